"""Our models among Keras's: functional and sequential ones, subclasses, and every way to pass inputs."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core import GPT2Tokenizer
from gpt2_core.errors import InputError
from gpt2_tf import TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel, TFGPT2Model
from models import padded_mask, random_ids, small_config
from tf.helpers import MODELS, close, equal, ids_of, keras, model_of, tf, tiny


def test_inputs_come_as_arguments_a_dict_a_list_arrays_or_plain_lists():
    model = model_of()
    ids, mask = ids_of(model, 2, 5).numpy(), padded_mask(2, 5)
    expected = model(tf.constant(ids), attention_mask=tf.constant(mask)).logits
    ways = [
        model(ids, None, mask),
        model(input_ids=ids, attention_mask=mask),
        model({"input_ids": ids, "attention_mask": mask}),
        model({"input_ids": ids}, attention_mask=mask),
        model(input_ids={"input_ids": ids, "attention_mask": mask}),
        model([ids, None, mask]),
        model((tf.constant(ids), None, tf.constant(mask))),
        model(ids.tolist(), attention_mask=mask.tolist()),
        model(ids.astype(np.int32), attention_mask=mask.astype(bool)),
        model(ids, attention_mask=mask.astype(np.float32)),
        model.call(ids, attention_mask=mask),
    ]
    for out in ways:
        assert equal(out.logits, expected)
    assert model([[1, 2, 3]]).logits.shape == (1, 3, 37)


def test_what_the_tokenizer_returns_is_an_input():
    model = tiny(vocab_size=50257, n_embd=2, n_head=1)
    tokenizer = GPT2Tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    for kind in ("tf", "np", None):
        enc = tokenizer(["Hello there", "A king"], padding=True, return_tensors=kind)
        assert equal(model(enc).logits, model(**enc).logits)
        assert model(enc).logits.shape == (2, 2, 50257)


@pytest.mark.parametrize("cls", MODELS)
def test_an_argument_that_does_not_exist_is_refused_with_the_one_that_was_meant(cls):
    model = tiny(cls)
    ids = ids_of(model, 1, 3)
    with pytest.raises(InputError, match="takes no 'atention_mask'; did you mean 'attention_mask'"):
        model({"input_ids": ids, "atention_mask": ids})
    with pytest.raises((TypeError, InputError), match="attention_masks"):
        model(ids, attention_masks=ids)


def test_an_argument_given_twice_is_refused():
    model = tiny()
    ids = ids_of(model, 1, 3)
    with pytest.raises(InputError, match="attention_mask was given twice"):
        model({"input_ids": ids, "attention_mask": ids}, attention_mask=ids)
    with pytest.raises(InputError, match=r"input_ids has rows of different lengths.*padding=True"):
        model([[1, 2], [3]])


def test_a_functional_model_may_name_any_argument_and_use_any_output():
    body = tiny(TFGPT2Model)
    ids = ids_of(body, 3, 5).numpy()
    mask = padded_mask(3, 5)
    out = body(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    names = {"input_ids": ids, "attention_mask": mask}
    inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    for called in (body(inputs), body(inputs["input_ids"], attention_mask=inputs["attention_mask"])):
        model = keras.Model(inputs, called.last_hidden_state)
        close(model(names), out.last_hidden_state, 1e-6)
    asked = keras.models.clone_model(body)
    asked.set_weights(body.get_weights())
    whole = keras.Model(inputs, asked(inputs, output_hidden_states=True, output_attentions=True))
    again = whole(names)
    assert type(again) is type(out)
    assert again.keys() == out.keys()
    close(again.hidden_states[0], out.hidden_states[0], 1e-6)
    close(again.past[0][1], out.past[0][1], 1e-6)
    tuned = keras.Model(inputs, keras.layers.Dense(2)(called.last_hidden_state[:, -1]))
    tuned.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    table = body.wte.weight.numpy()
    tuned.fit(names, np.array([0, 1, 1]), verbose=0)
    assert not np.array_equal(body.wte.weight.numpy(), table)


def test_a_frozen_body_in_a_functional_model_stays_as_it_is():
    body = tiny(TFGPT2Model)
    body.trainable = False
    ids = keras.Input((None,), dtype="int32")
    model = keras.Model(ids, keras.layers.Dense(2)(body(ids).last_hidden_state[:, -1]))
    assert len(model.trainable_variables) == 2
    assert len(body.variables) == len(model.non_trainable_variables)


def test_sequential_and_subclassed_models_hold_ours():
    body = tiny(TFGPT2Model)
    ids = random_ids(body.config, 2, 5)
    first = keras.layers.Lambda(lambda out: out.last_hidden_state[:, 0])
    stack = keras.Sequential([keras.Input((None,), dtype="int32"), body, first, keras.layers.Dense(2)])
    assert stack(ids).shape == (2, 2)

    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = body
            self.top = keras.layers.Dense(2)

        def call(self, inputs, training=None):
            return self.top(self.body(inputs, training=training).last_hidden_state[:, 0])

    mine = Mine()
    assert mine({"input_ids": ids}).shape == (2, 2)
    assert len(mine.trainable_variables) == len(body.trainable_variables) + 2


class Scaled(TFGPT2LMHeadModel):
    """A user's own model on top of ours."""

    def call(self, input_ids=None, training=None, **others):
        out = super().call(input_ids, training=training, **others)
        out.logits = out.logits * 2
        return out


def test_a_subclass_may_change_what_comes_out_and_still_fits():
    model, plain = Scaled(small_config(), seed=0), TFGPT2LMHeadModel(small_config(), seed=0)
    ids = random_ids(model.config, 2, 5)
    assert equal(model(ids).logits, plain(ids).logits * 2)
    model.compile("sgd", run_eagerly=True)
    assert np.isfinite(model.fit({"input_ids": ids, "labels": ids}, verbose=0).history["loss"][0])


def test_the_summary_counts_each_parameter_once():
    model = tiny(TFGPT2DoubleHeadsModel)
    assert model.count_params() == model.num_parameters()
    lines = []
    model.summary(expand_nested=True, print_fn=lambda text, **_: lines.append(text))
    assert "unbuilt" not in "\n".join(lines)


def test_keras_masks_of_layers_before_are_no_surprise():
    model = tiny(TFGPT2Model)
    embedded = keras.layers.Embedding(37, 8, mask_zero=True)
    ids = keras.Input((None,), dtype="int32")
    functional = keras.Model(ids, model(inputs_embeds=embedded(ids)).last_hidden_state)
    assert functional(np.array([[1, 2, 0]])).shape == (1, 3, 8)
