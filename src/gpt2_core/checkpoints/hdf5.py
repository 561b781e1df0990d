"""HDF5 as h5py writes it by default: groups of groups and of plain arrays. The container of all of Keras's files.

    superblock, version 0        96 bytes: signature, sizes, the end of the file, and where the root group stands
    object header, version 1     16 bytes and messages: what a group or an array is, one 8-byte head each
      of a group                 a symbol table (where its tree and its heap stand) and attributes
      of an array                a dataspace (its shape), a datatype, a layout (where its bytes stand, how many)
    tree  TREE, leaves SNOD      the members of a group: where each name and each object header stands, by name
    heap  HEAP                   the names, each ended by a zero
    global heap  GCOL            the texts of attributes, where h5py was given a str
    the data of each array       contiguous, row by row, little-endian

All addresses count from the start of the file and are 8 bytes wide, as are all lengths.

Keras 3 stores bfloat16 as opaque bytes, two for each number, and says so in the array's attribute `dtype`.

Source: HDF5 File Format Specification version 3.0, sections II.A, III.A, III.B, III.D, III.E, IV.A. h5py asks the
library for the earliest layout unless told otherwise, so this is what every release of it since 2.0 has written for
Keras. For bfloat16: saving_lib.py of Keras 3.

Read here, not by the library, because a stranger's file should not be able to end the process: the library is made for
sound files. What is read is small: everything else that HDF5 has (links to other files and within the file, arrays made
of other files' pieces, compressed or chunked data, references, enumerations, strings as data) is refused by name. The
tests hold reader and writer to agree with h5py. docs/decisions/0009-hdf5-without-the-library.md has the reasons.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import BinaryIO, TypeAlias

from gpt2_core.checkpoints.tensors import STORAGE, MappedFile, Shape, Tensor, check_shape
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError

SIGNATURE = b"\x89HDF\r\n\x1a\n"

Names: TypeAlias = tuple[str, ...]

_UNDEFINED = (1 << 64) - 1
_SUPERBLOCK = struct.Struct("<8s8B2HI4Q2Q2I2Q")
_OBJECT = struct.Struct("<BxHII4x")
_MESSAGE = struct.Struct("<HHB3x")
_ENTRY = struct.Struct("<QQI4x16x")
_NODE = struct.Struct("<4sBBHQQ")
_HEAP = struct.Struct("<4sB3xQQQ")
_LEAF = struct.Struct("<4sBxH")
_TEXTS = struct.Struct("<4sB3xQ")
_TEXT = struct.Struct("<HH4xQ")
_PLACE = struct.Struct("<IQI")
_SPACES = 2  # how a text of fixed width is filled up

# Types of messages.
_SPACE, _LINK_INFO, _TYPE, _FILL, _LINK, _FILES, _LAYOUT, _FILTERS = 0x01, 0x02, 0x03, 0x05, 0x06, 0x07, 0x08, 0x0B
_ATTRIBUTE, _CONTINUED, _TABLE = 0x0C, 0x10, 0x11
_SHARED = 0x02  # the flag of a message that stands elsewhere

# GPT-2 XL's 580 parameters take 1.5 MB. All of the description that is read counts, so its time is bounded too.
_MOST_DESCRIPTION = 1 << 24
_LEAST_READ = 24
_MOST_NAME = 255
_MOST_TEXT = 1 << 24
_MOST_DEPTH = 16


def _float(exponent: int, mantissa: int) -> bytes:
    """The datatype message of an IEEE-like float, little-endian: sign, exponent, mantissa with its 1 implied."""
    bits = 1 + exponent + mantissa
    sizes = struct.pack("<HHBBBBI", 0, bits, mantissa, exponent, 0, mantissa, (1 << (exponent - 1)) - 1)
    return struct.pack("<BBBBI", 0x11, 0x20, bits - 1, 0, bits // 8) + sizes


def _integer(bits: int, *, signed: bool) -> bytes:
    return struct.pack("<BBBBIHH", 0x10, 0x08 if signed else 0, 0, 0, bits // 8, 0, bits)


#: Our dtypes and the message that describes each. bfloat16 has no name in HDF5 before 2.0, but this description,
#: which every release reads: as float32, exactly. bool would be an enumeration.
TYPES: Mapping[str, bytes] = {
    "float64": _float(11, 52),
    "float32": _float(8, 23),
    "float16": _float(5, 10),
    "bfloat16": _float(8, 7),
    **{f"int{bits}": _integer(bits, signed=True) for bits in (64, 32, 16, 8)},
    **{f"uint{bits}": _integer(bits, signed=False) for bits in (64, 32, 16, 8)},
}
_DTYPES = {message[1:]: dtype for dtype, message in TYPES.items()}
_CLASSES = (
    "another integer",
    "another float",
    "time",
    "strings",
    "bit fields",
    "opaque bytes",
    "records",
    "references",
    "an enumeration",
    "lists of varying length",
    "arrays",
)


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Array:
    """An array of the file: the names that lead to it, and `size` bytes at `offset`."""

    path: Names
    dtype: str
    shape: Shape
    offset: int

    @property
    def end(self) -> int:
        """Where the byte after the last one stands."""
        return self.offset + prod(self.shape) * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class Window:
    """A file of HDF5 that stands within another one: `size` bytes from `start` on."""

    file: MappedFile
    start: int
    size: int

    def bytes(self, offset: int, count: int) -> bytes:
        """A copy of `count` bytes, fewer at the end of the window."""
        return self.file.bytes(self.start + offset, min(count, self.size - offset)) if offset < self.size else b""


File: TypeAlias = MappedFile | Window


@dataclass(frozen=True)
class Contents:
    """What a file holds: its arrays in the order of their bytes, and the names of each group's attributes."""

    arrays: tuple[Array, ...]
    attributes: Mapping[Names, frozenset[str]]
    _bodies: Mapping[Names, Mapping[str, bytes]] = field(repr=False)
    _reader: _Reader = field(repr=False)

    def text(self, path: Names, attribute: str, most: int = _MOST_TEXT) -> str | None:
        """The text of a group's attribute, that of a list put together; None if there is none, or it is no text.

        Raises: CheckpointFormatError for more than `most` bytes, and for damage.
        """
        body = self._bodies.get(path, {}).get(attribute)
        return None if body is None else self._reader.text(path, body, most)


