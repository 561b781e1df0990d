"""gpt2_core.checkpoints.openai: the original release's files, held to TensorFlow and to what its Saver wrote.

tests/peers/openai holds a folder as a trainer left it, which is read without TensorFlow. The container itself is
tested in test_checkpoints_tensor_bundle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_checkpoints_tensor_bundle import block, entry, snapped

from gpt2_core.checkpoints import (
    About,
    Checkpoint,
    Tensor,
    detect,
    open_checkpoint,
    openai,
    safetensors,
    save_checkpoint,
    sstable,
    tensor_bundle,
)
from gpt2_core.checkpoints.crc32c import crc32c, masked
from gpt2_core.checkpoints.protobuf import to_varint
from gpt2_core.checkpoints.tensor_bundle import Bundle
from gpt2_core.checkpoints.tensors import MappedFile
from gpt2_core.checkpoints.tokenizers import gpt2_parts
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import (
    CannotHoldError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    Gpt2Error,
    TokenizerError,
    UnsafeCheckpointError,
)
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.reference import ReferenceModel
from models import random_ids, random_parameters, small_config
from tolerances import TRANSFORMERS, error

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=150, deadline=None, derandomize=True, database=None)
TRAINED = Path(__file__).parent.parent / "peers" / "openai" / "trained.zip"
CONFIG = small_config()
RELEASE = [
    "checkpoint",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder that a trainer left."""
    return unpack(tmp_path / "run1")


def unpack(folder: Path) -> Path:
    with zipfile.ZipFile(TRAINED) as archive:
        archive.extractall(folder)
    return folder


