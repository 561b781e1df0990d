"""gpt2_core.checkpoints.tensors: rounding to other number formats, pieces, and files that change under a reader."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, tensors, widen_bfloat16
from gpt2_core.checkpoints.tensors import (
    STORAGE,
    MappedFile,
    ahead,
    contiguous_pieces,
    converted,
    file_tensor,
    in_background,
    watched,
)
from gpt2_core.errors import CheckpointError, CheckpointFormatError

FLOATS = ("float64", "float32", "float16", "bfloat16")


def numbers(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.array(), np.float64)


def some(dtype: str, count: int = 4000) -> Tensor:
    """Numbers of every size that float16 holds, in a format."""
    chance = np.random.default_rng(0)
    wide = chance.normal(size=count) * 2.0 ** chance.integers(-24, 12, count)
    return converted(Tensor.of(wide), dtype)


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("of", FLOATS)
def test_a_number_becomes_the_nearest_that_the_format_has(of: str, to: str) -> None:
    given = some(of)
    result = converted(given, to)
    assert result.dtype == to and result.raw().dtype == STORAGE[to]
    steps = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[to]
    lowest = -14 if to == "float16" else -126
    for before, after in zip(numbers(given).tolist(), numbers(result).tolist(), strict=True):
        exponent = max(int(np.floor(np.log2(abs(before)))) if before else lowest, lowest)
        assert abs(Fraction(after) - Fraction(before)) <= Fraction(2) ** (exponent - steps) / 2


def test_float64_is_rounded_to_bfloat16_once_not_twice() -> None:
    """Just above half-way between two numbers: rounding to float32 first would make it half-way, and then even."""
    half_way = 1 + 2**-8
    for value, expected in (
        (half_way, 1.0),
        (half_way + 2**-40, 1 + 2**-7),
        (half_way - 2**-40, 1.0),
        (-half_way - 2**-40, -1 - 2**-7),
        (1 + 3 * 2**-8 - 2**-40, 1 + 2**-7),
        (2.0**-130 * (1 + 2**-30), 2.0**-130),
        (0.0, 0.0),
    ):
        assert numbers(converted(Tensor.of(np.array([value])), "bfloat16"))[0] == expected, value


def test_wider_formats_hold_every_number_of_narrower_ones() -> None:
    every = Tensor.of(np.arange(1 << 16, dtype=np.uint16), "bfloat16")
    wide = converted(every, "float32").raw()
    finite = np.isfinite(wide)
    assert np.array_equal(converted(Tensor.of(wide[finite]), "bfloat16").raw(), every.raw()[finite])
    halves = Tensor.of(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
    back = converted(converted(halves, "float64"), "float16").raw()
    assert np.array_equal(back[~np.isnan(back)], halves.raw()[~np.isnan(halves.raw())])


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)])
def test_too_large_a_number_is_an_error_and_infinity_is_not(dtype: str, largest: float) -> None:
    fine = np.array([largest, -largest, np.inf, -np.inf, np.nan])
    kept = numbers(converted(Tensor.of(fine), dtype))
    assert np.array_equal(kept, fine, equal_nan=True)
    with pytest.raises(CheckpointError, match=f"2 numbers are too large for {dtype}"):
        converted(Tensor.of(np.array([1.0, largest * 1.01, -largest * 1.01])), dtype).raw()


def test_what_is_no_float_is_not_converted() -> None:
    for given, wanted in ((np.ones(2, np.int64), "float32"), (np.ones(2), "int8"), (np.ones(2, bool), "bfloat16")):
        with pytest.raises(CheckpointError, match="only floats are"):
            converted(Tensor.of(given), wanted).raw()
    same = Tensor.of(np.ones(2, np.int64))
    assert converted(same, "int64") is same


def test_pieces_are_those_of_the_whole_and_bounded() -> None:
    big = np.random.default_rng(0).normal(size=(300, 5000)).astype(np.float32)
    for tensor in (Tensor.of(big), Tensor("float32", (5000, 300), lambda: big.T), converted(Tensor.of(big), "float16")):
        pieces = list(tensor.chunks())
        assert max(map(len, pieces)) <= 1 << 20 and len(pieces) > 1
        assert b"".join(pieces) == tensor.raw().tobytes()
    for array in (np.float32(3) + np.zeros(()), np.zeros((0, 4)), np.zeros((1, 1, 3)), np.arange(6).reshape(2, 3).T):
        assert (
            np.concatenate([piece.reshape(-1) for piece in contiguous_pieces(array)]).tolist() == array.ravel().tolist()
        )


def test_a_watcher_is_told_of_every_byte_once_however_they_are_taken() -> None:
    given = Tensor.of(np.zeros((300, 5000), np.float32))
    for take in (lambda tensor: list(tensor.chunks()), lambda tensor: tensor.raw(), lambda tensor: tensor.array()):
        seen: list[int] = []
        take(watched(given, seen.append))
        assert sum(seen) == given.nbytes


def test_a_file_that_became_shorter_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(3 << 20))
    file = MappedFile(path)
    tensor = file_tensor(file, "float32", (3 << 18,), 0)
    assert sum(map(len, tensor.chunks())) == 3 << 20
    os.truncate(path, 1 << 20)
    with pytest.raises(CheckpointFormatError, match="it became shorter"):
        list(tensor.chunks())
    file.close()
    with pytest.raises(CheckpointError, match="has been closed"):
        list(tensor.chunks())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="/proc")
def test_a_file_nobody_holds_is_closed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))

    def opened() -> int:
        return sum(os.path.realpath(link) == str(tmp_path / "a") for link in Path("/proc/self/fd").iterdir())

    file = MappedFile(tmp_path / "a")
    array = file.view(0, np.dtype("u1"), 100)
    assert opened() >= 1
    del file, array
    gc.collect()
    assert opened() == 0


def test_a_bool_in_pieces_is_checked_as_one_in_one_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0\1\2")
    file = MappedFile(tmp_path / "a")
    with pytest.raises(CheckpointFormatError, match="other than 0 and 1"):
        list(file_tensor(file, "bool", (3,), 0).chunks())
    assert list(widen_bfloat16(np.array([0x3F80], np.uint16))) == [1.0]


def test_what_is_made_ahead_is_the_same_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_WORTH_A_THREAD", 0)
    big = np.random.default_rng(0).normal(size=(300, 5000)).astype(np.float32)
    for given in (Tensor.of(big), Tensor("float32", (5000, 300), lambda: big.T), converted(Tensor.of(big), "float16")):
        made = ahead(given)
        assert b"".join(made.chunks()) == b"".join(given.chunks()) and np.array_equal(made.raw(), given.raw())
    assert list(in_background(iter(range(100)))) == list(range(100)) and list(in_background(iter([]))) == []


def test_an_error_made_ahead_is_raised_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise CheckpointError("too large")

    seen = []
    with pytest.raises(CheckpointError, match="too large"):
        for item in in_background(items()):
            seen.append(item)
    assert seen == [1, 2]


def test_who_stops_listening_stops_the_thread() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            made.append(number)
            yield number

    for item in in_background(items()):
        if item == 3:
            break
    assert len(made) < 100
    assert not [thread for thread in threading.enumerate() if thread.name == "read ahead"]
