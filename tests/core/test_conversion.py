"""gpt2_core.conversion: every format to every other and back, and everything that is said or refused on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core import conversion
from gpt2_core.checkpoints import Tensor, formats, holds_of, open_checkpoint, save_checkpoint
from gpt2_core.checkpoints.holds import BESIDE, FLOATS, INSIDE, NOWHERE, OWN, objections
from gpt2_core.checkpoints.tensors import STORAGE, converted
from gpt2_core.config import PRESETS, GPT2Config
from gpt2_core.conversion import Report, carry_out, open_source, plan_conversion
from gpt2_core.errors import (
    CannotHoldError,
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    InputError,
    TokenizerError,
    VerificationError,
    WriteError,
)
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.verification import check_tensors, outputs

FORMATS = list(formats())
CONFIG = GPT2Config(
    vocab_size=37,
    n_positions=16,
    n_embd=32,
    n_layer=2,
    n_head=2,
    num_labels=3,
    bos_token_id=1,
    eos_token_id=1,
    extra={"task_specific_params": {"text-generation": {"max_length": 50}}},
)
#: What may differ from a plain GPT-2, one by one and all together.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "pruned": {"pruned_heads": {1: [0]}},
    "n_inner": {"n_inner": 7},
    "activation": {"activation_function": "relu"},
    "epsilon": {"layer_norm_epsilon": 1e-3},
    "scaling": {"scale_attn_by_inverse_layer_idx": True},
}
VARIANTS["all"] = {key: value for variant in VARIANTS.values() for key, value in variant.items()}
#: The fields of a configuration that change what is computed.
COMPUTED = {
    "n_head",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "pruned_heads",
    "tie_word_embeddings",
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def model(
    folder: Path, config: GPT2Config = CONFIG, head: Head | str = Head.LM, dtype: str = "float32", **changes: Any
) -> Path:
    """A model on disk as the hub has it; ``changes`` replace tensors, None leaves one out."""
    chance = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        row.name: converted(Tensor.of(chance.normal(0.1, 0.4, row.shape).astype(np.float32)), dtype)
        for row in parameter_table(config, head)
    }
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    save_checkpoint(folder, {name: value for name, value in tensors.items() if value is not None})
    config.save_pretrained(folder)
    return folder


def convert(source: Path | str, target: Path, to: str, progress: Any = None, **settings: Any) -> Report:
    opening = {key: settings.pop(key) for key in ("format", "config", "head") if key in settings}
    with open_source(source, local_files_only=True, **opening) as opened:
        plan = plan_conversion(opened, target, to, **settings)
        return carry_out(plan, *([progress] if progress else []))


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_checkpoint(folder) as opened:
        return {name: (tensor.dtype, tensor.shape, tensor.raw().tobytes()) for name, tensor in opened.items()}


def fits(format: str, config: GPT2Config, head: Head, dtype: str = "float32") -> bool:
    return not objections(format, holds_of(formats()[format]), config, head, [dtype])


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Round trips ----------------------------------------------------------------------------------------------------------

CASES = [
    pytest.param(format, head, variant, id=f"{format}-{head.value}-{variant}")
    for format in FORMATS
    for head in Head
    for variant, changes in VARIANTS.items()
    if fits(format, CONFIG.replace(**changes), head)
]


@pytest.mark.parametrize(("format", "head", "variant"), CASES)
def test_there_and_back_changes_no_bit(tmp_path: Path, format: str, head: Head, variant: str) -> None:
    config = CONFIG.replace(**VARIANTS[variant])
    source = model(tmp_path / "a", config, head)
    convert(source, tmp_path / "b", format, verify="logits", tokenizer=False)
    back = convert(tmp_path / "b", tmp_path / "c", "safetensors", verify="tensors", head=head, tokenizer=False)
    assert bits(tmp_path / "c") == bits(source)
    assert back.plan.source.checkpoint.format == format
    returned = GPT2Config.from_json_file(tmp_path / "c" / "config.json")
    for key in COMPUTED - {"activation_function"}:
        assert getattr(returned, key) == getattr(config, key) or returned.inner_dim == config.inner_dim, key


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_dtype_a_format_holds_survives_it(tmp_path: Path, format: str, dtype: str) -> None:
    if not fits(format, CONFIG, Head.LM, dtype):
        pytest.skip(f"{format} does not hold {dtype}")
    source = model(tmp_path / "a", dtype=dtype)
    convert(source, tmp_path / "b", format, verify="tensors", tokenizer=False)
    convert(tmp_path / "b", tmp_path / "c", "safetensors", dtype=dtype, tokenizer=False)
    assert bits(tmp_path / "c") == bits(source)


def test_a_chain_through_all_formats_and_back_changes_no_bit(tmp_path: Path) -> None:
    source = here = model(tmp_path / "start")
    for number, format in enumerate([*FORMATS, *reversed(FORMATS), "safetensors"]):
        there = tmp_path / str(number)
        convert(here, there, format, verify="tensors", tokenizer=False)
        here = there
    assert bits(here) == bits(source)
    assert np.array_equal(computed(here), computed(source))


def computed(folder: Path) -> np.ndarray:
    with open_source(folder) as opened:
        return outputs(opened.config.replace(activation_function="gelu_new"), opened.head, opened.tensors())["logits"]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("of", FORMATS)
def test_any_format_to_any_other(tmp_path: Path, of: str, to: str) -> None:
    source = model(tmp_path / "a")
    convert(source, tmp_path / "b", of, verify="none", tokenizer=False)
    report = convert(tmp_path / "b", tmp_path / "c", to, verify="tensors", tokenizer=False)
    assert report.plan.lossless and report.verification is not None
    convert(tmp_path / "c", tmp_path / "d", "safetensors", tokenizer=False)
    assert bits(tmp_path / "d") == bits(source)


@pytest.mark.parametrize("format", FORMATS)
def test_what_changes_numbers_is_said_by_a_format_or_taken_for_granted_by_all_its_readers(format: str) -> None:
    holds = holds_of(formats()[format])
    if holds.config != BESIDE:
        kept = holds.config_keys if holds.config == INSIDE else frozenset()
        assert kept | set(holds.fixed) >= COMPUTED, f"{format} is silent about {COMPUTED - kept - set(holds.fixed)}"
    assert holds.config in (BESIDE, INSIDE, NOWHERE) and holds.tokenizer in (BESIDE, INSIDE, OWN, NOWHERE)
    assert set(holds.dtypes) <= set(STORAGE) and holds.heads <= set(Head)


# What is there --------------------------------------------------------------------------------------------------------


def test_a_plan_says_every_name_shape_dtype_and_byte(tmp_path: Path) -> None:
    with open_source(model(tmp_path / "a")) as source:
        plan = plan_conversion(source, tmp_path / "b", "nanogpt", dtype="float16")
    row = next(row for row in plan.rows if row.name == "transformer.h.1.mlp.c_fc.weight")
    assert (row.source_name, row.target_name) == (row.name, row.name) and row.shape == (32, 128)
    assert (row.source_dtype, row.dtype, row.bytes) == ("float32", "float16", 2 * 32 * 128)
    assert plan.bytes == 2 * sum(row.size for row in parameter_table(CONFIG)) and not plan.lossless
    assert [row.name for row in plan.rows] == [row.name for row in parameter_table(CONFIG)]


def test_names_there_are_those_of_both_files(tmp_path: Path) -> None:
    convert(model(tmp_path / "a"), tmp_path / "b", "llmc", verify="none")
    with open_source(tmp_path / "b") as source:
        plan = plan_conversion(source, tmp_path / "c", "flax")
    row = next(row for row in plan.rows if row.name == "transformer.h.1.mlp.c_fc.weight")
    assert (row.source_name, row.target_name) == ("fcw[1]", "transformer/h/1/mlp/c_fc/kernel")


def test_what_the_files_of_a_checkpoint_begin_with_is_a_source_and_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2_core.hub.resolve", lambda *given, **options: pytest.fail(f"asked the hub for {given}"))
    convert(model(tmp_path / "a"), tmp_path / "b", "openai")
    for format in (None, "openai"):
        report = convert(tmp_path / "b" / "model.ckpt", tmp_path / (format or "c"), "safetensors", format=format)
        assert report.plan.source.checkpoint.path.name == "model.ckpt.index"
        assert bits(report.plan.target) == bits(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "b")
    with open_source("model.ckpt") as opened:
        assert opened.config.n_head == CONFIG.n_head and opened.tokenizer is None


def test_what_else_a_folder_holds_is_said_unless_the_format_was_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "a")
    convert(folder, tmp_path / "b.npz", "npz")
    (tmp_path / "b.npz").rename(folder / "model.npz")
    convert(folder, tmp_path / "b.bin", "bin")
    (tmp_path / "b.bin").rename(folder / "pytorch_model.bin")
    report = convert(folder, tmp_path / "c", "safetensors")
    assert report.plan.notes[0] == "the folder also holds bin, npz; safetensors was read (--from reads another)"
    named = convert(folder, tmp_path / "d", "safetensors", format="npz")
    assert named.plan.source.checkpoint.format == "npz" and not any("also holds" in note for note in named.plan.notes)


def test_missing_unexpected_and_misshaped_tensors_are_reported_together(tmp_path: Path) -> None:
    odd = model(
        tmp_path,
        transformer__ln_f__bias=None,
        extra=np.zeros(2, np.float32),
        transformer__wpe__weight=np.zeros((3, 32), np.float32),
    )
    with pytest.raises(CheckpointMismatchError) as error:
        open_source(odd)
    assert error.value.missing == ("transformer.ln_f.bias",) and error.value.unexpected == ("extra",)
    assert [name for name, _, _ in error.value.misshaped] == ["transformer.wpe.weight"]


def test_no_head_starts_afresh_in_a_conversion(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"missing \(1\):\n    multiple_choice_head\.summary\.bias"):
        open_source(model(tmp_path, head=Head.DOUBLE, multiple_choice_head__summary__bias=None))


def test_buffers_and_a_tied_head_are_left_out_by_name(tmp_path: Path) -> None:
    mask = np.ones((1, 1, 16, 16), bool)
    model(tmp_path / "a", transformer__h__0__attn__bias=mask)
    tokens = open_checkpoint(tmp_path / "a").array("transformer.wte.weight")
    model(tmp_path / "a", transformer__h__0__attn__bias=mask, lm_head__weight=tokens.copy())
    report = convert(tmp_path / "a", tmp_path / "b", "bin").to_dict()
    assert set(report["source"]["ignored"]) == {"transformer.h.0.attn.bias", "lm_head.weight"}
    assert set(bits(tmp_path / "b")) == {row.name for row in parameter_table(CONFIG)}


def test_a_second_head_is_not_dropped_unless_that_is_asked_for(tmp_path: Path) -> None:
    two = model(tmp_path / "a", head=Head.SEQUENCE, classifier__bias=np.zeros(3, np.float32))
    with pytest.raises(CheckpointMismatchError, match=r"more than one head.*--head sequence"):
        open_source(two)
    report = convert(two, tmp_path / "b", "npz", head="sequence").to_dict()
    assert list(report["source"]["ignored"]) == ["classifier.bias"]


@pytest.mark.parametrize(
    ("changes", "head", "expected"),
    [
        ({}, Head.NONE, Head.NONE),
        ({"extra": {"architectures": ["GPT2LMHeadModel"]}}, Head.NONE, Head.LM),
        ({"extra": {"architectures": ["FlaxGPT2Model"]}}, Head.NONE, Head.NONE),
        ({"extra": {"architectures": ["Strange"]}}, Head.NONE, Head.LM),
        ({"tie_word_embeddings": False}, Head.NONE, Head.NONE),
        ({"tie_word_embeddings": False}, Head.LM, Head.LM),
        ({}, Head.DOUBLE, Head.DOUBLE),
        ({}, Head.QA, Head.QA),
    ],
)
def test_what_stands_on_top_is_what_is_there_or_what_the_configuration_says(
    tmp_path: Path, changes: dict[str, Any], head: Head, expected: Head
) -> None:
    changes = {"extra": {"architectures": ["GPT2Model"]}} | changes if head is Head.NONE and not changes else changes
    with open_source(model(tmp_path, CONFIG.replace(**changes), head)) as source:
        assert source.head is expected


# The configuration ----------------------------------------------------------------------------------------------------


def test_without_a_configuration_the_shapes_of_a_released_model_tell_it(tmp_path: Path) -> None:
    config = PRESETS["gpt2"].replace(vocab_size=5, n_positions=3, bos_token_id=None, eos_token_id=None)
    zeros = {row.name: np.zeros(row.shape, np.float16) for row in parameter_table(config)}
    zeros["lm_head.weight"] = np.ones((5, 768), np.float16)
    save_checkpoint(tmp_path, zeros)
    with open_source(tmp_path) as source:
        assert (source.config.n_head, source.config.n_inner, source.config.vocab_size) == (12, None, 5)
        assert source.config.tie_word_embeddings is False
        (note,) = source.known.notes
        assert "no configuration was found" in note and "n_head=12" in note
        assert note in plan_conversion(source, tmp_path / "b", "bin").notes


@pytest.mark.parametrize(("format", "file"), [("openai", "hparams.json"), ("kerashub", "config.json")])
def test_the_file_that_the_configuration_stands_in_is_named(tmp_path: Path, format: str, file: str) -> None:
    convert(model(tmp_path / "a"), tmp_path / "b", format)
    with open_source(tmp_path / "b") as opened:
        assert opened.known.source == str(tmp_path / "b" / file)
    text = (tmp_path / "b" / file).read_text()
    (tmp_path / "b" / file).write_text(
        text.replace("heads", "n_head").replace(f'n_head": {CONFIG.n_head}', 'n_head": 7')
    )
    with pytest.raises((ConfigError, CheckpointError), match=file.replace(".", r"\.")):
        open_source(tmp_path / "b")


def test_shapes_of_no_released_model_tell_no_number_of_heads(tmp_path: Path) -> None:
    (model(tmp_path) / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"2 layers 32 wide, but not the number of heads.*--config"):
        open_source(tmp_path)
    with open_source(tmp_path, config=CONFIG) as source:
        assert source.config is CONFIG and source.known.source == "given"
    save_checkpoint(tmp_path, {"a": np.zeros(2, np.float32)})
    with pytest.raises(ConfigError, match=r"wte\.weight is missing"):
        open_source(tmp_path)


def test_the_configuration_that_is_written_says_what_the_tensors_are_now(tmp_path: Path) -> None:
    source = model(tmp_path / "a", CONFIG.replace(extra={"torch_dtype": "float32", "kept": 1}), Head.TOKEN)
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    convert(source, tmp_path / "b", "safetensors", dtype="float16")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["architectures"] == ["GPT2ForTokenClassification"] and written["kept"] == 1
    assert written["dtype"] == "float16" and "torch_dtype" not in written
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"temperature": 0.7}'


def test_what_has_no_place_in_a_format_is_listed(tmp_path: Path) -> None:
    extra = {**CONFIG.extra, "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    with open_source(model(tmp_path / "a", CONFIG.replace(resid_pdrop=0.3, extra=extra))) as source:
        plan = plan_conversion(source, tmp_path / "b", "llmc")
        assert plan.lost["resid_pdrop"] == 0.3 and plan.lost["eos_token_id"] == 1 and "n_head" not in plan.lost
        assert "task_specific_params" in plan.lost and "architectures" not in plan.lost
        assert any("llmc has no place for resid_pdrop=0.3" in note for note in plan.notes)
        assert not plan_conversion(source, tmp_path / "b", "bin").lost


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_a_format_cannot_hold_is_refused_with_every_reason_and_nothing_is_written(tmp_path: Path) -> None:
    config = CONFIG.replace(n_inner=7, activation_function="relu", tie_word_embeddings=False, pruned_heads={1: [0]})
    with open_source(model(tmp_path / "a", config, dtype="float16")) as source, pytest.raises(CannotHoldError) as error:
        plan_conversion(source, tmp_path / "b", "llmc")
    for reason in (
        "llmc cannot say n_inner=7: its readers take None for granted",
        "activation_function='relu'",
        "'gelu_new' or 'gelu_pytorch_tanh'",
        "tie_word_embeddings=False",
        "pruned_heads={1: (0,)}",
        "llmc cannot hold float16; expected one of float32, bfloat16: give --dtype",
    ):
        assert reason in str(error.value)
    assert not (tmp_path / "b").exists()


def test_a_head_without_a_place_is_refused(tmp_path: Path) -> None:
    with open_source(model(tmp_path / "a", head=Head.DOUBLE)) as source, pytest.raises(CannotHoldError) as error:
        plan_conversion(source, tmp_path / "b", "nanogpt")
    assert "nanogpt has no place for the head 'double'; expected one of lm" in str(error.value)


@pytest.mark.parametrize(
    ("to", "target", "settings", "message"),
    [
        ("npz", "b", {"dtype": "bfloat16"}, "npz does not hold bfloat16"),
        ("bin", "b", {"verify": "yes"}, "expected one of none, tensors, logits"),
        ("npz", "b", {"max_shard_bytes": 5}, "is not split into shards"),
        ("bin", "b", {"max_shard_bytes": 0}, "expected at least 1 byte"),
        ("bin", "b.bin", {"max_shard_bytes": 100}, "is one file; give a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, to: str, target: str, settings: dict[str, Any], message: str
) -> None:
    with open_source(model(tmp_path / "a")) as source, pytest.raises(InputError, match=message):
        plan_conversion(source, tmp_path / target, to, **settings)


def test_nothing_is_overwritten_unless_that_is_asked_for(tmp_path: Path) -> None:
    source = model(tmp_path / "a")
    target = model(tmp_path / "b", CONFIG.replace(n_layer=1))
    (target / "mine.txt").write_text("mine")
    before = {name: (target / name).read_bytes() for name in listing(target)}
    for name in ("b", "b/model.safetensors"):
        with pytest.raises(WriteError, match="--overwrite"):
            convert(source, tmp_path / name, "safetensors")
    assert {name: (target / name).read_bytes() for name in listing(target)} == before
    convert(source, target, "llmc", overwrite=True)
    assert listing(target) == ["llmc_model.bin", "mine.txt"], "no configuration of another model stays"
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="would be written to a folder"):
        convert(source, tmp_path / "file", "bin", overwrite=True)


def test_a_model_may_be_converted_where_it_is(tmp_path: Path) -> None:
    given = bits(model(tmp_path))
    convert(tmp_path, tmp_path, "bin", overwrite=True)
    assert listing(tmp_path) == ["config.json", "pytorch_model.bin"] and bits(tmp_path) == given


# One file, shards -----------------------------------------------------------------------------------------------------


def test_a_target_that_ends_as_a_file_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("x")
    report = convert(model(tmp_path / "a"), tmp_path / "out" / "x.safetensors", "safetensors")
    assert listing(tmp_path / "out") == ["other", "x.safetensors"]
    assert report.files == (tmp_path / "out" / "x.safetensors",)
    assert any("config.json is not written" in note for note in report.plan.notes)
    convert(tmp_path / "a", tmp_path / "new" / "y.npz", "npz")
    assert listing(tmp_path / "new") == ["y.npz"]


def test_two_files_of_one_folder_may_be_converted_at_once(tmp_path: Path) -> None:
    source = model(tmp_path / "a")

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "verify" and not (tmp_path / "out" / "second.npz").exists():
            convert(source, tmp_path / "out" / "second.npz", "npz")

    convert(source, tmp_path / "out" / "first.npz", "npz", progress=meanwhile)
    assert listing(tmp_path / "out") == ["first.npz", "second.npz"]


def test_shards_are_as_large_as_asked_and_read_back(tmp_path: Path) -> None:
    report = convert(model(tmp_path / "a"), tmp_path / "b", "bin", max_shard_bytes=20_000)
    assert len(report.files) > 4 and (tmp_path / "b" / "pytorch_model.bin.index.json").is_file()
    assert bits(tmp_path / "b") == bits(tmp_path / "a")


# Number formats -------------------------------------------------------------------------------------------------------


def test_a_tensor_larger_than_a_shard_is_told_of(tmp_path: Path) -> None:
    with open_source(model(tmp_path / "a")) as opened:
        for size, told in ((10**6, 0), (15000, 1), (100, 1)):
            notes = plan_conversion(opened, tmp_path / "b", "bin", max_shard_bytes=size).notes
            assert len([note for note in notes if "shard size" in note]) == told, size
    assert "transformer.wte.weight, transformer.wpe.weight" in notes[-2] and "and 23 more" in notes[-2], notes


def test_rounding_is_checked_against_the_source_and_outputs_are_compared(tmp_path: Path) -> None:
    report = convert(model(tmp_path / "a"), tmp_path / "b", "safetensors", dtype="bfloat16")
    found = report.verification
    assert found is not None and found.kind == "logits" and not report.plan.lossless
    assert found.difference is not None and found.scale is not None and 0 < found.difference < 0.1 * found.scale
    assert found.agreement is not None and 0.5 < found.agreement <= 1
    lossless = convert(model(tmp_path / "a"), tmp_path / "c", "safetensors", dtype="float64").verification
    assert lossless is not None and lossless.difference == 0.0


def test_a_number_too_large_for_a_format_stops_the_conversion(tmp_path: Path) -> None:
    big = np.full((16, 32), 7e4, np.float32)
    source = model(tmp_path / "a", transformer__wpe__weight=big)
    with pytest.raises(CheckpointError, match=r"512 numbers are too large for float16, 70000\.0 is the first"):
        convert(source, tmp_path / "b", "safetensors", dtype="float16")
    assert not (tmp_path / "b").exists()
    convert(source, tmp_path / "b", "safetensors", dtype="bfloat16")


@pytest.mark.filterwarnings("error")
def test_numbers_that_are_not_finite_stay_so_and_are_counted(tmp_path: Path) -> None:
    odd = np.zeros((16, 32), np.float32)
    odd[0, :3], odd[1, :2] = np.nan, np.inf
    source = model(tmp_path / "a", transformer__wpe__weight=odd)
    for dtype in ("float32", "float16", "bfloat16"):
        report = convert(source, tmp_path / dtype, "safetensors", dtype=dtype)
        found = report.verification
        assert found is not None and found.not_finite == {"transformer.wpe.weight": (3, 2)}, dtype
        json.dumps(report.to_dict(), allow_nan=False)


# Verification ---------------------------------------------------------------------------------------------------------


def spoiled(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    """Let the reader of npz give one tensor changed, as a writer that makes a mistake would."""
    npz = formats()["npz"]
    read = npz.read

    def reading(path: Path, *, writable: bool = False) -> Any:
        opened = read(path, writable=writable)
        opened._tensors.update(change(opened[name]))
        return opened

    monkeypatch.setattr(npz, "read", reading)


def test_one_wrong_bit_is_found_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"

    def flip(tensor: Tensor) -> dict[str, Tensor]:
        array = tensor.array().copy()
        array.view(np.uint32)[3, 5] ^= 1
        return {name: Tensor.of(array)}

    spoiled(monkeypatch, name, flip)
    with pytest.raises(VerificationError, match=rf"1 of the 4096 numbers of {name} differ"):
        convert(model(tmp_path / "a"), tmp_path / "b", "npz")
    assert listing(tmp_path) == ["a/config.json", "a/model.safetensors"]
    convert(tmp_path / "a", tmp_path / "b", "npz", verify="none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: {"extra": tensor}, r"unexpected \(1\)"),
        (lambda tensor: {"transformer.ln_f.bias": Tensor.of(np.zeros(32))}, "is float64"),
        (lambda tensor: {"transformer.ln_f.bias": Tensor.of(np.zeros(3, np.float32))}, r"misshaped \(1\)"),
    ],
)
def test_other_tensors_than_meant_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    spoiled(monkeypatch, "transformer.ln_f.bias", change)
    with pytest.raises(CheckpointError, match=message):
        convert(model(tmp_path / "a"), tmp_path / "b", "npz")
    assert not (tmp_path / "b").exists()


def test_a_configuration_inside_that_says_something_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llmc = formats()["llmc"]
    pack = llmc._HEADER.pack  # type: ignore[attr-defined]

    class Wrong:
        size = 1024
        unpack = llmc._HEADER.unpack  # type: ignore[attr-defined]

        def pack(self, *numbers: int) -> bytes:
            return pack(*numbers[:5], 4, *numbers[6:])  # type: ignore[no-any-return]

    monkeypatch.setattr(llmc, "_HEADER", Wrong())
    with pytest.raises(VerificationError, match="n_head is 4, expected 2"):
        convert(model(tmp_path / "a"), tmp_path / "b", "llmc")


def test_outputs_that_differ_are_found_even_where_the_numbers_are_the_same() -> None:
    config = CONFIG.replace(n_layer=1)
    chance = np.random.default_rng(0)
    one = {row.name: Tensor.of(chance.normal(size=row.shape)) for row in parameter_table(config)}
    other = one | {"transformer.wpe.weight": Tensor.of(one["transformer.wpe.weight"].array() * (1 + 1e-7))}
    conversion.compare_outputs(config, Head.LM, one, dict(one), lossless=True)
    with pytest.raises(VerificationError, match="computes other numbers"):
        conversion.compare_outputs(config, Head.LM, one, other, lossless=True)
    broken = one | {"transformer.ln_f.weight": Tensor.of(np.full(32, np.nan))}
    for lossless in (True, False):
        with pytest.raises(VerificationError, match="not finite"):
            conversion.compare_outputs(config, Head.LM, one, broken, lossless=lossless)
    assert conversion.compare_outputs(config, Head.LM, broken, broken, lossless=True)[:2] == (0, 0)
    apart = config.replace(tie_word_embeddings=False)
    rows = one["transformer.wte.weight"].array().copy()
    rows[3] = np.inf
    partly = one | {"lm_head.weight": Tensor.of(rows)}
    difference, scale, _ = conversion.compare_outputs(apart, Head.LM, partly, partly, lossless=True)
    assert difference == 0 < scale < 1e9, "what is finite is compared"
    rows = rows.copy()
    rows[5] += 1
    with pytest.raises(VerificationError, match="computes other numbers"):
        conversion.compare_outputs(apart, Head.LM, partly, one | {"lm_head.weight": Tensor.of(rows)}, lossless=True)


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_verification_computes_is_what_the_reference_does(head: Head, variant: str) -> None:
    from gpt2_core.reference import ReferenceModel
    from gpt2_core.verification import FIXED_IDS

    config = CONFIG.replace(**VARIANTS[variant])
    chance = np.random.default_rng(0)
    values = {row.name: chance.normal(0.1, 0.4, row.shape) for row in parameter_table(config, head)}
    got = outputs(config, head, {name: Tensor.of(value) for name, value in values.items()})
    ids = np.array(FIXED_IDS)[None, :16] % 37
    out = ReferenceModel(config, values, head)(ids[:, None] if head is Head.DOUBLE else ids)
    if head is Head.NONE:
        expected = {"last_hidden_state": out.last_hidden_state}
    elif head is Head.QA:
        expected = {"start_logits": out.start_logits, "end_logits": out.end_logits}
    elif head is Head.DOUBLE:
        expected = {"logits": out.logits[0]}
    else:
        expected = {"logits": out.logits}
    for name, value in expected.items():
        mine = got[name][:, -1] if head is Head.SEQUENCE else got[name]
        assert np.allclose(mine, value, rtol=1e-12, atol=1e-12), name


def test_pieces_of_different_lengths_are_compared_number_by_number() -> None:
    numbers = np.random.default_rng(0).normal(size=(70, 50_000)).astype(np.float32)
    turned = Tensor("float32", (70, 50_000), lambda: np.asfortranarray(numbers))
    assert check_tensors({"a": Tensor.of(numbers)}, {"a": turned}).tensors == 1


# The tokenizer --------------------------------------------------------------------------------------------------------


def test_the_hubs_files_are_brought_along_as_they_are(tmp_path: Path) -> None:
    source = model(tmp_path / "a")
    GPT2Tokenizer().save_pretrained(source)
    (source / "tokenizer_config.json").write_text('{"chat_template": "kept", "model_max_length": 99}')
    report = convert(source, tmp_path / "b", "bin")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()
        assert tmp_path / "b" / name in report.files
    convert(source, tmp_path / "c", "bin", tokenizer=False)
    assert listing(tmp_path / "c") == ["config.json", "pytorch_model.bin"]


def test_openais_files_become_the_hubs(tmp_path: Path) -> None:
    source = model(tmp_path / "a")
    GPT2Tokenizer().save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "vocab.json").rename(source / "encoder.json")
    (tmp_path / "t" / "merges.txt").rename(source / "vocab.bpe")
    convert(source, tmp_path / "b", "safetensors")
    assert "encoder.json" not in listing(tmp_path / "b")
    assert GPT2Tokenizer.from_pretrained(tmp_path / "b").encode("Hello world") == [15496, 995]


def test_a_released_name_has_its_tokenizer_without_files(tmp_path: Path) -> None:
    report = convert("gpt2-tales", tmp_path / "b", "npz", verify="tensors")
    assert GPT2Tokenizer.from_pretrained(tmp_path / "b").model_max_length == 512
    assert report.to_dict()["target"]["tokenizer"] == "GPT-2's own, which ships with the package"


def test_what_happens_to_a_tokenizer_is_said(tmp_path: Path) -> None:
    source = model(tmp_path / "a")
    with open_source(source) as opened:
        assert any("no tokenizer was found" in note for note in plan_conversion(opened, tmp_path / "b", "npz").notes)
    GPT2Tokenizer().save_pretrained(source)
    with open_source(source) as opened:
        assert any("no place for a token" in note for note in plan_conversion(opened, tmp_path / "b", "nanogpt").notes)
        for target, format in (("b.npz", "npz"), ("b.bin", "llmc")):
            notes = plan_conversion(opened, tmp_path / target, format).notes
            assert any("tokenizer's files are not written" in note for note in notes)
        assert not any(
            "token" in note for note in plan_conversion(opened, tmp_path / "b", "npz", tokenizer=False).notes
        )


def test_a_tokenizer_that_cannot_be_read_stops_only_formats_that_translate_it(tmp_path: Path) -> None:
    source = model(tmp_path / "a")
    (source / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    convert(source, tmp_path / "b", "bin")
    with pytest.raises(TokenizerError, match="--no-tokenizer"):
        convert(source, tmp_path / "c", "llmc")
    convert(source, tmp_path / "c", "llmc", tokenizer=False)


def test_a_tokenizer_that_leads_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    source = model(tmp_path / "a")
    (tmp_path / "secret").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of"):
        open_source(source)


# Progress, memory, kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_progress_counts_every_byte_once(tmp_path: Path, format: str) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    report = convert(
        model(tmp_path / "a"),
        tmp_path / "b",
        format,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
        verify="tensors",
        tokenizer=False,
    )
    assert list(seen) == ["write", "verify"]
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1] == (report.plan.bytes, report.plan.bytes)


KILLED = """
import os, signal, sys, time
from gpt2_core import conversion
from gpt2_core.conversion import carry_out, open_source, plan_conversion
def progress(what, done, total):
    if what == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
