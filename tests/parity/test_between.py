"""From one framework to the other: files bit for bit, initial values, gradients, and numbers in every format."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.checkpoints import open_checkpoint
from gpt2_core.errors import CheckpointError
from models import HEADS, ordinary_parameters, padded_mask, random_config, random_ids, small_config
from parity.frameworks import FRAMEWORKS
from tolerances import GRADIENTS, REFERENCE, error

#: The formats that save_pretrained writes, and the number formats each can hold.
FORMATS = {
    "safetensors": ("float32", "float16", "bfloat16", "float64"),
    "bin": ("float32", "float16", "bfloat16", "float64"),
}


@pytest.fixture(scope="module")
def both():
    """The two frameworks, side by side in one process."""
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    return FRAMEWORKS["pt"](), FRAMEWORKS["tf"]()


def bits(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: (checkpoint.dtype(name), checkpoint[name].raw().tobytes()) for name in checkpoint}


@pytest.mark.parametrize("order", ["pt to tf", "tf to pt"])
@pytest.mark.parametrize(
    ("format", "dtype"), [(format, dtype) for format, dtypes in FORMATS.items() for dtype in dtypes]
)
def test_what_one_saves_the_other_loads_and_saves_bit_for_bit(both, tmp_path, format, dtype, order):
    one, other = both if order == "pt to tf" else both[::-1]
    config = random_config(3, tie_word_embeddings=False)
    model = one.build(config, "lm", ordinary_parameters(config, "lm"), dtype)
    model.save_pretrained(tmp_path / "one", format=format)
    loaded = other.classes["lm"].from_pretrained(tmp_path / "one", dtype="auto")
    assert loaded.config == type(loaded).from_pretrained(tmp_path / "one").config
    loaded.save_pretrained(tmp_path / "other", format=format)
    assert bits(tmp_path / "one") == bits(tmp_path / "other")
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "other/config.json").read_bytes()
    for name, value in one.parameters(model).items():
        np.testing.assert_array_equal(other.parameters(loaded)[name], value)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_crosses_both_ways(both, tmp_path, head):
    config = random_config(4)
    for one, other in (both, both[::-1]):
        model = one.build(config, head, ordinary_parameters(config, head), "float32")
        folder = tmp_path / f"{one.name}-{head}"
        model.save_pretrained(folder)
        loaded = other.classes[head].from_pretrained(folder)
        assert loaded.config.pruned_heads == config.pruned_heads
        for name, value in one.parameters(model).items():
            np.testing.assert_array_equal(other.parameters(loaded)[name], value)


@pytest.mark.parametrize("head", HEADS)
def test_the_same_seed_starts_from_the_same_bits(both, head):
    config = random_config(5)
    pt, tf = ({n: v.tobytes() for n, v in each.parameters(each.classes[head](config, 7)).items()} for each in both)
    assert pt == tf


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_both_frameworks_give_the_same_numbers_in_every_format(both, dtype, seed):
    config = random_config(seed)
    ids = random_ids(config, 3, 9, seed=seed)
    inputs = {
        "input_ids": ids, "labels": ids, "attention_mask": padded_mask(3, 9, "left", seed), "use_cache": True,
        "output_attentions": True, "output_hidden_states": True,
    }  # fmt: skip
    values = both[0].rounded(ordinary_parameters(config, "lm", seed), dtype)
    pt, tf = (each.run(each.build(config, "lm", values, dtype), **inputs) for each in both)
    assert pt.keys() == tf.keys()
    for key in pt.keys():  # noqa: SIM118 - an output iterates over its values
        tolerance = REFERENCE[dtype].loss if key == "loss" else REFERENCE[dtype].values
        assert error(both[1].numpy(tf[key]), both[0].numpy(pt[key])) <= tolerance, key


@pytest.mark.parametrize("head", ["lm", "double", "sequence", "token", "qa"])
@pytest.mark.parametrize("seed", range(3))
def test_both_frameworks_give_the_same_gradient_of_every_parameter(both, head, seed):
    config = random_config(seed, activation_function=["gelu_new", "gelu", "relu"][seed])
    values = ordinary_parameters(config, head, seed)
    ids = random_ids(config, 2, 3, 7, seed=seed) if head == "double" else random_ids(config, 2, 7, seed=seed)
    inputs = {"input_ids": ids} | {
        "lm": {"labels": ids},
        "double": {"labels": ids, "mc_labels": np.array([2, 0])},
        "sequence": {"labels": np.array([2, 0])},
        "token": {"labels": ids % config.num_labels},
        "qa": {"start_positions": np.array([1, 2]), "end_positions": np.array([3, 4])},
    }[head]
    (pt_loss, pt), (tf_loss, tf) = (each.gradients(each.build(config, head, values), **inputs) for each in both)
    assert error(tf_loss, pt_loss) <= 1e-10
    assert pt.keys() == tf.keys() == values.keys()
    assert max(error(tf[name], pt[name]) for name in pt) <= GRADIENTS


def test_resized_and_pruned_models_stay_the_same(both, tmp_path):
    config = small_config(n_head=4, n_embd=16)
    values = ordinary_parameters(config, "lm")
    models = [each.build(config, "lm", values) for each in both]
    for model in models:
        model.prune_heads({0: [1, 3], 1: [0]})
        model.resize_token_embeddings(41)
        model.prune_heads({0: [0]})
    assert models[0].config == models[1].config
    pt, tf = (each.parameters(model) for each, model in zip(both, models, strict=True))
    assert pt.keys() == tf.keys()
    assert max(error(tf[name], pt[name]) for name in pt) <= 1e-12
    ids = random_ids(config, 2, 6)
    outs = [each.numpy(each.run(model, input_ids=ids).logits) for each, model in zip(both, models, strict=True)]
    assert error(outs[1], outs[0]) <= 1e-10


def test_an_unknown_format_is_refused_in_the_same_words(both, tmp_path):
    said = set()
    for each in both:
        with pytest.raises(CheckpointError) as caught:
            each.classes["lm"](small_config()).save_pretrained(tmp_path / "x", format="safetensor")
        said.add(str(caught.value))
    assert len(said) == 1
    assert "did you mean 'safetensors'" in said.pop()
    assert not (tmp_path / "x").exists()
