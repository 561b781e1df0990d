"""pytorch_model.bin: what torch.save writes, read without torch and without running anything.

Since torch 1.6 it is a stored zip archive:

    NAME/data.pkl      a pickle of the state dict; each tensor refers to a storage by key
    NAME/data/KEY      the bytes of one storage, aligned to 64
    NAME/byteorder     "little" or "big"; absent before torch 2.1, then little
    NAME/version       "3"

Before, five pickles (a magic number, 1001, a description of the machine, the state dict, the keys of storages) and
then, for each key, a 64-bit count of elements and the bytes. A tensor is a storage, an offset, a shape, and strides.

Source: torch/serialization.py and torch/_utils.py of torch 1.0 to 2.13. The pickles run on `pickles.decode`, which
cannot call anything; `_KNOWN` is the whole list of globals.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import pickles, zips
from gpt2_core.checkpoints.pickles import Global, Reducer
from gpt2_core.checkpoints.sharding import Layout, read_layout, write_layout
from gpt2_core.checkpoints.tensors import (
    STORAGE,
    Checkpoint,
    MappedFile,
    Shape,
    Tensor,
    check_bool,
    check_shape,
    file_tensor,
)
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError
from gpt2_core.files import atomic_write

NAME = "bin"
RANK = 20
LAYOUT = Layout(NAME, stem="pytorch_model", suffix=".bin", suffixes=(".bin", ".pt", ".pth"))
FILES = (LAYOUT.single, LAYOUT.index)

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_CLASSES = {dtype: name for name, dtype in _STORAGES.items()}
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_ZIP_START = b"PK\3\4"
_LEGACY_STARTS = (b"\x8a\x0a" + _MAGIC.to_bytes(10, "little"), f"L{_MAGIC}L\n".encode())  # protocols 2 up, 0 and 1


@dataclass(frozen=True)
class Storage:
    """A run of numbers that tensors share: `count` of `dtype` (None: untyped bytes) under `key`, from `start` on."""

    key: str
    dtype: str | None
    count: int
    start: int = 0
    most: int | None = None


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it; nothing has been checked against the file yet."""

    storage: Storage
    dtype: str
    offset: int
    shape: Shape
    strides: tuple[int, ...]


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, looks like this format, else None."""
    if path.is_dir():
        return LAYOUT.find(path)
    if not path.is_file():
        return None
    named = LAYOUT.owns(path.name) or path.name.endswith(".bin.index.json")
    return path if named or _looks_like(path) else None


def owns(name: str) -> bool:
    """Whether a file of this name, in a model's folder, belongs to a checkpoint of this format."""
    return LAYOUT.owns(name)


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a pytorch_model.bin (either kind), an index of shards, or a folder with one; no code in it ever runs.

    Tensors are views of the mapped file where they are contiguous and aligned, else copies.
    Raises: UnsafeCheckpointError naming what the file wanted to run or where it wanted to lead,
    CheckpointFormatError for anything damaged or not a dict of tensors.
    """
    return read_layout(LAYOUT, Path(path), _read_file, writable=writable)


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Write tensors as torch.save would, without torch, one tensor in memory at a time; give the files.

    `path` is a file (.bin, .pt, .pth) or a folder, which gets pytorch_model.bin, or shards of at most
    `max_shard_bytes` and their index; an earlier one in it is replaced. torch.load(weights_only=True) reads it.
    Raises: CheckpointError for tensors that cannot be stored (the format has no unsigned 16 to 64 bit integers,
    and no metadata), WriteError; either way the path is as it was.
    """
    if metadata:
        raise CheckpointError(f"bin has no place for metadata ({', '.join(metadata)}); leave it out or use safetensors")
    return write_layout(LAYOUT, Path(path), tensors, _write_file, metadata=None, max_shard_bytes=max_shard_bytes)


