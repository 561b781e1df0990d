"""Damaged files of every format end in an error of ours, or in a checkpoint whose tensors can be read; in nothing else.

Each file that a format writes is damaged in turn: bytes are flipped, cut off, repeated and moved, and the numbers that
headers are made of are replaced by others. tests/core/test_checkpoints_fuzz.py looks closer at single headers.
"""

from __future__ import annotations

import os
import shutil
import tracemalloc
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import About, Tensor, formats, holds_of, write_with
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.checkpoints.tokenizers import parts_of
from gpt2_core.config import GPT2Config
from gpt2_core.errors import Gpt2Error
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.vocabulary import BYTE_TO_CHAR

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=60, deadline=None, derandomize=True, database=None)
CONFIG = GPT2Config(
    vocab_size=257, n_positions=4, n_embd=32, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256, num_labels=3
)
FORMATS = list(formats())
#: What damaged counts and lengths like to be.
NUMBERS = [0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


def about() -> About:
    ids = {char: index for index, char in enumerate(BYTE_TO_CHAR.values())} | {"<|endoftext|>": 256}
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return About(CONFIG, Head.LM, parts_of(ids, [], source="the test", settings=settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("formats")


@lru_cache
def sound(folder: Path, format: str) -> tuple[Path, tuple[Path, ...]]:
    """A folder with a small model in this format, and the files it consists of."""
    chance = np.random.default_rng(0)
    tensors = {
        row.name: Tensor.of(chance.normal(size=row.shape).astype(np.float32))
        for row in parameter_table(CONFIG, Head.LM)
    }
    target = folder / format
    return target, write_with(formats()[format], target, tensors, about=about())


def read_all(format: str, target: Path) -> None:
    """Read everything there is; an error of ours is as good an end as any."""
    module = formats()[format]
    try:
        module.find(target)
        with module.read(target) as opened:
            for name in opened:
                assert opened.array(name).shape == opened.shape(name)
            if opened.config is not None:
                config_of(opened, beside=False)
            if opened.tokenizer is not None:
                opened.tokenizer()
    except Gpt2Error as error:
        assert len(str(error)) < 10_000


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_that_are_damaged_below_are_sound(folder: Path, format: str) -> None:
    target, files = sound(folder, format)
    assert files and all(file.is_file() for file in files)
    with formats()[format].read(target) as opened:
        assert {name.removeprefix("transformer.") for name in opened} >= {
            row.name.removeprefix("transformer.") for row in parameter_table(CONFIG, Head.LM)
        }
        assert holds_of(formats()[format]).config != "inside" or config_of(opened, beside=False).config.n_embd == 32


@pytest.mark.parametrize("format", FORMATS)
def test_flipped_cut_and_spliced_files_end_well(folder: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    target, files = sound(folder, format)
    damaged = folder / f"{format}-damaged"
    shutil.copytree(target, damaged)
    contents = [file.read_bytes() for file in files]
    # The beginning and the end, where headers and directories are, deserve most of the damage.
    index = st.integers(0, len(files) - 1)
    place = st.one_of(st.integers(0, 4095), st.integers(-2048, -1), st.floats(0, 1, exclude_max=True))

    @bounded
    @given(
        which=index,
        flips=st.lists(st.tuples(place, st.integers(0, 255)), max_size=6),
        numbers=st.lists(
            st.tuples(place, st.sampled_from(NUMBERS), st.sampled_from([1, 2, 4, 8]), st.booleans()), max_size=2
        ),
        cut=st.one_of(st.none(), place),
        splice=st.one_of(st.none(), st.tuples(place, place, place)),
    )
    def run(
        which: int,
        flips: list[tuple[int | float, int]],
        numbers: list[tuple[int | float, int, int, bool]],
        cut: int | float | None,
        splice: tuple[int | float, int | float, int | float] | None,
    ) -> None:
        data = bytearray(contents[which])

        def at(where: int | float) -> int:
            return int(where * len(data)) if isinstance(where, float) else where % max(len(data), 1)

        for where, value in flips:
            data[at(where)] = value
        for where, number, width, big in numbers:
            raw = (number % (1 << 8 * width)).to_bytes(width, "big" if big else "little")
            data[at(where) : at(where) + width] = raw
        if splice is not None:
            start, end, to = map(at, splice)
            data[to:to] = data[start : min(end, start + 4096)]
        if cut is not None:
            del data[at(cut) :]
        file = damaged / files[which].relative_to(target)
        file.write_bytes(data)
        try:
            read_all(format, damaged)
        finally:
            file.write_bytes(contents[which])

    tracemalloc.start()
    try:
        run()
        # A header may claim anything; what is held for it is bounded by the file and by the bounds of headers.
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@bounded
@given(data=st.binary(max_size=200), format=st.sampled_from(FORMATS), name=st.sampled_from(["a", "a.bin", "a.pt"]))
def test_any_bytes_in_any_file_end_well(folder: Path, data: bytes, format: str, name: str) -> None:
    path = folder / name
    path.write_bytes(data)
    read_all(format, path)