with open_source(sys.argv[1]) as source:
    carry_out(plan_conversion(source, sys.argv[2], sys.argv[3], overwrite=True), progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
@pytest.mark.parametrize("when", ["write", "verify"])
@pytest.mark.parametrize("target", ["new", "old", "old.npz"])
def test_a_kill_leaves_what_was_there_before(tmp_path: Path, when: str, target: str) -> None:
    source = model(tmp_path / "a")
    if target == "old":
        model(tmp_path / "old", CONFIG.replace(n_layer=1))
    if target == "old.npz":
        (tmp_path / "old.npz").write_bytes(b"before")
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}
    done = subprocess.run([sys.executable, "-c", KILLED, source, tmp_path / target, "npz", when], check=False)
    assert done.returncode == -signal.SIGKILL
    seen = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path) if ".saving" not in name}
    assert seen == before
    convert(source, tmp_path / target, "npz", overwrite=True)
    assert not [name for name in listing(tmp_path) if ".saving" in name], "what the kill left is cleared away"


PEAK = """
import sys
from pathlib import Path
from gpt2_core.conversion import carry_out, open_source, plan_conversion
with open_source(sys.argv[1]) as source:
    carry_out(plan_conversion(source, sys.argv[2], sys.argv[3], verify="tensors", overwrite=True, tokenizer=False))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status, MADV_DONTNEED")
@pytest.mark.parametrize("format", FORMATS)
def test_converting_holds_a_few_tensors_not_all(tmp_path: Path, format: str) -> None:
    """A model of 120 MB, its largest tensor 16 MB; what a tiny one needs is taken off."""
    large = CONFIG.replace(vocab_size=16384, n_embd=256, n_layer=32)
    peaks = []
    for name, config in (("small", CONFIG), ("large", large)):
        folder = tmp_path / name
        zero = np.zeros(16384 * 256, np.float32)
        save_checkpoint(
            folder,
            {row.name: Tensor.of(zero[: row.size].reshape(row.shape)) for row in parameter_table(config)},
        )
        config.save_pretrained(folder)
        peaks.append(int(subprocess.check_output([sys.executable, "-c", PEAK, folder, tmp_path / "out", format])))
    assert (peaks[1] - peaks[0]) / 1024 < 60, f"{format} held {(peaks[1] - peaks[0]) / 1024:.0f} MB of 117"


def test_every_test_that_the_page_on_safety_names_is_there() -> None:
    root = Path(__file__).parent
    page = (root.parent.parent / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {name for file in root.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert len(named) > 30 and named - there == set()


def test_the_page_on_formats_has_every_format() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "formats.md").read_text()
    assert [name for name in FORMATS if f"\n| `{name}` | " not in page] == []
