"""safetensors: an 8-byte length, a JSON header, and the tensors one after the other.

    u64 little-endian     n, the bytes of the header
    n bytes of JSON       {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...
                           "__metadata__": {text: text}}; may end in spaces, so that the data is aligned
    the data              offsets count from here; regions cover it to the end of the file without gap or overlap

Source: the format section of the safetensors README, version 0.4 to 0.8. Read here, not by the package, because views
of the mapped file, bfloat16 and the strictness below are wanted without a framework; the tests hold both to agree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpt2_core.checkpoints.sharding import Layout, read_layout, unique_keys, write_layout
from gpt2_core.checkpoints.tensors import STORAGE, Checkpoint, MappedFile, Tensor, check_shape, file_tensor
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_write

NAME = "safetensors"
RANK = 10
LAYOUT = Layout(NAME, stem="model", suffix=".safetensors", suffixes=(".safetensors",))
FILES = (LAYOUT.single, LAYOUT.index)

_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {code: name for name, code in _CODES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_METADATA = "__metadata__"
# GPT-2 XL needs 60 kB. The package allows 100 MB, which unpack to gigabytes of Python objects.
_MOST_HEADER = 1 << 24
_ALIGNMENT = 64  # bytes, a cache line; the format asks for 8


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, looks like this format, else None."""
    if path.is_dir():
        return LAYOUT.find(path)
    named = path.name.endswith((".safetensors", ".safetensors.index.json"))
    return path if path.is_file() and (named or _looks_like(path)) else None


def owns(name: str) -> bool:
    """Whether a file of this name, in a model's folder, belongs to a checkpoint of this format."""
    return LAYOUT.owns(name)


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a safetensors file, an index of shards, or a folder with either; tensors are views of the mapped file.

    Raises: CheckpointFormatError for anything that is not exactly what the format allows, UnsafeCheckpointError for
    an index that points outside its folder.
    """
    return read_layout(LAYOUT, Path(path), _read_file, writable=writable)


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Write tensors to a ``.safetensors`` file or into a folder, one tensor in memory at a time; give the files.

    A folder gets one file, or shards of at most `max_shard_bytes` bytes and their index; an earlier safetensors
    checkpoint in it is replaced. `metadata` defaults to {"format": "pt"}, which transformers asks for.
    Raises: CheckpointError for tensors that cannot be stored, WriteError; either way the path is as it was.
    """
    return write_layout(LAYOUT, Path(path), tensors, _write_file, metadata=metadata, max_shard_bytes=max_shard_bytes)


def _looks_like(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _read_file(path: Path, writable: bool) -> Checkpoint:
    file = MappedFile(path, writable=writable)
    try:
        header, start = _header(file)
        metadata = _metadata(header.pop(_METADATA, {}))
        tensors = _tensors(file, header, start)
    except CheckpointFormatError as cause:
        raise CheckpointFormatError(f"{path} is not a sound safetensors file: {cause}") from cause
    return Checkpoint(tensors, format=NAME, path=path, metadata=metadata, close=file.close)


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """The JSON object, and where the data starts."""
    length = int.from_bytes(file.bytes(0, 8), "little")
    if file.size < 10 or length > file.size - 8:
        raise CheckpointFormatError(
            f"it has {file.size} bytes, but its header claims {length if file.size >= 8 else 'at least 2'}; "
            f"it is truncated or of another format: fetch it again"
        )
    if length > _MOST_HEADER:
        raise CheckpointFormatError(f"its header has {length} bytes; expected at most {_MOST_HEADER}")
    text = file.bytes(8, length)
    if not text.startswith(b"{"):
        raise CheckpointFormatError(f"its header starts with {text[:1]!r}; expected '{{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as cause:
        raise CheckpointFormatError(f"its header cannot be read ({cause}); expected JSON in UTF-8") from cause
    return header, 8 + length


def _metadata(given: object) -> dict[str, str]:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise CheckpointFormatError(f"its {_METADATA} is {str(given)[:200]}; expected texts by name")
    return given


def _tensors(file: MappedFile, header: Mapping[str, Any], start: int) -> dict[str, Tensor]:
    regions: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        size = prod(shape) * STORAGE[dtype].itemsize
        if end - begin != size:
            raise CheckpointFormatError(
                f"tensor {name!r} of dtype {dtype} and shape {shape} has {end - begin} bytes; expected {size}"
            )
        regions.append((begin, end, name))
        tensors[name] = file_tensor(file, dtype, shape, start + begin)
    _check_regions(sorted(regions), file.size - start)
    return tensors


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise CheckpointFormatError(f"tensor {name!r} is described by {str(entry)[:200]}; expected {sorted(_FIELDS)}")
    code, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointFormatError(
            f"tensor {name!r} has dtype {str(code)[:50]!r}; expected one of {', '.join(_DTYPES)}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise CheckpointFormatError(f"tensor {name!r} has data_offsets {str(offsets)[:200]}; expected two integers")
    dtype = _DTYPES[code]
    return dtype, check_shape(entry["shape"], dtype, f"tensor {name!r}"), offsets[0], offsets[1]


def _check_regions(regions: list[tuple[int, int, str]], size: int) -> None:
    """Every byte of the data belongs to exactly one tensor: no overlap to be fooled by, no gap to hide things in."""
    reached = 0
    for begin, end, name in regions:
        if begin != reached:
            kind = "overlaps the one before" if begin < reached else "leaves a gap before it"
            raise CheckpointFormatError(f"tensor {name!r} at bytes {begin} to {end} {kind}; expected {reached}")
        reached = end
    if reached != size:
        problem = "it is truncated: fetch it again" if reached > size else "the rest belongs to no tensor"
        raise CheckpointFormatError(f"its tensors end at byte {reached} of the data, which has {size}; {problem}")


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    # Wide dtypes first, so that every tensor is aligned to its own width; stable, so the order stays otherwise.
    order = sorted(tensors, key=lambda name: -STORAGE[tensors[name].dtype].itemsize)
    header = _written_header(tensors, order, {"format": "pt"} if metadata is None else metadata)
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for chunk in tensors[name].chunks():
                file.write(chunk)
            tensors[name].release()


def _written_header(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    if _METADATA in tensors:
        raise CheckpointError(f"safetensors keeps the name {_METADATA} for itself; rename the tensor")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise CheckpointError(f"metadata is {dict(metadata)!r}; safetensors holds texts by name only")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-(len(text) + 8) % _ALIGNMENT)
