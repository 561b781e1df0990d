"""Two runs are held against each other: what differs, where, and by how much."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from gpt2_core import comparison
from gpt2_core.comparison import TOLERANCES, Key, Report, Side, coarsest, compare, error, measure, named, rounded
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointFormatError, InputError
from gpt2_core.reference import ReferenceModel
from models import ordinary_parameters, random_ids, small_config

CONFIG = small_config()
IDS = random_ids(CONFIG, 2, 9)


def side(
    config: GPT2Config = CONFIG, dtype: str = "float64", gradients: Any = None, stored: Any = None, **changes: Any
) -> Side:
    """A run of the reference; ``changes`` replace parameters (dots written as two underscores)."""
    values = ordinary_parameters(CONFIG, "lm")
    values = {name: value for name, value in values.items() if name in dict(ordinary_parameters(config, "lm"))}
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    model = ReferenceModel(config, values)
    out = model(IDS, labels=IDS, output_hidden_states=True, output_attentions=True)
    outputs = {key: np.asarray(value) for key, value in named(out)}
    return Side("a folder", "numpy", dtype, config, model.parameters, outputs, gradients, stored)


def changed(name: str, index: tuple[int, ...], by: float) -> dict[str, np.ndarray]:
    value = ordinary_parameters(CONFIG, "lm")[name]
    value[index] += by
    return {name.replace(".", "__"): value}


# -- two arrays ----------------------------------------------------------------------------------------------


def test_the_worst_number_is_found_with_its_place_and_both_values():
    b = np.arange(24.0).reshape(2, 3, 4)
    a = b.copy()
    a[1, 0, 2] += 1.5  # 14: error 1.5 / 15
    a[0, 2, 3] += 1.0  # 11: error 1 / 12, but less far away
    found = measure(a, b)
    assert (found.where, found.values) == ((1, 0, 2), (15.5, 14.0))
    assert found.error == pytest.approx(1.5 / 15)
    assert found.absolute == 1.5
    assert found.relative == pytest.approx(1.5 / 15.5)
    assert (found.identical, found.differing) == (False, 2)


def test_each_of_the_three_figures_is_the_worst_of_its_own():
    b = np.array([0.0, 1000.0, 1e-6])
    found = measure(b + np.array([0.0, 3.0, 1e-6]), b)
    assert found.absolute == 3.0
    assert found.relative == 0.5  # between 1e-6 and 2e-6
    assert found.error == pytest.approx(3 / 1001)
    assert found.where == (1,)


def test_equal_arrays_are_identical_and_have_no_worst_place():
    values = np.random.default_rng(0).normal(size=(3, 5))
    for other in (values.copy(), np.asfortranarray(values)):
        found = measure(values, other)
        assert (found.identical, found.differing, found.error, found.where, found.values) == (True, 0, 0.0, None, None)
    assert measure(values.astype(np.float32), values.astype(np.float32).astype(np.float64)).identical


def test_zeros_of_unlike_sign_are_no_error_but_not_identical():
    found = measure(np.array([0.0, 1.0]), np.array([-0.0, 1.0]))
    assert (found.identical, found.differing, found.error, found.absolute) == (False, 1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b"), [(np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan), (np.inf, 1.0), (1.0, np.inf), (np.inf, -np.inf)]
)
def test_what_is_no_number_is_infinitely_wrong_on_either_side(a, b):
    found = measure(np.array([0.0, a]), np.array([0.0, b]))
    assert found.error == math.inf
    assert found.where == (1,)


def test_the_same_infinity_on_both_sides_is_no_error():
    assert measure(np.array([np.inf, -np.inf]), np.array([np.inf, -np.inf])).error == 0.0


def test_arrays_larger_than_a_piece_are_compared_to_the_end(monkeypatch):
    monkeypatch.setattr(comparison, "_PIECE", 10)
    b = np.zeros((5, 4, 7))
    for where in ((0, 0, 0), (2, 3, 6), (4, 3, 6)):
        a = b.copy()
        a[where] = 1.0
        found = measure(a, b)
        assert (found.where, found.error, found.differing) == (where, 1.0, 1)
    wide = np.zeros((3, 25))
    wide[2, 24] = 1.0
    assert measure(wide, np.zeros((3, 25))).where == (2, 24)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0)])
def test_single_numbers_and_empty_arrays_can_be_compared(shape):
    assert measure(np.ones(shape), np.ones(shape)).identical
    if np.ones(shape).size:
        assert measure(np.ones(shape) * 3, np.ones(shape)).error == 1.0


def test_error_takes_nests_and_is_infinite_where_they_differ():
    a, b = np.ones((2, 2)), np.ones((2, 2)) * 1.5
    assert error((a, (b,)), (a, (b,))) == 0.0
    assert error((a, (a,)), (a, (b,))) == pytest.approx(0.5 / 2.5)
    assert error((a,), (a, b)) == error(a, (a,)) == error(np.ones(3), a) == math.inf


def test_rounding_is_that_of_each_format():
    values = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, 70000.0, 1e-9])
    assert rounded(values, "bfloat16").tolist()[:2] == [1.0, 1.0078125]
    assert rounded(values, "float16").tolist()[2:] == [np.inf, 0.0]
    assert rounded(values, "float32").dtype == np.float32
    assert rounded(values, "float64").tolist() == values.tolist()


def test_the_coarsest_format_decides():
    assert coarsest(["float32", "float64"]) == "float32"
    assert coarsest(["bfloat16", "float16"]) == "bfloat16"
    with pytest.raises(InputError, match="did you mean 'float16'"):
        coarsest(["float32", "floot16"])


def test_the_table_is_ordered_from_fine_to_coarse():
    for name in ("values", "loss", "gradients"):
        column = [getattr(row, name) for row in TOLERANCES.values()]
        assert column == sorted(column)


# -- whole runs ----------------------------------------------------------------------------------------------


def test_a_run_against_itself_is_identical():
    report = compare(side(), side())
    assert report.verdict == "identical"
    assert report.config == ()
    assert [len(part.differences) for part in report.sections.values()] == [28, 2 + 3 + 2 + 4]
    assert all(part.worst is None for part in report.sections.values())
    assert all(set(row.errors) == {0.0} for row in report.heat)


@pytest.mark.parametrize("by", [1.0, 1e-12])
def test_a_single_changed_weight_is_found_and_named(by):
    name, index = "transformer.h.1.mlp.c_fc.weight", (3, 17)
    report = compare(side(**changed(name, index, by)), side())
    assert report.verdict == "mismatch"
    assert not report.parameters.matches
    worst = report.parameters.worst
    assert (worst.name, worst.where, worst.differing) == (name, index, 1)
    assert worst.ratio == math.inf
    assert [each.name for each in report.parameters.differences if not each.identical] == [name]


def test_the_worst_output_is_named_by_layer_row_token_and_unit():
    a, b = side(), side()
    wrong = a.outputs[Key("hidden_states", 1)].copy()
    wrong[1, 4, 6] += 0.5
    report = compare(dataclasses.replace(a, outputs={**a.outputs, Key("hidden_states", 1): wrong}), b)
    assert report.verdict == "mismatch"
    assert report.parameters.identical
    worst = report.outputs.worst
    assert (worst.name, worst.kind, worst.layer) == ("hidden_states[1]", "hidden_states", 1)
    assert worst.place == "row 1, token 4, unit 6"
    assert worst.ratio == pytest.approx(worst.error / 1e-10)
    row = next(row for row in report.heat if (row.kind, row.layer) == ("hidden_states", 1))
    assert [token for token, found in enumerate(row.errors) if found] == [4]
    assert row.errors[4] == pytest.approx(worst.error, rel=1e-2)


def test_every_kind_of_output_is_compared_and_its_axes_are_named():
    report = compare(side(), side())
    kinds = report.outputs.by_kind()
    assert list(kinds) == ["loss", "logits", "past.key", "past.value", "hidden_states", "attentions"]
    assert {kind: each[0].axes for kind, each in kinds.items() if kind != "loss"} == {
        "logits": ("row", "token", "entry"),
        "past.key": ("row", "head", "token", "unit"),
        "past.value": ("row", "head", "token", "unit"),
        "hidden_states": ("row", "token", "unit"),
        "attentions": ("row", "head", "token", "seen token"),
    }
    assert all(len(each[0].axes) == len(each[0].shape) for kind, each in kinds.items() if kind != "loss")
    assert [each.name for each in kinds["past.key"]] == ["past[0].key", "past[1].key"]
    assert {(row.kind, len(row.errors)) for row in report.heat} == {(kind, 9) for kind in kinds if kind != "loss"}


def test_every_output_has_the_name_of_its_place():
    out = ReferenceModel(CONFIG, ordinary_parameters(CONFIG, "lm"))(IDS, labels=IDS, output_hidden_states=True)
    found = dict(named(out))
    assert found[Key("past.key", 1)] is out.past[1][0]
    assert found[Key("past.value", 0)] is out.past[0][1]
    assert found[Key("hidden_states", 2)] is out.hidden_states[2]
    assert found[Key("loss")] is out.loss


def test_the_worst_is_what_exceeds_its_own_tolerance_the_most():
    a, b = side(dtype="float32"), side(dtype="float32")
    logits = a.outputs[Key("logits")].copy()
    logits[0, 0, 0] += 1e-4
    moved = {**a.outputs, Key("logits"): logits, Key("loss"): a.outputs[Key("loss")] + 9e-5}
    worst = compare(dataclasses.replace(a, outputs=moved), b).outputs.worst
    assert worst.name == "loss"  # less far away than the logits, but its tolerance is smaller


def test_each_position_is_held_to_the_tolerance_of_its_kind():
    a, b = side(dtype="float32"), side(dtype="float32")
    report = compare(dataclasses.replace(a, gradients=a.parameters), dataclasses.replace(b, gradients=b.parameters))
    held = {each.kind: each.tolerance for part in report.sections.values() for each in part.differences}
    bound = TOLERANCES["float32"]
    assert held.pop("loss") == bound.loss
    assert held.pop("gradient") == bound.gradients
    assert held.pop("parameter") == 0.0
    assert set(held.values()) == {bound.values}
    assert report.bound == "float32"


def test_a_transposed_square_kernel_is_caught_in_parameters_and_in_outputs():
    kernel = ordinary_parameters(CONFIG, "lm")["transformer.h.0.attn.c_proj.weight"]
    assert kernel.shape[0] == kernel.shape[1]
    for dtype in ("float64", "float32", "float16"):
        report = compare(side(dtype=dtype, transformer__h__0__attn__c_proj__weight=kernel.T), side(dtype=dtype))
        assert report.parameters.worst.name == "transformer.h.0.attn.c_proj.weight"
        assert not report.outputs.matches


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gelu_by_erf_for_gelu_by_tanh_is_caught_at_the_published_tolerance(dtype):
    report = compare(side(CONFIG.replace(activation_function="gelu"), dtype), side(dtype=dtype))
    assert report.parameters.identical
    assert report.config == (("activation_function", "gelu", "gelu_new"),)
    assert report.verdict == "mismatch"
    assert report.outputs.worst.ratio > 5
    first = next(each for each in report.outputs.differences if each.name == "hidden_states[0]")
    assert first.identical  # the embeddings have not met the activation yet


def test_errors_within_the_tolerance_are_a_match():
    a, b = side(), side()
    near = {key: value * (1 + 1e-12) for key, value in a.outputs.items()}
    report = compare(dataclasses.replace(a, outputs=near), b)
    assert report.verdict == "match"
    assert 0 < report.outputs.worst.ratio < 1


def test_a_tolerance_of_the_callers_holds_for_everything():
    a = side(**changed("transformer.wpe.weight", (2, 2), 1e-3))
    assert compare(a, side(), tolerance=1.0).verdict == "match"
    report = compare(a, side(), tolerance=1e-9)
    assert (report.verdict, report.bound) == ("mismatch", "given")
    assert {each.tolerance for part in report.sections.values() for each in part.differences} == {1e-9}


def test_models_of_unlike_shape_are_reported_whole_and_compared_where_they_can_be():
    config = CONFIG.replace(n_layer=1, tie_word_embeddings=False)
    head = np.zeros((37, 8))
    report = compare(side(config, lm_head__weight=head), side())
    assert report.verdict == "mismatch"
    assert report.parameters.only_in_a == ("lm_head.weight",)
    assert len(report.parameters.only_in_b) == 12
    assert all(name.startswith("transformer.h.1.") for name in report.parameters.only_in_b)
    assert report.outputs.only_in_b == ("past[1].key", "past[1].value", "hidden_states[2]", "attentions[1]")
    assert [name for name, _, _ in report.config] == ["n_layer", "tie_word_embeddings"]
    assert not report.parameters.complete
    assert not report.parameters.identical


def test_unlike_shapes_are_listed_with_both():
    wide = small_config(vocab_size=40)
    values = ordinary_parameters(wide, "lm")
    report = compare(side(wide, **{n.replace(".", "__"): v for n, v in values.items()}), side())
    assert report.parameters.misshaped == (("transformer.wte.weight", (40, 8), (37, 8)),)
    assert report.outputs.misshaped == (("logits", (2, 9, 40), (2, 9, 37)),)
    assert report.verdict == "mismatch"


def test_what_did_not_run_is_a_mismatch_and_no_empty_success():
    a, b = (dataclasses.replace(each, outputs={}) for each in (side(), side()))
    report = compare(a, b, notes=["why"])
    assert report.outputs is None
    assert report.parameters.identical
    assert (report.verdict, report.notes) == ("mismatch", ("why",))


def test_gradients_are_compared_where_both_have_them():
    slopes = ordinary_parameters(CONFIG, "lm", seed=1)
    other = {name: value.copy() for name, value in slopes.items()}
    other["transformer.wte.weight"][5, 5] += 1e-3
    report = compare(side(gradients=slopes), side(gradients=other))
    assert report.verdict == "mismatch"
    assert (report.gradients.worst.name, report.gradients.worst.where) == ("transformer.wte.weight", (5, 5))
    assert compare(side(gradients=slopes), side()).gradients is None
    missing = {name: value for name, value in slopes.items() if "wpe" not in name}
    assert compare(side(gradients=missing), side(gradients=slopes)).gradients.only_in_b == ("transformer.wpe.weight",)


def test_files_of_unlike_number_formats_are_compared_as_the_coarser_holds_them():
    values = ordinary_parameters(CONFIG, "lm")
    names = {name.replace(".", "__"): name for name in values}
    halves = {key: rounded(values[name], "bfloat16") for key, name in names.items()}
    fine = side(stored=dict.fromkeys(values, "float32"), dtype="float32")
    coarse = side(stored=dict.fromkeys(values, "bfloat16"), dtype="float32", **halves)
    for report in (compare(fine, coarse), compare(coarse, fine)):
        assert report.parameters.identical
        assert report.bound == "bfloat16"
        assert report.verdict == "match"
        assert any("unlike number formats" in note for note in report.notes)
    # A weight that is no rounding of the other is found all the same.
    halves["transformer__ln_f__bias"] = halves["transformer__ln_f__bias"] * 1.05
    wrong = side(stored=dict.fromkeys(values, "bfloat16"), dtype="float32", **halves)
    assert compare(fine, wrong).parameters.worst.name == "transformer.ln_f.bias"


def test_parameters_that_are_nan_on_both_sides_are_the_same_but_their_outputs_say_nothing():
    broken = changed("transformer.wpe.weight", (3, 3), math.nan)
    report = compare(side(**broken), side(**broken))
    assert report.parameters.matches
    assert report.verdict == "mismatch"
    assert report.outputs.worst.error == math.inf


# -- JSON ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["same", "changed", "gradients", "unlike", "infinite", "not run"])
def test_a_report_survives_json(kind):
    a, b = side(), side()
    if kind == "changed":
        a = side(**changed("transformer.wte.weight", (4, 4), 0.1))
    elif kind == "gradients":
        a, b = side(gradients=a.parameters), side(gradients=a.parameters)
    elif kind == "unlike":
        a = side(CONFIG.replace(n_layer=1))
    elif kind == "infinite":
        a = dataclasses.replace(a, outputs={**a.outputs, Key("loss"): np.array(np.inf)})
    elif kind == "not run":
        a, b = (dataclasses.replace(each, outputs={}) for each in (a, b))
    report = compare(a, b, read=(2, 9), notes=["a remark"])
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert Report.from_json(data) == report
    assert data["verdict"] == report.verdict
    assert data["parameters"]["differences"][0]["ratio"] in (0.0, "inf")


@pytest.mark.parametrize("broken", [{}, {"format": 2}, {"format": 1, "a": 3}, {"format": 1}])
def test_what_is_no_report_is_refused(broken):
    with pytest.raises(CheckpointFormatError):
        Report.from_json(broken)