def contents(file: File) -> Contents:
    """Find every array of a file. Nothing is allocated for their bytes, which are all checked to be in the file.

    Raises: UnsafeCheckpointError for anything that leads to another file, CheckpointFormatError for damage and for
    what is not read here; messages start in the middle of a sentence about the file.
    """
    reader = _Reader(file)
    arrays, bodies = reader.walk()
    arrays.sort(key=lambda array: (array.offset, array.end))
    reached = _SUPERBLOCK.size
    for array in arrays:
        if array.offset == array.end:
            continue
        if array.offset < reached:
            raise CheckpointFormatError(f"{_shown(array.path)} at byte {array.offset} overlaps what stands before it")
        reached = array.end
    return Contents(tuple(arrays), {path: frozenset(each) for path, each in bodies.items()}, bodies, reader)


def root_attributes(file: File) -> frozenset[str]:
    """The names of the root group's attributes, and nothing else of the file.

    Raises: as `contents`.
    """
    reader = _Reader(file)
    return frozenset(reader.object((), reader.root()).attributes)


def members(file: File, path: Names = ()) -> frozenset[str]:
    """The names in one group, and nothing else of the file; none if there is no such group.

    Raises: as `contents`.
    """
    reader = _Reader(file)
    found = reader.object((), reader.root())
    for depth, name in enumerate(path):
        within = reader.members(path[:depth], found) if found.is_group else {}
        if name not in within:
            return frozenset()
        found = reader.object(path[: depth + 1], within[name])
    return frozenset(reader.members(path, found)) if found.is_group else frozenset()


@dataclass
class _Object:
    """What the messages of one object header say."""

    space: bytes | None = None
    type: bytes | None = None
    layout: bytes | None = None
    table: bytes | None = None
    links: list[bytes] = field(default_factory=list)
    link_info: bytes | None = None
    attributes: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_group(self) -> bool:
        return self.table is not None or self.link_info is not None or bool(self.links)