def read_tree(path: str | Path, *, writable: bool = False) -> tuple[Any, MappedFile]:
    """What torch.save saved, whatever its nesting, with a `Tensor` for each tensor; and the file, to be closed.

    For formats that nest a state dict in something else. Dicts have texts or integers as keys. Raises: as `read`.
    """
    path = Path(path)
    file = MappedFile(path, writable=writable)
    try:
        if file.bytes(0, 4) == _ZIP_START:
            return _ZipReader(file).tree(), file
        return _LegacyReader(file).tree(), file
    except UnsafeCheckpointError as cause:
        raise UnsafeCheckpointError(f"{path} is not safe to read: {cause}") from cause
    except CheckpointFormatError as cause:
        raise CheckpointFormatError(f"{path} is not a sound file of torch.save: {cause}") from cause


def _looks_like(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_ZIP_START):  # of torch all names begin with one folder; numpy and Keras have archives too
        first = zips.first_name(path)
        return "/" in first and not first.endswith(".npy")
    return any(start in head[:32] for start in _LEGACY_STARTS)


def _read_file(path: Path, writable: bool) -> Checkpoint:
    tree, file = read_tree(path, writable=writable)
    kind = type(tree).__name__
    if not isinstance(tree, dict):
        raise CheckpointFormatError(f"{path} holds a {kind}; expected a state dict, tensors by name")
    others = [f"{str(name)[:60]} ({type(value).__name__})" for name, value in tree.items() if not _is_pair(name, value)]
    if others:
        raise CheckpointFormatError(
            f"{path} holds more than tensors by name: {', '.join(others[:8])}{' ...' if len(others) > 8 else ''}; "
            f"expected a state dict; if it is nested in a training checkpoint, save that part alone"
        )
    return Checkpoint(tree, format=NAME, path=path, close=file.close)


def _is_pair(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


# What the pickles may mention ----------------------------------------------------------------------------------------


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any) -> TensorRecord:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; ignored: requires_grad, backward_hooks, metadata."""
    if type(storage) is not Storage or storage.dtype is None or len(ignored) > 3:
        raise CheckpointFormatError("the pickle makes a tensor of something that is not a typed storage; it is damaged")
    return _record(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *ignored: Any
) -> TensorRecord:
    """torch._utils._rebuild_tensor_v3: an untyped storage, the dtype beside it."""
    name = dtype.path.removeprefix("torch.") if type(dtype) is Global else ""
    if type(storage) is not Storage or name not in STORAGE or len(ignored) > 1:
        raise CheckpointFormatError("the pickle makes a tensor of something that is not a storage and a dtype")
    return _record(storage, name, offset, shape, strides)


def _record(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> TensorRecord:
    sizes = check_shape(shape, dtype, "a tensor")
    steps = check_shape(strides, "uint8", "the strides of a tensor") if len(sizes) and 0 not in sizes else strides
    if type(offset) is not int or offset < 0 or type(strides) is not tuple or len(steps) != len(sizes):
        raise CheckpointFormatError("the pickle has a tensor whose offset or strides are wrong; it is damaged")
    return TensorRecord(storage, dtype, offset, sizes, tuple(steps))


def _parameter(tensor: Any, *ignored: Any) -> TensorRecord:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks) and _with_state(..., state)."""
    if type(tensor) is not TensorRecord or len(ignored) > 3:
        raise CheckpointFormatError("the pickle makes a parameter of something that is not a tensor; it is damaged")
    return tensor


def _ordered_dict(*pairs: Any) -> dict[str | int, Any]:
    """collections.OrderedDict(), filled afterwards; Python 2 gave its pairs at once."""
    if not pairs:
        return {}
    (items,) = pairs
    if type(items) is not list:
        raise CheckpointFormatError("the pickle makes a dict of something that is not a list of pairs; it is damaged")
    return {pickles.check_key(key): value for key, value in items}


def _size(sizes: Any) -> tuple[Any, ...]:
    """torch.Size."""
    if type(sizes) not in (tuple, list):
        raise CheckpointFormatError("the pickle makes a size of something that is not a tuple; it is damaged")
    return tuple(sizes)


_KNOWN: Mapping[str, Reducer | None] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    **{f"torch.{place}{name}": None for place in ("", "cuda.") for name in _STORAGES},
    **dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage")),
    **{f"torch.{dtype}": None for dtype in STORAGE},
}


