"""Small PyTorch models for the tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import gpt2_pt  # noqa: E402
from gpt2_pt import (  # noqa: E402
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from models import ordinary_parameters, random_ids, small_config  # noqa: E402

MODELS = (
    GPT2Model,
    GPT2LMHeadModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2ForQuestionAnswering,
)


def model_of(cls: Any = GPT2LMHeadModel, dtype: Any = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A small model in evaluation mode with weights such as a trained one has."""
    config = small_config(**changes)
    model = cls(config, seed=None).to(dtype).eval()
    with torch.no_grad():
        for name, value in ordinary_parameters(config, model.head, seed).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))
    return model


def ids_of(model: Any, *shape: int, seed: int = 0) -> Any:
    """Random ids; with an axis of two choices for the double-heads model."""
    if isinstance(model, GPT2DoubleHeadsModel) and len(shape) == 2:
        shape = (shape[0], 2, shape[1])
    return torch.from_numpy(random_ids(model.config, *shape, seed=seed))


__all__ = ["MODELS", "gpt2_pt", "ids_of", "model_of", "torch"]
