"""The published tolerances, under the names that the tests use; the table itself is in `gpt2_core.comparison`."""

from __future__ import annotations

from gpt2_core.comparison import TOLERANCES as REFERENCE
from gpt2_core.comparison import TRANSFORMERS, Tolerance, error

#: Gradients in float64: against the reference's differences, and between frameworks.
GRADIENTS = REFERENCE["float64"].gradients

__all__ = ["GRADIENTS", "REFERENCE", "TRANSFORMERS", "Tolerance", "error"]
