"""Ten steps of AdamW from the same values and batches: the same losses and the same weights in every framework."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.config import GPT2Config
from gpt2_core.initialization import initial_value
from gpt2_core.parameters import parameter_table
from models import ordinary_parameters, random_ids, small_config
from parity.frameworks import FRAMEWORKS
from tolerances import error

STEPS = 10
#: Ten steps of 124 million parameters in float32: what was measured, times ten.
TOLERANCE_OF_LOSSES, TOLERANCE_OF_WEIGHTS = 1e-6, 2e-4
# Powers of two, because Keras rounds the settings of its optimizers to float32.
ADAMW = {"lr": 2**-7, "beta1": 0.875, "beta2": 1 - 2**-10, "eps": 1e-8, "decay": 2**-6}
CONFIG = small_config(vocab_size=67, n_embd=16, n_head=4, n_layer=3, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
                      summary_first_dropout=0.0, classifier_dropout=0.0)  # fmt: skip


def batches(head):
    pick = np.random.default_rng(3)
    for step in range(STEPS):
        ids = random_ids(CONFIG, *((3, 2, 11) if head == "double" else (6, 11)), seed=step)
        ids[..., 1::2] = ids[..., ::2][..., : ids[..., 1::2].shape[-1]]  # something there is to learn
        mask = np.ones_like(ids)
        mask[-1, ..., 8:] = 0
        labels = np.where(mask, ids, -100)
        first = ids.reshape(len(ids), -1)[:, 0]
        yield {"input_ids": ids, "attention_mask": mask} | {
            "lm": {"labels": labels},
            "double": {"labels": labels, "mc_labels": pick.integers(0, 2, len(ids))},
            "sequence": {"labels": first % 2},
            "token": {"labels": np.where(mask, ids % 2, -100)},
            "qa": {"start_positions": first % 8, "end_positions": first % 7},
        }[head]


def trained(framework, head, dtype, config=CONFIG):
    values = {row.name: initial_value(row, 0) for row in parameter_table(config, head)}
    model = framework.build(config, head, values, dtype)
    losses = framework.train(model, list(batches(head)), **ADAMW)
    return losses, framework.parameters(model)


@pytest.fixture(scope="module")
def of_pytorch():
    """What PyTorch makes of each task, computed once."""
    pytest.importorskip("torch")
    framework, made = FRAMEWORKS["pt"](), {}

    def get(head, dtype, config=CONFIG):
        key = (head, dtype, config)
        if key not in made:
            made[key] = trained(framework, head, dtype, config)
        return made[key]

    return get


@pytest.mark.parametrize("head", ["lm", "double", "sequence", "token", "qa"])
def test_ten_steps_in_float64_give_the_same_losses_and_weights(framework, of_pytorch, head):
    if framework.name == "pt":
        pytest.skip("PyTorch is what the others are held to")
    expected_losses, expected = of_pytorch(head, "float64")
    losses, weights = trained(framework, head, "float64")
    assert error(losses, expected_losses) <= 1e-10
    assert weights.keys() == expected.keys()
    assert max(error(weights[name], expected[name]) for name in expected) <= 1e-8


def test_an_untied_head_learns_the_same(framework, of_pytorch):
    if framework.name == "pt":
        pytest.skip("PyTorch is what the others are held to")
    config = CONFIG.replace(tie_word_embeddings=False)
    expected_losses, expected = of_pytorch("lm", "float64", config)
    losses, weights = trained(framework, "lm", "float64", config)
    assert error(losses, expected_losses) <= 1e-10
    assert max(error(weights[name], expected[name]) for name in expected) <= 1e-8


def test_ten_steps_in_float32_give_the_same_losses(framework, of_pytorch):
    if framework.name == "pt":
        pytest.skip("PyTorch is what the others are held to")
    assert error(trained(framework, "lm", "float32")[0], of_pytorch("lm", "float32")[0]) <= 1e-5


def test_training_lowers_the_loss(framework):
    losses, weights = trained(framework, "lm", "float64")
    assert losses[-1] < losses[0] - 0.1
    assert all(np.isfinite(value).all() for value in weights.values())


@pytest.mark.slow
def test_ten_steps_of_gpt2_itself_at_its_full_length_give_the_same_losses_and_weights(of_pytorch, record_property):
    pytest.importorskip("keras")
    config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    values = ordinary_parameters(config, "lm")
    texts = [random_ids(config, 1, config.n_positions, seed=step) for step in range(STEPS)]
    found = []
    for framework in (FRAMEWORKS["pt"](), FRAMEWORKS["tf"]()):
        model = framework.build(config, "lm", values, "float32")
        losses = framework.train(model, [{"input_ids": ids, "labels": ids} for ids in texts], **ADAMW | {"lr": 2**-13})
        found.append((losses, framework.parameters(model)))
        del model
    (expected_losses, expected), (losses, weights) = found
    errors = {name: error(weights[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    record_property("losses", error(losses, expected_losses))
    record_property("weights", (worst, errors[worst]))
    assert error(losses, expected_losses) <= TOLERANCE_OF_LOSSES
    assert errors[worst] <= TOLERANCE_OF_WEIGHTS
