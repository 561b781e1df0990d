"""Checks on input: each says what was got, what was expected, and what to do."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core import inputs
from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError

CONFIG = GPT2Config(vocab_size=10, n_positions=8, n_embd=4, n_layer=2, n_head=2)


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: inputs.check_one_input(None, None), ["neither", "input_ids", "inputs_embeds"]),
        (lambda: inputs.check_one_input(1, 1), ["both", "exactly one"]),
        (lambda: inputs.check_one_past(1, 1), ["both past and past_key_values"]),
        (lambda: inputs.check_rank("input_ids", (3,), "(batch, position)", 2), ["(3,)", "2 axes", "(batch, position)"]),
        (lambda: inputs.check_not_empty((1, 0)), ["empty", "(1, 0)", "end-of-text"]),
        (lambda: inputs.check_length(CONFIG, 9, 0), ["9 tokens long but", "8 positions", "shorten"]),
        (lambda: inputs.check_length(CONFIG, 1, 8), ["9 tokens long (8 from past)", "8 positions"]),
        (lambda: inputs.check_mask((2, 3), 2, 3, 1), ["(2, 3)", "(2, 4)", "1 cached and 3 new"]),
        (lambda: inputs.check_past(CONFIG, 3), ["3 layers", "expected 2"]),
        (lambda: inputs.check_past_shape(1, (1, 2), (1, 2, 3, 2)), ["past[1]", "(1, 2)", "(1, 2, 3, 2)"]),
        (lambda: inputs.check_labels_shape("labels", (2,), (2, 3)), ["labels", "(2,)", "(2, 3)"]),
        (lambda: inputs.check_ids("input_ids", [[-1, 3]], 10, "do this"), ["-1", "0 to 9", "do this"]),
        (lambda: inputs.check_ids("input_ids", [[3, 10]], 10, "do this"), ["holds 10", "0 to 9"]),
        (lambda: inputs.check_ids("input_ids", [[0.5]], 10, ""), ["float64", "whole numbers"]),
        (lambda: inputs.check_ids("input_ids", [[True]], 10, ""), ["bool", "whole numbers"]),
        (lambda: inputs.check_both_positions([1], None), ["only one of start_positions and end_positions"]),
    ],
)
def test_a_wrong_input_is_described(check, words):
    with pytest.raises(InputError) as caught:
        check()
    for word in words:
        assert word in str(caught.value)


def test_right_inputs_pass():
    inputs.check_one_input(1, None)
    inputs.check_rank("input_ids", (1, 2), "(batch, position)", 2)
    inputs.check_not_empty((1, 1))
    inputs.check_length(CONFIG, 8, 0)
    inputs.check_length(CONFIG, 1, 7)
    inputs.check_mask((2, 4), 2, 3, 1)
    inputs.check_past(CONFIG, 2)
    inputs.check_past_shape(0, (1, 2, 3, 2), (1, 2, 3, 2))
    inputs.check_both_positions(None, None)
    assert inputs.check_one_past(None, "new name") == "new name"
    assert inputs.check_one_past("old name", None) == "old name"


def test_ids_of_any_whole_type_become_int64():
    ids = inputs.check_ids("input_ids", np.array([[0, 9]], np.uint8), 10, "")
    assert ids.dtype == np.int64
    assert ids.tolist() == [[0, 9]]


def test_the_messages_built_for_others_name_what_was_got():
    assert "holds -3" in str(inputs.out_of_range("x", -3, 20, 10, "remedy"))
    assert "holds 20" in str(inputs.out_of_range("x", 0, 20, 10, "remedy"))
    assert "past is a str, expected 2 pairs" in str(inputs.unreadable_past(CONFIG, "str"))
    assert "(3,), expected (2,), (2, 2) or (2, batch" in str(inputs.bad_head_mask(CONFIG, (3,)))
