"""Bad input is refused in the same words, whichever framework is asked."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.errors import GenerationError, Gpt2Error, InputError
from models import random_ids, random_parameters, small_config

IDS = random_ids(small_config(), 2, 5) % 10
IDS[0, 0] = 9
CHOICES = random_ids(small_config(), 2, 2, 5) % 10
ONE = np.ones((2, 5), np.int64)


def a_past(layers=2, rows=2, heads=2, length=5, width=4):
    return tuple((np.ones((rows, heads, length, width)),) * 2 for _ in range(layers))


#: head, inputs in numpy, and what the error says.
WRONG = {
    "nothing": ("lm", {}, "got neither of input_ids and inputs_embeds; give exactly one"),
    "both": ("lm", {"input_ids": IDS, "inputs_embeds": np.ones((2, 5, 8))}, "got both of input_ids and inputs_embeds"),
    "one axis": ("lm", {"input_ids": IDS[0]}, "input_ids has shape (5,), expected 2 axes: (batch, position)"),
    "embeds": ("none", {"inputs_embeds": np.ones((2, 5, 9))}, "inputs_embeds has shape (2, 5, 9), expected (2, 5, 8)"),
    "empty": ("lm", {"input_ids": IDS[:, :0]}, "the input is empty: its shape is (2, 0)"),
    "no rows": ("lm", {"input_ids": IDS[:0]}, "the input is empty: its shape is (0, 5)"),
    "too long": ("lm", {"input_ids": np.zeros((1, 17), np.int64)}, "17 tokens long but this model has 16 positions"),
    "long past": (
        "lm",
        {"input_ids": IDS, "past": a_past(length=12)},
        "is 17 tokens long (12 from past) but this model has 16",
    ),
    "high id": ("lm", {"input_ids": IDS + 30}, "input_ids holds 39, expected ids from 0 to 36; use the tokenizer"),
    "low id": ("lm", {"input_ids": IDS - 9}, "expected ids from 0 to 36; use the tokenizer"),
    "kind of id": ("lm", {"input_ids": IDS.astype(np.uint8)}, "input_ids has dtype uint8, expected int64 or int32"),
    "position": (
        "lm",
        {"input_ids": IDS, "position_ids": ONE * 16},
        "position_ids holds 16, expected ids from 0 to 15",
    ),
    "positions": (
        "lm",
        {"input_ids": IDS, "position_ids": ONE[:, :4]},
        "position_ids has shape (2, 4), expected (2, 5)",
    ),
    "types": ("lm", {"input_ids": IDS, "token_type_ids": ONE[:1]}, "token_type_ids has shape (1, 5), expected (2, 5)"),
    "mask": (
        "lm",
        {"input_ids": IDS, "attention_mask": ONE[:, :4]},
        "attention_mask has shape (2, 4), expected (2, 5)",
    ),
    "mask and past": (
        "lm",
        {"input_ids": IDS[:, :1], "past": a_past(), "attention_mask": ONE},
        "expected (2, 6): one number for each of the 5 cached and 1 new",
    ),
    "heads": ("lm", {"input_ids": IDS, "head_mask": np.ones(3)}, "head_mask has shape (3,), expected (2,), (2, 2) or"),
    "head layers": ("lm", {"input_ids": IDS, "head_mask": np.ones((3, 2))}, "head_mask has shape (3, 2), expected"),
    "two pasts": (
        "lm",
        {"input_ids": IDS, "past": a_past(), "past_key_values": a_past()},
        "got both past and past_key_values",
    ),
    "layers of past": ("lm", {"input_ids": IDS, "past": a_past(1)}, "past has 1 layers, expected 2: pass back what"),
    "rows of past": (
        "lm",
        {"input_ids": IDS, "past": a_past(rows=3)},
        "past[0] has shape (3, 2, 5, 4), expected (2, 2",
    ),
    "width of past": ("lm", {"input_ids": IDS, "past": a_past(width=3)}, "past[0] has shape (2, 2, 5, 3), expected"),
    "no past": ("lm", {"input_ids": IDS, "past": 5}, "past is a int, expected 2 pairs (key, value)"),
    "labels": ("lm", {"input_ids": IDS, "labels": IDS[:, :4]}, "labels has shape (2, 4), expected (2, 5)"),
    "high label": ("lm", {"input_ids": IDS, "labels": IDS + 30}, "labels holds 39, expected ids from 0 to 36; mark"),
    "low label": ("lm", {"input_ids": IDS, "labels": IDS - 12}, "expected ids from 0 to 36; mark positions"),
    "kind of label": ("lm", {"input_ids": IDS, "labels": ONE * 0.5}, "expected whole numbers"),
    "no choices": ("double", {"input_ids": IDS}, "input_ids has shape (2, 5), expected 3 axes: (batch, choice, pos"),
    "choice": (
        "double",
        {"input_ids": CHOICES, "mc_token_ids": np.full((2, 2), 5)},
        "mc_token_ids holds 5, expected ids from 0 to 4; mc_token_ids are positions",
    ),
    "choices": (
        "double",
        {"input_ids": CHOICES, "mc_token_ids": np.zeros(2, np.int64)},
        "mc_token_ids has shape (2,), expected",
    ),
    "right choice": (
        "double",
        {"input_ids": CHOICES, "mc_labels": np.array([0, 2])},
        "mc_labels holds 2, expected ids",
    ),
    "right choices": (
        "double",
        {"input_ids": CHOICES, "mc_labels": ONE[:, :2]},
        "mc_labels has shape (2, 2), expected",
    ),
    "two labels": (
        "double",
        {"input_ids": CHOICES, "labels": CHOICES, "lm_labels": CHOICES},
        "got both labels and lm_labels",
    ),
    "class": ("sequence", {"input_ids": IDS, "labels": np.array([0, 7])}, "labels holds 7, expected ids from 0 to 1"),
    "classes": ("sequence", {"input_ids": IDS, "labels": ONE[0]}, "labels has shape (5,), expected (2,)"),
    "grades": ("sequence", {"input_ids": IDS, "labels": np.ones((2, 3))}, "labels has shape (2, 3), expected (2, 2)"),
    "token class": ("token", {"input_ids": IDS, "labels": IDS}, "labels holds 9, expected ids from 0 to 1"),
    "token classes": ("token", {"input_ids": IDS, "labels": IDS[0]}, "labels has shape (5,), expected (2, 5)"),
    "one end": (
        "qa",
        {"input_ids": IDS, "start_positions": ONE[:, 0]},
        "only one of start_positions and end_positions",
    ),
    "ends": (
        "qa",
        {"input_ids": IDS, "start_positions": ONE[0], "end_positions": ONE[0]},
        "start_positions has shape (5,), expected (2,)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_every_framework_refuses_wrong_input_in_these_words(framework, name):
    head, inputs, words = WRONG[name]
    config = small_config()
    model = framework.build(config, head, random_parameters(config, head))
    inputs = {
        key: framework.past(model, value) if key.startswith("past") and isinstance(value, tuple) else value
        for key, value in inputs.items()
    }
    with pytest.raises(InputError) as caught:
        framework.run(model, **inputs)
    assert words in str(caught.value)


#: settings of generate, prompt, and what the error says.
WRONG_TEXT = {
    "setting": ({"max_new_token": 3}, IDS, "did you mean 'max_new_tokens'"),
    "range": ({"top_p": 1.5}, IDS, "top_p"),
    "room": ({"max_new_tokens": 12}, IDS, "at most max_new_tokens=11"),
    "empty": ({}, IDS[:, :0], "the input is empty"),
    "ids": ({}, IDS + 30, "input_ids holds 39, expected ids from 0 to 36"),
    "banned": ({"suppress_tokens": list(range(37)), "max_new_tokens": 2}, IDS, "ban"),
}


@pytest.mark.parametrize("name", WRONG_TEXT)
def test_every_framework_refuses_to_generate_in_these_words(framework, name):
    settings, ids, words = WRONG_TEXT[name]
    config = small_config()
    model = framework.build(config, "lm", random_parameters(config, "lm"))
    with pytest.raises((GenerationError, InputError)) as caught:
        model.generate(ids, **settings)
    assert words in str(caught.value)


def test_logits_that_are_no_numbers_are_said_to_be(framework):
    config = small_config()
    values = random_parameters(config, "lm")
    values["transformer.ln_f.bias"][0] = np.nan
    with pytest.raises(GenerationError, match="nan"):
        framework.build(config, "lm", values).generate(IDS, max_new_tokens=2)


def test_a_file_that_does_not_fit_is_refused_in_the_same_words(framework, tmp_path):
    config = small_config()
    model = framework.build(config, "lm", random_parameters(config, "lm"))
    model.save_pretrained(tmp_path)
    said = set()
    with pytest.raises(Gpt2Error) as caught:
        type(model).from_pretrained(tmp_path, config=config.replace(n_layer=3))
    said.add(str(caught.value).replace(str(tmp_path), ""))
    assert "transformer.h.2.attn.c_attn.weight" in said.pop()
