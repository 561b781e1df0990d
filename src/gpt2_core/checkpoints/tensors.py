"""What every checkpoint format has in common: dtypes by name, lazy tensors, and files mapped into memory.

A `Tensor` knows its dtype and shape and fetches its numbers when asked. A `Checkpoint` is a mapping from names to
tensors, read from a file or put together by a caller; writers take any mapping from names to tensors or arrays.
Nothing here knows a format.

bfloat16 has no numpy dtype: `raw` gives its bits as uint16, and `array` widens to float32, which is exact.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointFormatError, nearest
from gpt2_core.files import LFS_POINTER_BYTES, refuse_lfs_pointer

if TYPE_CHECKING:
    from gpt2_core.tokenizer_files import TokenizerParts

#: Our names of dtypes, and the numpy dtype of their bits, little-endian as every format here stores them.
STORAGE: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

#: numpy 1.26 cannot make an array of more dimensions; no GPT-2 tensor has more than four.
MOST_DIMENSIONS = 32
_MOST_BYTES = 1 << 62
#: Bytes handed over at a time: what a checksum has just read is still in a core's own cache when it is written.
_CHUNK = 1 << 20
#: Bytes put in order at a time, where numbers are stored otherwise; more for rows so long that only a few would fit,
#: since each of those has to be gathered from the whole tensor.
_SLAB, _MOST_SLAB, _FEW_ROWS = 1 << 21, 1 << 25, 64
_AHEAD = 16  # pieces made before they are asked for
_WORTH_A_THREAD = 1 << 22  # bytes
# Along and across the numbers that stand beside each other in the file, and what is left free between rows of a tile:
# rows whose lengths are multiples of 4096 bytes would otherwise push each other out of a core's cache.
_TILE, _GAP = (512, 64), 16

Shape = tuple[int, ...]
Item = TypeVar("Item")


class Tensor:
    """One tensor: its dtype, its shape, and a way to fetch its numbers.

    `load` returns the bits as an array of `STORAGE[dtype]` with this shape; a view with any strides will do. `release`
    is called when a writer is done with the numbers and may give memory back. `pieces`, for tensors that are better
    not made in one piece, gives the same bits as arrays that follow each other.
    """

    __slots__ = ("_load", "_pieces", "_release", "dtype", "shape")

    def __init__(
        self,
        dtype: str,
        shape: Sequence[int],
        load: Callable[[], NDArray[Any]],
        release: Callable[[], None] | None = None,
        pieces: Callable[[], Iterator[NDArray[Any]]] | None = None,
    ) -> None:
        if dtype not in STORAGE:
            raise CheckpointError(
                f"dtype {dtype!r} is not known; expected one of {', '.join(STORAGE)}{nearest(dtype, list(STORAGE))}"
            )
        self.dtype = dtype
        self.shape: Shape = tuple(int(size) for size in shape)
        self._load = load
        self._release = release
        self._pieces = pieces

    @classmethod
    def of(cls, array: NDArray[Any], dtype: str | None = None) -> Tensor:
        """The tensor holding `array`; dtype="bfloat16" takes the bits of one as uint16.

        Raises: CheckpointError for an array of objects, strings, or any other dtype that no format stores.
        """
        name = dtype or array.dtype.name
        if name not in STORAGE:
            raise CheckpointError(f"arrays of dtype {name} cannot be stored; expected one of {', '.join(STORAGE)}")
        bits = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if bits.dtype != STORAGE[name]:
            raise CheckpointError(
                f"an array of dtype {array.dtype} does not hold the bits of {name}; expected {STORAGE[name]}"
            )
        return cls(name, array.shape, lambda: bits)

    @property
    def size(self) -> int:
        """How many numbers."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.size * STORAGE[self.dtype].itemsize

    def raw(self) -> NDArray[Any]:
        """The bits, C-contiguous, little-endian: a view of the file where that is possible; uint16 for bfloat16."""
        return in_order(self.view()).reshape(self.shape)

    def view(self) -> NDArray[Any]:
        """The bits with whatever strides they have: the cheapest way to look at them, piece by piece."""
        bits = self._load()
        if bits.dtype != STORAGE[self.dtype]:
            raise CheckpointError(
                f"a tensor of dtype {self.dtype} fetched {bits.dtype}, expected {STORAGE[self.dtype]}"
            )
        return bits

    def array(self) -> NDArray[Any]:
        """The numbers, C-contiguous: a view of the file where that is possible; bfloat16 widened to float32."""
        return widen_bfloat16(self.raw()) if self.dtype == "bfloat16" else self.raw()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order, in pieces, for writers. What is stored otherwise is put in order a piece at a time."""
        for piece in self._pieces() if self._pieces is not None else contiguous_pieces(self.view()):
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
            for start in range(0, flat.size, _CHUNK):
                yield flat[start : start + _CHUNK].data

    def release(self) -> None:
        """Say that the numbers are not needed for now; fetching them again is allowed."""
        if self._release is not None:
            self._release()

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape})"


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name, in the order of the file, fetched when asked for. A context manager; `close` lets go of files.

    Arrays stay valid after `close`: each holds on to its part of the file.

    Attributes: `format` (the module's name), `path` (what was opened), `files` (all files read), `metadata`, and what
    the files say beyond tensors: `config` (keys of a config.json, None where the format keeps none of its own),
    `head` (a value of `parameters.Head`, where the file says it), `tokenizer` (called to read the one that the files
    hold; None where they hold none), `names_in_file` (the name here -> the name or names there, where they differ),
    `ignored` (names there that nothing is made from -> why), `notes` (sentences that a person should read),
    `config_file` (where `config` stands if that is not the file at `path`).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        format: str,
        path: Path,
        files: Sequence[Path] = (),
        metadata: Mapping[str, str] | None = None,
        close: Callable[[], None] = lambda: None,
        config: Mapping[str, Any] | None = None,
        head: str | None = None,
        tokenizer: Callable[[], TokenizerParts] | None = None,
        names_in_file: Mapping[str, str] | None = None,
        ignored: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        config_file: Path | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.format = format
        self.path = path
        self.files = tuple(files) or (path,)
        self.metadata = dict(metadata or {})
        self.config = None if config is None else dict(config)
        self.head = head
        self.tokenizer = tokenizer
        self.names_in_file = dict(names_in_file or {})
        self.ignored = dict(ignored or {})
        self.notes = tuple(notes)
        self.config_file = config_file
        self._close = close

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            hint = nearest(name, list(self._tensors))
            raise KeyError(f"{self.path} holds no tensor {name!r}{hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # what a mapping does by itself looks for a hint whenever there is none

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        """The shape of one tensor."""
        return self[name].shape

    def dtype(self, name: str) -> str:
        """The dtype of one tensor, one of the keys of `STORAGE`."""
        return self[name].dtype

    def array(self, name: str) -> NDArray[Any]:
        """The numbers of one tensor: see `Tensor.array`."""
        return self[name].array()

    def raw(self, name: str) -> NDArray[Any]:
        """The bits of one tensor: see `Tensor.raw`."""
        return self[name].raw()

    @property
    def bytes_total(self) -> int:
        """The bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def close(self) -> None:
        """Let go of the files; arrays fetched before stay valid, fetching another raises CheckpointError."""
        self._close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, format={self.format!r}, {len(self)} tensors, {self.bytes_total:,} bytes)"
        )


