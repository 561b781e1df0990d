"""model.npz: plain numpy, as numpy.savez writes it and numpy.load reads it.

A stored zip archive with one .npy file for each tensor, under the hub's names:

    transformer.wte.weight.npy    "\\x93NUMPY", version (1, 0), u16 length of the header (u32 from version 2 on),
                                  the header "{'descr': '<f4', 'fortran_order': False, 'shape': (50257, 768), }" and
                                  spaces up to a multiple of 64, then the numbers

config.json and the tokenizer stand beside it. numpy has no bfloat16: it is refused, not renamed. Archives that are
compressed (numpy.savez_compressed) are refused too, as every reader here refuses what may unpack to more than it is.

Source: numpy.lib.format, "Format Specification", versions 1.0 to 3.0.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import zips
from gpt2_core.checkpoints.holds import Holds
from gpt2_core.checkpoints.tensors import (
    STORAGE,
    Checkpoint,
    MappedFile,
    Tensor,
    as_tensors,
    check_bool,
    check_shape,
    file_tensor,
)
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError
from gpt2_core.files import atomic_folder, atomic_write

NAME = "npz"
RANK = 90
FILES = ("model.npz",)
SUFFIXES = (".npz",)
HOLDS = Holds(dtypes=("float32", "float16", "float64"))

_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY"
_MOST_HEADER = 10_000  # bytes; numpy's own bound
_HEADER = re.compile(
    r"\{'descr': '(?P<order>[<>|=])(?P<kind>[a-zA-Z])(?P<width>\d{1,2})', "
    r"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[0-9, ]*)\),? *\} *\n?"
)
_DTYPES: Mapping[tuple[str, int], str] = {
    (dtype.kind, dtype.itemsize): name for name, dtype in STORAGE.items() if name != "bfloat16"
}


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, holds this format, else None."""
    if path.is_dir():
        return path / FILES[0] if (path / FILES[0]).is_file() else None
    return path if path.is_file() and (path.name.endswith(SUFFIXES) or _looks_like(path)) else None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in FILES


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a .npz file or a folder with model.npz; tensors are views of the mapped file where they are aligned.

    Raises: CheckpointFormatError for anything damaged, UnsafeCheckpointError for compressed archives and names that
    lead out of the archive.
    """
    path = Path(path)
    path = path / FILES[0] if path.is_dir() else path
    file = MappedFile(path, writable=writable)
    try:
        tensors = {}
        for name, entry in zips.entries(file).items():
            if not name.endswith(_SUFFIX):
                raise CheckpointFormatError(f"it holds {name[:100]!r}; expected arrays, NAME.npy")
            tensors[name.removesuffix(_SUFFIX)] = _tensor(file, name, entry)
    except UnsafeCheckpointError as cause:
        file.close()
        raise UnsafeCheckpointError(f"{path} is not safe to read: {cause}") from cause
    except CheckpointFormatError as cause:
        file.close()
        raise CheckpointFormatError(f"{path} is not a sound .npz file: {cause}") from cause
    return Checkpoint(tensors, format=NAME, path=path, close=file.close)


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Write a .npz file, or model.npz into a folder, one tensor in memory at a time.

    Raises: CheckpointError for tensors that cannot be stored, WriteError; either way the path is as it was.
    """
    path, given = Path(path), as_tensors(tensors)
    if metadata or max_shard_bytes is not None:
        raise CheckpointError("npz takes neither metadata nor shards; leave them out, or use safetensors")
    refused = [name for name, tensor in given.items() if tensor.dtype == "bfloat16"]
    if refused:
        raise CheckpointError(
            f"npz cannot hold bfloat16, which numpy does not have ({', '.join(refused[:5])}); convert it to float32, "
            f"which is exact, or use safetensors"
        )
    if path.suffix in SUFFIXES and not path.is_dir():
        _write_file(path, given)
        return (path,)
    with atomic_folder(path, replaces=owns) as stage:
        _write_file(stage / FILES[0], given)
    return (path / FILES[0],)


def _looks_like(path: Path) -> bool:
    """Whether the first file of an archive is an array."""
    return zips.first_name(path).endswith(_SUFFIX)


def _tensor(file: MappedFile, name: str, entry: zips.Entry) -> Tensor:
    start = file.bytes(entry.offset, 12)
    if len(start) < 12 or not start.startswith(_MAGIC) or start[6] not in (1, 2, 3):
        raise CheckpointFormatError(f"{name[:100]!r} does not begin as an array of numpy does")
    wide = start[6] > 1
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    begin = 12 if wide else 10
    if length > min(_MOST_HEADER, entry.size - begin):
        raise CheckpointFormatError(
            f"the header of {name[:100]!r} claims {length} bytes, more than there are or may be"
        )
    text = file.bytes(entry.offset + begin, length).decode("latin-1")
    found = _HEADER.fullmatch(text)
    known = _DTYPES.get((found["kind"], int(found["width"]))) if found else None
    if found is None or known is None:
        raise CheckpointFormatError(f"the header of {name[:100]!r} is {text[:200]!r}; expected an array of numbers")
    shape = check_shape(_sizes(found["shape"], name), known, f"array {name[:100]!r}")
    size = prod(shape) * STORAGE[known].itemsize
    if size != entry.size - begin - length:
        raise CheckpointFormatError(
            f"array {name[:100]!r} of dtype {known} and shape {shape} has {entry.size - begin - length} bytes; "
            f"expected {size}"
        )
    at = entry.offset + begin + length
    if found["fortran"] == "False" and found["order"] != ">":
        return file_tensor(file, known, shape, at)
    return _turned(file, known, shape, at, fortran=found["fortran"] == "True", swapped=found["order"] == ">")


def _sizes(text: str, name: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if parts and not parts[-1]:
        parts.pop()  # the comma that makes a tuple of one, or nothing at all
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise CheckpointFormatError(f"the shape of {name[:100]!r} is ({text[:100]}); expected sizes")
    return [int(part) for part in parts]


def _turned(file: MappedFile, dtype: str, shape: tuple[int, ...], at: int, *, fortran: bool, swapped: bool) -> Tensor:
    """An array stored column by column, or with the bytes of each number the other way round."""

    def load() -> NDArray[Any]:
        run = file.view(at, STORAGE[dtype], prod(shape))
        run = run.byteswap() if swapped else run
        if dtype == "bool":
            check_bool(run, file.path)
        return run.reshape(shape[::-1]).T if fortran else run.reshape(shape)

    return Tensor(dtype, shape, load, lambda: file.release(at, prod(shape) * STORAGE[dtype].itemsize))


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_write(path) as file:
        archive = zips.Writer(file)
        for name, tensor in tensors.items():
            header = _header(tensor)
            archive.add(name + _SUFFIX, len(header) + tensor.nbytes, _chain(header, tensor))
            tensor.release()
        archive.finish()


def _chain(header: bytes, tensor: Tensor) -> Any:
    yield header
    yield from tensor.chunks()


def _header(tensor: Tensor) -> bytes:
    descr = np.lib.format.dtype_to_descr(STORAGE[tensor.dtype])
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    padding = -(len(_MAGIC) + 4 + len(text) + 1) % 64
    content = (text + " " * padding + "\n").encode("latin-1")
    return _MAGIC + b"\1\0" + struct.pack("<H", len(content)) + content