def _storage(saved: Any) -> Storage:
    """A persistent id: ("storage", class, key, device, count) and, in legacy files, None or (key, start, count)."""
    if type(saved) is not tuple or len(saved) not in (5, 6) or saved[0] != "storage":
        raise CheckpointFormatError("the pickle refers to something that is not a storage; expected tensors only")
    _, kind, key, _, count, *view = saved
    name = kind.path.rpartition(".")[2] if type(kind) is Global else ""
    if name not in _STORAGES and "UntypedStorage" not in name:
        raise CheckpointFormatError("the pickle refers to a storage of an unknown kind; it is damaged")
    start, most = 0, None
    if view and view[0] is not None:
        _, start, most = view[0]
    numbers = [number for number in (count, start, most) if number is not None]
    if type(key) not in (str, int) or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointFormatError("the pickle refers to a storage by a wrong key or size; it is damaged")
    return Storage(str(key), _STORAGES.get(name), count, start, most)


# The two kinds of file -----------------------------------------------------------------------------------------------


class _Reader:
    """What both kinds share: from records in a tree to tensors over the file."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.big_endian = False
        self._seen: dict[int, Any] = {}

    def region(self, storage: Storage) -> tuple[int, int]:
        """Where the bytes of a whole storage stand, and how many there are."""
        raise NotImplementedError

    def tensors(self, tree: Any, depth: int = 0) -> Any:
        """The tree with a Tensor for each record. Shared parts stay shared: a small pickle may name one often."""
        if type(tree) is TensorRecord:
            return self.tensor(tree)
        if type(tree) not in (dict, list, tuple):
            return tree
        if id(tree) in self._seen:
            return self._seen[id(tree)]
        if depth > 50:
            raise CheckpointFormatError("the pickle is nested more than 50 deep; expected a state dict")
        self._seen[id(tree)] = None  # a tree that holds itself ends here
        value: Any
        if type(tree) is dict:
            value = {key: self.tensors(item, depth + 1) for key, item in tree.items()}
        else:
            value = type(tree)(self.tensors(item, depth + 1) for item in tree)
        self._seen[id(tree)] = value
        return value

    def tensor(self, record: TensorRecord) -> Tensor:
        storage, bits = record.storage, STORAGE[record.dtype]
        width = STORAGE[storage.dtype].itemsize if storage.dtype else 1
        begin, size = self.region(storage)
        begin += storage.start * width
        size -= storage.start * width
        if storage.most is not None:
            size = min(size, storage.most * width)
        held, count = size // bits.itemsize, prod(record.shape)
        reach = sum((length - 1) * step for length, step in zip(record.shape, record.strides, strict=True))
        if count and (size < 0 or record.offset + reach >= held):
            raise CheckpointFormatError(
                f"a tensor of shape {record.shape} reaches element {record.offset + reach} of a storage that holds "
                f"{max(held, 0)}; the file is damaged"
            )
        if count > held:
            raise CheckpointFormatError(
                f"a tensor of shape {record.shape} has more elements than its storage, {held}: it was expanded; "
                f"make it contiguous before it is saved"
            )
        at = begin + record.offset * bits.itemsize
        if not self.big_endian and (not count or record.strides == _contiguous(record.shape)):
            return file_tensor(self.file, record.dtype, record.shape, at)
        return Tensor(record.dtype, record.shape, self.strided(record, at, reach + 1 if count else 0))

    def strided(self, record: TensorRecord, at: int, span: int) -> Callable[[], NDArray[Any]]:
        """Fetch a tensor that is not stored row by row, or not little-endian."""
        bits = STORAGE[record.dtype]

        def load() -> NDArray[Any]:
            run = self.file.view(at, bits, span)
            if self.big_endian:
                run = run.byteswap()
            steps = tuple(step * bits.itemsize for step in record.strides)
            if record.dtype == "bool":
                check_bool(run, self.file.path)
            return np.ndarray(record.shape, bits, run, 0, steps) if span else np.empty(record.shape, bits)

        return load


class _ZipReader(_Reader):
    def __init__(self, file: MappedFile) -> None:
        super().__init__(file)
        self.entries = zips.entries(file)
        roots = [name.removesuffix("data.pkl") for name in self.entries if _is_program(name)]
        if len(roots) != 1:
            raise CheckpointFormatError(
                f"it has {len(roots)} entries NAME/data.pkl; expected one, as torch.save writes"
            )
        self.root = roots[0]
        if f"{self.root}constants.pkl" in self.entries:
            raise CheckpointFormatError("it is a TorchScript program, not a checkpoint; save its state_dict instead")

    def tree(self) -> Any:
        order = self.small("byteorder") if f"{self.root}byteorder" in self.entries else b"little"
        if order not in (b"little", b"big"):
            raise CheckpointFormatError(f"its byte order is {order[:20]!r}; expected little or big")
        self.big_endian = order == b"big"
        value, _ = pickles.decode(self.small("data.pkl"), 0, _KNOWN, _storage)
        return self.tensors(value)

    def small(self, name: str) -> bytes:
        entry = self.entries[self.root + name]
        if entry.size > pickles.MOST_BYTES:
            raise CheckpointFormatError(f"its {name} has {entry.size} bytes; expected at most {pickles.MOST_BYTES}")
        data = self.file.bytes(entry.offset, entry.size)
        if zlib.crc32(data) != entry.crc:
            raise CheckpointFormatError(f"its {name} does not have the checksum it should; fetch the file again")
        return data

    def region(self, storage: Storage) -> tuple[int, int]:
        entry = self.entries.get(f"{self.root}data/{storage.key}")
        wanted = storage.count * (STORAGE[storage.dtype].itemsize if storage.dtype else 1)
        if entry is None or entry.size != wanted:
            held = "is missing" if entry is None else f"has {entry.size} bytes"
            raise CheckpointFormatError(f"its storage {storage.key[:60]!r} {held}; expected {wanted} bytes")
        return entry.offset, entry.size


class _LegacyReader(_Reader):
    def __init__(self, file: MappedFile) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}
        self.regions: dict[str, tuple[int, int]] = {}

    def tree(self) -> Any:
        head = self.file.bytes(0, pickles.MOST_BYTES)
        if b"ustar" in head[257:263] or not head.startswith((b"\x80", b"L")):
            raise CheckpointFormatError(
                "it is neither a zip archive nor a pickle; expected a file that torch.save wrote (the tar files of "
                "torch before 0.2 are not read: save it again with a newer one)"
            )
        magic, at = pickles.decode(head, 0, _KNOWN)
        if magic != _MAGIC:
            raise CheckpointFormatError("it is a pickle, but does not start with torch's magic number")
        version, at = pickles.decode(head, at, _KNOWN)
        machine, at = pickles.decode(head, at, _KNOWN)
        if version != _PROTOCOL or type(machine) is not dict:
            raise CheckpointFormatError(f"its version is not {_PROTOCOL}; expected a file that torch.save wrote")
        self.big_endian = machine.get("little_endian") is False
        value, at = pickles.decode(head, at, _KNOWN, self.note)
        keys, at = pickles.decode(head, at, _KNOWN)
        if type(keys) is not list or not all(type(key) in (str, int) for key in keys):
            raise CheckpointFormatError("its list of storages is damaged; fetch it again")
        self.locate([str(key) for key in keys], at)
        return self.tensors(value)

    def note(self, saved: Any) -> Storage:
        storage = _storage(saved)
        first = self.storages.setdefault(storage.key, storage)
        if (first.dtype, first.count) != (storage.dtype, storage.count):
            raise CheckpointFormatError(f"its storage {storage.key[:60]!r} is of two kinds; fetch it again")
        return storage

    def locate(self, keys: list[str], at: int) -> None:
        """Walk over the storages that follow the pickles; they reach to the end of the file."""
        for key in keys:
            storage = self.storages.get(key)
            count = int.from_bytes(self.file.bytes(at, 8), "little")
            if storage is None or storage.count != count or key in self.regions:
                raise CheckpointFormatError(
                    f"its storage {key[:60]!r} does not have the size it should; fetch it again"
                )
            size = count * (STORAGE[storage.dtype].itemsize if storage.dtype else 1)
            self.regions[key] = (at + 8, size)
            at += 8 + size
        if at != self.file.size:
            raise CheckpointFormatError(
                f"it has {self.file.size} bytes; expected {at}: it is truncated, fetch it again"
            )

    def region(self, storage: Storage) -> tuple[int, int]:
        if storage.key not in self.regions:
            raise CheckpointFormatError(f"its storage {storage.key[:60]!r} is missing; fetch it again")
        return self.regions[storage.key]


def _is_program(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def _contiguous(shape: Shape) -> tuple[int, ...]:
    """The strides, in elements, of a tensor stored row by row."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