class MappedFile:
    """A regular file mapped into memory; views of it cost no copy and outlive `close`.

    With `writable` the views can be written to: the pages written become private to this process, the file never
    changes. Raises: CheckpointError if the file cannot be opened, is not a regular file, or is a git-LFS pointer.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path = path
        self._writable = writable
        try:
            # Looked at before it is opened: opening a pipe would wait for its writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path} is not a regular file; expected a checkpoint file")
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
                self._map = mmap.mmap(file.fileno(), 0, access=access) if self.size else None
                self._descriptor = os.dup(file.fileno()) if hasattr(os, "pread") and not writable else None
        except (OSError, ValueError) as cause:
            if isinstance(cause, CheckpointError):
                raise
            reason = getattr(cause, "strerror", None) or cause
            raise CheckpointError(f"cannot open {path}: {reason}; expected a readable checkpoint file") from cause
        self._closed = False
        try:
            refuse_lfs_pointer(path, self.bytes(0, LFS_POINTER_BYTES))
        except CheckpointError:
            self.close()
            raise

    def bytes(self, offset: int, count: int) -> bytes:
        """A copy of `count` bytes, fewer at the end of the file."""
        self._check_open()
        return b"" if self._map is None else self._map[offset : offset + count]

    def pieces(self, offset: int, count: int) -> Iterator[NDArray[np.uint8]]:
        """`count` bytes in pieces, for those who pass them on: read, not mapped, so that no page stays behind.

        Mapping costs a page fault every few pages: copying a file took 1.3 times as long.
        """
        for start in range(offset, offset + count, _CHUNK):
            size = min(_CHUNK, offset + count - start)
            self._check_open()
            data = self.bytes(start, size) if self._descriptor is None else os.pread(self._descriptor, size, start)
            if len(data) != size:
                raise CheckpointFormatError(f"{self.path} ends at byte {start + len(data)}; it became shorter")
            yield np.frombuffer(data, np.uint8)

    def view(self, offset: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """`count` numbers at `offset` without a copy; a copy only where the address does not suit the dtype.

        Raises: CheckpointFormatError if the region is not within the file.
        """
        self._check_open()
        if offset < 0 or count < 0 or offset + count * dtype.itemsize > self.size:
            raise CheckpointFormatError(
                f"{self.path} holds {self.size} bytes, but a tensor claims bytes {offset} to "
                f"{offset + count * dtype.itemsize}; it is truncated or damaged, fetch it again"
            )
        if count == 0 or self._map is None:
            return np.empty(0, dtype)
        array = np.frombuffer(self._map, dtype, count, offset)
        # Frameworks take a numpy array's address for granted; an unaligned one is slow at best.
        return array if array.flags.aligned else array.copy()

    def release(self, offset: int, count: int) -> None:
        """Give back the memory that holds these bytes of the file; they are read from the disk if needed again."""
        if self._map is None or self._writable or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + count) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def close(self) -> None:
        """Let go; the mapping itself ends with the last array that looks into it."""
        self._map = None
        self._closed = True
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError(f"{self.path} has been closed; fetch tensors before leaving the `with` block")


def converted(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in another float format, rounded to nearest, ties to even; lazily, a piece at a time for writers.

    Fetching raises CannotHoldError where a finite number is too large for `dtype`.
    """
    if tensor.dtype == dtype:
        return tensor

    def pieces() -> Iterator[NDArray[Any]]:
        for chunk in tensor.chunks():
            yield _cast(np.frombuffer(chunk, STORAGE[tensor.dtype]), tensor.dtype, dtype)

    def load() -> NDArray[Any]:
        whole = np.empty(tensor.size, STORAGE[dtype])
        done = 0
        for piece in pieces():
            whole[done : done + piece.size] = piece
            done += piece.size
        return whole.reshape(tensor.shape)

    return Tensor(dtype, tensor.shape, load, tensor.release, pieces)


