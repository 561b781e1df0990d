"""flax_model.msgpack: what the Flax classes of transformers 4.5 to 4.57 saved.

A MessagePack map of maps along the path of each parameter, {"transformer": {"h": {"0": {"attn": {"c_attn": {"kernel":
array}}}}}}, of the bare model without "transformer". An array is extension 1, itself MessagePack: [shape, name of
dtype, bytes]. One of more than 2**30 bytes is a map instead, {"__msgpack_chunked_array__": True, "shape": {"0": n,
...}, "chunks": {"0": array, ...}}. Scalars are extension 3, laid out like arrays. Large models of 4.20 on are several
files and an index:

    flax_model-00001-of-00002.msgpack           a part of the map
    flax_model.msgpack.index.json               {"weight_map": {"transformer/wte/embedding": file name}}

Kernels of blocks are (out, in), where the hub's PyTorch files have (in, out); those of heads, which are Dense layers,
are (in, out) where those have (out, in). Norms have `scale` for weight, tables `embedding`. A tied head is not stored.
transformers had the language model only; the other heads are laid out as Dense layers in the same way.

Source: flax/serialization.py 0.3 to 0.10; modeling_flax_utils.py and modeling_flax_gpt2.py of transformers 4.5 to 4.57.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import msgpack
from gpt2_core.checkpoints.holds import Holds
from gpt2_core.checkpoints.msgpack import Blob, Reader
from gpt2_core.checkpoints.naming import PREFIX
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.sharding import Layout, read_layout, write_layout
from gpt2_core.checkpoints.tensors import (
    STORAGE,
    Checkpoint,
    MappedFile,
    Shape,
    Tensor,
    as_tensors,
    check_shape,
    file_tensor,
)
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_write

NAME = "flax"
RANK = 40
LAYOUT = Layout(NAME, stem="flax_model", suffix=".msgpack", suffixes=(".msgpack",))
FILES = (LAYOUT.single, LAYOUT.index)
HOLDS = Holds(shards=True)

_BODY = "transformer/"
_BLOCK = _BODY + "h/{layer}/"
_KERNEL = "I O -> O I"
_HEAD = "O I -> I O"
NAMES = Names(
    Rule("wte.weight", f"{_BODY}wte/embedding"),
    Rule("wpe.weight", f"{_BODY}wpe/embedding"),
    Rule("h.{layer}.ln_1.weight", f"{_BLOCK}ln_1/scale"),
    Rule("h.{layer}.ln_1.bias", f"{_BLOCK}ln_1/bias"),
    Rule("h.{layer}.attn.c_attn.weight", f"{_BLOCK}attn/c_attn/kernel", _KERNEL),
    Rule("h.{layer}.attn.c_attn.bias", f"{_BLOCK}attn/c_attn/bias"),
    Rule("h.{layer}.attn.c_proj.weight", f"{_BLOCK}attn/c_proj/kernel", _KERNEL),
    Rule("h.{layer}.attn.c_proj.bias", f"{_BLOCK}attn/c_proj/bias"),
    Rule("h.{layer}.ln_2.weight", f"{_BLOCK}ln_2/scale"),
    Rule("h.{layer}.ln_2.bias", f"{_BLOCK}ln_2/bias"),
    Rule("h.{layer}.mlp.c_fc.weight", f"{_BLOCK}mlp/c_fc/kernel", _KERNEL),
    Rule("h.{layer}.mlp.c_fc.bias", f"{_BLOCK}mlp/c_fc/bias"),
    Rule("h.{layer}.mlp.c_proj.weight", f"{_BLOCK}mlp/c_proj/kernel", _KERNEL),
    Rule("h.{layer}.mlp.c_proj.bias", f"{_BLOCK}mlp/c_proj/bias"),
    Rule("ln_f.weight", f"{_BODY}ln_f/scale"),
    Rule("ln_f.bias", f"{_BODY}ln_f/bias"),
    Rule("lm_head.weight", "lm_head/kernel", _HEAD),
    Rule("multiple_choice_head.summary.weight", "multiple_choice_head/summary/kernel", _HEAD),
    Rule("multiple_choice_head.summary.bias", "multiple_choice_head/summary/bias"),
    Rule("score.weight", "score/kernel", _HEAD),
    Rule("classifier.weight", "classifier/kernel", _HEAD),
    Rule("classifier.bias", "classifier/bias"),
    Rule("qa_outputs.weight", "qa_outputs/kernel", _HEAD),
    Rule("qa_outputs.bias", "qa_outputs/bias"),
)

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_MOST_ARRAY = 1 << 30  # bytes in one piece; flax/serialization.py, MAX_CHUNK_SIZE


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, looks like this format, else None."""
    if path.is_dir():
        return LAYOUT.find(path)
    return path if path.is_file() and path.name.endswith((".msgpack", ".msgpack.index.json")) else None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return LAYOUT.owns(name)


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a flax_model.msgpack, an index of shards, or a folder with either.

    Raises: CheckpointFormatError for anything damaged or not a map of arrays, UnsafeCheckpointError for an index that
    points outside its folder.
    """
    opened = read_layout(LAYOUT, Path(path), _read_file, writable=writable)
    try:
        return _translated(opened)
    except CheckpointFormatError as cause:
        opened.close()
        raise CheckpointFormatError(f"{opened.path} is not a GPT-2 of Flax: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Write tensors as transformers would, without Flax, one in memory at a time; give the files.

    `path` is a file (.msgpack) or a folder. Names without ``transformer.`` give a file of the bare model.
    Raises: CheckpointError for tensors that cannot be stored, WriteError; either way the path is as it was.
    """
    if metadata:
        raise CheckpointError(
            f"flax has no place for metadata ({', '.join(metadata)}); leave it out or use safetensors"
        )
    stored = _stored(as_tensors(tensors))
    return write_layout(LAYOUT, Path(path), stored, _write_file, metadata=None, max_shard_bytes=max_shard_bytes)


