"""Small TensorFlow models for the tests of this folder, and what `fit` takes for each."""

from __future__ import annotations

from typing import Any

import numpy as np

import gpt2_tf  # before TensorFlow: it keeps TensorFlow's banner off the terminal

# isort: split
import keras
import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_tf import (
    TFGPT2DoubleHeadsModel,
    TFGPT2ForQuestionAnswering,
    TFGPT2ForSequenceClassification,
    TFGPT2ForTokenClassification,
    TFGPT2LMHeadModel,
    TFGPT2Model,
)
from models import ordinary_parameters, random_ids, small_config

MODELS = (
    TFGPT2Model,
    TFGPT2LMHeadModel,
    TFGPT2DoubleHeadsModel,
    TFGPT2ForSequenceClassification,
    TFGPT2ForTokenClassification,
    TFGPT2ForQuestionAnswering,
)
WITH_LOSS = MODELS[1:]
#: Every place where dropout could act, switched off.
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0,
         "classifier_dropout": 0.0}  # fmt: skip


def filled(model: Any, seed: int = 0) -> Any:
    """``model`` with weights such as a trained one has."""
    for name, value in ordinary_parameters(model.config, model.head, seed).items():
        model.get_parameter(name).assign(value)
    return model


def model_of(
    cls: Any = TFGPT2LMHeadModel, dtype: Any = "float64", seed: int = 0, name: str | None = None, **changes: Any
) -> Any:
    """A small model with weights such as a trained one has."""
    return filled(cls(small_config(**changes), seed=None, dtype=dtype, name=name), seed)


def tiny(cls: Any = TFGPT2LMHeadModel, dtype: Any = "float32", **changes: Any) -> Any:
    """The smallest model with everything in it and no dropout, for what is traced and compiled."""
    return model_of(cls, dtype=dtype, **({"n_layer": 1} | QUIET | changes))


def ids_of(model: Any, *shape: int, seed: int = 0) -> Any:
    """Random ids; with an axis of two choices for the double-heads model."""
    if isinstance(model, TFGPT2DoubleHeadsModel) and len(shape) == 2:
        shape = (shape[0], 2, shape[1])
    return tf.constant(random_ids(model.config, *shape, seed=seed))


def batch_of(model: Any, rows: int, T: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs with labels in numpy, as `fit` takes them: some of the labels do not count."""
    pick = np.random.default_rng(seed)
    ids = ids_of(model, rows, T, seed=seed).numpy()
    batch = {"input_ids": ids}
    if model.head.value in ("lm", "double"):
        batch["labels"] = np.where(pick.random(ids.shape) < 0.3, -100, ids)
    if model.head.value == "double":
        batch["mc_labels"] = pick.integers(0, 2, rows)
    if model.head.value == "sequence":
        batch["labels"] = pick.integers(0, 2, rows)
    if model.head.value == "token":
        batch["labels"] = np.where(pick.random(ids.shape) < 0.3, -100, ids % 2)
    if model.head.value == "qa":
        batch |= {"start_positions": pick.integers(0, T, rows), "end_positions": pick.integers(0, T + 2, rows)}
    return batch


def values(model: Any) -> dict[str, np.ndarray]:
    """The model's numbers by the names of the parameter table."""
    return {row.name: model.get_parameter(row.name).numpy() for row in model.parameter_table()}


def same_values(one: Any, other: Any) -> None:
    """Both models hold the same bits in the same format."""
    left, right = values(one), values(other)
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].tobytes() == right[name].tobytes(), name


def close(one: Any, other: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=tolerance, atol=tolerance)


def equal(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


__all__ = [
    "MODELS", "QUIET", "WITH_LOSS", "GPT2Config", "batch_of", "close", "equal", "filled", "gpt2_tf", "ids_of", "keras",
    "model_of", "same_values", "tf", "tiny", "values",
]  # fmt: skip