def _cast(bits: NDArray[Any], given: str, wanted: str) -> NDArray[Any]:
    floats = widen_bfloat16(bits) if given == "bfloat16" else bits
    if floats.dtype.kind != "f" or STORAGE[wanted].kind not in ("f" if wanted != "bfloat16" else "u"):
        raise CheckpointError(f"{given} cannot be converted to {wanted}; only floats are")
    with np.errstate(over="ignore"):
        if wanted == "bfloat16":
            narrow = floats if floats.dtype == np.float32 else _round_to_odd(floats)
            result = round_to_bfloat16(narrow)
            infinite = (result & 0x7FFF) == 0x7F80
        else:
            result = floats.astype(STORAGE[wanted])
            infinite = np.isinf(result)
    if infinite.any():
        lost = infinite & np.isfinite(floats)
        if lost.any():
            raise CannotHoldError(
                f"{np.count_nonzero(lost)} numbers are too large for {wanted}, {floats[lost][0]} is the first; "
                f"choose bfloat16 or float32"
            )
    return result


def _round_to_odd(floats: NDArray[Any]) -> NDArray[np.float32]:
    """To float32 such that rounding again, to fewer bits, gives what rounding once would: inexact means odd."""
    near = floats.astype(np.float32)
    exact = near == floats
    toward_zero = np.where(np.abs(near.astype(np.float64)) > np.abs(floats), np.nextafter(near, np.float32(0)), near)
    odd = (toward_zero.view(np.uint32) | np.uint32(1)).view(np.float32)
    return np.where(exact | np.isnan(floats), near, odd)