# Reading --------------------------------------------------------------------------------------------------------------


def _translated(opened: Checkpoint) -> Checkpoint:
    """The same checkpoint under our names and in our layout; a bare model's have no ``transformer.``."""
    bare = not any(name.startswith(_BODY) for name in opened)
    heads = {str(rule.theirs) for rule in NAMES.rules if not str(rule.theirs).startswith(_BODY)}
    there = {_BODY + name if bare and name not in heads else name: tensor for name, tensor in opened.items()}
    found = NAMES.from_file(there)
    unknown = [name for name in found.tensors if name not in found.names_in_file]
    tensors = {}
    names = {}
    for name, tensor in found.tensors.items():
        if name in unknown:
            tensors[name.removeprefix(_BODY) if bare else name] = tensor
            continue
        here = name.removeprefix(PREFIX) if bare else name
        tensors[here] = tensor
        names[here] = found.names_in_file[name].removeprefix(_BODY) if bare else found.names_in_file[name]
    return Checkpoint(
        tensors, format=NAME, path=opened.path, files=opened.files, close=opened.close, names_in_file=names
    )


def _read_file(path: Path, writable: bool) -> Checkpoint:
    file = MappedFile(path, writable=writable)
    try:
        reader = Reader(file, 0, file.size)
        tree = reader.value()
        reader.finish()
        if not isinstance(tree, dict):
            raise CheckpointFormatError(f"it holds a {type(tree).__name__}; expected a map of parameters by name")
        tensors = dict(_flattened(file, tree))
    except CheckpointFormatError as cause:
        file.close()
        raise CheckpointFormatError(f"{path} is not a sound flax_model.msgpack: {cause}") from cause
    return Checkpoint(tensors, format=NAME, path=path, close=file.close)


