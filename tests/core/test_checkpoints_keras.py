"""gpt2_core.checkpoints.keras: what Keras writes of gpt2_tf's models, read and written without it, and nothing else.

tests/peers/keras holds what Keras 3.15 wrote and computed. The tests at the end ask Keras again where TensorFlow is
installed.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import About, Checkpoint, Tensor, detect, keras, keras_files, open_checkpoint, zips
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.checkpoints.tensors import MappedFile, converted
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import (
    CannotHoldError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    ConfigError,
    Gpt2Error,
    UnsafeCheckpointError,
)
from gpt2_core.parameters import Head
from gpt2_core.pretrained import open_pretrained, save_pretrained
from gpt2_core.reference import ReferenceModel
from models import HEADS, random_config, random_ids, random_parameters, small_config
from tolerances import TRANSFORMERS, error

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=150, deadline=None, derandomize=True, database=None)
PEERS = Path(__file__).parent.parent / "peers" / "keras"
CASES = sorted(path.stem for path in PEERS.glob("*.zip"))
SUFFIX = {"archive": ".keras", "weights": ".weights.h5"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def unpack(case: str, folder: Path) -> Path:
    """The folder with what Keras saved, and its answers."""
    with zipfile.ZipFile(PEERS / f"{case}.zip") as archive:
        archive.extractall(folder)
    return folder


def tensors_of(config: GPT2Config, head: str, dtype: str = "float32", seed: int = 0) -> dict[str, Tensor]:
    values = random_parameters(config, head, seed)
    return {name: converted(Tensor.of(value.astype(np.float32)), dtype) for name, value in values.items()}


def written(path: Path, config: GPT2Config | None = None, head: str = "lm", dtype: str = "float32") -> Path:
    config = config or small_config()
    (file,) = keras.write(path, tensors_of(config, head, dtype), about=About(config, Head(head)))
    return file


def assert_same(opened: Checkpoint, expected: dict[str, Tensor]) -> None:
    assert sorted(opened) == sorted(expected)
    for name, tensor in expected.items():
        assert (opened[name].dtype, opened[name].shape) == (tensor.dtype, tensor.shape), name
        assert opened[name].raw().tobytes() == tensor.raw().tobytes(), name


def arrays_in(file: Any) -> dict[str, Any]:
    """Every array of a file of h5py's, by its path."""
    found: dict[str, Any] = {}
    file.visititems(lambda name, each: found.update({name: each}) if hasattr(each, "shape") else None)
    return found


# What Keras wrote and computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_keras_wrote_is_read_bit_for_bit_and_computes_what_it_computed(tmp_path: Path, case: str) -> None:
    folder = unpack(case, tmp_path)
    head = case.partition("-")[0]
    with np.load(folder / "answers.npz") as answers:
        values = {name.removeprefix("value."): answers[name] for name in answers if name.startswith("value.")}
        theirs = {name.removeprefix("out."): answers[name] for name in answers if name.startswith("out.")}
        ids = answers["in.input_ids"]
    with open_source(folder) as source:
        assert (source.checkpoint.format, source.head.value) == ("keras", head) and source.matching.fits
        assert source.checkpoint.names_in_file.keys() == set(source.checkpoint)
        assert sorted(source.tensors()) == sorted(values)
        for name, tensor in source.tensors().items():
            assert np.array_equal(tensor.array().astype(values[name].dtype), values[name]), name
        dtypes = {tensor.dtype for tensor in source.tensors().values()}
    assert dtypes == {{"lm-odd": "bfloat16", "lm-untied": "float64", "sequence": "float16"}.get(case, "float32")}
    out = ReferenceModel.from_pretrained(folder, head)(ids)
    if dtypes == {"float32"} and "trained" not in case:  # the others computed in fewer bits
        for name, value in theirs.items():
            assert error(out[name], value) <= TRANSFORMERS, name


def test_every_head_every_kind_of_file_and_every_number_format_is_among_them() -> None:
    assert {case.partition("-")[0] for case in CASES} == set(HEADS)
    assert {"lm-odd", "lm-untied", "double-trained", "qa-sharded", "token"} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_names_in_the_file_are_the_paths_that_h5py_finds(tmp_path: Path, case: str) -> None:
    h5py = pytest.importorskip("h5py")
    folder = unpack(case, tmp_path)
    theirs: dict[str, Any] = {}
    opened = open_checkpoint(folder)
    for path in folder.iterdir():
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                theirs |= arrays_in(h5py.File(io.BytesIO(archive.read("model.weights.h5"))))
        elif path.suffix == ".h5":
            theirs |= arrays_in(h5py.File(path))
    assert set(theirs) == {*opened.names_in_file.values(), *opened.ignored}
    for name, there in opened.names_in_file.items():
        assert opened[name].raw().tobytes() == theirs[there][()].tobytes(), name


