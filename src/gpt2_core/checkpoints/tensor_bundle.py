"""What TensorFlow's Saver writes (version 2): tensors as raw bytes, and a table that says where each stands.

    PREFIX.index                     a table (`sstable`): "" -> a header, the name of each tensor -> an entry
    PREFIX.data-00000-of-00001       the numbers, row by row, little-endian; one file or several

Header and entries are messages (`protobuf`):

    BundleHeaderProto    1 num_shards, 2 endianness (0: little), 3 version {1 producer, 2 min_consumer, 3 bad_consumers}
    BundleEntryProto     1 dtype, 2 shape {2 dim {1 size}, 3 unknown_rank}, 3 shard_id, 4 offset, 5 size,
                         6 crc32c (4 bytes, masked, of the tensor's bytes), 7 slices

Tensors of `slices` are variables that were trained in pieces (partitioned); they are refused. Texts and other things
that are no numbers are listed and not read. Each tensor's checksum is looked at when its numbers are first fetched.

What is written is what TensorFlow 2.21 writes, byte for byte: in the order of names, without gaps, in one file.

Source: TensorFlow, core/util/tensor_bundle/tensor_bundle.{h,cc}, core/protobuf/tensor_bundle.proto,
core/framework/{tensor_shape,types,versions}.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import protobuf, sstable
from gpt2_core.checkpoints.crc32c import Crc32c, masked
from gpt2_core.checkpoints.tensors import STORAGE, MappedFile, Shape, Tensor, check_shape, file_tensor
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_write, file_inside

INDEX = ".index"
_HEADER = b""
_SLICE = b"\0"  # how the keys of pieces begin
_VERSION = 1
_MOST_SHARDS = 99_999  # what five digits can count

#: Numbers of dtypes in TensorFlow -> ours; and what the others are called there.
DTYPES: Mapping[int, str] = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    17: "uint16",
    19: "float16",
    22: "uint32",
    23: "uint64",
}
_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
_OTHERS = {7: "text", 8: "complex64", 18: "complex128", 20: "resource", 21: "variant"}


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: `size` bytes at `offset` of the file number `shard`. `dtype` None: no numbers of ours."""

    name: str
    dtype: str | None
    kind: str
    shape: Shape
    shard: int
    offset: int
    size: int
    crc: int

    @property
    def end(self) -> int:
        """Where the byte after the last one stands."""
        return self.offset + self.size


def data_name(prefix: str, shard: int, shards: int) -> str:
    """The name of the file number `shard` of `shards` with numbers."""
    return f"{prefix}.data-{shard:05d}-of-{shards:05d}"


# Reading -------------------------------------------------------------------------------------------------------------


class Bundle:
    """An open checkpoint of TensorFlow: `entries` by name, in the order of the names, and `files`."""

    def __init__(self, prefix: Path, *, writable: bool = False) -> None:
        """Open PREFIX.index and the files it speaks of.

        Raises: CheckpointError for what is not there; CheckpointFormatError for anything damaged, cut off, lying, or
        not read here; UnsafeCheckpointError for a link that leaves the folder.
        """
        self.index = prefix.with_name(prefix.name + INDEX)
        self._files: dict[int, MappedFile] = {}
        try:
            self.entries, shards = _read_index(self.index)
            for shard in sorted({entry.shard for entry in self.entries.values()}):
                path = file_inside(prefix.parent, data_name(prefix.name, shard, shards), what=str(self.index))
                if not path.exists():
                    raise CheckpointError(
                        f"{path} is not there, and {self.index} says that it holds tensors; put it into the same folder"
                    )
                self._files[shard] = MappedFile(path, writable=writable)
            for shard, file in self._files.items():
                _check_regions([entry for entry in self.entries.values() if entry.shard == shard], file)
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> tuple[Path, ...]:
        """All files: the index first."""
        return (self.index, *(file.path for file in self._files.values()))

    def tensor(self, name: str, shape: Shape | None = None) -> Tensor:
        """One tensor, lazily; in another `shape` of as many numbers where one is given.

        Fetching it the first time raises CheckpointFormatError if its bytes are not those that were written. Raises:
        CheckpointFormatError if it holds no numbers.
        """
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointFormatError(f"{self.index} says that {name!r} is {entry.kind}; expected numbers")
        plain = file_tensor(self._files[entry.shard], entry.dtype, shape or entry.shape, entry.offset)
        return _checked(plain, entry, self._files[entry.shard].path)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()