# Writing -------------------------------------------------------------------------------------------------------------


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    write_tree(path, tensors)


def write_tree(path: Path, tree: Any) -> None:
    """Write what torch.load gives back as it is: dicts, lists, tuples, texts, numbers, None, and tensors.

    The other direction of `read_tree`. A `Tensor` that stands in several places is stored once, as torch stores tensors
    that share their memory. Raises: CheckpointError for what cannot be stored, WriteError.
    """
    program = _Program()
    content = program.complete(tree)
    root = "archive/"  # the name that torch gives when it does not know the file's
    with atomic_write(path) as file:
        archive = zips.Writer(file)
        for name, data in (("data.pkl", content), ("byteorder", b"little")):
            archive.add(root + name, len(data), [data])
        for key, tensor in enumerate(program.tensors):
            archive.add(f"{root}data/{key}", tensor.nbytes, tensor.chunks())
            tensor.release()
        archive.add(f"{root}version", 2, [b"3\n"])
        archive.finish()


class _Program:
    """Makes the pickle of a tree. A tensor is _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._keys: dict[int, int] = {}

    def complete(self, tree: Any) -> bytes:
        """The whole pickle, of protocol 2."""
        return b"\x80\x02" + self.value(tree) + b"."

    def state(self, tensors: Mapping[str, Tensor]) -> bytes:
        """A state dict."""
        refused = [name for name, tensor in tensors.items() if tensor.dtype not in _CLASSES]
        if refused:
            raise CheckpointError(
                f"bin cannot hold {tensors[refused[0]].dtype} ({', '.join(refused[:5])}); expected one of "
                f"{', '.join(_CLASSES)}; convert them, or use safetensors"
            )
        rows = b"".join(_text(name) + self.tensor(tensor) for name, tensor in tensors.items())
        return _ORDERED + b"(" + rows + b"u"

    def value(self, value: Any) -> bytes:
        """Anything that may stand in a tree."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, Mapping):
            if _is_state(value):  # an OrderedDict, as torch makes it; other dicts are plain
                return self.state(value)
            rows = b"".join(self.value(key) + self.value(item) for key, item in value.items())
            return b"}(" + rows + b"u"
        if isinstance(value, list | tuple):
            items = b"".join(map(self.value, value))
            return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        if isinstance(value, int):
            return _integer(value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            return _text(value)
        raise CheckpointError(f"bin cannot hold a {type(value).__name__}; expected tensors and plain values")

    def tensor(self, tensor: Tensor) -> bytes:
        """A call that makes a tensor over its storage."""
        key = self._keys.setdefault(id(tensor), len(self.tensors))
        if key == len(self.tensors):
            self.tensors.append(tensor)
        kind = _global("torch", _CLASSES[tensor.dtype])
        storage = b"(" + _text("storage") + kind + _text(str(key)) + _text("cpu") + _integer(tensor.size) + b"tQ"
        shape = b"(" + b"".join(map(_integer, tensor.shape)) + b"t"
        strides = b"(" + b"".join(map(_integer, _contiguous(tensor.shape))) + b"t"
        arguments = b"(" + storage + _integer(0) + shape + strides + b"\x89" + _ORDERED + b"t"
        return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _is_state(tree: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in tree.values())


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(number: int) -> bytes:
    if 0 <= number < 1 << 16:
        return b"M" + struct.pack("<H", number)
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


_ORDERED = _global("collections", "OrderedDict") + b")R"
