"""gpt2_core.checkpoints.h5: the names, shapes and numbers of transformers' TensorFlow classes, both ways.

tests/peers/transformers4 holds what transformers 4.57 wrote and computed. The tests at the end ask it again where the
environment variable GPT2_DUET_TRANSFORMERS4 names the Python of an environment that has it; see tests/peers.
"""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core import parameters
from gpt2_core.checkpoints import Tensor, detect, h5, hdf5, open_checkpoint, round_to_bfloat16, save_checkpoint
from gpt2_core.checkpoints.naming import match
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, UnsafeCheckpointError
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.pretrained import open_pretrained, save_pretrained
from gpt2_core.reference import ReferenceModel
from models import HEADS, padded_mask, random_config, random_parameters, small_config
from tolerances import TRANSFORMERS, error

PEERS = Path(__file__).parent.parent / "peers"
CASES = sorted(path.stem for path in (PEERS / "transformers4").glob("*.zip"))
HEAD_OF = {"none": "none", "double": "double", "sequence": "sequence", "lm": "lm"}
SEQUENCES = ("input_ids", "token_type_ids")
OUTPUTS = {"hidden_states": "hidden_states", "attentions": "attentions", "past_key_values": "past"}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def head_of(case: str) -> str:
    return HEAD_OF[case.partition("-")[0]]


def unpack(case: str, folder: Path) -> Path:
    """The folder that transformers saved, and its answers."""
    with zipfile.ZipFile(PEERS / "transformers4" / f"{case}.zip") as archive:
        archive.extractall(folder)
    return folder


def tensors_of(config: GPT2Config, head: str, dtype: str = "float32", seed: int = 0) -> dict[str, Tensor]:
    values = random_parameters(config, head, seed)
    if dtype == "bfloat16":
        return {name: Tensor.of(round_to_bfloat16(v.astype(np.float32)), dtype) for name, v in values.items()}
    return {name: Tensor.of(value.astype(dtype)) for name, value in values.items()}


def assert_same(opened: Any, given: dict[str, Tensor]) -> None:
    assert sorted(opened) == sorted(given)
    for name, tensor in given.items():
        assert (opened[name].dtype, opened[name].shape) == (tensor.dtype, tensor.shape), name
        assert opened[name].raw().tobytes() == tensor.raw().tobytes(), name


# What transformers 4.57 wrote and computed ----------------------------------------------------------------------------


