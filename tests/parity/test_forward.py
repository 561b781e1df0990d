"""The forward pass of every model against the float64 reference, in everything it returns."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.config import ACTIVATIONS
from gpt2_core.reference import ReferenceModel
from models import HEADS, ordinary_parameters, padded_mask, random_config, random_ids, random_parameters, small_config
from tolerances import REFERENCE, error

ROWS, T = 3, 9
PLAIN = ("none", "lm", "sequence", "token", "qa")


def inputs_for(config, head, seed, rows=ROWS, T=T):
    """Ids, and labels of whatever kind the head takes."""
    shape = (rows, 2, T) if head == "double" else (rows, T)
    ids = random_ids(config, *shape, seed=seed)
    pick = np.random.default_rng(seed)
    labels = {
        "none": {},
        "lm": {"labels": np.where(pick.random(shape) < 0.3, -100, ids)},
        "double": {"labels": np.where(pick.random(shape) < 0.3, -1, ids), "mc_labels": pick.integers(0, 2, rows)},
        "sequence": {"labels": pick.integers(0, config.num_labels, rows)},
        "token": {"labels": np.where(pick.random(shape) < 0.3, -100, ids % config.num_labels)},
        # The last ones may lie outside the text, and do not count then.
        "qa": {
            "start_positions": pick.integers(0, T, rows),
            "end_positions": np.r_[0, pick.integers(0, T + 2, rows - 1)],
        },
    }[head]
    return {"input_ids": ids, **labels, "output_attentions": True, "output_hidden_states": True, "use_cache": True}


def pair(framework, config, head, seed, parameters=random_parameters, dtype="float64"):
    values = framework.rounded(parameters(config, head, seed), dtype)
    return ReferenceModel(config, values, head), framework.build(config, head, values, dtype)


def assert_same(framework, got, expected, dtype="float64"):
    names = expected.keys()
    assert got.keys() == names
    for key in names:
        tolerance = REFERENCE[dtype].loss if key.endswith("loss") else REFERENCE[dtype].values
        assert error(framework.numpy(got[key]), expected[key]) <= tolerance, key


def check(framework, config, head, seed, **more):
    ours, theirs = pair(framework, config, head, seed)
    inputs = inputs_for(config, head, seed) | more
    assert_same(framework, framework.run(theirs, **inputs), ours(**inputs))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("seed", range(18))
def test_every_model_agrees_in_everything_it_returns(framework, head, seed):
    config = random_config(seed)
    check(framework, config, head, seed)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees(framework, activation):
    check(framework, small_config(activation_function=activation), "lm", 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_inner": 5},
        {"layer_norm_epsilon": 0.3},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"pruned_heads": {0: [1], 1: [0]}},
        {"n_head": 1},
        {"n_head": 8},
        {"n_layer": 1},
    ],
    ids=str,
)
def test_each_setting_that_changes_the_numbers_agrees_alone(framework, changes):
    check(framework, small_config(**changes), "lm", 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", HEADS)
def test_padding_on_either_side_agrees(framework, head, side):
    config = random_config(3, pad_token_id=None)
    mask = padded_mask(ROWS, T, side)
    if head == "double":
        mask = np.stack((mask, mask[::-1]), axis=1)
    check(framework, config, head, 3, attention_mask=mask)


@pytest.mark.parametrize("head", ["lm", "sequence", "double"])
def test_a_mask_with_holes_agrees(framework, head):
    config = random_config(4)
    shape = (ROWS, 2, T) if head == "double" else (ROWS, T)
    check(framework, config, head, 4, attention_mask=(np.random.default_rng(0).random(shape) < 0.6).astype(np.int64))


@pytest.mark.parametrize("kind", [np.bool_, np.float64, np.int32])
def test_a_mask_of_any_kind_of_number_means_the_same(framework, kind):
    check(framework, small_config(), "lm", 4, attention_mask=padded_mask(ROWS, T).astype(kind))


def test_any_nonzero_number_in_a_mask_means_real(framework):
    check(framework, small_config(), "lm", 4, attention_mask=padded_mask(ROWS, T) * 3)
    check(framework, small_config(), "lm", 4, attention_mask=padded_mask(ROWS, T) * 0.5)


@pytest.mark.parametrize("head", HEADS)
def test_token_types_and_positions_agree(framework, head):
    config = random_config(5)
    shape = (ROWS, 2, T) if head == "double" else (ROWS, T)
    positions = np.random.default_rng(5).integers(0, config.n_positions, shape)
    check(framework, config, head, 5, token_type_ids=random_ids(config, *shape, seed=9), position_ids=positions)


def test_positions_may_be_given_once_for_all_rows(framework):
    config = small_config()
    for shape in ((T,), (1, T)):
        check(framework, config, "lm", 5, position_ids=np.arange(T).reshape(shape) + 3)


@pytest.mark.parametrize("head", HEADS)
def test_embeddings_in_the_place_of_ids_agree(framework, head):
    config = random_config(6, pad_token_id=None)
    shape = (ROWS, 2, T) if head == "double" else (ROWS, T)
    x = np.random.default_rng(6).normal(size=(*shape, config.n_embd))
    check(framework, config, head, 6, input_ids=None, inputs_embeds=x)


@pytest.mark.parametrize("axes", ["one", "layers", "everything"])
@pytest.mark.parametrize("head", ["lm", "double"])
def test_a_mask_over_heads_agrees(framework, head, axes):
    config = small_config(n_layer=2, n_head=2)
    rows = ROWS * 2 if head == "double" else ROWS
    shape = {"one": (2,), "layers": (2, 2), "everything": (2, rows, 2, T, T)}[axes]
    for attentions in (True, False):  # without them the fused kernel would serve, which knows no such mask
        mask = np.random.default_rng(7).random(shape)
        check(framework, config, head, 7, head_mask=mask, output_attentions=attentions)


def test_all_inputs_at_once_agree(framework):
    config = random_config(8, n_head=2, n_embd=8, n_layer=2, pruned_heads={})
    positions = np.random.default_rng(8).integers(0, config.n_positions, (ROWS, T))
    check(
        framework, config, "lm", 8, attention_mask=padded_mask(ROWS, T), position_ids=positions,
        token_type_ids=random_ids(config, ROWS, T, seed=2), head_mask=np.array([[1.0, 0.0], [0.5, 2.0]]),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cls_index", "last", "first", "mean"])
@pytest.mark.parametrize("where", [None, np.array([[0, 3], [-1, 8], [2, -9]])], ids=["default", "given"])
def test_every_summary_agrees(framework, kind, where):
    config = small_config(summary_type=kind, summary_activation="tanh")
    check(framework, config, "double", 9, mc_token_ids=where)


@pytest.mark.parametrize(
    ("num_labels", "problem_type"),
    [(1, None), (3, None), (3, "single_label_classification"), (3, "multi_label_classification"), (3, "regression")],
)
def test_every_kind_of_problem_agrees(framework, num_labels, problem_type):
    config = small_config(num_labels=num_labels, problem_type=problem_type)
    pick = np.random.default_rng(10)
    kind = problem_type or ("regression" if num_labels == 1 else "single_label_classification")
    labels = {
        "single_label_classification": pick.integers(0, num_labels, ROWS),
        "multi_label_classification": pick.integers(0, 2, (ROWS, num_labels)).astype(float),
        "regression": pick.normal(size=(ROWS, num_labels)),
    }[kind]
    check(framework, config, "sequence", 10, labels=labels)
    if num_labels == 1:
        check(framework, config, "sequence", 10, labels=labels[:, 0])
    if problem_type is None and num_labels == 3:
        check(framework, config, "sequence", 10, labels=pick.random((ROWS, 3)))


def test_a_classifier_reads_the_last_token_that_is_not_padding(framework):
    config = small_config(pad_token_id=0)
    ids = random_ids(config, ROWS, T) % 36 + 1
    ids[0, 5:], ids[1, :4], ids[2] = 0, 0, 0
    check(framework, config, "sequence", 11, input_ids=ids)


@pytest.mark.parametrize("head", ["lm", "double", "sequence", "token"])
def test_a_loss_may_come_from_each_set_of_labels_alone(framework, head):
    config = random_config(12)
    given = inputs_for(config, head, 12)
    ours, theirs = pair(framework, config, head, 12)
    names = [name for name in given if name.endswith("labels")]
    for name in names:
        inputs = {key: value for key, value in given.items() if key == name or key not in names}
        assert_same(framework, framework.run(theirs, **inputs), ours(**inputs))
    inputs = {key: value for key, value in given.items() if key not in names}
    assert_same(framework, framework.run(theirs, **inputs), ours(**inputs))


def test_a_loss_with_every_label_ignored_is_nan(framework):
    config = small_config()
    ours, theirs = pair(framework, config, "lm", 0)
    ids = random_ids(config, 2, 5)
    labels = np.full_like(ids, -100)
    assert np.isnan(ours(ids, labels=labels).loss)
    assert np.isnan(framework.numpy(framework.run(theirs, input_ids=ids, labels=labels).loss))


def test_the_config_says_what_is_returned_where_the_call_does_not(framework):
    config = small_config(use_cache=False, output_attentions=True, output_hidden_states=True)
    ours, theirs = pair(framework, config, "lm", 0)
    ids = random_ids(config, 2, 5)
    assert_same(framework, framework.run(theirs, input_ids=ids), ours(ids))
    assert framework.run(theirs, input_ids=ids).keys() == ("logits", "hidden_states", "attentions")
    quiet = {"use_cache": True, "output_attentions": False, "output_hidden_states": False}
    assert framework.run(theirs, input_ids=ids, **quiet).keys() == ("logits", "past")


@pytest.mark.parametrize("head", HEADS)
def test_one_row_of_one_token_and_all_positions_agree(framework, head):
    config = random_config(13)
    ours, theirs = pair(framework, config, head, 13)
    for rows, T in ((1, 1), (1, config.n_positions), (4, 1)):
        inputs = inputs_for(config, head, 13, rows, T)
        if T == 1 and head in ("lm", "double", "token"):
            del inputs["labels"]  # a single token has no next one to score, and the loss would be nan
        assert_same(framework, framework.run(theirs, **inputs), ours(**inputs))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(12))
def test_narrower_number_formats_stay_within_the_table(framework, dtype, seed):
    config = random_config(seed)
    ours, theirs = pair(framework, config, "lm", seed, ordinary_parameters, dtype)
    inputs = inputs_for(config, "lm", seed)
    assert_same(framework, framework.run(theirs, **inputs), ours(**inputs), dtype)


def test_upcast_attention_in_half_precision_is_nearer_to_the_reference(framework):
    # Large scores and many keys: there the product and the softmax lose most in half precision.
    errors = {}
    for upcast in (False, True):
        config = small_config(n_positions=128, n_embd=64, n_head=1, n_layer=1, reorder_and_upcast_attn=upcast)
        values = framework.rounded(ordinary_parameters(config, "none", 0), "float16")
        values["h.0.attn.c_attn.weight"] *= 4
        model = framework.build(config, "none", values, "float16")
        inputs = {"input_ids": random_ids(config, 2, 128), "output_attentions": True}
        expected = ReferenceModel(config, values, "none")(**inputs)
        errors[upcast] = error(framework.numpy(framework.run(model, **inputs).attentions), expected.attentions)
    assert errors[True] < errors[False]
