"""What is PyTorch's own about `generate`: modes, callbacks, devices, errors. The text itself is in tests/parity."""

from __future__ import annotations

import math

import pytest

from gpt2_core.errors import GenerationError, InputError
from gpt2_pt import GPT2DoubleHeadsModel, GPT2LMHeadModel
from models import padded_mask
from pt.helpers import MODELS, ids_of, model_of, torch


def test_training_mode_comes_back_and_dropout_is_off_meanwhile():
    model = model_of()
    ids = ids_of(model, 2, 4)
    expected = model.generate(ids, max_new_tokens=6)
    seen = []
    model.transformer.register_forward_hook(lambda module, *_: seen.append(module.training))
    model.train()
    assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    assert not any(seen)
    assert all(module.training for module in model.modules())


def test_each_part_gets_its_own_mode_back_also_after_an_error():
    model = model_of().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids_of(model, 1, 3), max_new_tokens=2, on_token=stop)
    assert [module.training for module in model.modules()] == modes
    model.generate(ids_of(model, 1, 3), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_the_result_has_no_gradient_and_the_kind_of_ids():
    model = model_of()
    out = model.generate(ids_of(model, 2, 4), max_new_tokens=3)
    assert out.dtype == torch.int64
    assert not out.requires_grad
    assert torch.is_grad_enabled()


def test_every_new_token_is_reported_once_and_may_be_kept_or_changed():
    model = model_of()
    ids = ids_of(model, 3, 4)
    seen = []
    out = model.generate(ids, max_new_tokens=5, on_token=seen.append, eos_token_id=())
    assert torch.equal(torch.stack(seen, dim=1), out[:, 4:])
    changed = model.generate(ids, max_new_tokens=5, on_token=lambda new: new.fill_(0), eos_token_id=())
    assert torch.equal(changed, out)


def test_each_row_ends_at_its_own_end_of_text_and_goes_on_with_padding():
    model = model_of(n_positions=40)
    ids = ids_of(model, 6, 4)
    free = model.generate(ids, max_new_tokens=20, eos_token_id=(), do_sample=True, temperature=3.0, seed=1)
    ends = [3, 8, 12]
    out = model.generate(
        ids, max_new_tokens=20, eos_token_id=ends, pad_token_id=36, do_sample=True, temperature=3.0, seed=1
    )
    lengths = set()
    for row, whole in zip(out[:, 4:].tolist(), free[:, 4:].tolist(), strict=True):
        stop = next((at for at, token in enumerate(whole) if token in ends), len(whole))
        lengths.add(stop)
        assert row[: stop + 1] == whole[: stop + 1][: len(row)]
        assert all(token == 36 for token in row[stop + 1 :])
    assert len(lengths) > 2


def test_the_loop_stops_when_all_rows_have_ended():
    model = model_of(n_positions=40)
    ids = ids_of(model, 1, 4)
    first = int(model.generate(ids, max_new_tokens=1)[0, -1])
    calls = []
    out = model.generate(ids, max_new_tokens=30, eos_token_id=first, on_token=calls.append)
    assert out.shape == (1, 5)
    assert len(calls) == 1


def test_the_prompt_is_run_once_and_then_a_token_at_a_time():
    model = model_of()
    shapes = []
    model.transformer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model.generate(ids_of(model, 2, 5), max_new_tokens=4, eos_token_id=(), num_return_sequences=3, do_sample=True)
    assert shapes == [(2, 5), (6, 1), (6, 1), (6, 1)]


def test_padding_common_to_all_rows_is_not_computed():
    model = model_of()
    shapes = []
    model.transformer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    ids, mask = ids_of(model, 2, 14), torch.zeros(2, 14)
    mask[:, :3] = 1
    out = model.generate(ids, mask, max_new_tokens=12, eos_token_id=())
    assert shapes[0] == (2, 3)
    assert torch.equal(out[:, 11:], model.generate(ids[:, :3], max_new_tokens=12, eos_token_id=()))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float32])
def test_a_mask_of_any_kind_will_do(kind):
    model = model_of()
    ids, mask = ids_of(model, 3, 5), torch.from_numpy(padded_mask(3, 5))
    assert torch.equal(
        model.generate(ids, mask.to(kind), max_new_tokens=3), model.generate(ids, mask, max_new_tokens=3)
    )