def reshaped(tensor: Tensor, shape: Shape) -> Tensor:
    """The same numbers in the same order, in another shape; in the pieces that the tensor comes in."""

    def pieces() -> Iterator[NDArray[Any]]:
        return (np.frombuffer(chunk, STORAGE[tensor.dtype]) for chunk in tensor.chunks())

    return Tensor(tensor.dtype, shape, lambda: tensor.view().reshape(shape), tensor.release, pieces)


def watched(tensor: Tensor, on_bytes: Callable[[int], None]) -> Tensor:
    """The tensor; `on_bytes` is told how many of its bytes a writer has taken, as it takes them."""

    def pieces() -> Iterator[NDArray[Any]]:
        for chunk in tensor.chunks():
            yield np.frombuffer(chunk, np.uint8)
            on_bytes(len(chunk))

    def load() -> NDArray[Any]:
        array = tensor.view()
        on_bytes(tensor.nbytes)
        return array

    return Tensor(tensor.dtype, tensor.shape, load, tensor.release, pieces)


def ahead(tensor: Tensor) -> Tensor:
    """The tensor; while a writer is busy with one piece of it, a thread makes the next ones."""
    if tensor.nbytes < _WORTH_A_THREAD:
        return tensor

    def pieces() -> Iterator[NDArray[Any]]:
        for chunk in in_background(tensor.chunks()):
            yield np.frombuffer(chunk, np.uint8)

    return Tensor(tensor.dtype, tensor.shape, tensor.view, tensor.release, pieces)