class _Reader:
    def __init__(self, file: File) -> None:
        self.file = file
        self.left = _MOST_DESCRIPTION
        self.heaps: dict[int, dict[int, bytes]] = {}

    def take(self, offset: int, count: int, what: str) -> bytes:
        """`count` bytes of the description, counted."""
        if offset + count > self.file.size:
            raise CheckpointFormatError(
                f"{what} would stand at bytes {offset} to {offset + count} of {self.file.size}; "
                f"it is truncated or damaged: fetch it again"
            )
        self.left -= max(count, _LEAST_READ)
        if self.left < 0:
            raise CheckpointFormatError(f"its description takes more than {_MOST_DESCRIPTION} bytes")
        return self.file.bytes(offset, count)

    def walk(self) -> tuple[list[Array], dict[Names, dict[str, bytes]]]:
        """Every array and every group, from the root on; each object may be linked once."""
        arrays: list[Array] = []
        groups: dict[Names, dict[str, bytes]] = {}
        seen: set[int] = set()
        waiting: list[tuple[Names, int]] = [((), self.root())]
        while waiting:
            path, address = waiting.pop()
            if address in seen:
                raise CheckpointFormatError(f"{_shown(path)} is an object that the file links to more than once")
            seen.add(address)
            found = self.object(path, address)
            if found.is_group:
                if len(path) >= _MOST_DEPTH:
                    raise CheckpointFormatError(f"its groups are nested more than {_MOST_DEPTH} deep")
                groups[path] = found.attributes
                waiting += [((*path, name), where) for name, where in self.members(path, found).items()]
            else:
                arrays.append(self.array(path, found))
        return arrays, groups

    def root(self) -> int:
        """Where the header of the root group stands."""
        head = self.file.bytes(0, _SUPERBLOCK.size)
        if not head.startswith(SIGNATURE):
            raise CheckpointFormatError(f"it starts with {head[:8]!r}; expected the signature of HDF5, {SIGNATURE!r}")
        if len(head) < _SUPERBLOCK.size:
            raise CheckpointFormatError(f"it has {len(head)} bytes; it is truncated: fetch it again")
        _, version, _, table, _, shared, address, length, _, _, _, _, base, _, end, driver, _, root, *_ = (
            _SUPERBLOCK.unpack(head)
        )
        if (version, table, shared, address, length, base, driver) != (0, 0, 0, 8, 8, 0, _UNDEFINED):
            raise CheckpointFormatError(
                f"its superblock is of version {version} or has unusual sizes; expected version 0, which h5py and "
                f"Keras write by default (not libver='latest', no user block): copy it with h5py into a new file"
            )
        if end > self.file.size:
            raise CheckpointFormatError(
                f"it has {self.file.size} bytes, but had {end} when it was written; it is truncated: fetch it again"
            )
        return int(root)

    def object(self, path: Names, address: int) -> _Object:
        """The messages of the object header at `address`, sorted by what they are about."""
        found = _Object()
        for kind, flags, body in self.messages(path, address):
            if flags & _SHARED and kind != _ATTRIBUTE:
                raise CheckpointFormatError(f"{_shown(path)} shares its description with another object")
            if kind == _SPACE:
                found.space = body
            elif kind == _TYPE:
                found.type = body
            elif kind == _LAYOUT:
                found.layout = body
            elif kind == _TABLE:
                found.table = body
            elif kind == _LINK:
                found.links.append(body)
            elif kind == _LINK_INFO:
                found.link_info = body
            elif kind == _ATTRIBUTE:
                name = _attribute_name(path, body)
                if name in found.attributes:
                    raise CheckpointFormatError(f"{_shown(path)} has two attributes called {name[:50]!r}")
                found.attributes[name] = body
            elif kind == _FILES:
                raise UnsafeCheckpointError(f"{_shown(path)} keeps its data in other files; nothing was read from them")
            elif kind == _FILTERS:
                raise CheckpointFormatError(f"{_shown(path)} is compressed or filtered; expected plain data")
        return found

    def messages(self, path: Names, address: int) -> Iterator[tuple[int, int, bytes]]:
        """The type, the flags and the body of each message of an object header, and of its continuations."""
        what = f"the header of {_shown(path)}"
        head = self.take(address, _OBJECT.size, what)
        version, _, _, size = _OBJECT.unpack(head)
        if version != 1:
            raise CheckpointFormatError(f"{what} is not of version 1; expected a file that h5py or Keras wrote")
        blocks = [(address + _OBJECT.size, size)]
        for block_start, block_size in blocks:
            block, at = self.take(block_start, block_size, what), 0
            while at + _MESSAGE.size <= len(block):
                kind, count, flags = _MESSAGE.unpack_from(block, at)
                at += _MESSAGE.size
                body = block[at : at + count]
                at += count
                if len(body) != count:
                    raise CheckpointFormatError(f"{what} has a message that is longer than the header")
                self.left -= _LEAST_READ
                if kind == _CONTINUED:
                    start, length = _unpack("<QQ", body, what)
                    blocks.append((start, length))
                elif kind:
                    yield kind, flags, body

    # Groups ----------------------------------------------------------------------------------------------------------

    def members(self, path: Names, found: _Object) -> dict[str, int]:
        """The names in a group, and where the header of each stands."""
        members: dict[str, int] = {}
        named = self.links(path, found) if found.table is None else self.table(path, found.table)
        for raw, address in named:
            name = _name(path, raw)
            if name in members:
                raise CheckpointFormatError(f"{_shown(path)} has two members called {name!r}")
            members[name] = address
        return members

    def table(self, path: Names, body: bytes) -> Iterator[tuple[bytes, int]]:
        """The members that a symbol table lists."""
        what = f"the list of members of {_shown(path)}"
        tree, heap = _unpack("<QQ", body, what)
        mark, version, size, _, start = _HEAP.unpack(self.take(heap, _HEAP.size, what))
        if mark != b"HEAP" or version != 0:
            raise CheckpointFormatError(f"{what} has no heap of names where it should be; it is damaged")
        names = self.take(start, size, what)
        for leaf in self.leaves(tree, None, what):
            mark, version, count = _LEAF.unpack(self.take(leaf, _LEAF.size, what))
            if mark != b"SNOD" or version != 1:
                raise CheckpointFormatError(f"{what} has no leaf where it should be; it is damaged")
            entries = self.take(leaf + _LEAF.size, count * _ENTRY.size, what)
            for name, address, cache in _ENTRY.iter_unpack(entries):
                self.left -= _LEAST_READ
                end = names.find(b"\0", name, name + _MOST_NAME + 1)
                if end < 0:
                    raise CheckpointFormatError(f"{what} has a name that does not end within {_MOST_NAME} bytes")
                if cache == 2:
                    raise _soft_link(path, names[name:end])
                yield names[name:end], address

    def leaves(self, address: int, level: int | None, what: str) -> Iterator[int]:
        """Where the leaves of a tree stand, in order. `level` is that of the node at `address`, if it is known."""
        mark, kind, found, count, _, _ = _NODE.unpack(self.take(address, _NODE.size, what))
        if mark != b"TREE" or kind != 0 or (level is not None and found != level) or found > _MOST_DEPTH:
            raise CheckpointFormatError(f"{what} has no tree where it should be; it is damaged")
        body = self.take(address + _NODE.size, 8 * (2 * count + 1), what)
        for child in struct.unpack(f"<{2 * count + 1}Q", body)[1::2]:
            if found == 0:
                yield child
            else:
                yield from self.leaves(child, found - 1, what)

    def links(self, path: Names, found: _Object) -> Iterator[tuple[bytes, int]]:
        """The members of a group of the newer kind, which h5py makes for links and for names that are not ASCII."""
        what = f"a link in {_shown(path)}"
        if found.link_info is not None:
            _, flags = _unpack("<BB", found.link_info, what)
            (heap,) = _unpack("<Q", found.link_info[10 if flags & 0x01 else 2 :], what)
            if heap != _UNDEFINED:
                raise CheckpointFormatError(
                    f"{_shown(path)} keeps its members in a heap, as libver='latest' does; expected a file that h5py "
                    f"or Keras wrote by default: copy it with h5py into a new file"
                )
        for body in found.links:
            version, flags = _unpack("<BB", body, what)
            at, kind = 2, 0
            if flags & 0x08:
                (kind,) = _unpack("<B", body[at:], what)
                at += 1
            at += (8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0)
            width = 1 << (flags & 0x03)
            length = int.from_bytes(body[at : at + width], "little")
            name = body[at + width : at + width + length]
            rest = body[at + width + length :]
            if version != 1 or len(name) != length:
                raise CheckpointFormatError(f"{what} is of another version or damaged")
            if kind == 1:
                raise _soft_link(path, name)
            if kind != 0:
                raise UnsafeCheckpointError(
                    f"{_shown((*path, name.decode('utf-8', 'replace')))} is a link to another file, which was not "
                    f"followed; do not use this file unless you trust it, and then copy what it links to into it"
                )
            (address,) = _unpack("<Q", rest, what)
            yield name, address

    # Arrays ----------------------------------------------------------------------------------------------------------

    def array(self, path: Names, found: _Object) -> Array:
        if found.space is None or found.type is None or found.layout is None:
            raise CheckpointFormatError(f"{_shown(path)} is neither a group nor an array")
        dtype = "bfloat16" if self.is_opaque_bfloat16(path, found) else _dtype(path, found.type)
        shape = check_shape(_sizes(path, found.space), dtype, _shown(path))
        offset, size = _region(path, found.layout)
        expected = prod(shape) * STORAGE[dtype].itemsize
        if size != expected:
            raise CheckpointFormatError(
                f"{_shown(path)} of dtype {dtype} and shape {shape} has {size} bytes; expected {expected}"
            )
        if size == 0:
            return Array(path, dtype, shape, 0)
        if offset == _UNDEFINED:
            raise CheckpointFormatError(f"{_shown(path)} was never written: it has no data")
        if offset + size > self.file.size:
            raise CheckpointFormatError(
                f"{_shown(path)} claims bytes {offset} to {offset + size} of {self.file.size}; "
                f"it is truncated or damaged: fetch it again"
            )
        return Array(path, dtype, shape, offset)

    def is_opaque_bfloat16(self, path: Names, found: _Object) -> bool:
        """Whether an array is bfloat16 as Keras 3 stores it."""
        body = found.attributes.get("dtype")
        if body is None or found.type is None or found.type[:1] != b"\x15" or found.type[4:8] != b"\2\0\0\0":
            return False
        return self.text(path, body, _MOST_NAME) == "bfloat16"

    # Texts -----------------------------------------------------------------------------------------------------------

    def text(self, path: Names, body: bytes, most: int) -> str | None:
        """What an attribute says, several texts put together; None if it is no text."""
        what = f"an attribute of {_shown(path)}"
        kind, space, data = _attribute_parts(body, what)
        count, width, padding = prod(_sizes(path, space)), int.from_bytes(kind[4:8], "little"), kind[1] & 0x0F
        of_any_length = kind[:1] == b"\x19" and padding == 1
        if not of_any_length and kind[:1] != b"\x13":
            return None
        width = _PLACE.size if of_any_length else width
        if count * max(width, 1) > len(data):
            raise CheckpointFormatError(f"{what} is cut short; it is damaged")
        whole, address, index = bytearray(), 0, 0
        for at in range(0, count * width, width or 1):
            text = data[at : at + width]
            if of_any_length:
                length, address, index = _PLACE.unpack(text)
            else:
                text = text.rstrip(b" ") if padding == _SPACES else text.split(b"\0")[0]
                length = len(text)
            if len(whole) + length > most:  # before it is fetched: a list may name one long text many times
                raise CheckpointFormatError(f"{what} is longer than {most} bytes")
            whole += self.heap_text(length, address, index, what) if of_any_length else text
        return whole.decode("utf-8", "replace")

    def heap_text(self, length: int, address: int, index: int, what: str) -> bytes:
        """A text of any length: how long it is, which heap it stands in, and its number there."""
        text = self.heap(address).get(index, b"") if length else b""
        if len(text) < length:
            raise CheckpointFormatError(f"{what} is not where it should be; it is damaged")
        return text[:length]

    def heap(self, address: int) -> dict[int, bytes]:
        """The texts of a global heap, by number."""
        if address not in self.heaps:
            what, found, at = "a heap of texts", self.heaps.setdefault(address, {}), 0
            mark, version, size = _TEXTS.unpack(self.take(address, _TEXTS.size, what))
            if mark != b"GCOL" or version != 1 or size < _TEXTS.size:
                raise CheckpointFormatError(f"{what} is not where it should be; it is damaged")
            block = self.take(address + _TEXTS.size, size - _TEXTS.size, what)
            while at + _TEXT.size <= len(block):
                index, _, length = _TEXT.unpack_from(block, at)
                at += _TEXT.size
                if not index:  # what is free
                    break
                if at + length > len(block):
                    raise CheckpointFormatError(f"{what} holds one that is longer than the heap; it is damaged")
                found[index] = block[at : at + length]
                at += length + -length % 8
        return self.heaps[address]


