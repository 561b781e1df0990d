"""The tolerances are of use: likely mistakes exceed them. Each is made on purpose, in the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpt2_core import reference
from gpt2_core.reference import ReferenceModel
from models import ordinary_parameters, padded_mask, random_ids, random_parameters, small_config
from tolerances import REFERENCE, TRANSFORMERS, error

IDS = random_ids(small_config(), 2, 9)


def difference(framework, config, wrong_config, values, wrong_values=None, dtype="float64", **inputs):
    """How far a right model is from a reference with a mistake."""
    model = framework.build(config, "lm", values, dtype)
    wrong = ReferenceModel(wrong_config, wrong_values or values, "lm")
    return error(framework.numpy(framework.run(model, input_ids=IDS, **inputs).logits), wrong(IDS, **inputs).logits)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gelu_by_erf_for_gelu_by_tanh_is_caught(framework, dtype):
    x = np.linspace(-6, 6, 200_001)
    apart = np.abs(reference.gelu(x) - reference.gelu_new(x)).max()
    assert math.isclose(apart, 4.73e-4, rel_tol=1e-2)
    config = small_config()
    values = framework.rounded(ordinary_parameters(config, "lm"), dtype)
    found = difference(framework, config, config.replace(activation_function="gelu"), values, dtype=dtype)
    assert found > 10 * REFERENCE[dtype].values
    assert found > 10 * TRANSFORMERS


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["attn.c_proj", "attn.c_attn", "mlp.c_fc", "mlp.c_proj"])
def test_a_transposed_kernel_is_caught_where_shapes_cannot_tell(framework, name, dtype):
    # attn.c_proj is square in every model; the others are made so here.
    config = small_config(n_inner=8)
    values = framework.rounded(random_parameters(config, "lm"), dtype)
    key = f"transformer.h.1.{name}.weight"
    kernel = values[key]
    turned = kernel.T if name != "attn.c_attn" else np.concatenate([part.T for part in np.split(kernel, 3, 1)], 1)
    assert turned.shape == kernel.shape
    found = difference(framework, config, config, values, values | {key: turned}, dtype)
    assert found > REFERENCE[dtype].values


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_a_forgotten_setting_is_caught(framework, changes):
    config = small_config()
    values = ordinary_parameters(config, "lm")
    assert difference(framework, config, config.replace(**changes), values) > 100 * REFERENCE["float64"].values


def test_queries_and_keys_that_change_places_are_caught(framework):
    config = small_config()
    values = ordinary_parameters(config, "lm")
    kernel, bias = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"
    order = np.r_[8:16, 0:8, 16:24]
    wrong = values | {kernel: values[kernel][:, order], bias: values[bias][order]}
    assert difference(framework, config, config, values, wrong) > 1e4 * REFERENCE["float64"].values


def test_shifted_positions_and_a_dropped_mask_are_caught(framework):
    config = small_config()
    values = ordinary_parameters(config, "lm")
    model, ours = framework.build(config, "lm", values), ReferenceModel(config, values, "lm")
    got = framework.numpy(framework.run(model, input_ids=IDS).logits)
    assert error(got, ours(IDS, position_ids=np.arange(9)[None] + 1).logits) > 1e-2
    mask = padded_mask(2, 9, seed=1)
    assert not mask.all()
    got = framework.numpy(framework.run(model, input_ids=IDS, attention_mask=mask).logits)
    assert error(got, ours(IDS).logits) > 1e-2
    plain = np.arange(9)[None].repeat(2, 0)
    assert error(got[mask == 1], ours(IDS, attention_mask=mask, position_ids=plain).logits[mask == 1]) > 1e-2
