"""Muon in PyTorch: the step of a block's kernel; see `gpt2_core.muon`."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_core.muon import COEFFICIENTS, EPSILON, ITERATIONS, step_size


@torch.no_grad()
def step(slope: Tensor, momentum: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """What a kernel (in, out) moves by at a rate of 1, and its next momentum, which keeps ``share`` of the last."""
    momentum = momentum + (slope - momentum) * (1 - share)
    return orthogonal(slope + (momentum - slope) * share) * step_size(slope.shape), momentum


def orthogonal(matrix: Tensor) -> Tensor:
    """(N, M) -> (N, M), with the singular vectors of ``matrix`` and singular values near 1."""
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    wide = wide / (torch.linalg.vector_norm(wide) + EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.size(0) <= matrix.size(1) else wide.T