def is_index(path: Path) -> bool:
    """Whether a file ends as an index does. Raises: OSError."""
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(sstable.MAGIC)))
        return file.read() == sstable.MAGIC


def _read_index(path: Path) -> tuple[dict[str, Entry], int]:
    """All entries, and how many files of numbers there are."""
    file = MappedFile(path)
    try:
        return _entries(sstable.read(file))
    except CheckpointFormatError as cause:
        raise CheckpointFormatError(f"{path} is not a sound index of a TensorFlow checkpoint: {cause}") from cause
    finally:
        file.close()


def _entries(table: list[sstable.Entry]) -> tuple[dict[str, Entry], int]:
    if not table or table[0][0] != _HEADER:
        raise CheckpointFormatError("it has no header, which is what the empty name stands for")
    shards = _shards(table[0][1])
    named = [(key, value) for key, value in table[1:] if not key.startswith(_SLICE)]
    found = {}
    for key, value in named:
        try:
            name = key.decode()
        except UnicodeDecodeError as cause:
            raise CheckpointFormatError(f"the name {key[:80]!r} is not UTF-8") from cause
        found[name] = _entry(name, value, shards)
    if len(named) < len(table) - 1:
        raise CheckpointFormatError("it holds pieces of partitioned variables; save it again without a partitioner")
    return found, shards


def _shards(header: bytes) -> int:
    """How many files a header says there are, if it is one that this can read."""
    shards = endianness = 0
    least, bad = 0, []
    for field, value in protobuf.fields(header):
        if field == 1:
            shards = protobuf.number(value)
        elif field == 2:
            endianness = protobuf.number(value)
        elif field == 3:
            for inner, each in protobuf.fields(protobuf.message(value)):
                least = protobuf.number(each) if inner == 2 else least
                bad += [each] if inner == 3 else []
    if endianness != 0:
        raise CheckpointFormatError(
            "its numbers are big-endian; restore and save it again with TensorFlow on a little-endian machine"
        )
    if least > _VERSION or _VERSION in bad:
        raise CheckpointFormatError(f"it asks for readers of version {least} and not {bad}; this one is {_VERSION}")
    if not 1 <= shards <= _MOST_SHARDS:
        raise CheckpointFormatError(f"it says that there are {shards} files; expected 1 to {_MOST_SHARDS}")
    return shards


def _entry(name: str, data: bytes, shards: int) -> Entry:
    values = {1: 0, 3: 0, 4: 0, 5: 0, 6: 0}
    sizes: list[int] = []
    for field, value in protobuf.fields(data):
        if field in values:
            values[field] = protobuf.number(value)
        elif field == 2:
            sizes += _dimensions(name, protobuf.message(value))
        elif field == 7:
            raise CheckpointFormatError(
                f"{name!r} is a partitioned variable, of which this file holds pieces; restore it and save it again "
                f"without a partitioner"
            )
    number, shard, offset, size, crc = values.values()
    if not 0 <= shard < shards or offset < 0 or size < 0:
        raise CheckpointFormatError(
            f"{name!r} is said to stand in file {shard} of {shards} at {offset}, with {size} bytes"
        )
    dtype = DTYPES.get(number)
    kind = dtype or _OTHERS.get(number, f"of the type {number}")
    shape = check_shape(sizes, dtype or "uint8", repr(name))
    if dtype is not None and prod(shape) * STORAGE[dtype].itemsize != size:
        raise CheckpointFormatError(f"{name!r} has {size} bytes, which {dtype} of shape {shape} does not take")
    return Entry(name, dtype, kind, shape, shard, offset, size, crc)