def test_only_language_models_generate():
    for cls in MODELS:
        assert hasattr(cls, "generate") == (cls in (GPT2LMHeadModel, GPT2DoubleHeadsModel))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temprature": 2.0}, "generation has no setting 'temprature'; did you mean 'temperature'"),
        ({"temperature": 0.5}, "temperature=0.5 has no effect without sampling; pass do_sample=True"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected None or a whole number of at least 1"),
        ({"max_new_tokens": 3, "max_length": 8}, "got both max_new_tokens=3 and max_length=8"),
        ({"max_length": 5}, "max_length=5 leaves no room after a prompt of 5 tokens"),
        ({"max_new_tokens": 12}, "may get 17 tokens long, prompt of 5 included, .* at most max_new_tokens=11"),
        ({"do_sample": True, "top_p": 0}, "top_p is 0, expected a number above 0 and up to 1"),
        ({"do_sample": True, "seed": -1}, "seed is -1, expected"),
        ({"eos_token_id": 37}, "eos_token_id names token 37, expected ids from 0 to 36"),
        ({"bad_words_ids": [[1, 99]]}, "bad_words_ids names token 99"),
        ({"suppress_tokens": range(37)}, "every token of row 0 is banned at new token 0, .* relax bad_words_ids"),
        ({"num_beam": 4}, "generation has no setting 'num_beam'; did you mean 'num_beams'"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    model = model_of()
    with pytest.raises(GenerationError, match=match):
        model.generate(ids_of(model, 1, 5), **({} if "max_length" in settings else {"max_new_tokens": 4}) | settings)


@pytest.mark.parametrize(
    ("ids", "mask", "match"),
    [
        ([[1, 2], [3]], [[1, 1], [1, 0]], "input_ids has rows of different lengths and attention_mask marks"),
        ([[]], None, "the input is empty"),
        (torch.zeros(0, 4).long(), None, "the input is empty"),
        ([[37]], None, "input_ids holds 37, expected ids from 0 to 36"),
        ([[-1]], None, "input_ids holds -1"),
        ([[1.0]], None, "input_ids has dtype float64, expected whole numbers"),
        (torch.ones(4).long(), None, r"input_ids has shape \(4,\), expected 2 axes"),
        (torch.ones(2, 4).long(), torch.ones(2, 3), r"attention_mask has shape \(2, 3\), expected \(2, 4\)"),
        (torch.ones(2, 4).long(), torch.zeros(2, 4), "row 0 of attention_mask marks no real token"),
        (torch.ones(1, 17).long(), None, "the input is 17 tokens long but this model has 16 positions"),
    ],
)
def test_impossible_prompts_are_refused(ids, mask, match):
    with pytest.raises(InputError, match=match):
        model_of().generate(ids, mask, max_new_tokens=1)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_reported(poison):
    model = model_of(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[5] = poison
    with pytest.raises(GenerationError, match=r"the logits of row 0 at new token 0 hold nan or .inf"):
        model.generate(ids_of(model, 2, 4), max_new_tokens=3)


def test_a_row_banned_to_nothing_is_named():
    model = model_of(vocab_size=4, eos_token_id=None, bos_token_id=None, n_positions=16)
    ids = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]])
    with pytest.raises(GenerationError, match="every token of row 1 is banned at new token 0"):
        model.generate(ids, no_repeat_ngram_size=1, max_new_tokens=1)


def test_a_finished_row_may_be_banned_to_nothing():
    model = model_of(vocab_size=3, eos_token_id=None, bos_token_id=None, n_positions=16)
    ids = torch.tensor([[0, 1], [0, 0]])
    out = model.generate(ids, no_repeat_ngram_size=1, max_length=3, eos_token_id=2, pad_token_id=0)
    assert out[0].tolist() == [0, 1, 2]


def test_the_double_heads_model_generates_as_its_language_model():
    double = model_of(GPT2DoubleHeadsModel)
    plain = model_of()
    plain.load_state_dict({n: value for n, value in double.state_dict().items() if "multiple" not in n})
    ids = ids_of(plain, 2, 5)
    assert torch.equal(double.generate(ids, max_new_tokens=5), plain.generate(ids, max_new_tokens=5))
