"""The container of a GGUF file, whatever is in it: values by key, and tensors by name. Nothing here knows GPT-2.

    "GGUF", u32 version (2 or 3), u64 tensors, u64 keys                   all numbers little-endian
    for each key:     string key, u32 type, the value
    for each tensor:  string name, u32 dimensions, u64 sizes with the fastest first, u32 type, u64 offset
    padding up to a multiple of general.alignment (32 where that key is missing)
    the data          offsets count from here; tensors follow each other, each padded to the alignment

A string is a u64 length and its bytes in UTF-8. An array is a u32 type, a u64 count and the values; arrays of arrays
are in the specification, and neither written by anyone nor read by llama.cpp or here. Version 1 had lengths of 32 bits,
and is no longer read by llama.cpp either. Version 3 allows files of big-endian machines, which are refused by name.

Source: ggml, docs/gguf.md and src/gguf.cpp of 2026, whose checks are made here too: keys and names stand once, and the
offset of a tensor is where the one before it ends.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints.tensors import STORAGE, MappedFile, Shape, check_shape
from gpt2_core.errors import CheckpointError, CheckpointFormatError

#: What a key may hold: one value, or an array of numbers, or the bytes of each string of an array.
Value = bool | int | float | str | NDArray[Any] | tuple[bytes, ...]

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT = 32
Q8_0 = 8

#: The types of tensors that are numbers as they stand: code -> our name. Those in blocks are in `BLOCK_TYPES`.
DTYPES: Mapping[int, str] = {
    0: "float32",
    1: "float16",
    24: "int8",
    25: "int16",
    26: "int32",
    27: "int64",
    28: "float64",
    30: "bfloat16",
}
CODES: Mapping[str, int] = {"q8_0": Q8_0} | {name: code for code, name in DTYPES.items()}
#: The types of tensors that hold numbers by the block, by the names that llama.cpp's tools print.
BLOCK_TYPES: Mapping[int, str] = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", Q8_0: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
    41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
#: The numbers in a block of Q8_0, and its bytes: a float16 scale and that many int8.
BLOCK, BLOCK_BYTES = 32, 34

_NUMBERS: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9
_UINT32, _INT32, _FLOAT32 = 4, 5, 6
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# A vocabulary of 250,000 tokens with its merges needs 10 MB.
_MOST_HEADER = 1 << 24
_MOST_KEY = 65_535  # bytes; the specification's own bound
_MOST_NAME = 64
_MOST_DIMENSIONS = 4
_MOST_ALIGNMENT = 1 << 20
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 4 + 8  # bytes of an entry


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `shape` has the fastest size last, as numpy's; `offset` counts from the file's start."""

    name: str
    shape: Shape
    code: int
    offset: int

    @property
    def nbytes(self) -> int:
        """The bytes it takes in the file."""
        return stored_bytes(self.shape, self.code)


@dataclass(frozen=True)
class Header:
    """What stands before the numbers: `end` is where the last tensor ends."""

    version: int
    values: Mapping[str, Value]
    entries: tuple[Entry, ...]
    end: int


def stored_bytes(shape: Shape, code: int) -> int:
    """The bytes of a tensor of this shape and type, one of `DTYPES` or Q8_0."""
    if code == Q8_0:
        return prod(shape) // BLOCK * BLOCK_BYTES
    return prod(shape) * STORAGE[DTYPES[code]].itemsize


# Reading --------------------------------------------------------------------------------------------------------------


