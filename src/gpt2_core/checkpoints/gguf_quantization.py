"""Q8_0, GGUF's format of 8 bits: 32 numbers in a row share a scale.

    float16 scale, 32 int8         a number is scale * int8, which float32 holds exactly

Making it: the scale is the largest magnitude of the 32 over 127, in float32; a number is multiplied by the inverse of
that and rounded to the nearest, ties away from zero; the scale is then rounded to float16. Source: ggml,
src/ggml-quants.c, quantize_row_q8_0_ref, bit for bit. Numbers that are not finite have no place in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints.gguf_container import BLOCK, BLOCK_BYTES
from gpt2_core.checkpoints.tensors import STORAGE, MappedFile, Shape, Tensor, widen_bfloat16
from gpt2_core.errors import CheckpointError

_BLOCK = np.dtype([("scale", "<f2"), ("numbers", "i1", (BLOCK,))])
_PIECE = BLOCK << 11  # numbers at a time: what one step leaves is still in a core's cache for the next
_READ = (1 << 20) // BLOCK_BYTES  # blocks read at a time


def quantize(numbers: NDArray[Any]) -> NDArray[Any]:
    """Blocks of Q8_0 from float32 numbers, a multiple of 32. Raises: CheckpointError for numbers it cannot hold."""
    rows = numbers.astype(np.float32, copy=False).reshape(-1, BLOCK)
    largest = np.abs(rows).max(axis=1)
    scale = largest / np.float32(127)
    blocks = np.empty(len(rows), _BLOCK)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        blocks["scale"] = scale
        inverse = np.float32(1) / scale
        # Without a scale, or one so small that its inverse is infinite, all numbers are zero anyway.
        inverse[~np.isfinite(inverse)] = 0
    if not np.isfinite(blocks["scale"]).all():
        raise CheckpointError(
            "q8_0 cannot hold numbers that are infinite, not a number, or larger than 8.3 million; choose float32 or "
            "bfloat16"
        )
    scaled = rows * inverse[:, None]
    whole = np.trunc(scaled)
    scaled -= whole  # exact
    scaled += scaled
    whole += np.trunc(scaled, out=scaled)
    blocks["numbers"] = whole
    return blocks


def dequantize(blocks: NDArray[Any]) -> NDArray[np.float32]:
    """The float32 numbers of blocks of Q8_0, one after the other."""
    result: NDArray[np.float32] = blocks["numbers"].astype(np.float32)
    with np.errstate(invalid="ignore"):  # a scale of a damaged file may be infinite
        result *= blocks["scale"].astype(np.float32)[:, None]
    return result.reshape(-1)


def quantized_pieces(tensor: Tensor) -> Iterator[NDArray[Any]]:
    """The blocks of a tensor in order, a piece at a time; its rows have to be a multiple of 32 numbers long."""
    for piece in _even(tensor, BLOCK):
        for start in range(0, piece.size, _PIECE):
            few = piece[start : start + _PIECE]
            yield quantize(widen_bfloat16(few) if tensor.dtype == "bfloat16" else few)


def rounded(tensor: Tensor) -> Tensor:
    """The tensor as it is after being stored as Q8_0 and read: float32."""

    def pieces() -> Iterator[NDArray[Any]]:
        for blocks in quantized_pieces(tensor):
            yield dequantize(blocks)

    return Tensor("float32", tensor.shape, lambda: _joined(pieces(), tensor.shape), tensor.release, pieces)


def file_tensor(file: MappedFile, shape: Shape, offset: int) -> Tensor:
    """The float32 tensor whose blocks stand row by row at `offset` of `file`."""
    count = int(np.prod(shape, dtype=np.int64)) // BLOCK

    def pieces() -> Iterator[NDArray[Any]]:
        for start in range(0, count, _READ):
            few = min(_READ, count - start)
            for data in file.pieces(offset + start * BLOCK_BYTES, few * BLOCK_BYTES):
                yield dequantize(data.view(_BLOCK))

    def release() -> None:
        file.release(offset, count * BLOCK_BYTES)

    return Tensor("float32", shape, lambda: _joined(pieces(), shape), release, pieces)


def _joined(pieces: Iterator[NDArray[Any]], shape: Shape) -> NDArray[Any]:
    whole = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
    done = 0
    for piece in pieces:
        whole[done : done + piece.size] = piece
        done += piece.size
    return whole.reshape(shape)


def _even(tensor: Tensor, count: int) -> Iterator[NDArray[Any]]:
    """The numbers in order in pieces of a multiple of `count`, whatever pieces the tensor itself comes in."""
    left: list[NDArray[Any]] = []
    held = 0
    for chunk in tensor.chunks():
        numbers = np.frombuffer(chunk, STORAGE[tensor.dtype])
        left.append(numbers)
        held += numbers.size
        if held >= count:
            together = np.concatenate(left) if len(left) > 1 else numbers
            whole = held // count * count
            yield together[:whole]
            left, held = [together[whole:]], held - whole
