"""What the scheduler does with a framework's tensors: a few operations each, on caches and on logits.

Everything else of a step is the framework's engine (`gpt2_core.engine`), or numpy on a few numbers a row.

Letters: R rows, H heads, S columns, D head width, V vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]
Pair = tuple[Any, Any]


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

    def joined(self, caches: Sequence[Sequence[Pair]], width: int) -> Any:
        """The rows of several caches in one, each moved to the right end of ``width`` columns."""

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
    def __init__(self) -> None:
        import torch

        from gpt2_pt.cache import Past

        self._torch, self._past = torch, Past

    def joined(self, caches: Sequence[Sequence[Pair]], width: int) -> Any:
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

    def stacked(self, logits: Sequence[Any]) -> Any:
        return self._torch.cat([each[:, -1:] for each in logits])

    def top(self, logits: Any, k: int, temperatures: Numbers | None) -> Top:
        torch = self._torch
        with torch.no_grad():
            scores = logits[:, -1].float()
            values, ids = scores.topk(min(k, scores.size(1)))
            heated = None
            if temperatures is not None:
                heated = (scores / torch.from_numpy(temperatures).to(scores).unsqueeze(1)).logsumexp(-1)
                heated = heated.double().cpu().numpy()
            totals = scores.logsumexp(-1).double().cpu().numpy()
            return Top(ids.cpu().numpy(), values.double().cpu().numpy(), totals, heated)

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
