"""What the scheduler does with a framework's tensors: a few operations each, on caches and on logits.

Everything else of a step is the framework's engine (`gpt2_core.engine`), or numpy on a few numbers a row.

Letters: R rows, H heads, S columns, D head width, V vocabulary, k candidates.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]
Pair = tuple[Any, Any]

# Columns that a joint cache has to spare, so that it is not copied again at once.
_ROOM = 64
# Rows that are looked at together, and logits whose highest is looked for first.
_ROWS, _BLOCK = 4, 64


class Top(NamedTuple):
    """Of each row the k highest logits, the highest first.

    ids (R, k), values (R, k). totals (R,): the logarithm of the sum of the exponents of all logits; heated (R,): the
    same of the logits divided by each row's temperature, where one was given.
    """

    ids: Ids
    values: Numbers
    totals: Numbers
    heated: Numbers | None


class Tensors(Protocol):
    """The operations of one framework."""

    def joined(self, caches: Sequence[Any], width: int) -> Any:
        """The rows of several caches in one, each moved to the right end of ``width`` columns."""

    def kept(self, cache: Any) -> Sequence[Pair]:
        """A cache as a past that stays as it is, whatever is read on."""

    def stacked(self, logits: Sequence[Any]) -> Any:
        """Logits (R, 1, V) of several engines, one after the other."""

    def top(self, logits: Any, k: int, temperatures: Numbers | None) -> Top:
        """See `Top`; logits (R, 1, V)."""

    def row(self, logits: Any, row: int) -> Numbers:
        """All logits of one row, (V,)."""

    def size(self, cache: Sequence[Pair]) -> int:
        """How many bytes a cache takes."""


class _NumPy:
    def joined(self, caches: Sequence[Sequence[Pair]], width: int) -> Any:
        def one(parts: Sequence[Any]) -> Any:
            rows, (_, H, _, D) = sum(len(part) for part in parts), parts[0].shape
            out = np.zeros((rows, H, width, D), parts[0].dtype)
            start = 0
            for part in parts:
                out[start : start + len(part), :, width - part.shape[2] :] = part
                start += len(part)
            return out

        return tuple(
            (one([pair[0] for pair in layer]), one([pair[1] for pair in layer])) for layer in zip(*caches, strict=True)
        )

    def kept(self, cache: Any) -> Any:
        return cache

    def stacked(self, logits: Sequence[Any]) -> Any:
        return np.concatenate([each[:, -1:] for each in logits])

    def top(self, logits: Any, k: int, temperatures: Numbers | None) -> Top:
        scores = logits[:, -1]
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        heated = None if temperatures is None else _total(scores / temperatures[:, None])
        return Top(ids, np.take_along_axis(scores, ids, axis=1), _total(scores), heated)

    def row(self, logits: Any, row: int) -> Numbers:
        return np.asarray(logits[row, -1], np.float64)

    def size(self, cache: Sequence[Pair]) -> int:
        return sum(int(key.nbytes) + int(value.nbytes) for key, value in cache)


def _total(scores: Numbers) -> Numbers:
    highest = scores.max(axis=1)
    out: Numbers = highest + np.log(np.exp(scores - highest[:, None]).sum(axis=1))
    return out


class _PyTorch:
    """Of plain models, whose cache is a tuple of pairs, and of prepared ones, whose cache is one buffer."""

    def __init__(self) -> None:
        import torch

        from gpt2_pt.cache import Past

        self._torch, self._past = torch, Past

    def joined(self, caches: Sequence[Any], width: int) -> Any:
        if hasattr(caches[0], "buffer"):
            return self._joined_buffers(caches, width)

        def one(parts: Sequence[Any]) -> Any:
            rows, (_, H, _, D) = sum(part.size(0) for part in parts), parts[0].shape
            # Zeros, as what is masked away is still multiplied by 0, which would keep a nan.
            out = parts[0].new_zeros((rows, H, width, D))
            start = 0
            for part in parts:
                out[start : start + part.size(0), :, width - part.size(2) :] = part
                start += part.size(0)
            return out

        with self._torch.no_grad():
            return self._past(
                (one([pair[0] for pair in layer]), one([pair[1] for pair in layer]))
                for layer in zip(*caches, strict=True)
            )

    def _joined_buffers(self, caches: Sequence[Any], width: int) -> Any:
        with self._torch.inference_mode():
            like = caches[0].buffer
            out = copy.copy(caches[0])
            out.rows, out.start, out.stop = sum(cache.rows for cache in caches), 0, width
            out.buffer = like.new_empty((like.size(0), out.rows, like.size(2), width + _ROOM, like.size(4)))
            start = 0
            for cache in caches:
                rows, lead = slice(start, start + cache.rows), width - cache.stop
                out.buffer[:, rows, :, :lead] = 0
                out.buffer[:, rows, :, lead:width] = cache.buffer[:, : cache.rows, :, : cache.stop]
                start += cache.rows
            return out

    def kept(self, cache: Any) -> Any:
        if not hasattr(cache, "buffer"):
            return cache
        with self._torch.inference_mode():
            flat = cache.buffer[:, : cache.rows, :, : cache.stop].clone().unbind(0)
        return self._past(zip(flat[::2], flat[1::2], strict=True))

    def stacked(self, logits: Sequence[Any]) -> Any:
        return self._torch.cat([each[:, -1:] for each in logits])

    def top(self, logits: Any, k: int, temperatures: Numbers | None) -> Top:
        torch = self._torch
        with torch.inference_mode():
            scores = logits[:, -1].float()
            ids, values = self._highest(scores, min(k, scores.size(1)))
            totals = self._totals(scores, ids[:, :1])
            heated = None
            if temperatures is not None:
                hot = scores / torch.from_numpy(temperatures).to(scores).unsqueeze(1)
                heated = self._totals(hot, ids[:, :1]).double().cpu().numpy()
            return Top(ids.cpu().numpy(), values.double().cpu().numpy(), totals.double().cpu().numpy(), heated)

    def _totals(self, scores: Any, likeliest: Any) -> Any:
        """The logarithm of the sum of exponents, by way of log-softmax, a few rows at a time so that they stay in the
        cache: for 96 rows 2.5 ms, where logsumexp took 9.
        """
        out = [
            rows.gather(1, at) - self._torch.log_softmax(rows, -1).gather(1, at)
            for rows, at in zip(scores.split(_ROWS), likeliest.split(_ROWS), strict=True)
        ]
        return self._torch.cat(out).squeeze(1)

    def _highest(self, scores: Any, k: int) -> tuple[Any, Any]:
        """The k highest (R, k) of each row, the highest first: they are in the k blocks with the highest maxima. For 96
        rows of 50,257 that took 6 ms, where looking through all took 11.
        """
        torch = self._torch
        R, V = scores.shape
        blocks = V // _BLOCK
        if blocks <= k:
            values, ids = scores.topk(k)
            return ids, values
        whole = scores[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
        best = whole.amax(-1).topk(k, sorted=False).indices.unsqueeze(2)  # (R, k, 1)
        inside = torch.arange(_BLOCK, device=scores.device)
        rest = torch.arange(blocks * _BLOCK, V, device=scores.device).expand(R, -1)
        found = torch.cat(((best * _BLOCK + inside).flatten(1), rest), 1)
        values, places = scores.gather(1, found).topk(k)
        return found.gather(1, places), values

    def row(self, logits: Any, row: int) -> Numbers:
        out: Numbers = logits[row, -1].double().cpu().numpy()
        return out

    def size(self, cache: Sequence[Pair]) -> int:
        return sum(each.numel() * each.element_size() for pair in cache for each in pair)


class _TensorFlow:
    def __init__(self) -> None:
        import tensorflow

        self._tf = tensorflow

    def joined(self, caches: Sequence[Sequence[Pair]], width: int) -> Any:
        tf = self._tf

        def one(parts: Sequence[Any]) -> Any:
            return tf.concat([tf.pad(part, [[0, 0], [0, 0], [width - part.shape[2], 0], [0, 0]]) for part in parts], 0)

        return tuple(
            (one([pair[0] for pair in layer]), one([pair[1] for pair in layer])) for layer in zip(*caches, strict=True)
        )

    def kept(self, cache: Any) -> Any:
        return cache

    def stacked(self, logits: Sequence[Any]) -> Any:
        return self._tf.concat([each[:, -1:] for each in logits], 0)

    def top(self, logits: Any, k: int, temperatures: Numbers | None) -> Top:
        tf = self._tf
        scores = tf.cast(logits[:, -1], tf.float32)
        values, ids = tf.math.top_k(scores, min(k, int(scores.shape[1])))
        heated = None
        if temperatures is not None:
            heated = tf.reduce_logsumexp(scores / tf.cast(temperatures, tf.float32)[:, None], axis=-1)
            heated = heated.numpy().astype(np.float64)
        totals = tf.reduce_logsumexp(scores, axis=-1).numpy().astype(np.float64)
        return Top(ids.numpy().astype(np.int64), values.numpy().astype(np.float64), totals, heated)

    def row(self, logits: Any, row: int) -> Numbers:
        return np.asarray(logits[row, -1], np.float64)

    def size(self, cache: Sequence[Pair]) -> int:
        return sum(int(np.prod(each.shape)) * each.dtype.size for pair in cache for each in pair)


def tensors_of(framework: str) -> Tensors:
    """The operations of the framework called ``framework``: pt, tf or numpy."""
    kinds: dict[str, type[Any]] = {"pt": _PyTorch, "tf": _TensorFlow, "numpy": _NumPy}
    made: Tensors = kinds[framework]()
    return made
