"""Small models for tests: configs where everything that changes the numbers varies, and weights where all shows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from gpt2_core.config import ACTIVATIONS, GPT2Config
from gpt2_core.parameters import parameter_table

HEADS = ("none", "lm", "double", "sequence", "token", "qa")


def small_config(**changes: Any) -> GPT2Config:
    """Two layers of two heads of four, as GPT-2 is otherwise."""
    values: dict[str, Any] = {
        "vocab_size": 37,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return GPT2Config(**(values | changes))


def random_config(seed: int, **changes: Any) -> GPT2Config:
    """A small config; ``seed`` picks everything that changes the numbers, every activation in turn."""
    pick = random.Random(seed)
    n_head = pick.choice([1, 2, 3])
    values: dict[str, Any] = {
        "vocab_size": pick.choice([11, 37]),
        "n_positions": 16,
        "n_embd": n_head * pick.choice([4, 6]),
        "n_layer": pick.choice([1, 2, 3]),
        "n_head": n_head,
        "n_inner": pick.choice([None, 7, 40]),
        "activation_function": ACTIVATIONS[seed % len(ACTIVATIONS)],
        "layer_norm_epsilon": pick.choice([1e-5, 1e-3, 0.1]),
        "scale_attn_weights": pick.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": pick.random() < 0.5,
        "reorder_and_upcast_attn": pick.random() < 0.4,
        "tie_word_embeddings": pick.random() < 0.6,
        "summary_activation": pick.choice([None, "tanh"]),
        "summary_type": pick.choice(["cls_index", "last", "first", "mean"]),
        "pad_token_id": pick.choice([None, 0]),
        "num_labels": 3,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    if n_head > 1 and pick.random() < 0.4:
        values["pruned_heads"] = {values["n_layer"] - 1: [pick.randrange(n_head)]}
    return GPT2Config(**(values | changes))


def random_parameters(
    config: GPT2Config, head: str, seed: int = 0, *, mean: float = 0.1, std: float = 0.4
) -> dict[str, np.ndarray]:
    """Values far from any initial ones, so that gains, biases and transposes all show."""
    generator = np.random.default_rng(seed)
    return {row.name: generator.normal(mean, std, row.shape) for row in parameter_table(config, head)}


def ordinary_parameters(config: GPT2Config, head: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Values such as a trained GPT-2 has: gains near one, weights of ordinary width, biases small."""
    generator = np.random.default_rng(seed)
    values = {}
    for row in parameter_table(config, head):
        if row.init == "ones":
            values[row.name] = generator.normal(1.0, 0.1, row.shape)
        elif row.init == "zeros":
            values[row.name] = generator.normal(0.0, 0.1, row.shape)
        else:
            values[row.name] = generator.normal(0.0, 1 / np.sqrt(row.shape[-1]), row.shape)
    return values


def random_ids(config: GPT2Config, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 1000).integers(0, config.vocab_size, shape)


def padded_mask(rows: int, T: int, side: str = "left", seed: int = 0) -> np.ndarray:
    """A mask (rows, T) with a different number of padding columns in each row; the first row has none."""
    lengths = np.random.default_rng(seed).integers(1, T + 1, rows)
    lengths[0] = T
    at = np.arange(T)
    real = at >= T - lengths[:, None] if side == "left" else at < lengths[:, None]
    return real.astype(np.int64)
