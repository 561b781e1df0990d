"""What is TensorFlow's own about making and calling models. Bad input in general is in tests/parity/test_errors.py."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gpt2_core import GPT2Config
from gpt2_core.errors import ConfigError, InputError
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import count_parameters
from gpt2_tf import TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel, TFGPT2Model
from models import small_config
from tf.helpers import MODELS, close, equal, ids_of, keras, model_of, tf, tiny, values

IDS = tf.reshape(tf.range(10, dtype=tf.int64), (2, 5))


@pytest.mark.parametrize("cls", MODELS)
def test_parameters_are_those_of_the_table_and_start_from_its_values(cls):
    config = small_config(pruned_heads={1: [0]}, n_inner=5, num_labels=3)
    model = cls(config, seed=7)
    expected = initial_values(config, cls.head, 7)
    found = values(model)
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    assert [tuple(variable.shape) for variable in model.trainable_variables] == [v.shape for v in expected.values()]
    assert model.num_parameters() == count_parameters(config, cls.head)


def test_another_seed_gives_another_model_and_the_same_seed_the_same():
    one, same, other = (values(TFGPT2LMHeadModel(small_config(), seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


def test_making_and_running_a_model_leaves_the_random_state_alone():
    np.random.seed(0)  # noqa: NPY002 - the state that must stay
    tf.random.set_seed(0)
    before = np.random.get_state()[1].tolist(), tf.random.get_global_generator().state.numpy().tolist()  # noqa: NPY002
    model = TFGPT2DoubleHeadsModel(small_config())
    model(ids_of(model, 2, 5))
    state = random.getstate()
    model.generate(ids_of(model, 2, 5)[:, 0], do_sample=True, max_new_tokens=3)
    model(ids_of(model, 2, 5), training=True)
    assert random.getstate() == state
    assert (np.random.get_state()[1].tolist(), tf.random.get_global_generator().state.numpy().tolist()) == before  # noqa: NPY002


def test_a_model_needs_a_config_and_says_where_trained_weights_come_from():
    with pytest.raises(ConfigError, match=r"needs a GPT2Config, got str; .* TFGPT2LMHeadModel.from_pretrained"):
        TFGPT2LMHeadModel("gpt2")


def test_parameters_have_the_released_names():
    names = set(values(TFGPT2LMHeadModel(GPT2Config(n_embd=4, n_head=1, n_layer=1, vocab_size=9, n_positions=4))))
    block = {
        f"transformer.h.0.{layer}.{leaf}"
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for leaf in ("weight", "bias")
    }
    ends = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert names == block | ends
    with pytest.raises(AttributeError):
        model_of().get_parameter("transformer.h.0.attn.c_attn.kernel")


def test_a_policy_set_for_keras_is_that_of_new_models():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = TFGPT2LMHeadModel(small_config())
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.transformer.h[1].mlp.c_fc.dtype_policy.name == "mixed_bfloat16"
    assert model(IDS).logits.dtype == tf.bfloat16
    assert TFGPT2LMHeadModel(small_config()).dtype == "float32"


def test_outputs_unpack_index_and_name_alike():
    model = model_of()
    out = model(IDS, labels=IDS)
    loss, logits, *rest = out
    assert loss is out.loss is out["loss"] is out[0]
    assert logits is out.logits is out[1]
    assert rest == [out.past]
    assert out.past is out.past_key_values
    assert model(IDS)[0].shape == (2, 5, 37)
    assert "loss" not in model(IDS)


def test_the_bare_model_has_no_output_embeddings():
    assert model_of(TFGPT2Model).get_output_embeddings() is None
    assert model_of().get_output_embeddings() is not None


# -- refusing ----------------------------------------------------------------------------------------------------


def refused(match, model=None, **inputs):
    model = model or model_of()
    with pytest.raises(InputError, match=match):
        model(**inputs)


@pytest.mark.parametrize("kind", [tf.int64, tf.int32])
@pytest.mark.parametrize("training", [False, True])
def test_an_id_outside_the_vocabulary_is_named(kind, training):
    for wrong in (-1, 37, 10**6):
        ids = tf.constant([[1, 1], [1, wrong]], kind)
        refused(f"input_ids holds {wrong}, expected ids from 0 to 36", input_ids=ids, training=training)


@pytest.mark.parametrize("kind", [tf.float64, tf.bool, tf.uint8, tf.int16])
def test_ids_of_another_kind_of_number_are_refused(kind):
    refused(rf"input_ids has dtype {kind.name}, expected int64 or int32", input_ids=tf.cast(tf.ones((1, 3)), kind))


#: What shapes alone show, with the signature that shows it while a function is traced: None where it is not known.
SHAPES = {
    "too long": ({"input_ids": tf.ones((1, 17), tf.int64)}, (None, 17), "is 17 tokens long but this model has 16"),
    "rank": ({"input_ids": IDS[0]}, (None,), r"input_ids has shape \(.*,\), expected 2 axes"),
    "empty": ({"input_ids": IDS[:, :0]}, (None, 0), "the input is empty"),
    "mask": ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, (None, 5), r"attention_mask has shape .*, 4\)"),
    "labels": ({"input_ids": IDS, "labels": IDS[:, 1:]}, (None, 5), r"labels has shape .*, 4\), expected .*, 5\)"),
    "positions": ({"input_ids": IDS, "position_ids": IDS[:, 1:]}, (2, None), r"position_ids has shape \(2, 4\)|"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_what_a_static_shape_shows_is_refused_while_tracing_in_the_same_words(case):
    inputs, shape, match = SHAPES[case]
    model = tiny()
    refused(match, model, **inputs)
    names = list(inputs)
    others = [tf.TensorSpec(inputs[name].shape, inputs[name].dtype) for name in names[1:]]

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.int64), *others], autograph=False)
    def run(*tensors):
        return model(**dict(zip(names, tensors, strict=True))).logits

    if case == "positions":  # the length is not known, so nothing can be said
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(*inputs.values())
        return
    with pytest.raises(InputError, match=match):
        run(*inputs.values())


def test_what_shows_only_when_a_function_runs_stops_it_on_the_cpu():
    model = tiny()
    run = tf.function(lambda ids: model(ids, labels=ids).loss, autograph=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="37"):
        run(tf.constant([[1, 37]]))


def test_numbers_of_another_width_are_brought_to_the_models():
    model = model_of()
    embedded = tf.random.stateless_normal((2, 5, 8), (0, 1), dtype=tf.float32)
    out = model(inputs_embeds=embedded)
    assert out.logits.dtype == tf.float64
    close(out.logits, model(inputs_embeds=embedded.numpy()).logits)
    close(out.logits, model(inputs_embeds=tf.cast(embedded, tf.float64)).logits)


def test_positions_given_by_hand_may_run_over_more_tokens_than_the_table_has():
    model = model_of()
    ids = np.zeros((1, 20), np.int64)
    assert model(ids, position_ids=np.arange(20)[None] % 16).logits.shape == (1, 20, 37)


def test_a_refused_call_leaves_the_model_as_it_was():
    model = model_of()
    past = model(IDS).past
    before = model(IDS[:, :1], past).logits
    refused("input_ids holds 99", model, input_ids=tf.fill((2, 1), 99), past=past)
    assert equal(model(IDS[:, :1], past).logits, before)