def _dtype(path: Names, body: bytes) -> str:
    """The dtype that a datatype message describes; padding follows the message, versions 1 and 3 differ in nothing."""
    kind, version = (body[0] & 0x0F, body[0] >> 4) if body else (0, 0)
    known = _DTYPES.get(body[1 : 20 if kind == 1 else 12])
    if version not in (1, 3) or kind not in (0, 1) or known is None:
        held = _CLASSES[kind] if kind < len(_CLASSES) else f"class {kind}"
        raise CheckpointFormatError(
            f"{_shown(path)} holds {held} (or big-endian numbers); expected one of {', '.join(TYPES)}"
        )
    return known


def _sizes(path: Names, body: bytes) -> list[int]:
    what = f"the shape of {_shown(path)}"
    version, rank, _, kind = _unpack("<4B", body, what)
    if version not in (1, 2) or (version == 2 and kind > 1):
        raise CheckpointFormatError(f"{what} is of another version, or empty without sizes")
    return list(_unpack(f"<{rank}Q", body[8 if version == 1 else 4 :], what))


def _region(path: Names, body: bytes) -> tuple[int, int]:
    """Where the data of an array stands, and how many bytes it has."""
    what = f"the layout of {_shown(path)}"
    version, kind = _unpack("<BB", body, what)
    if version == 4 and kind == 3:
        raise UnsafeCheckpointError(f"{_shown(path)} is made of pieces of other files; nothing was read from them")
    if version not in (3, 4) or kind != 1:
        held = {0: "in its header", 2: "in chunks, which may be compressed"}.get(kind, "in another way")
        raise CheckpointFormatError(
            f"{_shown(path)} is stored {held} (layout version {version}); expected contiguous data, as Keras writes: "
            f"copy it with h5py into a new file"
        )
    offset, size = _unpack("<QQ", body[2:], what)
    return offset, size