def in_background(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, made by a thread that is a few ahead; what it raises is raised here, in its turn."""
    waiting: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_AHEAD)
    given_up = threading.Event()

    def make() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                waiting.put((item, None))
                if given_up.is_set():
                    return
        except BaseException as cause:  # told to whoever waits for the items, whatever it is
            error = cause
        waiting.put((None, error))

    worker = threading.Thread(target=make, name="read ahead", daemon=True)
    worker.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        given_up.set()
        while worker.is_alive():
            with contextlib.suppress(queue.Empty):
                waiting.get(timeout=0.01)


def contiguous_pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The numbers of an array in order, a few megabytes at a time, each piece C-contiguous; copies only if it must."""
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    if array.flags.c_contiguous or array.ndim == 0 or array.size == 0:
        yield in_order(array)
        return
    long = max(1, array[0].nbytes)
    rows = max(1, _SLAB // long, min(_FEW_ROWS, _MOST_SLAB // long))
    for start in range(0, array.shape[0], rows):
        yield in_order(array[start : start + rows])


def even_pieces(tensor: Tensor, size: int = 1 << 20) -> Iterator[NDArray[Any]]:
    """The numbers in order, flat, in pieces of `size`, whatever pieces the tensor itself comes in."""
    held: list[NDArray[Any]] = []
    count = 0
    for chunk in tensor.chunks():
        piece = np.frombuffer(chunk, STORAGE[tensor.dtype])
        while count + piece.size >= size:
            head, piece = piece[: size - count], piece[size - count :]
            yield np.concatenate([*held, head]) if held else head
            held, count = [], 0
        if piece.size:
            held.append(piece)
            count += piece.size
    if count:
        yield np.concatenate(held)


def in_order(array: NDArray[Any]) -> NDArray[Any]:
    """The array, C-contiguous; itself if it is so already.

    A transposed one is copied tile by tile, each brought into a core's own cache first: for feed-forward kernels of the
    released models in 0.1 to 0.6 of the processor's time that `numpy.ascontiguousarray` takes.
    """
    if array.ndim != 2 or array.flags.c_contiguous or abs(array.strides[0]) > abs(array.strides[1]):
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    tile = np.empty((_TILE[1], _TILE[0] + _GAP), array.dtype)
    for column in range(0, array.shape[1], _TILE[1]):
        for row in range(0, array.shape[0], _TILE[0]):
            here = slice(row, row + _TILE[0]), slice(column, column + _TILE[1])
            rows, columns = array[here].shape
            part = tile[:columns, :rows]
            part[...] = array[here].T
            out[here] = part.T
    return out


def file_tensor(file: MappedFile, dtype: str, shape: Shape, offset: int) -> Tensor:
    """The tensor stored row by row, little-endian, at `offset` of `file`."""
    bits, count = STORAGE[dtype], prod(shape)

    def load() -> NDArray[Any]:
        array = file.view(offset, bits, count).reshape(shape)
        if dtype == "bool":
            check_bool(array, file.path)
        return array

    def pieces() -> Iterator[NDArray[Any]]:
        if offset + count * bits.itemsize > file.size or dtype == "bool":
            yield load()  # which says what is wrong
        else:
            yield from file.pieces(offset, count * bits.itemsize)

    return Tensor(dtype, shape, load, lambda: file.release(offset, count * bits.itemsize), pieces)


def check_bool(array: NDArray[Any], path: Path) -> None:
    """Raise CheckpointFormatError unless every byte is 0 or 1: numpy does not define the others."""
    if array.size and int(array.view(np.uint8).max()) > 1:
        raise CheckpointFormatError(f"{path} holds a bool tensor with bytes other than 0 and 1; it is damaged")


def check_shape(shape: object, dtype: str, what: str) -> Shape:
    """`shape` as a tuple, checked to be one that an array can have.

    Raises: CheckpointFormatError naming `what` for negative, huge, too many or non-integer dimensions.
    """
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (None,)
    good = len(sizes) <= MOST_DIMENSIONS and all(type(size) is int and 0 <= size < _MOST_BYTES for size in sizes)
    if not good or prod(max(size, 1) for size in sizes) * STORAGE[dtype].itemsize >= _MOST_BYTES:
        raise CheckpointFormatError(
            f"{what} has the shape {str(shape)[:200]}; expected at most {MOST_DIMENSIONS} non-negative sizes "
            f"that memory could hold"
        )
    return sizes


def as_tensors(tensors: Mapping[str, Tensor | NDArray[Any]]) -> dict[str, Tensor]:
    """What a caller gave to a writer, as tensors by name. Raises: CheckpointError for what cannot be stored."""
    given: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not name:
            raise CheckpointError(f"{name!r} is not a name for a tensor; expected a non-empty string")
        if isinstance(value, Tensor):
            given[name] = value
        elif isinstance(value, np.ndarray | np.generic):
            given[name] = Tensor.of(np.asarray(value))
        else:
            raise CheckpointError(
                f"{name} is a {type(value).__name__}; expected a numpy array or a gpt2_core.checkpoints.Tensor"
            )
    return given


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits to float32, exactly: bfloat16 is the upper half of a float32."""
    wide = bits.astype("<u4")
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def round_to_bfloat16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 to bfloat16 bits, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    return np.where(np.isnan(numbers), ((bits >> np.uint32(16)) | np.uint32(0x40)).astype("<u2"), rounded)


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("gpt2_core.checkpoints needs a little-endian machine: views of files are used as they are")
