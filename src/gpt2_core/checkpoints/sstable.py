"""A sorted table of keys and values in one file, as LevelDB and TensorFlow lay it out: the index of a checkpoint.

    blocks of entries          in the order of their keys
    a block of metadata        empty
    a block of blocks          for each: a key not below its last and below the next one's first; where it stands
    footer, 48 bytes           where the last two stand, zeros, 57 FB 80 8B 24 75 47 DB

    block                      entries, restarts (4 bytes each), how many restarts (4 bytes)
      and 5 bytes behind it    0: as it is, 1: compressed by Snappy; the masked CRC-32C of the block and this byte
    entry                      shared, unshared, size (varints), `unshared` bytes of a key, `size` bytes of a value
    where a block stands       offset, size (varints)

The first `shared` bytes of a key are those of the key before. A restart is where an entry stands that shares nothing,
every 16th here, for readers that search; this one reads all, and checks that keys increase, so that none stands twice,
and that blocks follow each other in the file, so that nothing is read twice. TensorFlow 1.1 alone compressed.

Source: LevelDB, doc/table_format.md; TensorFlow, core/lib/io/{format,block_builder,table_builder}.cc; Snappy,
format_description.txt.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from gpt2_core.checkpoints.crc32c import crc32c, masked
from gpt2_core.checkpoints.protobuf import to_varint, varint
from gpt2_core.checkpoints.tensors import MappedFile
from gpt2_core.errors import CheckpointFormatError

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER = 48
#: Bytes of all blocks together, uncompressed. That of GPT-2 XL with Adam's slots takes 0.1 MB.
MOST_BYTES = 1 << 22
#: GPT-2 XL with Adam's slots has 1,740. Together they bound the time that a file can take.
MOST_ENTRIES = 20_000
MOST_KEY = 255  # bytes

_TRAILER = 5
_PLAIN, _SNAPPY = 0, 1
_INTERVAL = 16  # entries from one restart to the next
_BLOCK = 1 << 18  # bytes after which a block is closed
_NUMBER = struct.Struct("<I")

Entry = tuple[bytes, bytes]


# Reading -------------------------------------------------------------------------------------------------------------


def read(file: MappedFile) -> list[Entry]:
    """All keys and values, in the order of the keys.

    Raises: CheckpointFormatError for anything damaged, in the middle of a sentence about the file.
    """
    return _Reader(file).entries()


class _Reader:
    """One file, and how much of it may still be read."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._bytes_left = MOST_BYTES
        self._entries_left = MOST_ENTRIES

    def entries(self) -> list[Entry]:
        footer_at = self._file.size - FOOTER
        footer = self._file.bytes(max(0, footer_at), FOOTER)
        if footer_at < 0 or not footer.endswith(MAGIC):
            raise CheckpointFormatError(
                f"its {self._file.size} bytes do not end as a table does (with {MAGIC.hex()}); it may be cut off"
            )
        _, _, at = _place(footer, 0)  # the metadata, which is empty in the files of TensorFlow
        index_at, size, _ = _place(footer, at)
        found: list[Entry] = []
        reached = 0
        for bound, place in self._block(index_at, size, footer_at):
            at, size, _ = _place(place, 0)
            if at < reached:
                raise CheckpointFormatError(f"a block at byte {at} overlaps the one up to byte {reached}")
            found += self._block(at, size, index_at, after=found[-1][0] if found else None)
            if found and found[-1][0] > bound:
                raise CheckpointFormatError(f"its block of keys up to {_shown(bound)} holds {_shown(found[-1][0])}")
            reached = at + size + _TRAILER
        return found

    def _block(self, at: int, size: int, end: int, after: bytes | None = None) -> list[Entry]:
        """The entries of the block at `at`, which has to lie before `end`, and its keys after the key `after`."""
        data = self._content(at, size, end)
        restarts = _NUMBER.unpack_from(data, len(data) - 4)[0] if len(data) >= 4 else len(data)
        stop = len(data) - 4 - 4 * restarts
        if stop < 0:
            raise CheckpointFormatError(f"the block at byte {at} counts {restarts} restarts in {len(data)} bytes")
        found: list[Entry] = []
        here, key = 0, b""
        while here < stop:
            self._entries_left -= 1
            if self._entries_left < 0:
                raise CheckpointFormatError(f"it has over {MOST_ENTRIES} entries, which no checkpoint of a GPT-2 has")
            shared, here = varint(data, here)
            unshared, here = varint(data, here)
            length, here = varint(data, here)
            if shared > len(key) or shared + unshared > MOST_KEY or unshared + length > stop - here:
                raise CheckpointFormatError(
                    f"the entry after {_shown(key)} has a key of {shared} + {unshared} bytes and a value of {length}, "
                    f"where {stop - here} are left; expected keys of up to {MOST_KEY}"
                )
            key = key[:shared] + data[here : here + unshared]
            if after is not None and key <= after:
                raise CheckpointFormatError(f"the key {_shown(key)} stands after {_shown(after)}; expected a later one")
            here += unshared
            found.append((key, data[here : here + length]))
            after, here = key, here + length
        return found

    def _content(self, at: int, size: int, end: int) -> bytes:
        """The bytes of a block, checked and uncompressed."""
        if at + size + _TRAILER > end:
            raise CheckpointFormatError(f"it speaks of a block at bytes {at} to {at + size + _TRAILER} of {end}")
        self._take(size)
        data = self._file.bytes(at, size + _TRAILER)
        kind, crc = data[size], _NUMBER.unpack_from(data, size + 1)[0]
        if masked(crc32c(data[: size + 1])) != crc:
            raise CheckpointFormatError(f"the checksum of the block at byte {at} is another; fetch the file again")
        if kind == _PLAIN:
            return data[:size]
        if kind != _SNAPPY:
            raise CheckpointFormatError(
                f"the block at byte {at} is compressed by method {kind}; expected 0 or 1 (Snappy)"
            )
        length, start = varint(data, 0)
        self._take(length)
        return unsnap(data[start:size], length)

    def _take(self, size: int) -> None:
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise CheckpointFormatError(f"its blocks are longer than {MOST_BYTES} bytes, which no checkpoint needs")