def _attribute_parts(body: bytes, what: str) -> tuple[bytes, bytes, bytes]:
    """The type, the dataspace and the data of an attribute; all of them are filled up to 8 bytes in version 1."""
    version, flags, *sizes = _unpack("<BBHHH", body, what)
    if version not in (1, 2, 3) or (version > 1 and flags):
        raise CheckpointFormatError(f"{what} is of another version, or shares its description")
    at, parts = 9 if version == 3 else 8, []
    for size in sizes:
        parts.append(body[at : at + size])
        at += size + (-size % 8 if version == 1 else 0)
    return parts[1].ljust(8, b"\0"), parts[2], body[at:]


def _attribute_name(path: Names, body: bytes) -> str:
    version, _, length = _unpack("<BBH", body, f"an attribute of {_shown(path)}")
    start = 9 if version == 3 else 8
    return body[start : start + length].split(b"\0")[0].decode("utf-8", "replace")


def _name(path: Names, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    if not name or name == "." or "/" in name or len(raw) > _MOST_NAME or not name.isprintable():
        raise CheckpointFormatError(f"{_shown(path)} has a member called {raw[:50]!r}; expected a plain name")
    return name


def _soft_link(path: Names, raw: bytes) -> CheckpointError:
    name = raw[:_MOST_NAME].decode("utf-8", "replace")
    return UnsafeCheckpointError(
        f"{_shown((*path, name))} is a symbolic link, which may lead anywhere and was not followed; expected the data "
        f"itself: copy the file with h5py, links resolved"
    )


def _unpack(layout: str, body: bytes, what: str) -> tuple[int, ...]:
    size = struct.calcsize(layout)
    if len(body) < size:
        raise CheckpointFormatError(f"{what} is cut short; it is damaged")
    return struct.unpack(layout, body[:size])


def _shown(path: Names) -> str:
    text = "/" + "/".join(path)
    return repr(text if len(text) <= 200 else text[:200] + "...")


# Writing -------------------------------------------------------------------------------------------------------------

#: Keras splits a list of names into several attributes where it takes more, and so do we: a header's message has 64 kB.
MOST_ATTRIBUTE = 64512
_FANOUT = 16  # "group internal node K": a node of a tree has up to twice as many children
_LEAF_HALF = 4  # "group leaf node K": likewise; h5py's default
_ALIGNMENT = 64  # bytes, a cache line: so that mapped arrays suit their dtype

Attribute: TypeAlias = str | Sequence[str]
Tree: TypeAlias = "dict[str, Tree | Tensor]"


def write(file: BinaryIO, arrays: Mapping[Names, Tensor], attributes: Mapping[Names, Mapping[str, Attribute]]) -> None:
    """Write arrays, by the names that lead to each, and attributes of groups; one array in memory at a time.

    The description comes first, then the data in the order of `arrays`; the same input gives the same bytes.
    Raises: CheckpointError for what HDF5 or this module cannot hold; OSError.
    """
    for piece in pieces(arrays, attributes)[1]:
        file.write(piece)


def pieces(
    arrays: Mapping[Names, Tensor], attributes: Mapping[Names, Mapping[str, Attribute]]
) -> tuple[int, Iterator[bytes | memoryview]]:
    """How many bytes `write` would write, and these bytes in pieces, for a file that stands within another one.

    Raises: CheckpointError for what HDF5 or this module cannot hold.
    """
    refused = [path for path, tensor in arrays.items() if tensor.dtype not in TYPES]
    if refused:
        raise CheckpointError(
            f"h5 cannot hold {arrays[refused[0]].dtype} ({', '.join(map(_shown, refused[:5]))}); expected one of "
            f"{', '.join(TYPES)}; convert them, or use safetensors"
        )
    tree = _tree(arrays, attributes)
    # Sizes do not depend on addresses: a first layout tells how long the description is, a second one is right.
    start = len(_Image(tree, attributes, dict.fromkeys(arrays, 0), 0).data)
    places, end = {}, start
    for path, tensor in arrays.items():
        end += -end % _ALIGNMENT
        places[path] = end
        end += tensor.nbytes
    return end, _in_order(bytes(_Image(tree, attributes, places, end).data), arrays, places)


def _in_order(
    description: bytes, arrays: Mapping[Names, Tensor], places: Mapping[Names, int]
) -> Iterator[bytes | memoryview]:
    yield description
    at = len(description)
    for path, tensor in arrays.items():
        yield bytes(places[path] - at)
        yield from tensor.chunks()
        tensor.release()
        at = places[path] + tensor.nbytes


def split_names(name: str, values: Sequence[str]) -> dict[str, Sequence[str]]:
    """A list of texts as one attribute, or as `name`0, `name`1, ... of `MOST_ATTRIBUTE` bytes at most, like Keras's."""
    width = max((len(value.encode()) for value in values), default=1)
    most = MOST_ATTRIBUTE // max(width, 1)
    if len(values) <= most:
        return {name: values}
    if not most:
        raise CheckpointError(f"h5 cannot hold a name of {width} bytes in {name}; expected at most {MOST_ATTRIBUTE}")
    starts = range(0, len(values), most)
    return {f"{name}{number}": values[start : start + most] for number, start in enumerate(starts)}


def _tree(arrays: Mapping[Names, Tensor], attributes: Mapping[Names, object]) -> Tree:
    """Groups within groups, by name."""
    tree: Tree = {}

    def group(path: Names) -> Tree:
        at = tree
        for name in path:
            _check_name(path, name)
            child = at.setdefault(name, {})
            if isinstance(child, Tensor):
                raise CheckpointError(f"h5 cannot hold {_shown(path)}: {name!r} is an array and a group")
            at = child
        return at

    for path in attributes:
        group(path)
    for path, tensor in arrays.items():
        _check_name(path, path[-1])
        home = group(path[:-1])
        if path[-1] in home:
            raise CheckpointError(f"h5 cannot hold {_shown(path)} twice: it is an array and a group")
        home[path[-1]] = tensor
    return tree


def _check_name(path: Names, name: str) -> None:
    good = name and name != "." and "/" not in name and name.isprintable()
    if not good or len(name.encode("utf-8", "replace")) > _MOST_NAME or len(path) > _MOST_DEPTH:
        raise CheckpointError(
            f"h5 cannot hold {_shown(path)}: expected at most {_MOST_DEPTH} plain names of at most {_MOST_NAME} bytes"
        )


class _Image:
    """The description of a file, address by address: the superblock and all that hangs on it."""

    def __init__(
        self,
        tree: Tree,
        attributes: Mapping[Names, Mapping[str, Attribute]],
        places: Mapping[Names, int],
        end: int,
    ) -> None:
        self.attributes, self.places = attributes, places
        # One node of a tree holds 32 leaves; where that is too little, wider leaves spare us taller trees.
        self.half = max(_LEAF_HALF, -(-_widest(tree) // (4 * _FANOUT)))
        self.data = bytearray(_SUPERBLOCK.size)
        root, table, heap = self.group((), tree)
        half, undefined = self.half, _UNDEFINED
        versions = (0, 0, 0, 0, 0, 8, 8, 0)
        self.data[: _SUPERBLOCK.size] = _SUPERBLOCK.pack(
            SIGNATURE, *versions, half, _FANOUT, 0, 0, undefined, end, undefined, 0, root, 1, 0, table, heap
        )

    def place(self, block: bytes) -> int:
        """Append a block, aligned to 8 bytes, and give its address."""
        address = len(self.data)
        self.data += _padded(block)
        return address

    def group(self, path: Names, tree: Tree) -> tuple[int, int, int]:
        """Where the header of a group, its tree and its heap stand, once all that is in it has been placed."""
        members = {}
        for name in sorted(tree, key=str.encode):
            child = tree[name]
            here = (*path, name)
            members[name] = self.array(here, child) if isinstance(child, Tensor) else self.group(here, child)[0]
        names, offsets = bytearray(8), []  # the empty name stands first: the tree's keys begin with it
        for name in members:
            offsets.append(len(names))
            names += _padded(name.encode() + b"\0")
        segment = self.place(bytes(names))
        heap = self.place(_HEAP.pack(b"HEAP", 0, len(names), 1, segment))  # 1: nothing in it is free
        entries = [_ENTRY.pack(*pair, 0) for pair in zip(offsets, members.values(), strict=True)]
        keys = [0]
        node = b""
        for start in range(0, len(entries), 2 * self.half):
            held = entries[start : start + 2 * self.half]
            leaf = _LEAF.pack(b"SNOD", 1, len(held)) + b"".join(held)
            node += struct.pack(
                "<QQ", keys[-1], self.place(leaf.ljust(_LEAF.size + 2 * self.half * _ENTRY.size, b"\0"))
            )
            keys.append(offsets[start + len(held) - 1])
        node = _NODE.pack(b"TREE", 0, 0, len(keys) - 1, _UNDEFINED, _UNDEFINED) + node + struct.pack("<Q", keys[-1])
        table = self.place(node.ljust(_NODE.size + 8 * (4 * _FANOUT + 1), b"\0"))
        messages = [(_TABLE, 0, struct.pack("<QQ", table, heap))]
        messages += [(_ATTRIBUTE, 0, _attribute(*pair)) for pair in self.attributes.get(path, {}).items()]
        return self.header(messages), table, heap

    def array(self, path: Names, tensor: Tensor) -> int:
        """Where the header of an array stands."""
        offset = self.places[path] if tensor.nbytes else _UNDEFINED
        return self.header(
            [
                (_SPACE, 0, _space(tensor.shape)),
                (_TYPE, 1, TYPES[tensor.dtype]),  # 1: it never changes
                (_FILL, 1, struct.pack("<4BI", 2, 2, 2, 1, 0)),  # zeros, written where nothing else is
                (_LAYOUT, 0, struct.pack("<BBQQ", 3, 1, offset, tensor.nbytes)),
            ]
        )

    def header(self, messages: Sequence[tuple[int, int, bytes]]) -> int:
        bodies = [(kind, flags, _padded(body)) for kind, flags, body in messages]
        packed = b"".join(_MESSAGE.pack(kind, len(body), flags) + body for kind, flags, body in bodies)
        return self.place(_OBJECT.pack(1, len(messages), 1, len(packed)) + packed)


def _widest(tree: Tree) -> int:
    inner = [child for child in tree.values() if not isinstance(child, Tensor)]
    return max([len(tree), *map(_widest, inner)])


def _attribute(name: str, value: Attribute) -> bytes:
    """One text, or a list of texts of the same width filled up with zeros: what numpy calls dtype S."""
    texts = [text.encode() for text in ([value] if isinstance(value, str) else value)]
    width = max([1, *map(len, texts)])
    charset = 0 if all(text.isascii() for text in texts) else 1
    kind = struct.pack("<BBBBI", 0x13, charset << 4 | 1, 0, 0, width)
    space = _space(() if isinstance(value, str) else (len(texts),))
    title = name.encode() + b"\0"
    head = struct.pack("<BBHHH", 1, 0, len(title), len(kind), len(space))
    data = b"".join(text.ljust(width, b"\0") for text in texts)
    return head + _padded(title) + _padded(kind) + _padded(space) + data


def _space(shape: Shape) -> bytes:
    return struct.pack(f"<BBB5x{len(shape)}Q", 1, len(shape), 0, *shape)


def _padded(block: bytes) -> bytes:
    return block + bytes(-len(block) % 8)