def values(config: GPT2Config = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float32) for name, value in random_parameters(config, "lm", seed).items()}


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder that we wrote."""
    openai.write(tmp_path / "ours", values(), about=About(CONFIG))
    return tmp_path / "ours"


def bits(tensors: Mapping[str, Tensor | np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    given = {name: each if isinstance(each, Tensor) else Tensor.of(each) for name, each in tensors.items()}
    return {name: (each.dtype, each.shape, each.raw().tobytes()) for name, each in given.items()}


@contextmanager
def contents(folder: Path, name: str = "model.ckpt") -> Iterator[Bundle]:
    """What stands in the files, by the names there."""
    opened = Bundle(folder / name)
    try:
        yield opened
    finally:
        opened.close()


def rewritten(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder


# What TensorFlow's Saver wrote, without TensorFlow --------------------------------------------------------------------


def test_what_was_trained_computes_what_tensorflow_computed(trained: Path) -> None:
    with np.load(trained / "answers.npz") as answers:
        ids, logits = answers["ids"], answers["logits"]
    assert detect(trained) == ("openai", trained / "checkpoint")
    with open_source(trained) as source:
        assert source.head is Head.LM
        assert [
            getattr(source.config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
        ] == [*(259, 8, 4, 2, 2)]
        model = ReferenceModel(source.config, {name: tensor.array() for name, tensor in source.tensors().items()})
    assert error(model(ids).logits, logits) <= TRANSFORMERS


def test_what_was_trained_is_written_again_byte_for_byte(trained: Path, tmp_path: Path) -> None:
    with contents(trained, "model-3") as opened:
        tensor_bundle.write(tmp_path / "again", {name: opened.tensor(name) for name in opened.entries})
    for end in ("index", "data-00000-of-00001"):
        assert (tmp_path / f"again.{end}").read_bytes() == (trained / f"model-3.{end}").read_bytes()


def test_the_state_of_the_optimizer_is_listed_by_name(trained: Path) -> None:
    opened = open_checkpoint(trained)
    parameters = set(opened.names_in_file.values())
    assert opened.names_in_file["transformer.h.1.mlp.c_fc.weight"] == "model/h1/mlp/c_fc/w"
    assert len(opened) == len(parameters) == 28 and opened.head == "lm"
    assert set(opened.ignored) == {f"{name}/{slot}" for name in parameters for slot in ("Adam", "Adam_1")} | {
        *("beta1_power", "beta2_power", "global_step")
    }
    assert opened.ignored["global_step"] == "how many steps were made"
    assert opened.ignored["model/wte/Adam_1"] == "the state of the optimizer"


def test_a_name_that_only_looks_like_a_slot_is_unexpected(tmp_path: Path, ours: Path) -> None:
    given = {f"model/{name}": Tensor.of(np.zeros(3, np.float32)) for name in ("wte/adam", "h7/ln_9/g/Adam", "Adam")}
    with contents(ours) as opened:
        tensor_bundle.write(ours / "model.ckpt", {name: opened.tensor(name) for name in opened.entries} | given)
    assert open_checkpoint(ours).ignored == {}
    with pytest.raises(CheckpointMismatchError) as caught:
        open_source(ours)
    assert set(caught.value.unexpected) == set(given)


def test_the_tokenizer_is_brought_along_both_ways(trained: Path, tmp_path: Path) -> None:
    with open_source(trained) as source:
        carry_out(plan_conversion(source, tmp_path / "hub", "safetensors"))
    assert (tmp_path / "hub" / "vocab.json").read_bytes() == (trained / "encoder.json").read_bytes()
    with open_source(tmp_path / "hub") as source:
        carry_out(plan_conversion(source, tmp_path / "back", "openai"))
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "back" / name).read_bytes() == (trained / name).read_bytes(), name
    assert (tmp_path / "back" / "hparams.json").read_text() == (trained / "hparams.json").read_text() + "\n"
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == sorted(
        [*RELEASE, "encoder.json", "vocab.bpe"]
    )


def test_a_tokenizer_that_is_half_there_is_told(trained: Path) -> None:
    (trained / "vocab.bpe").unlink()
    tokenizer = open_checkpoint(trained).tokenizer
    assert tokenizer is not None
    with pytest.raises(TokenizerError, match=r"vocab\.bpe"):
        tokenizer()
    (trained / "encoder.json").unlink()
    assert open_checkpoint(trained).tokenizer is None


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_safetensors_and_back_is_bit_identical(tmp_path: Path, seed: int) -> None:
    config = small_config(n_layer=seed + 1, n_embd=12, n_head=3)
    given = values(config, seed)
    safetensors.write(tmp_path / "model.safetensors", given)
    with open_checkpoint(tmp_path / "model.safetensors") as first:
        openai.write(tmp_path / "there", first, about=About(config))
    with open_checkpoint(tmp_path / "there") as second:
        assert bits(second) == bits(given)
        assert list(second.names_in_file) == [row.name for row in parameter_table(config)]
        safetensors.write(tmp_path / "back.safetensors", second)
        openai.write(tmp_path / "again", second, about=About(config))
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    for name in RELEASE:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_names_without_transformer_are_written_too(tmp_path: Path, ours: Path) -> None:
    bare = {name.removeprefix("transformer."): value for name, value in values().items()}
    openai.write(tmp_path / "bare", bare, about=About(CONFIG))
    assert (tmp_path / "bare" / RELEASE[2]).read_bytes() == (ours / RELEASE[2]).read_bytes()


def test_kernels_have_a_further_axis_there_and_nothing_else_is_moved(ours: Path) -> None:
    given = {name.removeprefix("transformer."): value for name, value in values().items()}
    with contents(ours) as opened:
        assert len(opened.entries) == len(given)
        kernel = opened.tensor("model/h1/attn/c_proj/w")
        assert kernel.shape == (1, 8, 8) and np.array_equal(kernel.raw()[0], given["h.1.attn.c_proj.weight"])
        assert opened.tensor("model/h0/attn/c_attn/w").shape == (1, 8, 24)
        assert opened.tensor("model/wte").shape == (37, 8) and opened.tensor("model/ln_f/g").shape == (8,)


def test_the_files_are_those_of_the_release(ours: Path) -> None:
    assert sorted(file.name for file in ours.iterdir()) == RELEASE
    assert json.loads((ours / "hparams.json").read_text()) == {
        "n_vocab": 37, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2
    }  # fmt: skip
    assert (ours / "checkpoint").read_text().splitlines() == [
        'model_checkpoint_path: "model.ckpt"', 'all_model_checkpoint_paths: "model.ckpt"'
    ]  # fmt: skip


def test_gpt2s_own_tokenizer_is_written_as_it_was_released(tmp_path: Path) -> None:
    openai.write(tmp_path / "a", values(), about=About(CONFIG, Head.LM, gpt2_parts()))
    lines = (tmp_path / "a" / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    assert lines[:2] == ["#version: 0.2", "Ġ t"] and len(lines[1:-1]) == 50_000 and lines[-1] == ""
    assert json.loads((tmp_path / "a" / "encoder.json").read_text())["<|endoftext|>"] == 50_256


def test_another_format_in_the_folder_takes_its_place(ours: Path) -> None:
    (ours / "notes.txt").write_text("mine")
    save_checkpoint(ours, values(), format="npz")
    assert sorted(file.name for file in ours.iterdir()) == ["checkpoint", "model.npz", "notes.txt"]
    assert detect(ours)[0] == "npz", "a `checkpoint` that names nothing that is there counts for nothing"
    save_checkpoint(ours, values(), format="openai", about=About(CONFIG))
    assert sorted(file.name for file in ours.iterdir()) == sorted([*RELEASE, "notes.txt"])


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "another activation": ({"activation_function": "gelu"}, "cannot say activation_function='gelu'"),
    "another width": ({"n_inner": 7}, "cannot say n_inner=7"),
    "another epsilon": ({"layer_norm_epsilon": 1e-3}, "cannot say layer_norm_epsilon=0.001"),
    "unscaled": ({"scale_attn_weights": False}, "cannot say scale_attn_weights=False"),
    "scaled by layer": ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "pruned": ({"pruned_heads": {1: [0]}}, "cannot say pruned_heads"),
    "untied": ({"tie_word_embeddings": False}, "cannot say tie_word_embeddings=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_the_code_would_compute_otherwise_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    config = small_config(**changes)
    with pytest.raises(CannotHoldError, match=message):
        openai.write(tmp_path / "out", values(config), about=About(config))
    assert not (tmp_path / "out").exists()


def test_the_same_under_another_name_is_not_refused(tmp_path: Path) -> None:
    config = small_config(activation_function="gelu_pytorch_tanh", n_inner=32)
    openai.write(tmp_path / "out", values(config), about=About(config))


@pytest.mark.parametrize("head", [head for head in Head if head is not Head.LM])
def test_other_heads_are_refused(tmp_path: Path, head: Head) -> None:
    config = small_config(num_labels=3)
    with pytest.raises(CannotHoldError, match=f"no place for the head '{head.value}'"):
        openai.write(tmp_path / "out", random_parameters(config, head.value), about=About(config, head))


def test_what_else_has_no_place_is_refused(tmp_path: Path) -> None:
    half = {name: value.astype(np.float16) for name, value in values().items()}
    with pytest.raises(CannotHoldError, match="cannot hold float16; expected one of float32"):
        openai.write(tmp_path / "out", half, about=About(CONFIG))
    with pytest.raises(CheckpointError, match=r"no place in this format: lm_head\.weight"):
        openai.write(
            tmp_path / "out", {**values(), "lm_head.weight": np.zeros((37, 8), np.float32)}, about=About(CONFIG)
        )
    with pytest.raises(CheckpointError, match="needs about"):
        openai.write(tmp_path / "out", values())
    for named in ({"metadata": {"a": "b"}}, {"max_shard_bytes": 5}):
        with pytest.raises(CheckpointError, match="neither metadata nor shards"):
            openai.write(tmp_path / "out", values(), about=About(CONFIG), **named)
    parts = gpt2_parts()
    parts.added.append(type(parts.added[0])("<pad>", 50_257, True))
    with pytest.raises(CheckpointError, match="no place for tokens beyond the vocabulary"):
        openai.write(tmp_path / "out", values(), about=About(CONFIG, Head.LM, parts))
    assert not (tmp_path / "out").exists()


# Which checkpoint is meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    ["", "checkpoint", "model.ckpt", "model.ckpt.index", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"],
)
def test_any_of_its_files_and_what_all_names_begin_with_will_do(ours: Path, given: str) -> None:
    assert detect(ours / given)[0] == "openai"
    assert bits(open_checkpoint(ours / given)) == bits(openai.read(ours / given)) == bits(values())


def test_a_folder_without_checkpoint_is_read_if_only_one_can_be_meant(ours: Path) -> None:
    (ours / "checkpoint").unlink()
    assert detect(ours) == ("openai", ours / "model.ckpt.index")
    for end in ("index", "data-00000-of-00001"):
        (ours / f"model-5.{end}").write_bytes((ours / f"model.ckpt.{end}").read_bytes())
    assert detect(ours) == ("openai", ours / "model.ckpt.index")
    (ours / "model.ckpt.index").unlink()
    assert bits(open_checkpoint(ours)) == bits(values())
    (ours / "model-6.index").write_bytes((ours / "model-5.index").read_bytes())
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(ours)


def test_a_file_that_is_no_table_is_none_of_ours(tmp_path: Path, ours: Path) -> None:
    (tmp_path / "book.index").write_text("a, b, c")
    (tmp_path / "000005.ldb").write_bytes((ours / "model.ckpt.index").read_bytes())
    assert openai.find(tmp_path / "book.index") is openai.find(tmp_path) is openai.find(tmp_path / "000005.ldb") is None
    assert openai.find(tmp_path / "nothing") is None
    (tmp_path / "checkpoint").write_text("a note")
    assert openai.find(tmp_path / "checkpoint") is None
    with pytest.raises(CheckpointFormatError, match="no part of a TensorFlow checkpoint"):
        openai.read(tmp_path / "000005.ldb")
    with pytest.raises(CheckpointError, match="No such file"):
        openai.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    "path",
    ["/content/checkpoint/run1/model-3", "C:\\\\runs\\\\model-3", "/m\\303\\266del/model-3", '/a\\"\\\\b/model-3'],
)
def test_where_the_folder_stood_when_it_was_trained_does_not_matter(trained: Path, path: str) -> None:
    opened = open_checkpoint(rewritten(trained, "checkpoint", f'model_checkpoint_path: "{path}"\n'))
    assert opened.path == trained / "model-3.index"
    assert len(opened.notes) == 1 and "'model-3' beside it was read" in opened.notes[0]


def test_a_name_that_is_not_ascii_is_read_as_tensorflow_writes_it(trained: Path) -> None:
    for file in list(trained.glob("model-3.*")):
        file.rename(trained / file.name.replace("model", "mödel"))
    opened = open_checkpoint(rewritten(trained, "checkpoint", 'model_checkpoint_path: "m\\303\\266del-3"\n'))
    assert opened.path.name == "mödel-3.index" and opened.notes == ()


@pytest.mark.parametrize("path", ["../model-3", "sub/model-3", "..\\\\model-3", "model-3/..", "a\\000b"])
def test_checkpoint_never_leads_out_of_its_folder(trained: Path, path: str) -> None:
    rewritten(trained, "checkpoint", f'model_checkpoint_path: "{path}"\n')
    for target in (trained, trained / "checkpoint"):
        with pytest.raises(UnsafeCheckpointError, match="not a plain file name"):
            open_checkpoint(target)


def test_links_are_not_followed_out_of_the_folder(trained: Path, tmp_path: Path) -> None:
    (trained / "model-3.index").rename(tmp_path / "elsewhere")
    (trained / "model-3.index").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match="a symbolic link"):
        open_checkpoint(trained)
    (trained / "model-3.index").unlink()
    (tmp_path / "elsewhere").rename(trained / "model-3.index")
    (trained / "hparams.json").rename(tmp_path / "hparams")
    (trained / "hparams.json").symlink_to(tmp_path / "hparams")
    with pytest.raises(UnsafeCheckpointError, match="a symbolic link"):
        open_checkpoint(trained)


def test_a_checkpoint_that_is_not_there_is_told(trained: Path) -> None:
    rewritten(trained, "checkpoint", 'model_checkpoint_path: "model-9"\n')
    with pytest.raises(CheckpointError, match="names 'model-9', but"):
        open_checkpoint(trained / "checkpoint")
    assert open_checkpoint(trained).path.name == "model-3.index", "the only one there is"
    (trained / "model-3.index").unlink()
    with pytest.raises(CheckpointError, match="names 'model-9', but"):
        openai.read(trained)
    (trained / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"model\.ckpt\.index"):
        openai.read(trained)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model_checkpoint_path: 5", "names 0 checkpoints"),
        ('model_checkpoint_path: "a"\nmodel_checkpoint_path: "b"', "names 2 checkpoints"),
        ('model_checkpoint_path: "a', "names 0 checkpoints"),
        ('model_checkpoint_path: "\\377"', "not UTF-8"),
        ('model_checkpoint_path: "a"' + " " * (1 << 20), "expected at most 1048576"),
    ],
)
def test_a_damaged_checkpoint_is_told(trained: Path, content: str, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(rewritten(trained, "checkpoint", content))


# hparams.json ---------------------------------------------------------------------------------------------------------

HPARAMS = {"n_vocab": 37, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"n_vocab": ' + "9" * 5000 + "}", "is not JSON"),
        ("[]", r"holds \[\]; expected n_vocab, n_ctx"),
        (json.dumps({"n_vocab": 37}), "expected n_vocab, n_ctx, n_embd, n_head, n_layer and nothing else"),
        (json.dumps(HPARAMS | {"activation": "relu"}), "refuses other names"),
        (json.dumps(HPARAMS | {"n_head": 0}), "expected sizes above zero"),
        (json.dumps(HPARAMS | {"n_head": True}), "expected sizes above zero"),
        (json.dumps(HPARAMS | {"n_ctx": 16.0}), "expected sizes above zero"),
        (json.dumps(HPARAMS | {"n_embd": 1 << 31}), "expected sizes above zero"),
        (json.dumps(HPARAMS | {"n_layer": 10_001}), "up to 10000 layers"),
        (json.dumps(HPARAMS | {"attn_pdrop": 2}), "expected dropouts"),
        (json.dumps(HPARAMS | {"attn_pdrop": "0.1"}), "expected dropouts"),
        (json.dumps(HPARAMS | {"attn_pdrop": float("nan")}), "expected dropouts"),
        (json.dumps(HPARAMS) + " " * (1 << 20), "expected at most 1048576"),
    ],
)
def test_hparams_that_no_model_can_have_are_told(ours: Path, content: str, message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        open_checkpoint(rewritten(ours, "hparams.json", content))


def test_the_dropouts_of_openais_next_code_are_kept(ours: Path) -> None:
    opened = open_checkpoint(
        rewritten(ours, "hparams.json", json.dumps(HPARAMS | {"resid_pdrop": 0, "attn_pdrop": 0.2, "head_pdrop": 0.3}))
    )
    sizes = {ours: HPARAMS[theirs] for theirs, ours in openai.HYPERPARAMETERS.items()}
    assert opened.config == sizes | {"resid_pdrop": 0, "attn_pdrop": 0.2}
    assert opened.notes == ("hparams.json says head_pdrop=0.3, which belongs to another head",)


def test_without_hparams_nothing_is_made_up(ours: Path) -> None:
    (ours / "hparams.json").unlink()
    assert open_checkpoint(ours).config is None
    with pytest.raises(Gpt2Error, match="give the configuration"):
        open_source(ours)


def test_hparams_of_another_model_are_told(ours: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"h\.2\.ln_1\.weight"):
        open_source(rewritten(ours, "hparams.json", json.dumps(HPARAMS | {"n_layer": 3})))


# What the index may hold ----------------------------------------------------------------------------------------------


def test_a_kernel_without_its_first_axis_is_not_taken_for_one(ours: Path) -> None:
    with contents(ours) as opened:
        given = {name: opened.tensor(name) for name in opened.entries}
        flat = {"model/h0/attn/c_proj/w": opened.tensor("model/h0/attn/c_proj/w", (8, 8))}
        tensor_bundle.write(ours / "model.ckpt", given | flat)
    with pytest.raises(CheckpointFormatError, match=r"shape \(1, in, out\): model/h0/attn/c_proj/w is \(8, 8\)"):
        open_checkpoint(ours)


def test_a_tensor_of_another_shape_is_misshaped(ours: Path) -> None:
    with contents(ours) as opened:
        given = {name: opened.tensor(name) for name in opened.entries}
        tensor_bundle.write(ours / "model.ckpt", given | {"model/h0/ln_1/g": Tensor.of(np.zeros((1, 8), np.float32))})
    with pytest.raises(CheckpointMismatchError) as caught:
        open_source(ours)
    assert caught.value.misshaped == (("transformer.h.0.ln_1.weight", (1, 8), (8,)),)


def test_names_of_pythons_objects_are_told(ours: Path) -> None:
    names = ("layer/kernel/.ATTRIBUTES/VARIABLE_VALUE", "save_counter/.ATTRIBUTES/VARIABLE_VALUE")
    tensor_bundle.write(ours / "model.ckpt", {name: Tensor.of(np.zeros(2, np.float32)) for name in names})
    with pytest.raises(CheckpointFormatError, match=r"those of Python's objects \('layer/kernel"):
        open_checkpoint(ours)


def test_a_block_beyond_all_reason_is_told(ours: Path) -> None:
    tensor_bundle.write(ours / "model.ckpt", {"model/h99999/ln_1/g": Tensor.of(np.zeros(2, np.float32))})
    with pytest.raises(CheckpointFormatError, match="names block 99999"):
        open_checkpoint(ours)


def test_reading_and_writing_import_no_framework(trained: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from gpt2_core.conversion import *\n"
        "with open_source(sys.argv[1]) as source:\n"
        "    carry_out(plan_conversion(source, sys.argv[2], 'openai'))\n"
        "frameworks = {'tensorflow', 'torch', 'google', 'keras', 'transformers'}\n"
        "strange = frameworks & {name.partition('.')[0] for name in sys.modules}\n"
        "sys.exit(f'imported: {strange}' if strange else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, trained, tmp_path / "o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-3.index", "model-3.data-00000-of-00001", "checkpoint", "hparams.json"])
def test_flipped_cut_and_spliced_files_end_well(tmp_path: Path, name: str) -> None:
    folder = unpack(tmp_path / "run")
    whole = (folder / name).read_bytes()
    places = st.integers(0, len(whole) - 1)

    @bounded
    @given(
        flips=st.lists(st.tuples(places, st.integers(0, 255)), max_size=4),
        cut=st.one_of(st.none(), places),
        splice=st.one_of(st.none(), st.tuples(places, places, places)),
    )
    def run(flips: list[tuple[int, int]], cut: int | None, splice: tuple[int, int, int] | None) -> None:
        data = bytearray(whole)
        for place, value in flips:
            data[place] = value
        if splice is not None:
            start, end, to = splice
            data[to:to] = data[start:end]
        (folder / name).write_bytes(data[:cut])
        try:
            with openai.read(folder) as opened:
                for tensor in opened.values():
                    assert tensor.array().shape == tensor.shape
                if opened.tokenizer is not None:
                    opened.tokenizer()
        except (CheckpointError, TokenizerError) as cause:
            assert len(str(cause)) < 5000

    run()


def test_flipped_bytes_under_sound_checksums_end_well(tmp_path: Path) -> None:
    """A stranger computes the checksums of what they changed."""
    folder = unpack(tmp_path / "run")
    whole = (folder / "model-3.index").read_bytes()
    _, _, at = sstable._place(whole[-sstable.FOOTER :], 0)
    index, size, _ = sstable._place(whole[-sstable.FOOTER :], at)
    blocks = [(0, index - 13 - 5), (index, index + size)]  # entries, and the block of blocks; one of metadata between

    @bounded
    @given(flips=st.lists(st.tuples(st.integers(0, index + size - 1), st.integers(0, 255)), min_size=1, max_size=3))
    def run(flips: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for place, value in flips:
            data[place] = value
        for start, end in blocks:
            data[end + 1 : end + 5] = masked(crc32c(data[start : end + 1])).to_bytes(4, "little")
        (folder / "model-3.index").write_bytes(data)
        try:
            with openai.read(folder) as opened:
                assert opened.bytes_total <= 18_784
                for tensor in opened.values():
                    tensor.array()
        except CheckpointError as cause:
            assert len(str(cause)) < 5000 and "checksum of the block at byte 0" not in str(cause)

    run()


def test_no_flipped_bit_of_the_numbers_goes_unnoticed(trained: Path) -> None:
    whole = bytearray((trained / "model-3.data-00000-of-00001").read_bytes())
    with contents(trained, "model-3") as opened:
        entries = [
            each
            for each in opened.entries.values()
            if each.name in set(open_checkpoint(trained).names_in_file.values())
        ]
    for each in entries:
        at = each.offset + each.size // 2
        whole[at] ^= 4
        (trained / "model-3.data-00000-of-00001").write_bytes(whole)
        with pytest.raises(CheckpointFormatError, match=each.name), open_checkpoint(trained) as damaged:
            bits(damaged)
        whole[at] ^= 4


# TensorFlow itself ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> ModuleType:
    pytest.importorskip("tensorflow")
    import openai_graph

    return openai_graph


def hparams_of(config: GPT2Config) -> dict[str, int]:
    return {theirs: getattr(config, ours) for theirs, ours in openai.HYPERPARAMETERS.items()}


def test_a_saver_restores_what_we_write_and_computes_the_same(graph: ModuleType, ours: Path) -> None:
    tf, v1, ids = graph.tf, graph.v1, random_ids(CONFIG, 2, 7)
    with tf.Graph().as_default(), graph.session() as session:
        logits = graph.model(hparams_of(CONFIG), ids)
        latest = tf.train.latest_checkpoint(str(ours))
        assert latest == str(ours / "model.ckpt")
        v1.train.Saver().restore(session, latest)
        theirs = session.run(logits)
        assert not session.run(v1.report_uninitialized_variables()).size
    assert error(ReferenceModel(CONFIG, values())(ids).logits, theirs) <= TRANSFORMERS


def test_tensorflow_reads_what_we_write_bit_for_bit(graph: ModuleType, ours: Path) -> None:
    tf = graph.tf
    reader = tf.train.load_checkpoint(str(ours))
    given = {name.removeprefix("transformer."): value for name, value in values().items()}
    names = {row.theirs[0]: row.ours for row in openai.NAMES.rows(CONFIG.n_layer)}
    shapes = dict(tf.train.list_variables(str(ours)))
    assert set(shapes) == set(names)
    for there, here in names.items():
        theirs = reader.get_tensor(there)
        kernel = there.endswith("/w")
        assert theirs.dtype == np.float32 and list(theirs.shape) == shapes[there] == [1] * kernel + list(
            given[here].shape
        )
        assert theirs.tobytes() == given[here].tobytes()


def test_the_meta_that_we_write_is_a_graph_of_nothing(graph: ModuleType, ours: Path) -> None:
    tf, v1 = graph.tf, graph.v1
    with tf.Graph().as_default():
        assert v1.train.import_meta_graph(str(ours / "model.ckpt.meta")) is None, "there is nothing to save"


def saved(graph: ModuleType, folder: Path) -> dict[str, np.ndarray]:
    """Save the graph's model with its first numbers; the numbers, by the names of the variables."""
    tf, v1 = graph.tf, graph.v1
    folder.mkdir()
    with tf.Graph().as_default(), graph.session() as session:
        graph.model(hparams_of(CONFIG), random_ids(CONFIG, 1, 3))
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(folder / "model.ckpt"), write_meta_graph=False)
        found = {variable.op.name: session.run(variable) for variable in v1.global_variables()}
    (folder / "hparams.json").write_text(json.dumps(hparams_of(CONFIG)))
    return found