def _flattened(file: MappedFile, tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each array with its path, the steps with slashes between."""
    for key, value in tree.items():
        if "/" in key or not key:
            raise CheckpointFormatError(f"it has the name {key[:100]!r}, which cannot be a step of a path")
        name = above + key
        if isinstance(value, dict) and _CHUNKED in value:
            yield name, _chunked(file, value, name)
        elif isinstance(value, dict):
            yield from _flattened(file, value, f"{name}/")
        elif isinstance(value, Blob) and value.kind in (_ARRAY, _SCALAR):
            yield name, _array(file, value, name)
        else:
            raise CheckpointFormatError(f"{name[:200]} is a {type(value).__name__}; expected an array")


def _array(file: MappedFile, blob: Blob, name: str) -> Tensor:
    reader = Reader(file, blob.offset, blob.offset + blob.size)
    parts = reader.value()
    reader.finish()
    if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], Blob) or parts[2].kind is not None:
        raise CheckpointFormatError(f"{name[:200]} is no array: expected a shape, a dtype and bytes")
    sizes, dtype, data = parts
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise CheckpointFormatError(
            f"{name[:200]} is of dtype {str(dtype)[:50]!r}; expected one of {', '.join(STORAGE)}"
        )
    shape = check_shape(sizes, dtype, name[:200])
    expected = prod(shape) * STORAGE[dtype].itemsize
    if data.size != expected:
        raise CheckpointFormatError(f"{name[:200]} of {dtype} {shape} has {data.size} bytes; expected {expected}")
    return file_tensor(file, dtype, shape, data.offset)


def _chunked(file: MappedFile, value: Mapping[str, Any], name: str) -> Tensor:
    """An array in pieces, which follow each other when it is laid out flat."""
    shape_of, chunks_of = value.get("shape"), value.get("chunks")
    if set(value) != {_CHUNKED, "shape", "chunks"} or not isinstance(shape_of, dict) or not isinstance(chunks_of, dict):
        raise CheckpointFormatError(f"{name[:200]} is an array in pieces without a shape, or without the pieces")
    blobs = [chunks_of.get(str(index)) for index in range(len(chunks_of))]
    if not blobs or not all(isinstance(blob, Blob) and blob.kind == _ARRAY for blob in blobs):
        raise CheckpointFormatError(f"{name[:200]} is an array in pieces, and some of them are no arrays")
    parts = [_array(file, blob, name) for blob in blobs if blob is not None]
    shape = check_shape([shape_of.get(str(index)) for index in range(len(shape_of))], parts[0].dtype, name[:200])
    if len({part.dtype for part in parts}) > 1 or sum(part.size for part in parts) != prod(shape):
        raise CheckpointFormatError(f"the pieces of {name[:200]} do not make an array of shape {shape}")

    def load() -> NDArray[Any]:
        return np.concatenate([part.raw().reshape(-1) for part in parts]).reshape(shape)

    def pieces() -> Iterator[NDArray[Any]]:
        for part in parts:
            yield from (np.frombuffer(chunk, np.uint8) for chunk in part.chunks())

    def release() -> None:
        for part in parts:
            part.release()

    return Tensor(parts[0].dtype, shape, load, release, pieces)


# Writing --------------------------------------------------------------------------------------------------------------


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the file; without ``transformer/`` if ours come without theirs."""
    bodies = {name: name.startswith(PREFIX) for name in tensors if not _is_head(name)}
    if len(set(bodies.values())) > 1:
        raise CheckpointError(f"some of the names begin with {PREFIX} and some do not; expected all or none")
    bare = not any(bodies.values())
    there = NAMES.to_file(tensors)
    return {name.removeprefix(_BODY) if bare else name: tensor for name, tensor in there.items()}


def _is_head(name: str) -> bool:
    return any(name == rule.ours for rule in NAMES.rules if not str(rule.theirs).startswith(_BODY))


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *steps, leaf = name.split("/")
        at = tree
        for step in steps:
            at = at.setdefault(step, {})
        at[leaf] = tensor
    with atomic_write(path) as file:
        for piece in _packed(tree):
            file.write(piece)


def _packed(value: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    yield msgpack.packed_map(len(value))
    for key, item in value.items():
        yield msgpack.packed_text(key)
        if isinstance(item, Tensor):
            yield from _packed_tensor(item)
        else:
            yield from _packed(item)


def _packed_tensor(tensor: Tensor) -> Iterator[bytes | memoryview]:
    """An array, in pieces of at most 2**30 bytes if it is larger."""
    if tensor.nbytes <= _MOST_ARRAY:
        yield _array_start(tensor.shape, tensor.dtype, tensor.nbytes)
        yield from tensor.chunks()
        tensor.release()
        return
    width = STORAGE[tensor.dtype].itemsize
    most = _MOST_ARRAY // width * width
    sizes = [min(most, tensor.nbytes - start) for start in range(0, tensor.nbytes, most)]
    yield msgpack.packed_map(3) + msgpack.packed_text(_CHUNKED) + b"\xc3" + msgpack.packed_text("shape")
    yield msgpack.packed_map(len(tensor.shape))
    for index, length in enumerate(tensor.shape):
        yield msgpack.packed_text(str(index)) + msgpack.packed_integer(length)
    yield msgpack.packed_text("chunks") + msgpack.packed_map(len(sizes))
    chunks = tensor.chunks()
    held = memoryview(b"")
    for index, size in enumerate(sizes):
        yield msgpack.packed_text(str(index)) + _array_start((size // width,), tensor.dtype, size)
        while size:
            held = held or next(chunks)
            yield held[:size]
            taken = min(size, len(held))
            size, held = size - taken, held[taken:]
    tensor.release()


def _array_start(shape: Shape, dtype: str, size: int) -> bytes:
    """Everything of an array but its numbers."""
    sizes = msgpack.packed_list(len(shape)) + b"".join(map(msgpack.packed_integer, shape))
    inner = msgpack.packed_list(3) + sizes + msgpack.packed_text(dtype) + msgpack.packed_bytes(size)
    return msgpack.packed_extension(_ARRAY, len(inner) + size) + inner