def test_what_training_left_is_listed_by_name_and_a_policy_is_said_to_be_lost(tmp_path: Path) -> None:
    folder = unpack("double-trained", tmp_path)
    opened = open_checkpoint(folder)
    assert len(opened.ignored) == 128 and set(opened.ignored.values()) == {"the state of the optimizer"}
    assert all(name.startswith("optimizer/") for name in opened.ignored)
    assert "the policy mixed_float16" in opened.notes[0] and "compiled with AdamW" in opened.notes[1]
    with open_source(folder) as source:
        plan = plan_conversion(source, tmp_path / "b", "safetensors")
        assert set(opened.notes) <= set(plan.notes)
        assert set(carry_out(plan).to_dict()["source"]["ignored"]) == set(opened.ignored)


@pytest.mark.parametrize("case", ["lm-odd", "token"])
def test_what_is_written_again_is_described_and_laid_out_as_keras_does_it(tmp_path: Path, case: str) -> None:
    h5py = pytest.importorskip("h5py")
    folder = unpack(case, tmp_path / "theirs")
    with open_source(folder) as source:
        keras.write(tmp_path / "ours.keras", source.tensors(), about=About(source.config, source.head))
    with zipfile.ZipFile(tmp_path / "ours.keras") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["metadata.json", "config.json", "model.weights.h5"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("metadata.json")) == {"keras_version": keras_files.KERAS}
        ours, weights = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    if case == "token":
        said, theirs = json.loads((folder / "config.json").read_text()), (folder / "model.weights.h5").read_bytes()
    else:
        with zipfile.ZipFile(folder / "my.keras") as archive:
            said, theirs = json.loads(archive.read("config.json")), archive.read("model.weights.h5")
    said["config"]["name"] = said["config"]["name"].removesuffix("_1")  # what Keras calls a second model of a class
    assert ours == said | {"compile_config": {}}
    mine, other = (arrays_in(h5py.File(io.BytesIO(data))) for data in (weights, theirs))
    assert {name: each.shape for name, each in mine.items()} == {name: each.shape for name, each in other.items()}


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "archive", "weights"])
@pytest.mark.parametrize("head", HEADS)
def test_every_model_survives_bit_for_bit_with_its_configuration(tmp_path: Path, head: str, kind: str) -> None:
    """Tied and untied, pruned, odd n_inner, every activation: what random_config varies."""
    for seed in range(6):
        config = random_config(seed).replace(extra={"kept": ["as", "it", "is"]})
        expected = tensors_of(config, head, ("float32", "bfloat16", "float16", "float64")[seed % 4], seed)
        place = tmp_path / f"{seed}{SUFFIX.get(kind, '')}"
        (file,) = keras.write(place, expected, about=About(config, Head(head)))
        assert file == (place / "model.keras" if kind == "folder" else place)
        with keras.read(place) as opened:
            assert_same(opened, expected)
            assert config_of(opened, beside=False).config == config
            assert opened.names_in_file.keys() == set(opened) and not opened.ignored
            assert kind == "weights" or opened.head == head
        with open_source(place) as source:
            assert source.head.value == head


def test_twelve_layers_are_not_mixed_up(tmp_path: Path) -> None:
    config = small_config(n_layer=12)
    with keras.read(written(tmp_path / "a.keras", config)) as opened:
        assert_same(opened, tensors_of(config, "lm"))
        assert opened.names_in_file["transformer.h.11.ln_1.bias"] == "layers/tfgpt2_model/h/block_11/ln_1/vars/1"
        assert opened.names_in_file["transformer.h.0.ln_1.bias"] == "layers/tfgpt2_model/h/block/ln_1/vars/1"


def test_a_configuration_too_long_for_one_attribute_is_kept_in_several(tmp_path: Path) -> None:
    config = small_config(extra={"labels": [f"number {n}" for n in range(20_000)], "name": "größer"})
    path = written(tmp_path / "a.weights.h5", config)
    assert config_of(keras.read(path), beside=False).config == config
    h5py = pytest.importorskip("h5py")
    with h5py.File(path) as file:
        assert sorted(file.attrs) == [f"{keras.OWN}{n}" for n in range(len(file.attrs))] and len(file.attrs) > 3
        assert arrays_in(file).keys() == set(keras.read(path).names_in_file.values())