def assert_read(opened: Checkpoint, given: Mapping[str, np.ndarray]) -> None:
    assert opened.names_in_file.keys() == set(opened)
    assert sorted(opened.names_in_file.values()) == sorted(given)
    for here, there in opened.names_in_file.items():
        value = given[there][0] if there.endswith("/w") else given[there]
        assert opened.shape(here) == value.shape and opened.raw(here).tobytes() == value.tobytes()


def test_what_a_saver_writes_is_read_and_written_byte_for_byte(graph: ModuleType, tmp_path: Path) -> None:
    given = saved(graph, tmp_path / "theirs")
    opened = open_checkpoint(tmp_path / "theirs")
    assert_read(opened, given)
    openai.write(tmp_path / "ours", opened, about=About(CONFIG))
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


def test_what_tensorflow_wrote_to_several_files_is_read(graph: ModuleType, tmp_path: Path) -> None:
    """As a Saver does where variables are on several machines: each writes its own, and one merges the indices."""
    tf = graph.tf
    tensors = {name: Tensor.of(value) for name, value in values().items()}
    given = {name: tensor.raw() for name, tensor in openai.NAMES.to_file(tensors, CONFIG).items()}
    prefixes = [str(tmp_path / "parts" / f"part-{number}") for number in range(3)]
    for number, prefix in enumerate(prefixes):
        names = sorted(given)[number::3]
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(given[name]) for name in names],
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(tmp_path / "model.ckpt"))
    opened = open_checkpoint(tmp_path)
    assert [file.name for file in opened.files[1:]] == [f"model.ckpt.data-0000{n}-of-00003" for n in range(3)]
    assert_read(opened, given)