def read_header(file: MappedFile) -> Header:
    """Everything but the numbers, checked against the size of the file.

    Raises: CheckpointFormatError for anything that the format does not allow, and for tensors of a type that is not
    read here, naming it.
    """
    reader = _Reader(file)
    magic, version = reader.take(4), reader.u32()
    if magic != MAGIC:
        raise CheckpointFormatError(f"it starts with {magic!r}; expected {MAGIC!r}")
    if version not in (2, 3):
        raise CheckpointFormatError(_strange_version(version))
    tensors, keys = reader.u64(), reader.u64()
    reader.expect(tensors * _LEAST_TENSOR + keys * _LEAST_KEY)
    values = _values(reader, keys)
    alignment = _alignment(values)
    found = [reader.tensor() for _ in range(tensors)]
    start = -(-reader.place // alignment) * alignment
    entries = tuple(Entry(name, shape, code, start + offset) for name, shape, code, offset in found)
    return Header(version, values, entries, _check_entries(entries, start, alignment, file.size))


def _strange_version(version: int) -> str:
    if version == 1:
        return "it is of version 1; expected 2 or 3: make it again with a current version of llama.cpp's converter"
    if version & 0xFFFF == 0:
        return "it is from a big-endian machine; expected a little-endian file: gguf_convert_endian.py changes it"
    return f"it says it is of version {version}; expected 2 or 3"


def _values(reader: _Reader, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for _ in range(count):
        key = reader.text("a key", _MOST_KEY)
        if not key or key in values:
            raise CheckpointFormatError(f"the key {key[:200]!r} {'stands there twice' if key else 'is empty'}")
        values[key] = reader.value(key[:200])
    return values


def _alignment(values: Mapping[str, Value]) -> int:
    value = values.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(value) is not int or not 0 < value <= _MOST_ALIGNMENT or value & (value - 1):
        raise CheckpointFormatError(f"its {ALIGNMENT_KEY} is {str(value)[:50]}; expected a power of two")
    return value


def _check_entries(entries: tuple[Entry, ...], start: int, alignment: int, size: int) -> int:
    """Every tensor begins where the one before it ends, and the last one within the file; that last end."""
    _check_types(entries)
    names: set[str] = set()
    reached, end = start, start
    for entry in entries:
        if entry.name in names:
            raise CheckpointFormatError(f"tensor {entry.name!r} stands there twice")
        names.add(entry.name)
        if entry.code == Q8_0 and (not entry.shape or entry.shape[-1] % BLOCK):
            raise CheckpointFormatError(
                f"tensor {entry.name!r} of shape {entry.shape} is Q8_0; expected rows of a multiple of {BLOCK}"
            )
        if entry.offset != reached:
            kind = "overlaps the one before" if entry.offset < reached else "leaves a gap before it"
            raise CheckpointFormatError(
                f"tensor {entry.name!r} at byte {entry.offset} {kind}; expected {reached}, where the one before ends"
            )
        end = reached + entry.nbytes
        reached = -(-end // alignment) * alignment
    if entries and end > size:
        raise CheckpointFormatError(
            f"its tensors end at byte {end}, and it has {size}; it is truncated: fetch it again"
        )
    return end


def _check_types(entries: Iterable[Entry]) -> None:
    strange: dict[str, list[str]] = {}
    for entry in entries:
        if entry.code not in DTYPES and entry.code != Q8_0:
            kind = BLOCK_TYPES.get(entry.code, f"type {entry.code}, which is not known here")
            strange.setdefault(kind, []).append(entry.name)
    if strange:
        listed = ", ".join(f"{len(names)} tensors of {kind} ({names[0]!r} ...)" for kind, names in strange.items())
        raise CheckpointFormatError(
            f"it holds {listed[:600]}; what is read is F32, F16, BF16 and Q8_0. Convert the original weights instead; "
            f"or, at a loss that cannot be undone, `llama-quantize --allow-requantize FILE NEW.gguf F16`"
        )


class _Reader:
    """The bytes of a header, taken from the front; never more than there are, nor than a header may have."""

    def __init__(self, file: MappedFile) -> None:
        self._whole = file.size <= _MOST_HEADER
        self._data = file.bytes(0, min(file.size, _MOST_HEADER))
        self.place = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self.place

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.expect(count)
        self.place += count
        return self._data[self.place - count : self.place]

    def expect(self, count: int) -> None:
        """Raise CheckpointFormatError unless this many bytes are left."""
        if count > self.left:
            raise self._too_short(count)

    def u32(self) -> int:
        """The next four bytes, as a number."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """The next eight bytes, as a number."""
        return int(_U64.unpack(self.take(8))[0])

    def text(self, what: str, most: int = _MOST_HEADER) -> str:
        """The next string."""
        length = self.u64()
        if length > most:
            raise CheckpointFormatError(f"{what} is {length} bytes long; expected at most {most}")
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as cause:
            raise CheckpointFormatError(f"{what} is {data[:60]!r}, which is not UTF-8 ({cause.reason})") from cause

    def value(self, key: str) -> Value:
        """The next value, whose type stands before it."""
        kind = self.u32()
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind == _BOOL:
            return self._bools(key, 1).item()  # type: ignore[no-any-return]
        return self._numbers(key, kind, 1)[0].item()  # type: ignore[no-any-return]

    def tensor(self) -> tuple[str, Shape, int, int]:
        """The next entry of a tensor: name, shape, type, offset in the data."""
        name = self.text("the name of a tensor", _MOST_NAME)
        dimensions = self.u32()
        if not name or dimensions > _MOST_DIMENSIONS:
            raise CheckpointFormatError(f"tensor {name!r} has {dimensions} dimensions; expected a name and at most 4")
        sizes = [self.u64() for _ in range(dimensions)]
        code, offset = self.u32(), self.u64()
        return name, check_shape(sizes[::-1], DTYPES.get(code, "float64"), f"tensor {name!r}"), code, offset

    def _array(self, key: str) -> Value:
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            return self._strings(count)
        if kind == _BOOL:
            return self._bools(key, count)
        if kind == _ARRAY:
            raise CheckpointFormatError(f"{key} is an array of arrays; expected an array of plain values")
        return self._numbers(key, kind, count)

    def _numbers(self, key: str, kind: int, count: int) -> NDArray[Any]:
        if kind not in _NUMBERS:
            raise CheckpointFormatError(f"{key} is a value of type {kind}; expected a type from 0 to 12")
        return np.frombuffer(self.take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])

    def _bools(self, key: str, count: int) -> NDArray[Any]:
        data = np.frombuffer(self.take(count), np.uint8)
        if data.size and data.max() > 1:
            raise CheckpointFormatError(f"{key} is a bool with a byte of {data.max()}; expected 0 or 1")
        return data.astype(bool)

    def _strings(self, count: int) -> tuple[bytes, ...]:
        self.expect(count * _U64.size)
        data, place, end = self._data, self.place, len(self._data)
        found = []
        for _ in range(count):  # the hot loop of opening: a vocabulary and its merges, 30 ms
            start = place + 8
            place = start + int.from_bytes(data[place:start], "little")
            if place > end or start > end:
                raise self._too_short(place - start)
            found.append(data[start:place])
        self.place = place
        return tuple(found)

    def _too_short(self, count: int) -> CheckpointFormatError:
        if not self._whole:
            return CheckpointFormatError(f"its header has more than {_MOST_HEADER} bytes, which is the most read here")
        return CheckpointFormatError(
            f"its header asks for {count} bytes at byte {self.place}, and {self.left} are left; it is truncated"
        )


def text_of(values: Mapping[str, Value], key: str, default: str = "") -> str:
    """The text under `key`, `default` where there is none; what is no text is named as what it is."""
    value = values.get(key, default)
    return value if isinstance(value, str) else f"<{type(value).__name__}>"


# Writing --------------------------------------------------------------------------------------------------------------


def header_bytes(values: Mapping[str, Value | list[str]], tensors: Mapping[str, tuple[Shape, int]]) -> bytes:
    """A header of version 3 with these values and tensors (shape and type by name), padded to where the data starts.

    A bool, a text, a list of texts and an array of int32 become what they are; an int an unsigned one of 32 bits, a
    float one of 32 bits, which is what llama.cpp asks for. Raises: CheckpointError for what fits none of these.
    """
    parts = [MAGIC, _U32.pack(3), _U64.pack(len(tensors)), _U64.pack(len(values))]
    for key, value in values.items():
        parts += [_string(key), _packed(key, value)]
    offset = 0
    for name, (shape, code) in tensors.items():
        if len(name.encode()) >= _MOST_NAME or len(shape) > _MOST_DIMENSIONS:
            raise CheckpointError(f"GGUF has no place for a tensor called {name!r} of shape {shape}")
        sizes = [_U64.pack(size) for size in reversed(shape)]
        parts += [_string(name), _U32.pack(len(shape)), *sizes, _U32.pack(code), _U64.pack(offset)]
        offset += stored_bytes(shape, code)
        offset += padding(offset)
    header = b"".join(parts)
    header += bytes(padding(len(header)))
    if len(header) > _MOST_HEADER:
        raise CheckpointError(
            f"the header has {len(header)} bytes, and at most {_MOST_HEADER} are read; the vocabulary is too large"
        )
    return header


def padding(place: int) -> int:
    """How many bytes are missing to a multiple of the alignment."""
    return -place % ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return _U64.pack(len(data)) + data


def _packed(key: str, value: Value | list[str]) -> bytes:
    if isinstance(value, bool):
        return _U32.pack(_BOOL) + bytes([value])
    if isinstance(value, str):
        return _U32.pack(_STRING) + _string(value)
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return _U32.pack(_UINT32) + _U32.pack(value)
    if isinstance(value, float):
        return _U32.pack(_FLOAT32) + struct.pack("<f", value)
    if isinstance(value, list):
        head = _U32.pack(_ARRAY) + _U32.pack(_STRING) + _U64.pack(len(value))
        return b"".join([head, *map(_string, value)])
    if isinstance(value, np.ndarray) and value.dtype == np.int32:
        return _U32.pack(_ARRAY) + _U32.pack(_INT32) + _U64.pack(value.size) + value.astype("<i4").tobytes()
    raise CheckpointError(f"GGUF has no place for {key}={str(value)[:80]}; expected a value of 32 bits")
