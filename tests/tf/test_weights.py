"""Loading and saving whole models. Between the frameworks: tests/parity/test_between.py."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from gpt2_core.checkpoints import open_checkpoint, save_checkpoint
from gpt2_core.errors import CheckpointError, CheckpointMismatchError, ConfigError, HubError, InputError, WriteError
from gpt2_core.initialization import initial_value
from gpt2_core.reference import ReferenceModel
from gpt2_tf import (
    TFGPT2DoubleHeadsModel,
    TFGPT2ForSequenceClassification,
    TFGPT2ForTokenClassification,
    TFGPT2LMHeadModel,
    TFGPT2Model,
)
from models import small_config
from tf.helpers import MODELS, close, equal, ids_of, keras, model_of, same_values, tf, tiny, values

DTYPES = ("float64", "float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "shard"), [("safetensors", None), ("safetensors", 500), ("bin", 500)])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, format, shard, dtype):
    model = model_of(dtype=dtype, tie_word_embeddings=shard is None)
    model.save_pretrained(tmp_path, format=format, max_shard_bytes=shard)
    assert len(list(tmp_path.glob("*.safetensors" if format == "safetensors" else "*.bin"))) > 1 or shard is None
    for asked in (dtype, "auto") if shard else (tf.as_dtype(dtype), keras.DTypePolicy(dtype)):
        other = TFGPT2LMHeadModel.from_pretrained(tmp_path, dtype=asked)
        same_values(other, model)
        assert other.dtype_policy.name == dtype
    assert other.config.extra["architectures"] == ["GPT2LMHeadModel"]
    assert other.config.extra["dtype"] == dtype


@pytest.mark.parametrize("cls", MODELS)
def test_every_model_comes_back(tmp_path, cls):
    model = model_of(cls, dtype="float32", pruned_heads={0: [1]})
    model.save_pretrained(tmp_path, format="bin")
    other = cls.from_pretrained(tmp_path)
    same_values(other, model)
    assert other.loaded.newly_initialised == ()
    ids = ids_of(model, 2, 5)
    assert equal(other(ids)[0], model(ids)[0])
    assert other.config.replace(extra={}) == model.config


@pytest.mark.parametrize("stored", DTYPES)
def test_numbers_are_converted_as_tensorflow_would(tmp_path, stored):
    model = tiny(dtype=stored)
    model.save_pretrained(tmp_path)
    for asked in (*DTYPES, None):
        other = values(TFGPT2LMHeadModel.from_pretrained(tmp_path, dtype=asked))
        for name, value in values(model).items():
            assert other[name].tobytes() == tf.cast(value, asked or "float32").numpy().tobytes()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_policy_keeps_the_files_numbers_wide(tmp_path, policy):
    model = tiny()
    model.save_pretrained(tmp_path)
    other = TFGPT2LMHeadModel.from_pretrained(tmp_path, dtype=policy)
    same_values(other, model)
    assert other(ids_of(model, 1, 3)).logits.dtype == policy.removeprefix("mixed_")
    other.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"


def test_the_policy_of_keras_is_that_of_a_loaded_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = TFGPT2LMHeadModel.from_pretrained(tmp_path)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.dtype_policy.name == model.transformer.wte.dtype_policy.name == "mixed_bfloat16"


def test_the_reference_reads_what_a_model_wrote(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path, format="bin")
    ids = ids_of(model, 2, 6)
    close(model(ids).logits, ReferenceModel.from_pretrained(tmp_path)(ids.numpy()).logits, 1e-10)


def test_a_file_may_be_given_instead_of_its_folder(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    same_values(TFGPT2LMHeadModel.from_pretrained(tmp_path / "model.safetensors"), model)


def test_auto_takes_the_dtype_of_the_file_for_a_fresh_head_too(tmp_path):
    tiny(dtype="float16").save_pretrained(tmp_path)
    model = TFGPT2ForTokenClassification.from_pretrained(tmp_path, dtype="auto")
    assert {variable.dtype for variable in model.trainable_variables} == {"float16"}
    assert model(ids_of(model, 1, 4)).logits.dtype == tf.float16


@pytest.mark.parametrize("wrong", ["flaot16", tf.int64, 3])
def test_an_unknown_dtype_is_refused_with_those_that_are_known(tmp_path, wrong):
    with pytest.raises(InputError, match=r"dtype is .*, expected one of float32, .*'auto'"):
        TFGPT2LMHeadModel.from_pretrained(tmp_path, dtype=wrong)
    if wrong == "flaot16":
        with pytest.raises(InputError, match="did you mean 'float16'"):
            TFGPT2LMHeadModel.from_pretrained(tmp_path, dtype=wrong)


def test_loading_to_a_device_puts_everything_there(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = TFGPT2LMHeadModel.from_pretrained(tmp_path, device="CPU:0")
    assert all("CPU:0" in variable.value.device for variable in model.variables)


def test_loading_and_training_leave_the_file_alone_and_say_nothing(tmp_path, capfd, recwarn):
    for format in ("safetensors", "bin"):
        folder = tmp_path / format
        tiny().save_pretrained(folder, format=format)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        loaded = TFGPT2LMHeadModel.from_pretrained(folder)
        for variable in loaded.trainable_variables:
            variable.assign_add(tf.ones(variable.shape))
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


# -- what goes with what -----------------------------------------------------------------------------------------


def test_a_missing_classification_head_starts_from_the_seed_and_is_reported(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = TFGPT2ForSequenceClassification.from_pretrained(tmp_path, seed=5)
    assert model.loaded.newly_initialised == ("score.weight",)
    row = next(row for row in model.parameter_table() if row.name == "score.weight")
    assert np.array_equal(model.score.weight.numpy(), initial_value(row, 5))


def test_a_head_that_the_model_does_not_have_is_ignored_and_reported(tmp_path):
    model = tiny(TFGPT2DoubleHeadsModel)
    model.save_pretrained(tmp_path)
    plain = TFGPT2LMHeadModel.from_pretrained(tmp_path)
    assert set(plain.loaded.ignored) == {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"}
    ids = ids_of(plain, 1, 5)
    close(plain(ids).logits, model(ids[:, None]).logits[:, 0], 1e-6)
    close(TFGPT2Model.from_pretrained(tmp_path)(ids)[0], plain.transformer(ids)[0], 1e-6)


def test_a_tied_head_that_differs_from_the_token_table_is_refused_and_one_that_is_missing_too(tmp_path):
    tiny(tie_word_embeddings=False).save_pretrained(tmp_path / "apart")
    config = small_config(n_layer=1, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"differs from .*set tie_word_embeddings=False"):
        TFGPT2LMHeadModel.from_pretrained(tmp_path / "apart", config=config)
    tiny().save_pretrained(tmp_path / "tied")
    with pytest.raises(CheckpointMismatchError, match=r"lm_head.weight.*\n.*set tie_word_embeddings=True"):
        TFGPT2LMHeadModel.from_pretrained(tmp_path / "tied", config=config.replace(tie_word_embeddings=False))


def test_everything_that_does_not_fit_is_reported_together(tmp_path):
    tensors = values(tiny(n_layer=2))
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.h.0.mlp.c_fc.bias"] = tensors["transformer.h.0.mlp.c_fc.bias"][:5]
    tensors["transformer.h.1.surprise"] = np.zeros(3, np.float32)
    small_config().save_pretrained(tmp_path)
    save_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointMismatchError) as caught:
        TFGPT2LMHeadModel.from_pretrained(tmp_path)
    assert caught.value.missing == ("transformer.ln_f.bias",)
    assert caught.value.unexpected == ("transformer.h.1.surprise",)
    assert caught.value.misshaped == (("transformer.h.0.mlp.c_fc.bias", (5,), (32,)),)


def test_a_config_may_be_given_in_the_place_of_the_file(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json does not exist.*config=GPT2Config"):
        TFGPT2LMHeadModel.from_pretrained(tmp_path)
    config = model.config.replace(activation_function="relu")
    assert TFGPT2LMHeadModel.from_pretrained(tmp_path, config=config).config == config


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("cls", [TFGPT2Model, TFGPT2LMHeadModel])
def test_files_as_the_hub_has_them_load(tmp_path, prefix, cls):
    wanted = tiny(cls)
    tensors = {prefix + name.removeprefix("transformer."): value for name, value in values(wanted).items()}
    tensors[f"{prefix}h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
    tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].copy()
    wanted.config.save_pretrained(tmp_path)
    save_checkpoint(tmp_path, tensors)
    loaded = cls.from_pretrained(tmp_path)
    same_values(loaded, wanted)
    assert len(loaded.loaded.ignored) == 2


def test_a_name_that_is_no_folder_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError):
        TFGPT2LMHeadModel.from_pretrained("nobody/no-such-model", cache_dir=tmp_path, local_files_only=True)


# -- files and memory --------------------------------------------------------------------------------------------


def test_saving_over_the_folder_it_was_loaded_from_keeps_the_live_model_right(tmp_path):
    tiny().save_pretrained(tmp_path)
    loaded = TFGPT2LMHeadModel.from_pretrained(tmp_path)
    ids = ids_of(loaded, 2, 5)
    for format in ("safetensors", "bin"):
        loaded.transformer.h[0].ln_1.weight.assign_add(tf.fill((8,), 0.5))
        expected = loaded(ids).logits
        loaded.save_pretrained(tmp_path, format=format)
        assert equal(loaded(ids).logits, expected)
        same_values(TFGPT2LMHeadModel.from_pretrained(tmp_path), loaded)
    assert not list(tmp_path.glob("*.safetensors"))


def test_two_models_of_one_file_do_not_share_numbers(tmp_path):
    tiny().save_pretrained(tmp_path)
    one, two = (TFGPT2LMHeadModel.from_pretrained(tmp_path) for _ in range(2))
    one.transformer.ln_f.weight.assign(tf.fill((8,), 9.0))
    assert not np.any(two.transformer.ln_f.weight.numpy() == 9)


def test_an_unknown_format_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"safetenors.*did you mean 'safetensors'"):
        tiny().save_pretrained(tmp_path / "new", format="safetenors")
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_half_way_leaves_the_old_model(tmp_path, monkeypatch):
    from gpt2_tf import weights

    tiny().save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = weights._to_file

    def failing(variable):
        tensor = real(variable)
        if tuple(variable.shape) == (8,):
            monkeypatch.setattr(tensor, "_load", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return tensor

    monkeypatch.setattr(weights, "_to_file", failing)
    with pytest.raises((WriteError, OSError)):
        tiny(seed=1).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_config_json_says_what_the_weights_are(tmp_path):
    model = tiny(TFGPT2DoubleHeadsModel, dtype="bfloat16", n_inner=5)
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["architectures"], data["dtype"], data["n_inner"]) == (["GPT2DoubleHeadsModel"], "bfloat16", 5)
    with open_checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == {row.name for row in model.parameter_table()}