def test_other_float_formats_are_read(graph: ModuleType, tmp_path: Path) -> None:
    tf, v1 = graph.tf, graph.v1
    for dtype in (tf.float16, tf.bfloat16, tf.float64):
        with tf.Graph().as_default(), graph.session() as session:
            one = v1.get_variable("model/wte", initializer=tf.cast(tf.random.normal([5, 3]), dtype))
            session.run(v1.global_variables_initializer())
            v1.train.Saver().save(session, str(tmp_path / dtype.name), write_meta_graph=False, write_state=False)
            value = session.run(one)
        tensor = openai.read(tmp_path / f"{dtype.name}.index")["transformer.wte.weight"]
        assert tensor.dtype == dtype.name and tensor.raw().tobytes() == value.tobytes()


def test_partitioned_variables_are_refused_by_name(graph: ModuleType, tmp_path: Path) -> None:
    tf, v1 = graph.tf, graph.v1
    with tf.Graph().as_default(), graph.session() as session:
        v1.get_variable("model/wte", [6, 2], partitioner=v1.fixed_size_partitioner(2))
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "model"), write_meta_graph=False)
    with pytest.raises(CheckpointFormatError, match="'model/wte' is a partitioned variable"):
        open_checkpoint(tmp_path)


def test_every_slot_of_tensorflows_optimizers_is_known(graph: ModuleType, tmp_path: Path) -> None:
    tf, v1 = graph.tf, graph.v1
    train = v1.train
    optimizers = {
        "adam": train.AdamOptimizer(0.1),
        "momentum": train.MomentumOptimizer(0.1, 0.9),
        "rmsprop": train.RMSPropOptimizer(0.1, centered=True),
        "adagrad": train.AdagradOptimizer(0.1),
        "adadelta": train.AdadeltaOptimizer(0.1),
        "ftrl": train.FtrlOptimizer(0.1),
        "descent": train.GradientDescentOptimizer(0.1),
    }
    seen = set()
    for name, optimizer in optimizers.items():
        with tf.Graph().as_default(), graph.session() as session:
            with v1.variable_scope("model"):
                table = graph.variable("wte", [5, 3])
            step = train.get_or_create_global_step()
            moved = optimizer.minimize(tf.reduce_sum(table**2), global_step=step)
            with tf.control_dependencies([moved]):
                train.ExponentialMovingAverage(0.9).apply([table])
            session.run(v1.global_variables_initializer())
            train.Saver().save(session, str(tmp_path / name), write_meta_graph=False, write_state=False)
        opened = openai.read(tmp_path / f"{name}.index")
        assert list(opened) == ["transformer.wte.weight"], name
        seen |= set(opened.ignored)
    assert {name.rpartition("/")[2] for name in seen if "/" in name} == set(openai.SLOTS)


