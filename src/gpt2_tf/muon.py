"""Muon in TensorFlow: the step of a block's kernel; see `gpt2_core.muon`."""

from __future__ import annotations

import tensorflow as tf

from gpt2_core.muon import COEFFICIENTS, EPSILON, ITERATIONS, step_size
from gpt2_tf.layers import Tensor


def step(slope: Tensor, momentum: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel (in, out) moves by at a rate of 1, and its next momentum, which keeps ``share`` of the last."""
    momentum = momentum + (slope - momentum) * (1 - share)
    return orthogonal(slope + (momentum - slope) * share) * step_size(slope.shape), momentum


def orthogonal(matrix: Tensor) -> Tensor:
    """(N, M) -> (N, M), with the singular vectors of ``matrix`` and singular values near 1."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    wide = matrix if is_wide else tf.transpose(matrix)
    wide = wide / (tf.norm(wide) + EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = tf.matmul(wide, wide, transpose_b=True)
        wide = a * wide + tf.matmul(b * gram + c * tf.matmul(gram, gram), wide)
    return wide if is_wide else tf.transpose(wide)
