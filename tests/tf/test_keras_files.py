"""Keras's own files: .keras, .weights.h5, and what rests on them: cloning, copying, pickling."""

from __future__ import annotations

import copy
import pickle
import zipfile

import h5py
import numpy as np
import pytest

from gpt2_tf import Perplexity, TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel, TFGPT2Model
from tf.helpers import MODELS, batch_of, equal, filled, ids_of, keras, model_of, same_values, tf, tiny, values


@pytest.mark.parametrize("cls", MODELS)
def test_a_keras_file_brings_every_model_back_bit_by_bit(tmp_path, cls):
    model = model_of(cls, dtype="float32", pruned_heads={0: [1]}, name="mine")
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras", safe_mode=True)
    assert type(other) is cls
    assert (other.config, other.name) == (model.config, "mine")
    same_values(other, model)
    ids = ids_of(model, 2, 5)
    assert equal(other(ids)[0], model(ids)[0])


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_a_keras_file_keeps_number_formats(tmp_path, policy):
    model = tiny(dtype=policy)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert other.dtype_policy.name == other.transformer.h[0].attn.dtype_policy.name == policy
    same_values(other, model)
    assert other(ids_of(model, 1, 4)).logits.dtype == model.compute_dtype


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_into_a_model_made_anew_and_a_tied_head_is_stored_once(tmp_path, tied):
    model = model_of(dtype="float32", tie_word_embeddings=tied)
    model.save_weights(tmp_path / "model.weights.h5")
    other = TFGPT2LMHeadModel(model.config, seed=1)
    other.load_weights(tmp_path / "model.weights.h5")
    same_values(other, model)
    shapes = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda name, item: shapes.append(item.shape) if isinstance(item, h5py.Dataset) else None)
    assert shapes.count((37, 8)) == (1 if tied else 2)
    assert equal(other(ids_of(model, 2, 5)).logits, model(ids_of(model, 2, 5)).logits)


def test_weights_of_another_shape_are_refused(tmp_path):
    tiny().save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match=r"could not be loaded(.|\n)*Embedding name=wte"):
        tiny(vocab_size=38).load_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("change", ["prune", "resize", "replace"])
def test_a_model_of_changed_shape_comes_back_with_its_optimizer(tmp_path, change):
    model = tiny(n_head=4)
    if change == "prune":
        model.prune_heads({0: [0, 2]})
    elif change == "resize":
        model.resize_token_embeddings(41)
    else:
        model.set_input_embeddings(np.ones((40, 8), np.float32))
    batch = batch_of(model, 4, 6)
    model.compile(keras.optimizers.Adam(0.1), run_eagerly=True)
    model.fit(batch, verbose=0)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    same_values(other, model)
    for one, two in zip(model.optimizer.variables, other.optimizer.variables, strict=True):
        assert equal(one, two), one.path
    assert [v.shape for v in other.trainable_variables] == [v.shape for v in model.trainable_variables]


def test_training_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path):
    model = tiny()
    model.compile(
        keras.optimizers.AdamW(0.01, weight_decay=0.1), metrics=["accuracy", Perplexity()], run_eagerly=True
    )  # fmt: skip
    batch = batch_of(model, 4, 6)
    model.fit(batch, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert other.optimizer.iterations.numpy() == 2
    assert other.optimizer.weight_decay == 0.1
    assert other.run_eagerly
    one, two = (each.fit(batch, epochs=2, shuffle=False, verbose=0).history for each in (model, other))
    assert one == two
    assert set(two) == {"loss", "accuracy", "perplexity"}
    same_values(other, model)


COMPILED = {
    "a loss of one's own": {"loss": "mse", "metrics": ["mae"], "loss_weights": None},
    "metrics by output": {"metrics": {"mc_logits": ["accuracy"], "logits": [Perplexity(name="ppl")]}},
    "no metrics": {},
    "an optimizer by name": {"optimizer": "sgd", "steps_per_execution": 3},
}


@pytest.mark.parametrize("case", COMPILED)
def test_what_compile_was_given_comes_back(tmp_path, case, recwarn):
    model = tiny(TFGPT2Model if case.startswith("a loss") else TFGPT2DoubleHeadsModel)
    model.compile(**COMPILED[case])
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert other.get_compile_config() == model.get_compile_config()
    assert [metric.name for metric in other.metrics] == [metric.name for metric in model.metrics]
    assert type(other.optimizer) is type(model.optimizer)
    assert not [warning for warning in recwarn if "compile()" in str(warning.message)]
    plain = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert not plain.compiled


def test_an_adapted_model_in_a_functional_one_comes_back(tmp_path):
    body = tiny(TFGPT2Model)
    ids = keras.Input((None,), dtype="int32", name="input_ids")
    mask = keras.Input((None,), dtype="int32", name="attention_mask")
    hidden = body(ids, attention_mask=mask).last_hidden_state
    model = keras.Model([ids, mask], keras.layers.Dense(3)(hidden[:, -1]))
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    inputs = [ids_of(body, 2, 5).numpy(), np.ones((2, 5))]
    model.fit(inputs, np.zeros((2, 3)), verbose=0)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert equal(other(inputs), model(inputs))
    assert not equal(other(inputs), tf.zeros((2, 3)))


def test_a_keras_file_needs_no_code_to_run_and_holds_nothing_twice(tmp_path):
    model = tiny()
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert set(file.namelist()) == {"metadata.json", "config.json", "model.weights.h5"}
        assert b"__lambda__" not in file.read("config.json")


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "clone_model", "from_config"])
@pytest.mark.parametrize("cls", [TFGPT2LMHeadModel, TFGPT2DoubleHeadsModel])
def test_a_copied_model_is_whole_tied_and_its_own(cls, through):
    model = model_of(cls, name="mine")
    if through == "deepcopy":
        other = copy.deepcopy(model)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif through == "clone_model":
        other = filled(keras.models.clone_model(model))
    else:
        other = filled(cls.from_config(model.get_config()))
    assert (type(other), other.config, other.dtype, other.name) == (cls, model.config, "float64", "mine")
    same_values(other, model)
    assert other.lm_head.weight is other.transformer.wte.weight
    ids = ids_of(model, 2, 5)
    other.get_input_embeddings().weight.assign_add(tf.ones((37, 8), tf.float64))
    assert not equal(other(ids)[0], model(ids)[0])


def test_weights_as_a_list_go_from_one_model_into_another():
    model, other = tiny(), tiny(seed=5)
    other.set_weights(model.get_weights())
    same_values(other, model)
    assert values(other).keys() == values(model).keys()