def real_ones(name: str, value: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The part of an output that belongs to real tokens; `real` is (rows, T). What padding sees is nobody's concern."""
    rows, T = real.shape
    if name in ("hidden_states", "last_hidden_state") or (name == "logits" and value.ndim == 3):
        return value.reshape(rows, T, -1)[real]
    if name == "attentions":
        return value.swapaxes(1, 2)[real]  # (rows, H, T, S) -> (real, H, S)
    if name == "past_key_values":
        return value.transpose(1, 3, 0, 2, 4)[real]  # (2, rows, H, T, D) -> (real, 2, H, D)
    return value


def agree(model: ReferenceModel, given: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> set[str]:
    """Hold every answer of theirs to the reference; which kinds there were."""
    out = model(**given, output_attentions=True, output_hidden_states=True)
    ids = given["input_ids"]
    real = np.asarray(given.get("attention_mask", np.ones(ids.shape))).reshape(-1, ids.shape[-1]) != 0
    for name, value in theirs.items():
        kind, _, index = name.partition(".")
        if kind == "continued":
            first, rest = ({key: given[key][:, part] for key in SEQUENCES} for part in (slice(0, 2), slice(2, None)))
            again = model(**rest, past=model(**first).past)
            ours = again.last_hidden_state if model.head is Head.NONE else again.logits
        else:
            ours = out[OUTPUTS[kind]][int(index)] if index else out[kind]
        found = error(*(real_ones(kind, np.asarray(each), real) for each in (ours, value)))
        assert found <= TRANSFORMERS, f"{name}: {found}"
    return {name.partition(".")[0] for name in theirs}


def golden(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The inputs and the answers of an archive."""
    with np.load(folder / "answers.npz") as answers:
        return tuple(
            {name.partition(".")[2]: answers[name] for name in answers if name.startswith(side)}
            for side in ("in.", "out.")
        )


@pytest.mark.parametrize("case", CASES)
def test_numbers_agree_with_what_transformers_computed_from_its_own_file(tmp_path: Path, case: str) -> None:
    folder = unpack(case, tmp_path)
    model = ReferenceModel.from_pretrained(folder, head_of(case))
    seen = agree(model, *golden(folder))
    expected = {"attentions", "past_key_values"} | {
        "none": {"last_hidden_state", "hidden_states", "continued"},
        "lm": {"logits", "loss", "hidden_states", "continued"},
        "double": {"logits", "mc_logits", "hidden_states"},
        "sequence": {"logits", "loss", "hidden_states"},
    }[head_of(case)]
    assert seen == expected


def test_every_kind_of_file_is_among_them() -> None:
    assert {case.partition("-")[2] for case in CASES} == {"", "sharded", "unnamed", "nested"}
    assert {head_of(case) for case in CASES} == {"none", "lm", "double", "sequence"}


@pytest.mark.parametrize("case", CASES)
def test_every_array_is_the_one_that_h5py_reads(tmp_path: Path, case: str) -> None:
    h5py = pytest.importorskip("h5py")
    folder = unpack(case, tmp_path)
    theirs = {}
    for path in folder.glob("*.h5"):
        with h5py.File(path) as file:
            file.visititems(lambda name, each: theirs.update({name: each[()]}) if hasattr(each, "shape") else None)
    opened = open_checkpoint(folder)
    assert opened.format == "h5" and len(opened) == len(theirs)
    for name, inside in opened.names_in_file.items():
        (value,) = (value for path, value in theirs.items() if path.endswith(inside.partition("/")[2]))
        turned = (
            value.T if inside.endswith("kernel:0") else value[0] if value.ndim == 2 and name.endswith("bias") else value
        )
        assert np.array_equal(opened.array(name), turned), name


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_that_of_the_files_and_the_head_is_told(tmp_path: Path, case: str) -> None:
    opened = open_checkpoint(unpack(case, tmp_path))
    assert opened.head == (None if case == "lm-unnamed" else head_of(case))
    assert opened.names_in_file.keys() == set(opened)
    if "sharded" not in case:
        table = [row.name for row in parameter_table(GPT2Config.from_pretrained(tmp_path), head_of(case))]
        assert [name for name in opened if name in table[:17]] == table[:17]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_again_is_the_same_model(tmp_path: Path, case: str) -> None:
    opened = open_checkpoint(unpack(case, tmp_path / "theirs"))
    for most in (None, 700):
        h5.write(tmp_path / f"ours{most}", opened, max_shard_bytes=most)
        again = open_checkpoint(tmp_path / f"ours{most}")
        assert again.names() == opened.names() and again.head == (opened.head or "lm")
        assert_same(again, dict(opened.items()))


# Files of earlier versions --------------------------------------------------------------------------------------------


def early(folder: Path, model: str = "tfgp_t2lm_head_model", wte: str = "wte/weight:0", rename: Any = None) -> Path:
    """A file as transformers 2 and 3 left it, from its specification, with the numbers of the golden `lm`.

    Against today's: the model's name is cased otherwise (or missing), the token table is TFSharedEmbeddings' `weight`,
    lists of names are arrays of bytes of one width, and there is no group top_level_model_weights.
    """
    h5py = pytest.importorskip("h5py")
    unpack("lm", folder)
    with h5py.File(folder / "tf_model.h5") as theirs, h5py.File(folder / "early.h5", "w") as file:
        names = [name.partition("/")[2] for name in theirs["transformer"].attrs["weight_names"]]
        file.attrs["layer_names"] = np.array([b"transformer"])
        file.attrs["backend"] = np.bytes_("tensorflow")
        file.attrs["keras_version"] = np.bytes_("2.2.4-tf")
        group = file.create_group("transformer")
        renamed = []
        for name in names:
            value = theirs["transformer/tfgpt2lm_head_model"][name][()]
            new = f"{model}/{name.replace('wte/embeddings:0', wte)}".lstrip("/")
            renamed.append(rename(new) if rename else new)
            data = group.create_dataset(renamed[-1], value.shape, dtype=value.dtype)
            data[:] = value
        group.attrs["weight_names"] = np.array([name.encode() for name in renamed])
    (folder / "early.h5").replace(folder / "tf_model.h5")
    return folder


VARIANTS = {
    "2.x": {},
    "a second model in the session": {"model": "tfgp_t2lm_head_model_1"},
    "a class of the user's": {"model": "my_writer"},
    "a model called transformer": {"model": "transformer"},
    "without the model's name": {"model": ""},
    "several names": {"model": "outer/inner/tfgpt2lm_head_model"},
    "without the transformer": {"rename": lambda name: name.replace("/transformer/", "/")},
    "neither": {"model": "", "rename": lambda name: name.removeprefix("transformer/")},
    "without :0": {"rename": lambda name: name.removesuffix(":0")},
    "later tables": {"wte": "wte/embeddings:0"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_other_versions_give_the_same_numbers(tmp_path: Path, variant: str) -> None:
    folder = early(tmp_path, **VARIANTS[variant])
    model = ReferenceModel.from_pretrained(folder, "lm")
    agree(model, *golden(folder))


def test_files_of_early_keras_say_which_model_they_are() -> None:
    """As `to_snake_case` of Keras 2.2 and of tf-keras 2.21 turn the names of classes."""
    expected = {
        "tfgp_t2model": "none",
        "tfgpt2_model": "none",
        "tfgp_t2lm_head_model": "lm",
        "tfgpt2lm_head_model": "lm",
        "tfgp_t2double_heads_model": "double",
        "tfgpt2_double_heads_model": "double",
        "tfgp_t2for_sequence_classification": "sequence",
        "tfgpt2_for_sequence_classification": "sequence",
    }
    assert {name: h5._HEADS[name].value for name in expected} == expected


def test_layers_of_their_own_groups_are_read(tmp_path: Path) -> None:
    """wte/wte/weight: a functional Keras model whose layers are the transformer's."""
    given = tensors_of(small_config(), "none")
    stored = h5._stored(given, False)
    arrays, lists = {}, {}
    for name, tensor in stored.items():
        inside = name.removeprefix("tfgpt2_model/transformer/").removesuffix(":0")
        layer = inside.partition("/")[0]
        arrays[(layer, *inside.split("/"))] = tensor
        lists.setdefault((layer,), []).append(inside)
    with (tmp_path / "a.h5").open("wb") as file:
        hdf5.write(file, arrays, {(): {"layer_names": [layer for (layer,) in lists]}} | {
            layer: {"weight_names": names} for layer, names in lists.items()
        })  # fmt: skip
    assert_same(open_checkpoint(tmp_path / "a.h5"), given)


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table_is_a_bijection_and_knows_every_parameter() -> None:
    ours, theirs = ([getattr(rule, side) for rule in h5.NAMES.rules] for side in ("ours", "theirs"))
    assert len(set(ours)) == len(set(theirs)) == len(ours)
    for head in HEADS:
        config = small_config(tie_word_embeddings=False, n_layer=12)
        given = tensors_of(config, head)
        for sharded in (False, True):
            stored = h5._stored(given, sharded)
            assert len(stored) == len(given), "two parameters went to one name"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(6))
def test_every_model_survives_bit_for_bit(tmp_path: Path, head: str, seed: int) -> None:
    """Tied and untied, pruned, odd n_inner: what random_config varies."""
    config = random_config(seed)
    given = tensors_of(config, head, seed=seed)
    for most in (None, 900):
        save_checkpoint(tmp_path / str(most), given, format="h5", max_shard_bytes=most)
        opened = open_checkpoint(tmp_path / str(most))
        assert_same(opened, given)
        assert opened.names() == tuple(given) and opened.head == head
        found = match(opened, parameter_table(config, head), n_layer=config.n_layer, tied=config.tie_word_embeddings)
        assert not found.ignored and not found.newly_initialised


@pytest.mark.parametrize("dtype", [dtype for dtype in hdf5.TYPES if "float" in dtype])
def test_every_float_format_survives_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    given = tensors_of(small_config(), "double", dtype)
    save_checkpoint(tmp_path, given, format="h5")
    assert_same(open_checkpoint(tmp_path), given)


def test_twelve_layers_are_not_mixed_up(tmp_path: Path) -> None:
    given = tensors_of(small_config(n_layer=12), "lm")
    save_checkpoint(tmp_path, given, format="h5")
    assert_same(open_checkpoint(tmp_path), given)


def test_names_come_back_with_the_prefix_unless_the_model_is_bare(tmp_path: Path) -> None:
    bare = tensors_of(small_config(), "none")
    score = tensors_of(small_config(), "sequence")["score.weight"]
    save_checkpoint(tmp_path / "bare", bare, format="h5")
    save_checkpoint(tmp_path / "score", bare | {"score.weight": score}, format="h5")
    assert open_checkpoint(tmp_path / "bare").names() == tuple(bare)
    assert set(open_checkpoint(tmp_path / "score")) == {"score.weight", *(f"transformer.{name}" for name in bare)}


# What is written ------------------------------------------------------------------------------------------------------


def test_the_file_is_laid_out_as_keras_does(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    given = tensors_of(small_config(n_layer=1), "sequence")
    (path,) = h5.write(tmp_path, given)
    assert path.name == "tf_model.h5"
    with h5py.File(path) as file:
        assert list(file.attrs["layer_names"]) == [b"score", b"transformer"] == [name.encode() for name in file]
        names = [name.decode() for name in file["transformer"].attrs["weight_names"]]
        assert names[0] == "tfgpt2_for_sequence_classification/transformer/wte/weight:0"
        assert file["transformer"][names[0]].shape == (37, 8)
        bias = file["transformer/tfgpt2_for_sequence_classification/transformer/h_._0/attn/c_attn/bias:0"]
        assert bias.shape == (1, 24) and bias.dtype == np.float32
        kernel = file["score/tfgpt2_for_sequence_classification/score/kernel:0"]
        assert np.array_equal(kernel[()], given["score.weight"].array().T)


def test_shards_are_laid_out_as_transformers_does(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    theirs = unpack("double-sharded", tmp_path / "theirs")
    opened = open_checkpoint(theirs)
    *shards, index = h5.write(tmp_path / "ours", opened, max_shard_bytes=700)
    said, mine = (json.loads((folder / "tf_model.h5.index.json").read_text()) for folder in (theirs, tmp_path / "ours"))
    assert index.name == "tf_model.h5.index.json" and said["metadata"] == mine["metadata"]
    names = [{name.partition("/")[2] for name in each["weight_map"]} for each in (said, mine)]
    assert names[0] == names[1] and {name.partition("/")[0] for name in mine["weight_map"]} == {h5.MODELS[Head.DOUBLE]}
    for path in shards:
        with h5py.File(path) as file:
            listed = [name.decode() for name in file.attrs["layer_names"]]
            assert listed and all(hasattr(file[name], "shape") for name in listed) and set(listed) <= names[0]


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    given = tensors_of(small_config(), "double")
    first, second = (h5.write(tmp_path / name, given)[0].read_bytes() for name in "ab")
    assert first == second


def test_many_long_names_are_split_as_keras_splits_them(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    given = tensors_of(small_config(n_layer=120), "sequence")
    (path,) = h5.write(tmp_path, given)
    with h5py.File(path) as file:
        group = file["transformer"]
        lists = [name for name in group.attrs if name.startswith("weight_names")]
        assert lists == ["weight_names0", "weight_names1"]
        assert sum(len(group.attrs[name]) for name in lists) == 120 * 12 + 4
    assert_same(open_checkpoint(path), given)


def test_what_is_no_parameter_is_refused_by_name_and_the_folder_left_alone(tmp_path: Path) -> None:
    given = tensors_of(small_config(), "lm")
    save_checkpoint(tmp_path, given, format="h5")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in (
        "h.0.attn.bias",
        "h.00.ln_1.weight",
        "h.0.ln_3.weight",
        "transformer.score.weight",
        "epoch",
        "h.x.ln_1.weight",
    ):
        with pytest.raises(CheckpointError, match=f"1 of these names are none: {name}"):
            save_checkpoint(tmp_path, given | {name: np.zeros((2, 2), np.float32)}, format="h5")
    with pytest.raises(CheckpointError, match=r"some of the names begin with transformer\. and some do not"):
        save_checkpoint(tmp_path, given | {"wte.weight": np.zeros((2, 2), np.float32)}, format="h5")
    with pytest.raises(CheckpointError, match="no place for metadata"):
        h5.write(tmp_path, given, metadata={"format": "pt"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shapes_that_a_parameter_does_not_have_and_bool_are_refused(tmp_path: Path) -> None:
    for name, shape in (("h.0.attn.c_attn.bias", (1, 3)), ("score.weight", (3,)), ("h.0.mlp.c_fc.bias", ())):
        with pytest.raises(CheckpointError, match=rf"{name} has the shape"):
            h5.write(tmp_path / "a", {name: np.zeros(shape, np.float32)})
    with pytest.raises(CheckpointError, match="h5 cannot hold bool"):
        h5.write(tmp_path / "a", {"wte.weight": np.zeros((2, 2), bool)})
    assert not (tmp_path / "a").exists()


# What does not fit ----------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_reported_under_the_files_names(tmp_path: Path) -> None:
    config = small_config()
    stored = h5._stored(tensors_of(config, "lm"), False)
    first = "tfgpt2lm_head_model/transformer"
    stored[f"{first}/h_._0/crossattention/c_attn/weight:0"] = Tensor.of(np.ones(3, np.float32))
    stored[f"{first}/wte/embeddings:0"] = stored[f"{first}/wte/weight:0"]
    stored[f"{first}/h_._0/attn/c_attn/bias:0"] = Tensor.of(np.ones((2, 12), np.float32))
    stored[f"{first}/h_._01/ln_1/gamma:0"] = Tensor.of(np.ones(8, np.float32))
    del stored[f"{first}/ln_f/gamma:0"]
    h5._write_single(tmp_path / "tf_model.h5", stored, None)
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatchError) as caught:
        open_pretrained(tmp_path, "lm")
    assert set(caught.value.unexpected) == {
        f"{first}/h_._0/crossattention/c_attn/weight:0",
        f"{first}/wte/embeddings:0",
        f"{first}/h_._01/ln_1/gamma:0",
    }
    assert caught.value.missing == ("transformer.ln_f.weight",)
    assert caught.value.misshaped == (("transformer.h.0.attn.c_attn.bias", (2, 12), (24,)),)


def test_an_array_called_as_we_call_a_parameter_is_not_taken_for_it(tmp_path: Path) -> None:
    with (tmp_path / "tf_model.h5").open("wb") as file:
        array = Tensor.of(np.ones(2, np.float32))
        hdf5.write(
            file, {("wte.weight",): array, ("transformer", "wte", "weight"): array}, {(): {"layer_names": ["x"]}}
        )
    assert open_checkpoint(tmp_path).names() == ("/wte.weight", "transformer.wte.weight")


def test_layers_that_list_the_same_name_keep_both_arrays_apart(tmp_path: Path) -> None:
    arrays = {(layer, "x", "w:0"): Tensor.of(np.full(2, n, "f4")) for n, layer in enumerate("abc")}
    lists = {(layer,): {"weight_names": ["x/w:0"]} for layer in "abc"}
    with (tmp_path / "tf_model.h5").open("wb") as file:
        hdf5.write(file, arrays, {(): {"layer_names": ["a", "b", "c"]}, **lists})
    opened = open_checkpoint(tmp_path)
    assert [(name, opened.array(name)[0]) for name in opened] == [("x/w:0", 0), ("b/x/w:0", 1), ("c/x/w:0", 2)]
    with (tmp_path / "tf_model.h5").open("wb") as file:
        first = {("c", "b", "x", "w:0"): arrays["a", "x", "w:0"]}
        hdf5.write(file, first | arrays, {(): {"layer_names": ["a", "b", "c"]}, **lists})
    with pytest.raises(CheckpointFormatError, match="two of its arrays are called 'b/x/w:0'"):
        open_checkpoint(tmp_path)


def test_a_head_that_the_file_lacks_starts_afresh_and_one_that_the_model_lacks_is_ignored(tmp_path: Path) -> None:
    folder = unpack("lm", tmp_path / "lm")
    assert open_pretrained(folder, "sequence").matching.newly_initialised == ("score.weight",)
    folder = unpack("double", tmp_path / "double")
    assert len(open_pretrained(folder, "lm").matching.ignored) == 2


# Finding --------------------------------------------------------------------------------------------------------------


def test_files_are_told_by_their_content_and_keras_3s_are_left_to_others(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    unpack("lm", tmp_path)
    odd = (tmp_path / "tf_model.h5").rename(tmp_path / "odd-name")
    assert detect(odd) == ("h5", odd)
    with h5py.File(tmp_path / "new.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", data=np.ones(3))
    assert h5.find(tmp_path / "new.h5") is None
    with pytest.raises(CheckpointFormatError, match="no attribute layer_names"):
        h5.read(tmp_path / "new.h5")
    (tmp_path / "cut").write_bytes(odd.read_bytes()[:50])
    (tmp_path / "cut.weights.h5").write_bytes(odd.read_bytes()[:50])
    assert h5.find(tmp_path / "cut") and not h5.find(tmp_path / "cut.weights.h5")
    assert not h5.find(tmp_path / "config.json") and not h5.find(tmp_path / "nothing")


def test_a_folder_has_the_other_formats_first_and_saving_leaves_one(tmp_path: Path) -> None:
    given = tensors_of(small_config(), "lm")
    h5.write(tmp_path, given)
    h5.write(tmp_path / "shards", given, max_shard_bytes=900)
    assert detect(tmp_path / "shards")[1].name == "tf_model.h5.index.json"
    save_checkpoint(tmp_path / "shards", given, format="bin")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["pytorch_model.bin"]
    save_checkpoint(tmp_path / "shards", given, format="h5")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["tf_model.h5"]
    assert all(map(h5.owns, ("tf_model.h5", "tf_model.h5.index.json", "tf_model-00001-of-00002.h5")))
    assert not any(map(h5.owns, ("my.h5", "model.weights.h5", "tf_model.h5.bak")))


def test_a_shard_alone_and_an_index_without_the_models_name_are_read(tmp_path: Path) -> None:
    folder = unpack("lm-sharded", tmp_path)
    whole = dict(open_checkpoint(folder).items())
    for path in folder.glob("*.h5"):
        part = open_checkpoint(path)
        assert_same(part, {name: whole[name] for name in part})
    index = folder / "tf_model.h5.index.json"
    said = json.loads(index.read_text())
    said["weight_map"] = {name.partition("/")[2]: file for name, file in said["weight_map"].items()}
    index.write_text(json.dumps(said))
    assert_same(open_checkpoint(folder), whole)


def test_an_index_and_its_shards_are_held_to_each_other(tmp_path: Path) -> None:
    folder = unpack("lm-sharded", tmp_path)
    index = folder / "tf_model.h5.index.json"
    said = json.loads(index.read_text())
    (name,) = (name for name in said["weight_map"] if name.endswith("wte/embeddings:0"))
    for weight_map, kind, message in (
        (said["weight_map"] | {name: "../tf_model.h5"}, UnsafeCheckpointError, "not a plain file name"),
        (said["weight_map"] | {name: "tf_model-00009-of-00009.h5"}, CheckpointFormatError, "1 are missing"),
        (said["weight_map"] | {f"{name}1": said["weight_map"][name]}, CheckpointFormatError, f"lacks 1 .*{name}1"),
        ({k: v for k, v in said["weight_map"].items() if k != name}, CheckpointFormatError, f"does not put .*{name}"),
    ):
        index.write_text(json.dumps(said | {"weight_map": weight_map}))
        with pytest.raises(kind, match=message):
            open_checkpoint(folder)


# Whole models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_a_model_saved_in_pytorch_comes_back_bit_for_bit(tmp_path: Path, head: str) -> None:
    torch = pytest.importorskip("torch")
    import gpt2_pt

    names = ["GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"]
    names += [f"GPT2For{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    cls = getattr(gpt2_pt, names[HEADS.index(head)])
    for seed, most in ((1, None), (2, 900), (3, None)):
        model = cls(random_config(seed), seed=seed)
        if seed == 3:
            model = model.to(torch.bfloat16)
        model.save_pretrained(tmp_path / f"{seed}", format="h5", **({} if most is None else {"max_shard_bytes": most}))
        again = cls.from_pretrained(tmp_path / f"{seed}", dtype=torch.bfloat16 if seed == 3 else None)
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert {value.dtype for value in state.values()} == {value.dtype for value in model.state_dict().values()}


def test_reading_and_writing_import_neither_h5py_nor_a_framework(tmp_path: Path) -> None:
    folder = unpack("double", tmp_path)
    script = (
        "import sys; from gpt2_core.checkpoints import open_checkpoint, save_checkpoint\n"
        "opened = open_checkpoint(sys.argv[1]); save_checkpoint(sys.argv[1], opened, format='h5')\n"
        "print(*sorted({'torch', 'tensorflow', 'keras', 'h5py'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", script, str(folder)], text=True).strip() == ""


def test_arrays_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    h5.write(tmp_path, tensors_of(small_config(), "lm"))
    opened = open_checkpoint(tmp_path)
    for name in opened:
        array = opened.array(name)
        assert not array.flags.writeable and array.flags.aligned and not array.flags.owndata
    changed = open_checkpoint(tmp_path, writable=True).array("transformer.wte.weight")
    changed += 1
    assert not np.array_equal(open_checkpoint(tmp_path).array("transformer.wte.weight"), changed)


def test_the_docstrings_examples_are_true() -> None:
    assert doctest.testmod(h5).failed == 0 and doctest.testmod(parameters).failed == 0


# transformers 4.57 itself ---------------------------------------------------------------------------------------------

INTERPRETER = os.environ.get("GPT2_DUET_TRANSFORMERS4", "")
CLASSES = {
    "none": "TFGPT2Model",
    "lm": "TFGPT2LMHeadModel",
    "double": "TFGPT2DoubleHeadsModel",
    "sequence": "TFGPT2ForSequenceClassification",
}
#: What their TensorFlow classes do not know, or do otherwise whatever the config says.
PLAIN = {
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "summary_type": "cls_index",
    "pad_token_id": 0,
}
JOBS = [
    (seed, head, most, dtype)
    for seed, (head, most, dtype) in enumerate(
        [(head, most, "float32") for _ in range(3) for head in CLASSES for most in (None, 600)]
        + [(head, None, dtype) for head in CLASSES for dtype in ("float16", "bfloat16")]
    )
]


def their_config(seed: int) -> GPT2Config:
    config = random_config(seed, **PLAIN)
    named = config.activation_function
    return config.replace(activation_function="gelu_new" if named == "gelu_pytorch_tanh" else named)


def inputs_for(config: GPT2Config, head: str, seed: int) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(seed)
    shape = (2, 3, 9) if head == "double" else (3, 9)
    ids = chance.integers(1, config.vocab_size, shape)
    if head == "double":
        return {"input_ids": ids, "mc_token_ids": chance.integers(0, 9, shape[:2])}
    labels = {"none": {}, "lm": {"labels": np.where(ids % 3 == 0, -100, ids)}, "sequence": {"labels": ids[:, 0] % 3}}
    if head != "sequence" and seed % 3:
        return {"input_ids": ids, "token_type_ids": chance.integers(0, config.vocab_size, shape), **labels[head]}
    mask = padded_mask(3, 9, "right" if head == "sequence" else "left", seed)
    return {
        "input_ids": np.where(mask, ids, 0),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        **(labels[head] if head == "sequence" else {}),
    }


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job's folder, as we wrote it, with what transformers computed from it and saved again."""
    if not INTERPRETER:
        pytest.skip("set GPT2_DUET_TRANSFORMERS4 to the Python of an environment with transformers 4.57 and tf-keras")
    root = tmp_path_factory.mktemp("transformers4")
    jobs = []
    for seed, head, most, dtype in JOBS:
        config, folder = their_config(seed), root / str(seed)
        tensors = tensors_of(config, head, dtype, seed)
        save_pretrained(
            folder, config, head, tensors, architecture=CLASSES[head][2:], format="h5", max_shard_bytes=most
        )
        np.savez(root / f"{seed}-in.npz", **inputs_for(config, head, seed))
        jobs.append(
            {
                "folder": str(folder),
                "class": CLASSES[head],
                "inputs": str(root / f"{seed}-in.npz"),
                "answers": str(root / f"{seed}-out.npz"),
                "save": str(root / f"{seed}-saved"),
                "shard": most,
            }
        )
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [INTERPRETER, str(PEERS / "make_transformers4.py"), "answer", str(root / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize(("seed", "head", "most", "dtype"), JOBS)
def test_transformers_loads_what_we_write_and_we_what_it_writes(
    answered: Path, seed: int, head: str, most: int | None, dtype: str
) -> None:
    report = json.loads((answered / f"{seed}-out.json").read_text())
    assert not any(report.values()), report
    assert ("load_weights_differs" in report) == (most is None), "single files are loaded by Keras itself too"
    model = ReferenceModel.from_pretrained(answered / str(seed), head)
    with np.load(answered / f"{seed}-in.npz") as given, np.load(answered / f"{seed}-out.npz") as theirs:
        seen = agree(model, dict(given), dict(theirs))
    assert {"attentions", "hidden_states", "past_key_values"} <= seen
    ours, saved = open_checkpoint(answered / str(seed)), open_checkpoint(answered / f"{seed}-saved")
    assert set(saved) == set(ours) and (len(saved.files) == 1) == (most is None)
    for name in ours:
        assert np.array_equal(saved.array(name), ours.array(name).astype(np.float32)), name
