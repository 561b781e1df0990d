"""Cross-entropy over the whole vocabulary without ever holding all logits: some rows at a time, gradients at once.

Letters: R rows (batch times position), C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from gpt2_core.inputs import IGNORED_LABELS
from gpt2_tf.layers import Tensor

#: Logits held at a time. Fewer make the table's gradient be read and written more often, more take more memory.
LOGITS = 1 << 26


def chunked_loss(hidden: Tensor, table: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """``weight`` times the sum of cross-entropies, in nats, of ``targets`` (R,) under hidden (R, C) @ table.T (C, V).

    ``weight`` is a scalar tensor, through which no gradient goes. Targets of -100 do not count. Products are taken in
    the format of ``hidden``, the sum over the vocabulary and the gradient of the table in float32 (or float64).
    """

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def with_gradients(hidden: Tensor, table: Tensor) -> tuple[Tensor, Any]:
        loss, d_hidden, d_table = _gradients(hidden, table, targets, weight)

        def gradient(upstream: Tensor) -> tuple[Tensor, Tensor]:
            return d_hidden * tf.cast(upstream, d_hidden.dtype), tf.cast(d_table * upstream, table.dtype)

        return loss, gradient

    return with_gradients(hidden, table)


def chunked_sum(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross-entropies alone, as `chunked_loss`, for what is not trained on."""
    wide = _wide(hidden)
    head = tf.cast(table, hidden.dtype)
    total = tf.zeros((), wide)
    for rows in _slices(hidden, table):
        with tf.control_dependencies([total]):
            loss, _ = _cross_entropies(hidden[rows], head, targets[rows], wide)
            total += tf.reduce_sum(loss)
    return total


def _gradients(hidden: Tensor, table: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum, and its gradients: the logits of a slice are at hand just then."""
    wide = _wide(hidden)
    head = tf.cast(table, hidden.dtype)
    total, pieces, d_table = tf.zeros((), wide), [], None
    for rows in _slices(hidden, table):
        # One slice after the other: left to itself TensorFlow would make the logits of several at once.
        with tf.control_dependencies([total] if d_table is None else [total, d_table]):
            part = tf.identity(hidden[rows])
            loss, slope = _cross_entropies(part, head, targets[rows], wide)
            factor = tf.cast(targets[rows] != IGNORED_LABELS[0], hidden.dtype)[:, None] * tf.cast(weight, hidden.dtype)
            slope = tf.cast(slope, hidden.dtype)
            pieces.append(tf.matmul(slope, head) * factor)
            of_part = tf.cast(tf.matmul(slope, part * factor, transpose_a=True), wide)  # (V, C)
            d_table = of_part if d_table is None else d_table + of_part
            total += tf.reduce_sum(loss) * tf.cast(weight, wide)
    return total, pieces[0] if len(pieces) == 1 else tf.concat(pieces, axis=0), d_table


def _cross_entropies(part: Tensor, head: Tensor, targets: Tensor, wide: Any) -> tuple[Tensor, Tensor]:
    """The losses of some rows (R',), 0 where they do not count, and probabilities less one at the targets (R', V)."""
    counts = targets != IGNORED_LABELS[0]
    logits = tf.cast(tf.matmul(part, head, transpose_b=True), wide)  # (R', V)
    loss, slope = tf.raw_ops.SparseSoftmaxCrossEntropyWithLogits(
        features=logits, labels=tf.where(counts, targets, tf.zeros((), targets.dtype))
    )
    return loss * tf.cast(counts, wide), slope


def _wide(x: Tensor) -> Any:
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def _slices(hidden: Tensor, table: Tensor) -> list[slice]:
    size = max(1, LOGITS // int(table.shape[0]))
    return [slice(start, start + size) for start in range(0, int(hidden.shape[0]), size)]