def test_what_tensorflow_2_saves_of_objects_is_told(graph: ModuleType, tmp_path: Path) -> None:
    tf = graph.tf
    tf.train.Checkpoint(**{"model/wte": tf.Variable(tf.zeros([3, 2]))}).save(str(tmp_path / "ckpt"))
    with pytest.raises(CheckpointFormatError, match=r"those of Python's objects \('model\.Swte/\.ATTRIBUTES"):
        open_checkpoint(tmp_path)


def test_tensorflow_reads_a_table_that_we_compressed(graph: ModuleType, ours: Path) -> None:
    """Nobody writes such any more; that TensorFlow reads ours shows that we read its early ones."""
    file = MappedFile(ours / "model.ckpt.index")
    rows = sstable.read(file)
    file.close()
    plain = b"".join(entry(key, value) for key, value in rows) + bytes(4) + b"\1\0\0\0"
    packed, empty = block(snapped(plain), kind=1), block(b"")
    assert len(packed) < len(plain)
    places = block(entry(b"z", b"\0" + to_varint(len(packed) - 5)))
    numbers = (len(packed), len(empty) - 5, len(packed) + len(empty), len(places) - 5)
    footer = b"".join(map(to_varint, numbers)).ljust(40, b"\0") + sstable.MAGIC
    (ours / "model.ckpt.index").write_bytes(packed + empty + places + footer)
    assert bits(open_checkpoint(ours)) == bits(values())
    reader = graph.tf.train.load_checkpoint(str(ours))
    assert reader.get_tensor("model/wte").tobytes() == values()["transformer.wte.weight"].tobytes()
