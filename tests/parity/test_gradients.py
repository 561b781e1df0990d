"""Gradients against differences of the reference's loss."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.reference import ReferenceModel
from models import ordinary_parameters, padded_mask, random_config, random_ids
from tolerances import GRADIENTS, error


def slope(config, head, values, direction, inputs, step=1e-3):
    """The reference's derivative along ``direction``: differences at four points, exact to the fifth order."""

    def loss(at):
        return float(ReferenceModel(config, {n: values[n] + at * direction[n] for n in values}, head)(**inputs).loss)

    near = loss(step) - loss(-step)
    far = loss(2 * step) - loss(-2 * step)
    wide = loss(3 * step) - loss(-3 * step)
    return (45 * near - 9 * far + wide) / (60 * step)


@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_every_parameter_are_the_slopes_of_the_reference(framework, seed):
    # relu has a corner, where differences have no meaning.
    config = random_config(seed, activation_function=["gelu_new", "gelu", "silu", "tanh", "quick_gelu"][seed % 5])
    values = ordinary_parameters(config, "lm", seed)
    ids = random_ids(config, 2, 7, seed=seed)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": padded_mask(2, 7, "right", seed)}
    loss, gradients = framework.gradients(framework.build(config, "lm", values), **inputs)
    assert error(loss, ReferenceModel(config, values, "lm")(**inputs).loss) <= 1e-10
    assert set(gradients) == set(values)
    pick = np.random.default_rng(seed)
    zero = {name: np.zeros_like(value) for name, value in values.items()}
    for name, value in values.items():
        direction = pick.normal(size=value.shape)
        direction /= np.linalg.norm(direction)
        expected = slope(config, "lm", values, zero | {name: direction}, inputs)
        assert error((gradients[name] * direction).sum(), expected) <= GRADIENTS, name


@pytest.mark.parametrize("head", ["double", "sequence", "token", "qa"])
def test_gradients_of_the_other_heads_are_the_slopes_of_the_reference(framework, head):
    config = random_config(2, activation_function="gelu_new")
    values = ordinary_parameters(config, head, 2)
    ids = random_ids(config, 2, 3, 5) if head == "double" else random_ids(config, 2, 5)
    inputs = {
        "double": {"labels": ids, "mc_labels": np.array([2, 0])},
        "sequence": {"labels": np.array([2, 0])},
        "token": {"labels": ids % config.num_labels},
        "qa": {"start_positions": np.array([1, 2]), "end_positions": np.array([3, 4])},
    }[head] | {"input_ids": ids}
    _, gradients = framework.gradients(framework.build(config, head, values), **inputs)
    assert set(gradients) == set(values)
    pick = np.random.default_rng(0)
    for _ in range(5):
        direction = {name: pick.normal(size=value.shape) / np.sqrt(value.size) for name, value in values.items()}
        got = sum((gradients[name] * direction[name]).sum() for name in values)
        assert error(got, slope(config, head, values, direction, inputs)) <= GRADIENTS