@pytest.mark.parametrize("kind", SUFFIX)
def test_the_same_model_gives_the_same_bytes_and_arrays_stand_where_they_can_be_used(tmp_path: Path, kind: str) -> None:
    one, two = (written(tmp_path / f"{name}{SUFFIX[kind]}", head="double") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    with keras.read(one) as opened:
        assert all(not opened.raw(name).flags.owndata for name in opened), "views of the file"
        assert all(opened.raw(name).ctypes.data % 64 == 0 for name in opened)
        assert not opened.raw("transformer.ln_f.bias").flags.writeable
    assert keras.read(one, writable=True).raw("transformer.ln_f.bias").flags.writeable


def test_a_folder_of_keras_and_a_folder_of_the_hub_say_their_configuration_beside_the_weights(tmp_path: Path) -> None:
    folder = unpack("lm", tmp_path / "hub")
    assert open_pretrained(folder, "lm").config.n_inner == 7, "config.json is the hub's"
    folder = unpack("token", tmp_path / "keras")
    opened = open_pretrained(folder, "token")
    assert opened.config.n_inner == 7 and opened.checkpoint.head == "token", "config.json is Keras's"


def test_a_configuration_inside_of_weights_is_checked_too(tmp_path: Path) -> None:
    attributes = {(): keras_files.long_text(keras.OWN, json.dumps({"n_layer": 1 << 30}))}
    with pytest.raises(CheckpointFormatError, match="claims 1073741824 blocks, and holds 28 tensors"):
        keras.read(weights_with(tmp_path / "a.weights.h5", {}, attributes))
    for text, message in (("{", "the attribute gpt2_duet.config of .* is not JSON"), ("[]", "expected a JSON object")):
        with pytest.raises(CheckpointFormatError, match=message):
            keras.read(weights_with(tmp_path / "a.weights.h5", {}, {(): keras_files.long_text(keras.OWN, text)}))


def test_weights_alone_have_no_configuration_and_none_is_made_up(tmp_path: Path) -> None:
    folder = unpack("lm", tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no configuration inside"):
        open_pretrained(folder / "model.weights.h5", "lm")
    with pytest.raises(ConfigError, match=r"2 layers 6 wide, but not the number of heads"):
        open_source(folder)


def test_a_model_is_saved_and_opened_by_name_of_the_format(tmp_path: Path) -> None:
    config = small_config()
    save_pretrained(tmp_path, config, "lm", tensors_of(config, "lm"), architecture="GPT2LMHeadModel", format="keras")
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]
    assert open_pretrained(tmp_path, "lm").config == config
    assert open_pretrained(tmp_path, "lm").matching.fits


@pytest.mark.parametrize("head", HEADS)
def test_gpt2_pt_loads_and_saves_it(tmp_path: Path, head: str) -> None:
    torch = pytest.importorskip("torch")
    import gpt2_pt

    names = ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"]
    names += [f"GPT2For{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    cls = getattr(gpt2_pt, names[HEADS.index(head)])
    model = cls(random_config(4), seed=4)
    model.save_pretrained(tmp_path, format="keras")
    state = cls.from_pretrained(tmp_path / "model.keras").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_is_no_whole_model_is_not_written(tmp_path: Path) -> None:
    config, tensors = small_config(), tensors_of(small_config(), "lm")
    about = About(config)
    with pytest.raises(CheckpointMismatchError, match=r"missing \(1\):\n    ln_f\.bias") as error:
        keras.write(tmp_path / "a", {name: each for name, each in tensors.items() if "ln_f.bias" not in name},
                    about=about)  # fmt: skip
    assert error.value.missing == ("ln_f.bias",)
    odd = {
        **tensors,
        "lm_head.weight": tensors["transformer.wte.weight"],
        "transformer.wpe.weight": np.ones((2, 2), "f4"),
    }
    with pytest.raises(CheckpointMismatchError, match=r"a tied head is none") as error:
        keras.write(tmp_path / "a", odd, about=about)
    assert (error.value.unexpected, [row[0] for row in error.value.misshaped]) == (("lm_head.weight",), ["wpe.weight"])
    with pytest.raises(CheckpointMismatchError):
        keras.write(tmp_path / "a", {**tensors, "wte.weight": tensors["transformer.wte.weight"]}, about=about)
    with pytest.raises(CannotHoldError, match="keras holds one dtype, and there are float16, float32: give --dtype"):
        keras.write(tmp_path / "a", {**tensors, "transformer.ln_f.bias": np.ones(8, np.float16)}, about=about)
    with pytest.raises(CheckpointError, match="needs about"):
        keras.write(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match="metadata nor shards"):
        keras.write(tmp_path / "a", tensors, about=about, metadata={"a": "b"})
    with pytest.raises(CheckpointError, match=r"expected a name with \.weights\.h5"):
        keras.write(tmp_path / "a.h5", tensors, about=about)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_left_as_it_was_when_numbers_cannot_be_had(tmp_path: Path) -> None:
    written(tmp_path)
    before = (tmp_path / "model.keras").read_bytes()
    tensors = tensors_of(small_config(), "lm")

    def broken() -> np.ndarray:
        raise CheckpointError("gone")

    tensors["transformer.ln_f.bias"] = Tensor("float32", (8,), broken)
    for place in (tmp_path, tmp_path / "model.keras", tmp_path / "x.weights.h5"):
        with pytest.raises(CheckpointError, match="gone"):
            keras.write(place, tensors, about=About(small_config()))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model.keras": before}


def archived(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def contents_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def described(**changes: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """An archive whose config.json says something else; None leaves a key out."""

    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        said = json.loads(files["config.json"]) | changes
        return files | {
            "config.json": json.dumps({key: each for key, each in said.items() if each is not None}).encode()
        }

    return change


def config_with(**changes: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """An archive whose model has another configuration."""

    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        said = json.loads(files["config.json"])
        said["config"]["config"].update(changes)
        return files | {"config.json": json.dumps(said).encode()}

    return change


def without(name: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: {each: content for each, content in files.items() if each != name}


def put(name: str, content: bytes) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return lambda files: files | {name: content}


FUNCTIONAL = {"module": "keras.src.models.functional", "class_name": "Functional", "registered_name": "Functional"}
REFUSED: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "no description": (without("config.json"), r"has no config\.json"),
    "no variables": (without("model.weights.h5"), "has no variables"),
    "variables in numpy's format": (
        lambda files: without("model.weights.h5")(files) | {"model.weights.npz": b""},
        "variables in numpy's format",
    ),
    "no JSON": (put("config.json", b"{"), r"config\.json is not JSON"),
    "bytes that are no text": (put("config.json", b'{"\xff": 1}'), r"config\.json is not JSON"),
    "a list": (put("config.json", b"[]"), "expected a JSON object"),
    "a key twice": (put("config.json", b'{"a": 1, "a": 2}'), "stands there more than once"),
    "nested without end": (put("config.json", b"[" * 100_000), r"config\.json is not JSON"),
    "a huge description": (put("config.json", b" " * (1 << 24) + b"{}"), r"has a huge config\.json"),
    "no object": (put("config.json", b"{}"), "describes no object of Keras"),
    "a model of which ours may be a part": (
        described(**FUNCTIONAL),
        "describes 'Functional'; .*save_weights|save the part",
    ),
    "a class of the user's": (described(registered_name="Custom>MyGPT2"), r"'Custom>MyGPT2'; expected one of gpt2_tf>"),
    "a function": (described(registered_name=None, class_name="function"), "describes 'function'"),
    "a lambda": (described(registered_name=None, class_name="__lambda__"), "describes '__lambda__'"),
    "a model of KerasHub": (described(registered_name="keras_hub>GPT2CausalLM"), "save it with save_to_preset"),
    "a model of KerasNLP": (described(registered_name="keras_nlp>GPT2CausalLM"), "save it with save_to_preset"),
    "no configuration": (described(config={"name": "x"}), "without its configuration"),
    "a configuration that is none": (described(config={"config": [1]}), "without its configuration"),
    "more blocks than tensors": (config_with(n_layer=1 << 30), "claims 1073741824 blocks, and holds 28 tensors"),
    "more blocks under another name": (config_with(num_hidden_layers=1 << 30), "claims 1073741824 blocks"),
    "variables that are no HDF5": (put("model.weights.h5", b"\0" * 200), "expected the signature of HDF5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_archives_of_anything_else_are_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    path = archived(tmp_path / "b.keras", change(contents_of(written(tmp_path / "a.keras"))))
    with pytest.raises(CheckpointFormatError, match=message) as error:
        keras.read(path)
    assert str(path) in str(error.value) and not isinstance(error.value, UnsafeCheckpointError)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_unsafe_before_anything_is_unpacked(tmp_path: Path, compression: int) -> None:
    bomb = archived(
        tmp_path / "b.keras", contents_of(written(tmp_path / "a.keras")) | {"bomb": bytes(1 << 24)}, compression
    )
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(UnsafeCheckpointError, match="is compressed"):
        keras.read(bomb)


@pytest.mark.parametrize("name", ["../model.weights.h5", "/etc/passwd", "assets/../../x", "C:\\x"])
def test_names_that_leave_the_archive_are_unsafe(tmp_path: Path, name: str) -> None:
    files = contents_of(written(tmp_path / "a.keras"))
    with pytest.raises(UnsafeCheckpointError, match="a name outside of it"):
        keras.read(archived(tmp_path / "b.keras", files | {name: b"x"}))


def test_a_description_that_was_changed_without_its_checksum_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.keras")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"n_positions": 16', b'"n_positions": 61'))
    with pytest.raises(CheckpointFormatError, match=r"checksum of its config\.json is wrong"):
        keras.read(path)


def test_what_else_an_archive_holds_is_listed(tmp_path: Path) -> None:
    files = contents_of(written(tmp_path / "a.keras")) | {"assets/vocabulary.json": b"{}"}
    opened = keras.read(archived(tmp_path / "b.keras", files))
    assert opened.ignored == {"assets/vocabulary.json": "no part of a model of gpt2_tf"} and len(opened) == 28


def test_links_to_other_files_are_unsafe(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        file.create_dataset("layers/tfgpt2_model/layers/embedding/vars/0", data=np.ones(3, "f4"))
        file["layers/tfgpt2_model/h"] = h5py.ExternalLink("/etc/passwd", "/")
    with pytest.raises(UnsafeCheckpointError, match="link to another file"):
        keras.read(tmp_path / "a.weights.h5")
    files = contents_of(written(tmp_path / "a.keras"))
    files["model.weights.h5"] = (tmp_path / "a.weights.h5").read_bytes()
    with pytest.raises(UnsafeCheckpointError, match="link to another file"):
        keras.read(archived(tmp_path / "b.keras", files))


def test_the_description_of_a_folder_may_not_stand_elsewhere(tmp_path: Path) -> None:
    folder = unpack("token", tmp_path / "a")
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        keras.read(folder)


def test_a_folder_of_another_class_is_refused(tmp_path: Path) -> None:
    folder = unpack("token", tmp_path)
    said = json.loads((folder / "config.json").read_text()) | {"registered_name": "Custom>Mine"}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointFormatError, match=r"config\.json describes 'Custom>Mine'"):
        keras.read(folder)


# Names ----------------------------------------------------------------------------------------------------------------


def weights_with(path: Path, arrays: dict[str, Any], attributes: dict[tuple[str, ...], Any] | None = None) -> Path:
    config = small_config()
    stored, named = keras._stored(tensors_of(config, "lm"), About(config))
    more = {name: Tensor.of(np.asarray(value, np.float32)) for name, value in arrays.items()}
    keras_files.write_weights(path, stored | more, named | (attributes or {}))
    return path


def test_what_the_table_does_not_know_is_unexpected_under_its_path(tmp_path: Path) -> None:
    arrays = {
        "layers/dense/vars/0": np.ones(3),
        "layers/tfgpt2_model/h/block_0/ln_1/vars/0": np.ones(8),
        "layers/tfgpt2_model/h/block_01/ln_1/vars/0": np.ones(8),
        "layers/tfgpt2_model/h/block/ln_1/vars/2": np.ones(8),
        "layers/linear/vars/0": np.ones(8),
        "layers/linear[score]/vars/0": np.ones((3, 8)),
        "wte.weight": np.ones(2),
        "transformer.wte.weight": np.ones(2),
        "optimizers/vars/0": np.ones(2),
    }
    opened = keras.read(weights_with(tmp_path / "a.weights.h5", arrays))
    assert {name for name in opened if name not in opened.names_in_file} == {f"/{name}" for name in arrays}
    small_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError) as error:
        open_pretrained(tmp_path, "lm")
    assert set(error.value.unexpected) == {f"/{name}" for name in arrays} and not error.value.missing


@pytest.mark.parametrize("called", ["lm_head", "score", "qa_outputs", "other", ""])
def test_a_linear_head_is_the_one_that_it_is_called(tmp_path: Path, called: str) -> None:
    name = {("layers", "linear", "vars"): {"name": called}}
    opened = keras.read(weights_with(tmp_path / "a.weights.h5", {"layers/linear/vars/0": np.ones((37, 8))}, name))
    known = called in ("lm_head", "score", "qa_outputs")
    assert (f"{called}.weight" in opened) is known
    assert (opened.names_in_file.get(f"{called}.weight") == "layers/linear/vars/0") is known
    assert known or "/layers/linear/vars/0" in opened


def test_the_class_tells_the_head_whatever_its_layer_is_called(tmp_path: Path) -> None:
    files = contents_of(written(tmp_path / "a.keras", small_config(num_labels=37), "sequence"))
    path = archived(tmp_path / "b.keras", described(registered_name="gpt2_tf>TFGPT2LMHeadModel")(files))
    opened = keras.read(path)
    assert opened.head == "lm" and "lm_head.weight" in opened and "score.weight" not in opened


def test_files_are_told_by_what_is_in_them(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for case in CASES:
        folder = unpack(case, tmp_path / case)
        name, file = detect(folder)
        assert name == "keras" and keras.find(file) == file
    odd = (tmp_path / "lm" / "model.weights.h5").rename(tmp_path / "lm" / "epoch-3.weights.h5")
    assert detect(tmp_path / "lm") == ("keras", odd), "an only one may have any name"
    (tmp_path / "lm" / "epoch-4.weights.h5").write_bytes(odd.read_bytes())
    assert keras.find(tmp_path / "lm") is None
    plain = odd.rename(tmp_path / "whatever")
    assert detect(plain) == ("keras", plain)
    assert detect((tmp_path / "lm-odd" / "my.keras").rename(tmp_path / "zip")) == ("keras", tmp_path / "zip")
    with h5py.File(tmp_path / "other.weights.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=np.ones(3))
    (tmp_path / "other.weights.json").write_text('{"weight_map": {"/layers/dense/vars": "a.weights.h5"}}')
    archived(tmp_path / "a.zip", {"x": b""})
    assert not any(
        keras.find(tmp_path / name) for name in ("other.weights.h5", "other.weights.json", "a.zip", "nothing")
    )
    (tmp_path / "cut.weights.h5").write_bytes(plain.read_bytes()[:300])
    assert keras.find(tmp_path / "cut.weights.h5") and not keras.find(tmp_path)
    assert all(map(keras.owns, ("model.keras", "model.weights.h5", "model.weights.json")))
    assert not any(map(keras.owns, ("my.keras", "config.json", "metadata.json", "tf_model.h5")))
    with pytest.raises(CheckpointError, match=r"holds no model of Keras: expected model\.keras or"):
        keras.read(tmp_path)
    with pytest.raises(CheckpointError, match="cannot open"):
        keras.read(tmp_path / "none.weights.h5")


def test_an_index_and_its_files_are_held_to_each_other(tmp_path: Path) -> None:
    folder = unpack("qa-sharded", tmp_path)
    index = folder / "model.weights.json"
    said = json.loads(index.read_text())["weight_map"]
    group, files = next((group, files) for group, files in said.items() if "h/block/attn/c_proj" in group)
    for weight_map, kind, message in (
        (said | {group: ["../x.weights.h5"]}, UnsafeCheckpointError, "not a plain file name"),
        (said | {group: ["config.json"]}, CheckpointFormatError, r"expected files that end in \.weights\.h5"),
        (said | {group: ["model_99999.weights.h5"]}, CheckpointFormatError, "of which 1 are missing"),
        (said | {group: [3]}, CheckpointFormatError, "gives 3 as the file"),
        (said | {f"{group}1": files}, CheckpointFormatError, "lacks 1 groups"),
        (
            {key: each for key, each in said.items() if key != group},
            CheckpointFormatError,
            "does not put there: .*c_proj",
        ),
        ({}, CheckpointFormatError, "is no index"),
        ([], CheckpointFormatError, "is no index"),
        ({f"/{n}": f"{n}.weights.h5" for n in range(10_001)}, CheckpointFormatError, "expected at most 10000"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(kind, match=message):
            keras.read(index)
    twice = files[0].replace("model_", "copy_")
    (folder / twice).write_bytes((folder / files[0]).read_bytes())
    both = {
        key: [*(each if isinstance(each, list) else [each]), *([twice] if files[0] in each else [])]
        for key, each in said.items()
    }
    index.write_text(json.dumps({"weight_map": both}))
    with pytest.raises(CheckpointFormatError, match="that another one holds too"):
        keras.read(index)


# Memory and imports ---------------------------------------------------------------------------------------------------

PEAK = """
import sys
import numpy as np
from pathlib import Path
from gpt2_core.checkpoints import About, formats
from gpt2_core.checkpoints.tensors import Tensor
from gpt2_core.config import GPT2Config
from gpt2_core.parameters import parameter_table
format, folder, layers = formats()[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
config = GPT2Config(n_embd=512, n_layer=layers, n_head=8, vocab_size=2048, bos_token_id=1, eos_token_id=1)
def tensor(shape):
    return Tensor("float32", shape, lambda: np.ones(shape, np.float32))
given = {row.name: tensor(row.shape) for row in parameter_table(config)}
format.write(folder / "a", given, about=About(config))
with format.read(folder / "a") as opened:
    format.write(folder / "b", opened, about=About(config))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status, MADV_DONTNEED")
@pytest.mark.parametrize("format", ["keras", "kerashub"])
def test_writing_and_reading_hold_a_few_tensors_not_all(tmp_path: Path, format: str) -> None:
    """Twelve blocks of 12.6 MB; what one takes is taken off."""
    small, large = (
        int(subprocess.check_output([sys.executable, "-c", PEAK, format, tmp_path / str(count), str(count)]))
        for count in (1, 13)
    )
    assert (large - small) / 1024 < 40, f"{format} held {(large - small) / 1024:.0f} MB of 151"


IMPORTS = """
import sys
from gpt2_core.checkpoints import About, formats, open_checkpoint
for name in ("keras", "kerashub"):
    with open_checkpoint(sys.argv[1]) as opened:
        from gpt2_core.config import GPT2Config
        config = GPT2Config.from_dict(opened.config)
        formats()[name].write(f"{sys.argv[2]}/{name}", opened, about=About(config))
    formats()[name].read(f"{sys.argv[2]}/{name}")
print(*sorted({"tensorflow", "keras", "keras_hub", "h5py", "torch"} & {name.partition(".")[0] for name in sys.modules}))
"""


def test_no_framework_and_no_h5py_is_imported(tmp_path: Path) -> None:
    path = written(tmp_path / "a.keras")
    assert subprocess.check_output([sys.executable, "-c", IMPORTS, path, tmp_path], text=True).strip() == ""


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@lru_cache
def sound(folder: Path, kind: str) -> bytes:
    if kind == "ours":
        return written(folder / "ours.keras", small_config(n_layer=1), "qa").read_bytes()
    case, _, name = {"theirs": ("lm-odd", "", "my.keras"), "weights": ("sequence", "", "model.weights.h5")}[kind]
    return (unpack(case, folder / case) / name).read_bytes()


def read_all(path: Path, data: bytes) -> None:
    """Read all of a file with these bytes; an error of ours is as good an end as any."""
    path.write_bytes(data)
    try:
        with keras.read(path) as opened:
            assert opened.bytes_total <= len(data)
            for name in opened:
                assert opened.array(name).shape == opened.shape(name)
            if opened.config is not None:
                config_of(opened, beside=False)
    except Gpt2Error as error:
        assert len(str(error)) < 10_000
    keras.find(path)


@pytest.mark.parametrize("kind", ["ours", "theirs", "weights"])
def test_flipped_cut_and_spliced_files_end_well(folder: Path, kind: str) -> None:
    whole = sound(folder, kind)
    path = folder / f"{os.getpid()}-fuzzed{'.weights.h5' if kind == 'weights' else '.keras'}"
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(max(0, len(whole) - 400), len(whole) - 1))
    numbers = st.sampled_from([0, 1, 16, 255, 65_535, 1 << 31, 1 << 32, (1 << 62) - 1, 1 << 63, (1 << 64) - 1])

    @bounded
    @given(
        flips=st.lists(st.tuples(places, st.integers(0, 255)), max_size=8),
        words=st.lists(st.tuples(places, st.one_of(numbers, places)), max_size=4),
        cut=st.one_of(st.none(), places),
        splice=st.one_of(st.none(), st.tuples(places, places, places)),
    )
    def run(
        flips: list[tuple[int, int]],
        words: list[tuple[int, int]],
        cut: int | None,
        splice: tuple[int, int, int] | None,
    ) -> None:
        data = bytearray(whole)
        for at, value in flips:
            data[at] = value
        for at, value in words:
            data[at & ~7 : (at & ~7) + 8] = value.to_bytes(8, "little")
        if splice is not None:
            start, end, to = splice
            data[to:to] = data[start:end]
        read_all(path, bytes(data[:cut]))

    run()


@pytest.mark.parametrize("kind", ["theirs", "weights"])
def test_damaged_texts_of_attributes_end_well(folder: Path, kind: str) -> None:
    """Where Keras keeps names and number formats: the global heaps, and the attributes that lead there."""
    whole = sound(folder, kind)
    path = folder / f"{os.getpid()}-texts{'.weights.h5' if kind == 'weights' else '.keras'}"
    heaps = [at for at in range(len(whole)) if whole[at : at + 4] == b"GCOL"]
    names = [at for at in range(len(whole)) if whole[at : at + 5] in (b"name\0", b"dtype")]
    assert heaps and len(names) > 10
    near = st.one_of(*(st.sampled_from(found).map(lambda at: max(0, at - 16)) for found in (heaps, names)))

    @bounded
    @given(changes=st.lists(st.tuples(near, st.integers(0, 96), st.binary(min_size=1, max_size=8)), max_size=4))
    def run(changes: list[tuple[int, int, bytes]]) -> None:
        data = bytearray(whole)
        for at, more, value in changes:
            data[at + more : at + more + len(value)] = value
        read_all(path, bytes(data[: len(whole)]))

    run()


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", "gpt2", "float32", "x" * 300])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
KEYS = ["vocab_size", "n_layer", "n_head", "n_embd", "n_inner", "pruned_heads", "eos_token_id", "tie_word_embeddings"]
CONFIGS = st.dictionaries(
    st.sampled_from(KEYS), st.one_of(VALUES, st.sampled_from([2, 8, 37, 1 << 40, -1])), max_size=4
)
DESCRIPTIONS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {},
        optional={
            "registered_name": st.one_of(VALUES, st.sampled_from(sorted(keras.CLASSES))),
            "class_name": VALUES,
            "config": st.one_of(VALUES, st.fixed_dictionaries({}, optional={"config": CONFIGS, "dtype": VALUES})),
            "compile_config": st.one_of(VALUES, st.fixed_dictionaries({"optimizer": VALUES})),
        },
    ),
)


@bounded
@given(said=DESCRIPTIONS, whole=st.booleans())
def test_any_description_of_likely_and_unlikely_values_ends_well(folder: Path, said: Any, whole: bool) -> None:
    written(folder / "base.keras") if not (folder / "base.keras").exists() else None
    files = contents_of(folder / "base.keras")
    if whole and isinstance(said, dict):
        base = json.loads(files["config.json"])
        inner = said.get("config")
        if isinstance(inner, dict) and isinstance(inner.get("config"), dict):
            said["config"] = base["config"] | inner | {"config": base["config"]["config"] | inner["config"]}
        said = base | said
    path = archived(folder / "said.keras", files | {"config.json": json.dumps(said).encode()})
    read_all(path, path.read_bytes())


@bounded
@given(weight_map=st.one_of(VALUES, st.dictionaries(
    st.sampled_from(["/layers/tfgpt2_model/layers/embedding/vars", "x", ""]),
    st.one_of(VALUES, st.sampled_from(["a.weights.h5", "../a.weights.h5", "\0.weights.h5"]),
              st.lists(st.sampled_from(["a.weights.h5", "b.weights.h5"]))), max_size=3)))  # fmt: skip
def test_any_index_ends_well(folder: Path, weight_map: Any) -> None:
    if not (folder / "a.weights.h5").exists():
        (folder / "a.weights.h5").write_bytes(sound(folder, "weights"))
    read_all(folder / "i.weights.json", json.dumps({"weight_map": weight_map}).encode())


def test_a_compression_bomb_and_an_overlap_made_by_hand_end_well(tmp_path: Path) -> None:
    """Two entries that share their bytes: what is counted twice was meant to be read twice."""
    path = written(tmp_path / "a.keras")
    data = bytearray(path.read_bytes())
    file = MappedFile(path)
    entry = zips.entries(file)["config.json"]
    at = data.rindex(b"model.weights.h5") - 4  # where its local header stands, in the directory
    first = data.index(b"PK\3\4", 4)
    assert first < entry.offset
    data[at : at + 4] = first.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointFormatError, match="does not agree with the directory"):
        keras.read(path)
    assert zlib.crc32(file.bytes(entry.offset, entry.size)) == entry.crc


# Keras itself ---------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, "float32"),
    "untied": ({"tie_word_embeddings": False}, "float64"),
    "pruned": ({"pruned_heads": {1: [0]}, "n_inner": 7, "activation_function": "relu"}, "bfloat16"),
    "half": ({"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3}, "float16"),
}
#: Every head with one variant, and the language model with all of them.
PAIRS = [(head, variant) for n, head in enumerate(HEADS) for m, variant in enumerate(VARIANTS)
         if head == "lm" or n % len(VARIANTS) == m]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2_tf() -> Iterator[Any]:
    pytest.importorskip("tensorflow")
    return pytest.importorskip("gpt2_tf")


def class_of(gpt2_tf: Any, head: str) -> Any:
    (name,) = (name for name, each in keras.CLASSES.items() if each.value == head)
    return getattr(gpt2_tf, name.partition(">")[2])


def assert_holds(model: Any, expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        value = model.get_parameter(name)
        assert value.dtype == tensor.dtype and tuple(value.shape) == tensor.shape, name
        assert np.asarray(value.numpy()).tobytes() == tensor.raw().tobytes(), name
    assert len(model.variables) >= len(expected)


@pytest.mark.parametrize(("head", "variant"), PAIRS)
def test_keras_loads_what_we_write_bit_for_bit(tmp_path: Path, gpt2_tf: Any, head: str, variant: str) -> None:
    import keras as theirs

    changes, dtype = VARIANTS[variant]
    config = small_config(num_labels=3, **changes)
    expected = tensors_of(config, head, dtype, seed=1)
    for place in (tmp_path, tmp_path / "a.keras", tmp_path / "a.weights.h5"):
        keras.write(place, expected, about=About(config, Head(head)))
    cls = class_of(gpt2_tf, head)
    for path in (tmp_path / "model.keras", tmp_path / "a.keras"):
        model = theirs.saving.load_model(path, safe_mode=True)
        assert type(model) is cls and model.config == config and model.dtype_policy.name == dtype
        assert_holds(model, expected)
    other = cls(config, seed=3, dtype=dtype)
    other.load_weights(tmp_path / "a.weights.h5")
    assert_holds(other, expected)
    other = cls(config, seed=3, dtype=dtype)
    other.load_weights(tmp_path / "a.keras")
    assert_holds(other, expected)
    ids = random_ids(config, 2, 2, 5) if head == "double" else random_ids(config, 2, 5)
    if dtype in ("float32", "float64"):
        out, ours = model(ids), ReferenceModel.from_pretrained(tmp_path, head)(ids)
        first = next(iter(out.keys()))
        assert error(ours[first], np.asarray(out[first])) <= TRANSFORMERS


@pytest.mark.parametrize(("head", "variant"), PAIRS)
def test_what_keras_writes_now_goes_anywhere_and_back(tmp_path: Path, gpt2_tf: Any, head: str, variant: str) -> None:
    changes, dtype = VARIANTS[variant]
    config = small_config(num_labels=3, **changes)
    cls = class_of(gpt2_tf, head)
    expected = tensors_of(config, head, dtype, seed=2)
    model = cls(config, seed=None, dtype=dtype)
    for name, tensor in expected.items():
        model._set(name, tensor.array())
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "b.weights.h5")
    model.save_weights(tmp_path / "c.weights.json", max_shard_size=3000 / 1024**3)
    model.save(str(tmp_path / "d"), zipped=False)
    for place in ("a.keras", "b.weights.h5", "c.weights.json", "d"):
        beside = {} if place in ("a.keras", "d") else {"config": config}
        with open_source(tmp_path / place, **beside) as source:
            assert source.config == config and source.head.value == head and source.checkpoint.format == "keras"
            assert {name: each.raw().tobytes() for name, each in source.tensors().items()} == {
                name: each.raw().tobytes() for name, each in expected.items()
            }
            carry_out(plan_conversion(source, tmp_path / "out" / place[0], "safetensors", verify="tensors"))
        with open_source(tmp_path / "out" / place[0]) as source:
            carry_out(plan_conversion(source, tmp_path / "back" / f"{place[0]}.keras", "keras", verify="tensors"))
    assert_holds(cls.from_pretrained(tmp_path / "back" / "a.keras", dtype="auto"), expected)


def test_keras_has_the_classes_that_we_name(gpt2_tf: Any) -> None:
    import keras as theirs

    for name, head in keras.CLASSES.items():
        cls = theirs.saving.get_registered_object(name)
        assert cls is class_of(gpt2_tf, head.value) and cls.head.value == head.value


def test_an_adapted_model_is_refused_and_its_part_is_not(tmp_path: Path, gpt2_tf: Any) -> None:
    import keras as theirs

    body = gpt2_tf.TFGPT2Model(small_config(), seed=1)
    ids = theirs.Input((None,), dtype="int32", name="input_ids")
    model = theirs.Model(ids, theirs.layers.Dense(3)(body(ids).last_hidden_state[:, -1]))
    model.save(tmp_path / "whole.keras")
    with pytest.raises(CheckpointFormatError, match=r"describes 'Functional'; .*save the part"):
        keras.read(tmp_path / "whole.keras")
    model.save_weights(tmp_path / "whole.weights.h5")
    opened = keras.read(tmp_path / "whole.weights.h5")
    assert {name for name in opened if name not in opened.names_in_file} == {
        "/layers/dense/vars/0",
        "/layers/dense/vars/1",
    }
    body.save(tmp_path / "part.keras")
    assert len(keras.read(tmp_path / "part.keras").names_in_file) == 28
