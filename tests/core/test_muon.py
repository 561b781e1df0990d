"""Muon's arithmetic, without a framework."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.muon import is_for, orthogonal, step_size
from gpt2_core.parameters import parameter_table
from models import small_config


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16), (192, 768)])
def test_an_orthogonal_matrix_has_the_same_directions_and_singular_values_near_one(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    made = left.T @ orthogonal(matrix) @ right.T
    seen = values / np.linalg.norm(values) > 0.0015
    assert seen.sum() >= len(values) - 1
    assert np.abs(made - np.diag(np.diag(made))).max() < 1e-9
    assert np.diag(made)[seen].min() > 0.65 and np.diag(made).max() < 1.21


def test_the_size_of_a_matrix_does_not_matter_and_zero_stays_zero():
    matrix = np.random.default_rng(0).normal(size=(4, 12))
    assert np.abs(orthogonal(matrix) - orthogonal(1000 * matrix)).max() < 1e-6
    assert not orthogonal(np.zeros((3, 5))).any()


def test_a_step_is_about_as_large_as_one_of_adamw():
    for shape in ((192, 576), (768, 192)):
        step = step_size(shape) * orthogonal(np.random.default_rng(0).normal(size=shape))
        assert 0.15 < np.sqrt((step**2).mean()) < 0.22


def test_it_is_for_the_kernels_of_the_blocks_alone():
    config = small_config(n_layer=2)
    for head in ("lm", "none", "sequence"):
        names = [row.name for row in parameter_table(config, head) if is_for(row)]
        assert len(names) == 8
        assert all(name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) for name in names)
