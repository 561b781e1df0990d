"""The part of MessagePack that Flax uses, read over a mapped file: what is large is a place in it, not a copy.

The package `msgpack` would copy every array, and pieces of one that lies within another, before the first is used;
this reader gives `Blob`s. It bounds depth and counts, and never allocates what a length claims.

Source: the MessagePack specification (spec.md, "Formats").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from gpt2_core.checkpoints.tensors import MappedFile
from gpt2_core.errors import CheckpointFormatError

MOST_DEPTH = 32
MOST_ITEMS = 1_000_000
_LONGEST_TEXT = 1 << 16


@dataclass(frozen=True)
class Blob:
    """Bytes in the file: `kind` is the number of an extension, or None for plain bytes."""

    kind: int | None
    offset: int
    size: int


class Reader:
    """Reads values one after the other between two places of a file."""

    def __init__(self, file: MappedFile, start: int, end: int) -> None:
        self.file = file
        self.at = start
        self.end = end
        self.items = 0

    def value(self, depth: int = 0) -> Any:
        """The next value: None, bool, int, float, str, list, dict with texts as keys, or Blob."""
        self.items += 1
        if depth > MOST_DEPTH or self.items > MOST_ITEMS:
            raise CheckpointFormatError(
                f"it is nested more than {MOST_DEPTH} deep, or has more than {MOST_ITEMS} values"
            )
        code = self._take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._list(code & 0x0F, depth)
        if code < 0xC0:
            return self._text(code & 0x1F)
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            return struct.unpack(_NUMBERS[code], self._take(struct.calcsize(_NUMBERS[code])))[0]
        if code in _FIXED_EXTENSIONS:
            return self._blob(_FIXED_EXTENSIONS[code], extension=True)
        kind, layout = _SIZED.get(code, ("", ""))
        if not kind:
            raise CheckpointFormatError(f"the byte 0x{code:02x} at {self.at - 1} begins no value; it is damaged")
        size = int(struct.unpack(layout, self._take(struct.calcsize(layout)))[0])
        if kind == "map":
            return self._map(size, depth)
        if kind == "list":
            return self._list(size, depth)
        if kind == "text":
            return self._text(size)
        return self._blob(size, extension=kind == "extension")

    def finish(self) -> None:
        """Raise CheckpointFormatError unless everything has been read."""
        if self.at != self.end:
            raise CheckpointFormatError(f"it goes on for {self.end - self.at} bytes after its end")

    def _take(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise CheckpointFormatError(f"it ends at byte {self.end}, within a value; it is truncated: fetch it again")
        data = self.file.bytes(self.at, count)
        self.at += count
        return data

    def _text(self, size: int) -> str:
        if size > _LONGEST_TEXT:
            raise CheckpointFormatError(f"it has a text of {size} bytes; expected names")
        try:
            return self._take(size).decode("utf-8")
        except UnicodeDecodeError as cause:
            raise CheckpointFormatError(f"it has a text at byte {self.at} that is not UTF-8") from cause

    def _list(self, size: int, depth: int) -> list[Any]:
        self._check_count(size)
        return [self.value(depth + 1) for _ in range(size)]

    def _map(self, size: int, depth: int) -> dict[str, Any]:
        self._check_count(2 * size)
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise CheckpointFormatError(f"it has the key {str(key)[:100]!r} twice, or one that is no text")
            found[key] = self.value(depth + 1)
        return found

    def _check_count(self, count: int) -> None:
        """Every value takes a byte at least."""
        if count > self.end - self.at:
            raise CheckpointFormatError(f"it claims {count} values in {self.end - self.at} bytes; it is damaged")

    def _blob(self, size: int, *, extension: bool) -> Blob:
        kind = struct.unpack("b", self._take(1))[0] if extension else None
        if size > self.end - self.at:
            raise CheckpointFormatError(f"it claims {size} bytes where {self.end - self.at} are left; it is truncated")
        found = Blob(kind, self.at, size)
        self.at += size
        return found


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_SIZED = {
    0xC4: ("bytes", ">B"),
    0xC5: ("bytes", ">H"),
    0xC6: ("bytes", ">I"),
    0xC7: ("extension", ">B"),
    0xC8: ("extension", ">H"),
    0xC9: ("extension", ">I"),
    0xD9: ("text", ">B"),
    0xDA: ("text", ">H"),
    0xDB: ("text", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


# Writing --------------------------------------------------------------------------------------------------------------


def packed_map(count: int) -> bytes:
    """The beginning of a map of `count` pairs, which follow."""
    if count < 16:
        return bytes([0x80 | count])
    return b"\xde" + struct.pack(">H", count) if count < 1 << 16 else b"\xdf" + struct.pack(">I", count)


def packed_list(count: int) -> bytes:
    """The beginning of a list of `count` values, which follow."""
    if count < 16:
        return bytes([0x90 | count])
    return b"\xdc" + struct.pack(">H", count) if count < 1 << 16 else b"\xdd" + struct.pack(">I", count)


def packed_text(text: str) -> bytes:
    """A text."""
    data = text.encode("utf-8")
    if len(data) < 32:
        return bytes([0xA0 | len(data)]) + data
    if len(data) < 1 << 8:
        return b"\xd9" + bytes([len(data)]) + data
    return b"\xda" + struct.pack(">H", len(data)) + data


def packed_integer(number: int) -> bytes:
    """A number that is not negative."""
    if number < 0x80:
        return bytes([number])
    for limit, code, layout in ((8, 0xCC, ">B"), (16, 0xCD, ">H"), (32, 0xCE, ">I"), (64, 0xCF, ">Q")):
        if number < 1 << limit:
            return bytes([code]) + struct.pack(layout, number)
    raise OverflowError(number)


def packed_bytes(size: int) -> bytes:
    """The beginning of `size` bytes, which follow."""
    for limit, code, layout in ((8, 0xC4, ">B"), (16, 0xC5, ">H"), (32, 0xC6, ">I")):
        if size < 1 << limit:
            return bytes([code]) + struct.pack(layout, size)
    raise OverflowError(size)


def packed_extension(kind: int, size: int) -> bytes:
    """The beginning of an extension of `size` bytes, which follow."""
    for exact, code in ((1, 0xD4), (2, 0xD5), (4, 0xD6), (8, 0xD7), (16, 0xD8)):
        if size == exact:
            return struct.pack(">Bb", code, kind)
    for limit, code, layout in ((8, 0xC7, ">B"), (16, 0xC8, ">H"), (32, 0xC9, ">I")):
        if size < 1 << limit:
            return bytes([code]) + struct.pack(layout, size) + struct.pack("b", kind)
    raise OverflowError(size)
