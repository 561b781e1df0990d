"""What is TensorFlow's own about `generate`: callbacks, kinds of input, passes. The text itself is in tests/parity."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2_core import GPT2Tokenizer
from gpt2_core.errors import GenerationError
from gpt2_tf import TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel
from models import padded_mask
from tf.helpers import MODELS, equal, ids_of, tf, tiny, values


def test_every_new_token_is_reported_once():
    model = tiny()
    ids, seen = ids_of(model, 3, 4), []
    out = model.generate(ids, max_new_tokens=5, on_token=seen.append, eos_token_id=())
    assert out.dtype == tf.int64
    assert equal(tf.stack(seen, axis=1), out[:, 4:])


def test_each_row_ends_at_its_own_end_of_text_and_goes_on_with_padding():
    model = tiny(n_positions=40)
    ids, ends = ids_of(model, 6, 4), [3, 8, 12]
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 3.0, "seed": 1}
    free = model.generate(ids, eos_token_id=(), **settings).numpy()[:, 4:].tolist()
    out = model.generate(ids, eos_token_id=ends, pad_token_id=36, **settings).numpy()[:, 4:].tolist()
    lengths = set()
    for row, whole in zip(out, free, strict=True):
        stop = next((at for at, token in enumerate(whole) if token in ends), len(whole))
        lengths.add(stop)
        assert row[: stop + 1] == whole[: stop + 1][: len(row)]
        assert all(token == 36 for token in row[stop + 1 :])
    assert len(lengths) > 2


def test_the_loop_stops_when_all_rows_have_ended():
    model = tiny(n_positions=40)
    ids = ids_of(model, 1, 4)
    first, calls = int(model.generate(ids, max_new_tokens=1)[0, -1]), []
    out = model.generate(ids, max_new_tokens=30, eos_token_id=first, on_token=calls.append)
    assert (out.shape, len(calls)) == ((1, 5), 1)


def test_the_prompt_is_run_once_and_then_a_token_at_a_time_and_common_padding_never(monkeypatch):
    model, shapes = tiny(), []
    real = model._next_logits
    monkeypatch.setattr(
        model, "_next_logits", lambda ids, *rest: (shapes.append(tuple(ids.shape)), real(ids, *rest))[1]
    )
    ids = ids_of(model, 2, 5)
    model.generate(ids, max_new_tokens=4, eos_token_id=(), num_return_sequences=3, do_sample=True)
    assert shapes == [(2, 5), (6, 1), (6, 1), (6, 1)]
    shapes.clear()
    long, mask = ids_of(model, 2, 14), np.zeros((2, 14))
    mask[:, :3] = 1
    out = model.generate(long, mask, max_new_tokens=12, eos_token_id=())
    assert shapes[0] == (2, 3)
    assert equal(out[:, 11:], model.generate(long[:, :3], max_new_tokens=12, eos_token_id=()))


def test_prompts_and_masks_of_any_kind_will_do():
    model = tiny()
    ids, mask = ids_of(model, 3, 5), padded_mask(3, 5)
    expected = model.generate(ids, mask, max_new_tokens=3)
    for kind in (tf.int64, tf.bool, tf.float32):
        assert equal(model.generate(ids, tf.cast(mask, kind), max_new_tokens=3), expected)
    for prompt in (tf.cast(ids, tf.int32), ids.numpy(), ids.numpy().tolist()):
        assert equal(model.generate(prompt, mask.tolist(), max_new_tokens=3), expected)
    enc = {"input_ids": ids, "attention_mask": tf.constant(mask)}
    assert equal(model.generate(**enc, max_new_tokens=3), expected)


def test_what_the_tokenizer_returns_is_a_prompt():
    tokenizer = GPT2Tokenizer()
    model = tiny(vocab_size=50257, n_embd=2, n_head=1)
    out = model.generate(**tokenizer("The king", return_tensors="tf"), max_new_tokens=2)
    assert tokenizer.decode(out[0].numpy().tolist()).startswith("The king")


def test_only_language_models_generate():
    for cls in MODELS:
        assert hasattr(cls, "generate") == (cls in (TFGPT2LMHeadModel, TFGPT2DoubleHeadsModel))


def test_dropout_is_off_and_new_weights_are_seen_at_once():
    model = tiny(resid_pdrop=0.9, attn_pdrop=0.9)
    ids = ids_of(model, 2, 4)
    first = model.generate(ids, max_new_tokens=8, eos_token_id=())
    model(ids, training=True)
    assert equal(model.generate(ids, max_new_tokens=8, eos_token_id=()), first)
    model.set_weights(tiny(seed=5).get_weights())
    other = model.generate(ids, max_new_tokens=8, eos_token_id=())
    assert equal(other, tiny(seed=5).generate(ids, max_new_tokens=8, eos_token_id=()))
    assert not equal(other, first)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_reported(poison):
    model = tiny(tie_word_embeddings=False)
    head = model.lm_head.weight.numpy()
    head[5] = poison
    model.lm_head.weight.assign(head)
    with pytest.raises(GenerationError, match=r"the logits of row 0 at new token 0 hold nan or .inf"):
        model.generate(ids_of(model, 2, 4), max_new_tokens=3)


def test_a_row_banned_to_nothing_is_named_unless_it_has_ended():
    model = tiny(vocab_size=4, eos_token_id=None, bos_token_id=None)
    with pytest.raises(GenerationError, match="every token of row 1 is banned at new token 0"):
        model.generate([[0, 0, 0, 0], [0, 1, 2, 3]], no_repeat_ngram_size=1, max_new_tokens=1)
    model = tiny(vocab_size=3, eos_token_id=None, bos_token_id=None)
    out = model.generate([[0, 1], [0, 0]], no_repeat_ngram_size=1, max_length=3, eos_token_id=2, pad_token_id=0)
    assert out[0].numpy().tolist() == [0, 1, 2]


def test_the_double_heads_model_generates_as_its_language_model():
    double, plain = tiny(TFGPT2DoubleHeadsModel), tiny(seed=4)
    for name in values(plain):
        plain.get_parameter(name).assign(double.get_parameter(name))
    ids = ids_of(plain, 2, 5)
    assert equal(double.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))


def test_generating_between_epochs_works_as_a_callback():
    from tf.helpers import batch_of, keras

    model, texts = tiny(), []
    write = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: texts.append(model.generate([[1, 2]], max_new_tokens=4).numpy())
    )
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    model.fit(batch_of(model, 4, 6), epochs=2, callbacks=[write], verbose=0)
    assert len(texts) == 2
