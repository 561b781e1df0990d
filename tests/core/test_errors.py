"""The exception tree: what a caller can catch, and what the messages say."""

from __future__ import annotations

import inspect

import pytest

from gpt2_core import errors
from gpt2_core.errors import CheckpointMismatchError, Gpt2Error, nearest

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


def test_every_error_is_caught_by_the_root():
    assert len(ALL) >= 10
    assert all(issubclass(kind, Gpt2Error) for kind in ALL)


@pytest.mark.parametrize("kind", ["ConfigError", "InputError", "TokenizerError", "GenerationError", "CheckpointError"])
def test_wrong_values_are_also_value_errors_for_those_who_do_not_know_the_tree(kind):
    assert issubclass(getattr(errors, kind), ValueError)


def test_a_name_that_cannot_be_resolved_is_also_an_os_error():
    assert issubclass(errors.HubError, OSError)


def test_the_tree_drawn_in_the_docstring_is_the_tree():
    drawn = errors.__doc__ or ""
    assert all(kind.__name__ in drawn for kind in ALL)


def test_a_mismatch_reports_everything_together_and_keeps_it():
    error = CheckpointMismatchError("a.safetensors", ["wte.weight"], ["extra"], [("ln_f.bias", (3,), (4,))], "do this")
    text = str(error)
    assert error.missing == ("wte.weight",)
    assert error.unexpected == ("extra",)
    assert error.misshaped == (("ln_f.bias", (3,), (4,)),)
    for part in ("a.safetensors", "missing (1)", "wte.weight", "unexpected (1)", "extra", "(3,) in the file", "(4,)"):
        assert part in text
    assert text.endswith("remedy: do this")


def test_a_mismatch_leaves_out_what_there_is_none_of_and_cuts_long_lists():
    text = str(CheckpointMismatchError("x", [f"name{i}" for i in range(50)]))
    assert "unexpected" not in text
    assert "misshaped" not in text
    assert "name19" in text
    assert "name20" not in text
    assert "and 30 more" in text


def test_a_misspelt_name_gets_a_hint_and_a_wild_one_does_not():
    assert nearest("temprature", ["temperature", "top_k"]) == "; did you mean 'temperature'?"
    assert nearest("zebra", ["temperature", "top_k"]) == ""
