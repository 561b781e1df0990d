"""The one table of tolerances. docs/decisions/0006-tolerances.md says how each was measured.

An error is |got - expected| / (1 + |expected|): absolute near zero, relative far from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """``values``: logits, hidden states, attentions, past. ``loss``: means over many of them, which err less."""

    values: float
    loss: float


#: Against the float64 reference on the same (rounded) weights, by the number format of weights and arithmetic.
REFERENCE: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float64": Tolerance(values=1e-10, loss=1e-10),
        "float32": Tolerance(values=2e-5, loss=5e-7),
        "float16": Tolerance(values=6e-2, loss=4e-4),
        "bfloat16": Tolerance(values=5e-1, loss=5e-3),
    }
)

#: Gradients in float64: against the reference's differences, and between frameworks.
GRADIENTS = 1e-8

#: Float32 against transformers in float32.
TRANSFORMERS = 2e-5


def error(got: Any, expected: Any) -> float:
    """The largest error of ``got``, an array or a nest of tuples of them; infinite where shapes or nests differ."""
    if isinstance(expected, tuple):
        if not isinstance(got, tuple) or len(got) != len(expected):
            return np.inf
        return max((error(one, other) for one, other in zip(got, expected, strict=True)), default=0.0)
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape or np.isnan(got).any():
        return np.inf
    return float(np.max(np.abs(got - expected) / (1 + np.abs(expected)), initial=0.0))
