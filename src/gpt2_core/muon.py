"""Muon: a step of a block's kernel is its momentum made orthogonal. What it is, for every framework; no framework.

    m <- momentum * m + (1 - momentum) * gradient
    u  = momentum * m + (1 - momentum) * gradient          (Nesterov's)
    p <- p - lr * weight_decay * p
    p <- p - lr * step_size(shape) * orthogonal(u)

All directions that the gradients agree on are followed equally far, not only the few strongest. The embeddings,
gains and biases are left to AdamW. With `step_size` a step is about as large as one of AdamW at the same rate, so
both take the same ``lr`` and ``weight_decay``.

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", for the method and the
coefficients (kellerjordan.github.io/posts/muon); Liu et al. 2025, "Muon is scalable for LLM training", section 2.2,
for the size of a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_core.parameters import Parameter

# x <- a x + b (x x') x + c (x x')^2 x, so many times: takes every singular value from 0.0015 of the norm on to between
# 0.65 and 1.21, which is near enough to 1, in fewer products than would make it exact.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7


def is_for(row: Parameter) -> bool:
    """Whether Muon trains this parameter: the kernels of the blocks."""
    return ".h." in f".{row.name}" and len(row.shape) == 2 and row.name.endswith(".weight")


def step_size(shape: Sequence[int]) -> float:
    """What an orthogonal matrix is multiplied by to be as large as a step of AdamW: the root of its mean square 0.2."""
    return 0.2 * math.sqrt(max(shape))


def orthogonal(matrix: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, M) -> (N, M), with the singular vectors of ``matrix`` and singular values near 1; in float64."""
    x = np.asarray(matrix, np.float64)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / (np.linalg.norm(wide) + EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T
