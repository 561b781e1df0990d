"""gpt2_core.conversion: every format to every other and back, and everything that is said or refused on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core import conversion
from gpt2_core.checkpoints import Tensor, formats, holds_of, open_checkpoint, save_checkpoint
from gpt2_core.checkpoints.holds import BESIDE, FLOATS, INSIDE, NOWHERE, OWN, About, objections
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
    """A model on disk as the hub has it, values drawn for each name; ``changes`` replace tensors, None leaves one out."""
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
        assert COMPUTED <= kept | set(holds.fixed), f"{format} is silent about {COMPUTED - kept - set(holds.fixed)}"
    assert holds.config in (BESIDE, INSIDE, NOWHERE) and holds.tokenizer in (BESIDE, INSIDE, OWN, NOWHERE)
    assert set(holds.dtypes) <= set(STORAGE) and holds.heads <= set(Head)