def _dimensions(name: str, data: bytes) -> Iterator[int]:
    """The sizes that a TensorShapeProto holds."""
    for field, value in protobuf.fields(data):
        if field == 2:
            sizes = [protobuf.number(each) for inner, each in protobuf.fields(protobuf.message(value)) if inner == 1]
            yield sizes[-1] if sizes else 0
        elif field == 3 and value:
            raise CheckpointFormatError(f"{name!r} has no shape")


def _check_regions(entries: list[Entry], file: MappedFile) -> None:
    """Raise CheckpointFormatError unless all tensors of a file lie within it, apart from each other."""
    reached, before = 0, ""
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.end)):
        if entry.end > file.size:
            raise CheckpointFormatError(
                f"{file.path} holds {file.size} bytes, but {entry.name!r} is said to stand at bytes {entry.offset} to "
                f"{entry.end}; it is truncated or damaged, fetch it again"
            )
        if entry.size and entry.offset < reached:
            raise CheckpointFormatError(
                f"{file.path}: {entry.name!r} at byte {entry.offset} overlaps {before!r}, which ends at byte {reached}"
            )
        if entry.size:
            reached, before = entry.end, entry.name


def _checked(tensor: Tensor, entry: Entry, path: Path) -> Tensor:
    """The tensor; the first time that its numbers are fetched, their checksum is compared, a piece at a time."""
    sound = False

    def compare(crc: Crc32c) -> None:
        nonlocal sound
        if masked(crc.value) != entry.crc:
            raise CheckpointFormatError(
                f"{path}: the numbers of {entry.name!r} are not those that were written, as their checksum says; fetch "
                f"the file again"
            )
        sound = True

    def pieces() -> Iterator[NDArray[Any]]:
        crc = Crc32c()
        for chunk in tensor.chunks():
            if not sound:
                crc.update(chunk)
            yield np.frombuffer(chunk, STORAGE[tensor.dtype])
        if not sound:
            compare(crc)

    def load() -> NDArray[Any]:
        if not sound:
            for _ in pieces():
                pass
        return tensor.view()

    return Tensor(tensor.dtype, tensor.shape, load, tensor.release, pieces)


# Writing -------------------------------------------------------------------------------------------------------------


def write(prefix: Path, tensors: Mapping[str, Tensor]) -> tuple[Path, ...]:
    """Write PREFIX.index and one file of numbers, a piece of a tensor in memory at a time. Raises: WriteError."""
    data = prefix.with_name(data_name(prefix.name, 0, 1))
    version = protobuf.to_field(1, _VERSION)
    entries = [(_HEADER, protobuf.to_field(1, 1) + protobuf.to_field(3, version))]
    with atomic_write(data) as file:
        offset = 0
        for name in sorted(tensors, key=str.encode):
            tensor, crc = tensors[name], Crc32c()
            for chunk in tensor.chunks():
                file.write(chunk)
                crc.update(chunk)
            tensor.release()
            entries.append((name.encode(), _entry_bytes(tensor, offset, masked(crc.value))))
            offset += tensor.nbytes
    index = prefix.with_name(prefix.name + INDEX)
    with atomic_write(index) as file:
        file.write(sstable.to_bytes(entries))
    return index, data


def _entry_bytes(tensor: Tensor, offset: int, crc: int) -> bytes:
    dims = b"".join(protobuf.to_field(2, protobuf.to_field(1, size), always=True) for size in tensor.shape)
    return (
        protobuf.to_field(1, _NUMBERS[tensor.dtype])
        + protobuf.to_field(2, dims, always=True)
        + protobuf.to_field(4, offset)
        + protobuf.to_field(5, tensor.nbytes)
        + protobuf.to_short_field(6, crc)
    )