def _place(data: bytes, at: int) -> tuple[int, int, int]:
    """Where a block stands, its size, and what follows that statement."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return offset, size, at


def _shown(key: bytes) -> str:
    return repr(key[:80])[1:]


def unsnap(data: bytes, size: int) -> bytes:
    """What Snappy made into `data` (without its length in front), which is `size` bytes; no more are ever made.

    Raises: CheckpointFormatError, in the middle of a sentence, for anything else.
    """
    found = bytearray()
    at = 0
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            length, extra = tag >> 2, max(0, (tag >> 2) - 59)
            if extra:
                length = int.from_bytes(data[at : at + extra], "little")
                at += extra
            length += 1
            if length > len(data) - at or length > size - len(found):
                raise CheckpointFormatError(f"a compressed block has {length} bytes where fewer are left")
            found += data[at : at + length]
            at += length
            continue
        extra = (1, 2, 4)[(tag & 3) - 1]
        back = int.from_bytes(data[at : at + extra], "little")
        length = (tag >> 2) + 1
        if extra == 1:
            length, back = (tag >> 2 & 7) + 4, back | tag >> 5 << 8
        at += extra
        if not 0 < back <= len(found) or length > size - len(found) or at > len(data):
            raise CheckpointFormatError(f"a compressed block repeats {length} bytes from {back} before {len(found)}")
        start = len(found) - back
        again = found[start : start + length]
        found += (again * (length // back + 1))[:length]  # it may reach into itself
    if len(found) != size:
        raise CheckpointFormatError(f"a compressed block has {len(found)} bytes, expected {size}")
    return bytes(found)


# Writing -------------------------------------------------------------------------------------------------------------


def to_bytes(entries: Iterable[Entry]) -> bytes:
    """The table of these entries, whose keys have to increase, as TensorFlow writes it, byte for byte."""
    table = bytearray()
    index: list[Entry] = []
    block: list[Entry] = []
    size = 0
    for key, value in entries:
        if size >= _BLOCK:
            index.append((_between(block[-1][0], key), _append(table, block, _INTERVAL)))
            block, size = [], 0
        block.append((key, value))
        size += len(key) + len(value) + 3
    if block:
        index.append((_after(block[-1][0]), _append(table, block, _INTERVAL)))
    footer = _append(table, [], _INTERVAL) + _append(table, index, 1)
    return bytes(table) + footer.ljust(FOOTER - len(MAGIC), b"\0") + MAGIC


def _append(table: bytearray, entries: list[Entry], interval: int) -> bytes:
    """Put a block behind the others; where it stands."""
    block = bytearray()
    restarts = [0]
    last = b""
    for number, (key, value) in enumerate(entries):
        if number % interval == 0 and number:
            restarts.append(len(block))
        shared = _alike(last, key) if number % interval else 0
        block += to_varint(shared) + to_varint(len(key) - shared) + to_varint(len(value)) + key[shared:] + value
        last = key
    for place in [*restarts, len(restarts)]:
        block += _NUMBER.pack(place)
    where = to_varint(len(table)) + to_varint(len(block))
    block.append(_PLAIN)
    table += block + _NUMBER.pack(masked(crc32c(bytes(block))))
    return where


def _alike(one: bytes, other: bytes) -> int:
    """How many bytes two keys begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _after(key: bytes) -> bytes:
    """A short key that is not below `key`."""
    for at, byte in enumerate(key):
        if byte < 0xFF:
            return key[:at] + bytes([byte + 1])
    return key


def _between(key: bytes, following: bytes) -> bytes:
    """A short key that is not below `key`, and below the one that follows it."""
    at = _alike(key, following)
    if at < min(len(key), len(following)) and key[at] < 0xFF and key[at] + 1 < following[at]:
        return key[:at] + bytes([key[at] + 1])
    return key
