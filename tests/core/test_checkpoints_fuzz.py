"""Damaged files of every kind end in CheckpointError, or in a checkpoint whose tensors can be read; in nothing else."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, bin, formats, pickles, safetensors
from gpt2_core.errors import CheckpointError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=200, deadline=None, derandomize=True, database=None)
KINDS = ["safetensors", "bin", "legacy"]
TENSORS = {
    f"h.{n}.w": Tensor.of(np.arange(6, dtype=dtype).reshape(2, 3)) for n, dtype in enumerate(["<f4", "<f2", "<i8"])
}


def legacy() -> bytes:
    """What torch wrote before 1.6: five pickles and the storages."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(value, 2) for value in (bin._MAGIC, 1001, machine)]
    storages = [tensor.size.to_bytes(8, "little") + tensor.raw().tobytes() for tensor in TENSORS.values()]
    keys = pickle.dumps([str(key) for key in range(len(TENSORS))], 2)
    return b"".join([*head, bin._Program().complete(TENSORS), keys, *storages])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@lru_cache
def sound(folder: Path, kind: str) -> bytes:
    if kind == "legacy":
        return legacy()
    path = folder / f"sound.{kind}"
    formats()[kind].write(path, TENSORS)
    return path.read_bytes()


def read_all(folder: Path, kind: str, data: bytes) -> None:
    """Read every tensor of a file with these bytes; CheckpointError is as good an end as any."""
    path = folder / f"{os.getpid()}-fuzzed"
    path.write_bytes(data)
    reader: Callable[..., bin.Checkpoint] = formats()["safetensors" if kind == "safetensors" else "bin"].read
    try:
        with reader(path) as opened:
            assert opened.bytes_total <= 10 * len(data)
            for name in opened:
                assert opened.array(name).shape == opened.shape(name)
    except CheckpointError as error:
        assert len(str(error)) < 5000


def test_the_files_that_are_damaged_below_are_sound(folder: Path) -> None:
    for kind in KINDS:
        path = folder / f"{kind}-sound"
        path.write_bytes(sound(folder, kind))
        opened = formats()["safetensors" if kind == "safetensors" else "bin"].read(path)
        assert all(np.array_equal(opened.array(name), TENSORS[name].array()) for name in TENSORS)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_cut_and_spliced_files_end_well(folder: Path, kind: str) -> None:
    whole = sound(folder, kind)
    places = st.integers(0, len(whole) - 1)

    @bounded
    @given(
        flips=st.lists(st.tuples(places, st.integers(0, 255)), max_size=8),
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
        read_all(folder, kind, bytes(data[:cut]))

    run()


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
SIZES = st.one_of(st.integers(-1, 5), st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 2**200]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "BOOL", "U8", "I64", "F64"]), JSON),
        "shape": st.one_of(st.lists(SIZES, max_size=4), JSON),
        "data_offsets": st.one_of(st.lists(SIZES, min_size=2, max_size=2), JSON),
    }
)


@bounded
@given(
    header=st.one_of(JSON, st.dictionaries(st.text(max_size=5), st.one_of(ENTRIES, JSON), max_size=4)),
    data=st.binary(max_size=40),
)
def test_any_header_of_safetensors_ends_well(folder: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    read_all(folder, "safetensors", len(text).to_bytes(8, "little") + text + data)


@bounded
@given(length=st.integers(0, 2**64 - 1), rest=st.binary(max_size=60))
def test_any_bytes_as_safetensors_end_well(folder: Path, length: int, rest: bytes) -> None:
    read_all(folder, "safetensors", length.to_bytes(8, "little") + rest)
    read_all(folder, "safetensors", rest)


def reads_as_inert(value: object, depth: int = 0) -> bool:
    """Whether a decoded value is of the kinds that the machine may make, and of no other."""
    if type(value) in (list, tuple):
        return depth > 20 or all(reads_as_inert(item, depth + 1) for item in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return depth > 20 or all(reads_as_inert(item, depth + 1) for item in value.values())
    kinds = (type(None), bool, int, float, str, bytes, pickles.Global, bin.Storage, bin.TensorRecord)
    return type(value) in kinds


OPCODES = sorted(pickles._STEPS)
GLOBALS = [b"c%s\n%s\n" % tuple(path.encode().rsplit(b".", 1)) for path in bin._KNOWN]
PIECES = st.one_of(
    st.sampled_from(OPCODES).map(lambda code: bytes([code])),
    st.sampled_from(
        [*GLOBALS, b"cos\nsystem\n", b"(X\7\0\0\0storage", b"K\1", b"X\1\0\0\0a", b"(K\2K\3t", b"})", b"q\1h\1"]
    ),
    st.binary(max_size=6),
)


@bounded
@given(pieces=st.lists(PIECES, max_size=40))
def test_any_program_of_a_pickle_ends_well_and_makes_inert_values(pieces: list[bytes]) -> None:
    try:
        value, _ = pickles.decode(b"".join(pieces) + b".", 0, bin._KNOWN, bin._storage)
    except CheckpointError:
        return
    assert reads_as_inert(value)


@bounded
@given(value=JSON, protocol=st.integers(1, 5))
def test_pickles_of_plain_values_are_read_as_python_reads_them(value: object, protocol: int) -> None:
    program = pickle.dumps(value, protocol)
    try:
        decoded, end = pickles.decode(program, 0, {})
    except CheckpointError:
        assert any(abs(number) >= 1 << 127 for number in integers(value)), "only integers of over 16 bytes are refused"
        return
    assert end == len(program) and repr(decoded) == repr(pickle.loads(program))


def integers(value: object) -> list[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in integers(item)]
    return [value] if isinstance(value, int) else []


def test_a_header_of_many_names_is_read(folder: Path) -> None:
    """Twenty thousand, thirty times what GPT-2 XL has: nothing may go as their square."""
    many = {f"t{n}": {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n in range(20_000)}
    text = json.dumps(many).encode()
    (folder / "many").write_bytes(len(text).to_bytes(8, "little") + text + bytes(20_000))
    assert len(safetensors.read(folder / "many")) == 20_000
