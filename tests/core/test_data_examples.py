"""Examples of tasks: what a row holds, what is learnt of it, what is cut, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.data import Batches, Examples, read_examples
from gpt2_core.errors import InputError
from gpt2_core.tokenizer import GPT2Tokenizer

END = 50256


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


def lines(folder: Path, *values: Any) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def only(examples: Examples, size: int = 30) -> Any:
    return next(Batches(examples, batch_size=len(examples), block_size=size, shuffle=False))


def test_the_prompt_is_read_and_the_response_is_learnt(tmp_path, tokenizer):
    path = lines(
        tmp_path, {"prompt": "What is red?\n", "response": "A rose."}, {"prompt": "", "response": "Nothing at all."}
    )
    batch = only(read_examples(path, "instruction", tokenizer))
    prompt, response, other = map(tokenizer.encode, ("What is red?\n", "A rose.", "Nothing at all."))
    first = [END, *prompt, *response, END]
    second = [END, *other, END]
    empty = len(first) - len(second)
    assert batch.input_ids.tolist() == [first, second + [END] * empty]
    assert batch.attention_mask.tolist() == [[1] * len(first), [1] * len(second) + [0] * empty]
    unlearnt = [-100] * (1 + len(prompt))
    assert batch.labels.tolist() == [[*unlearnt, *response, END], [-100, *other, END, *[-100] * empty]]
    assert batch.targets.tolist() == [[*row[1:], -100] for row in batch.labels.tolist()]


def test_a_long_pair_loses_the_beginning_of_its_prompt_and_then_the_end_of_its_response(tmp_path, tokenizer):
    path = lines(tmp_path, {"prompt": " a b c d", "response": " e f g h"})
    examples = read_examples(path, "instruction", tokenizer)
    prompt, response = tokenizer.encode(" a b c d"), tokenizer.encode(" e f g h")
    assert (examples.cut(10), examples.cut(9)) == (0, 1)
    assert only(examples, 10).input_ids.tolist() == [[END, *prompt, *response, END]]
    cut = only(examples, 8)
    assert cut.input_ids.tolist() == [[END, *prompt[2:], *response, END]]
    assert cut.labels.tolist() == [[-100] * 3 + [*response, END]]
    short = only(examples, 3)
    assert short.input_ids.tolist() == [[END, *response[:2]]]
    assert short.labels.tolist() == [[-100, *response[:2]]]


def test_a_class_is_read_at_the_end_of_the_text(tmp_path, tokenizer):
    path = lines(tmp_path, {"text": "good", "label": 2}, {"text": "not so good", "label": 0}, {"text": "", "label": 1})
    examples = read_examples(path, "classification", tokenizer)
    assert (examples.num_labels, examples.label_names) == (3, None)
    batch = only(examples)
    long = tokenizer.encode("not so good")
    assert batch.input_ids.tolist()[1] == [*long, END]
    assert batch.labels.tolist() == [2, 0, 1]
    assert batch.targets is None
    assert batch.attention_mask.sum(-1).tolist() == [2, 4, 1]
    assert only(examples, 3).input_ids.tolist()[1] == [*long[:2], END]


def test_classes_may_have_names_and_a_second_file_has_the_same_numbers(tmp_path, tokenizer):
    path = lines(tmp_path, {"text": "a", "label": "sad"}, {"text": "b", "label": "glad"})
    examples = read_examples(path, "classification", tokenizer)
    assert (examples.label_names, examples.num_labels) == (("glad", "sad"), 2)
    assert only(examples).labels.tolist() == [1, 0]
    other = lines(tmp_path, {"text": "a", "label": "sad"})
    assert only(read_examples(other, "classification", tokenizer, label_names=("glad", "sad"))).labels.tolist() == [1]
    with pytest.raises(InputError, match=r"has the label 'sad', expected one of 'glad', 'saad'; .*did you mean 'saad'"):
        read_examples(other, "classification", tokenizer, label_names=("glad", "saad"))


def test_of_the_candidates_the_right_one_is_learnt_and_all_are_scored(tmp_path, tokenizer):
    path = lines(
        tmp_path,
        {"context": ["Hello.", "Who is there?"], "candidates": ["\nI am.", "\nIt rains a lot."], "label": 0},
        {"context": "Bye.", "candidates": ["\nOn.", "\nGo."], "label": 1},
    )
    batch = only(read_examples(path, "double_heads", tokenizer))
    context = tokenizer.encode("Hello.\nWho is there?")
    rows = [[END, *context, *tokenizer.encode(each), END] for each in ("\nI am.", "\nIt rains a lot.")]
    assert batch.input_ids.shape[:2] == (2, 2)
    for choice, row in enumerate(rows):
        assert batch.input_ids[0, choice, : len(row)].tolist() == row
        assert batch.mc_token_ids[0, choice] == len(row) - 1
        assert batch.attention_mask[0, choice].sum() == len(row)
    begin = 1 + len(context)
    assert batch.labels[0, 0, : len(rows[0])].tolist() == [-100] * begin + rows[0][begin:]
    assert (batch.labels[0, 1] == -100).all()
    assert (batch.labels[1, 0] == -100).all()
    assert (batch.labels[1, 1] != -100).sum() == 1 + len(tokenizer.encode("\nGo."))
    assert batch.targets[..., :-1].tolist() == batch.labels[..., 1:].tolist()
    assert batch.mc_labels.tolist() == [0, 1]
    assert set(batch.inputs()) == {"input_ids", "labels", "attention_mask", "mc_token_ids", "mc_labels"}


def test_a_long_choice_keeps_its_last_token(tmp_path, tokenizer):
    path = lines(tmp_path, {"context": " a b c", "candidates": [" d e f g", " h"], "label": 0})
    examples = read_examples(path, "double_heads", tokenizer)
    context, one, other = map(tokenizer.encode, (" a b c", " d e f g", " h"))
    batch = only(examples, 4)
    assert batch.input_ids.tolist() == [[[END, *one[:2], END], [END, context[-1], *other, END]]]
    assert batch.mc_token_ids.tolist() == [[3, 3]]


def test_the_models_take_such_batches(tmp_path, tokenizer):
    """The reference runs on each kind, so names and shapes are the models'."""
    from gpt2_core.config import GPT2Config
    from gpt2_core.initialization import initial_values
    from gpt2_core.reference import ReferenceModel

    config = GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=30, num_labels=3)
    for task, head, line in (
        ("instruction", "lm", {"prompt": "a", "response": "b"}),
        ("classification", "sequence", {"text": "a", "label": 1}),
        ("double_heads", "double", {"context": "a", "candidates": ["b", "c d"], "label": 1}),
    ):
        batch = only(read_examples(lines(tmp_path, line), task, tokenizer))
        model = ReferenceModel(config, initial_values(config, head), head)
        assert np.isfinite(model(**batch.inputs()).loss)


def test_examples_are_split_in_two_that_share_none(tmp_path, tokenizer):
    path = lines(tmp_path, *({"prompt": f"{i}", "response": f"{i}"} for i in range(20)))
    train, val = read_examples(path, "instruction", tokenizer).split(0.25, seed=3)
    assert (len(train), len(val)) == (15, 5)
    rows = [{tuple(row) for row in only(part).input_ids.tolist()} for part in (train, val)]
    assert len(rows[0] | rows[1]) == 20
    assert train.fingerprint != val.fingerprint
    with pytest.raises(InputError, match="val_fraction is 1"):
        train.split(1)


def test_a_position_in_examples_is_resumed(tmp_path, tokenizer):
    path = lines(tmp_path, *({"prompt": f"{i}", "response": f"{i}"} for i in range(7)))
    examples = read_examples(path, "instruction", tokenizer)
    one = Batches(examples, batch_size=2, block_size=9, seed=1)
    next(one)
    state = one.state()
    other = Batches(examples, batch_size=2, block_size=9, seed=1)
    other.restore(state)
    for _ in range(8):
        assert next(one).input_ids.tolist() == next(other).input_ids.tolist()
    assert state["mode"] == "examples"


@pytest.mark.parametrize(
    ("task", "line", "words"),
    [
        (
            "instruction",
            {"promt": "a", "response": "b"},
            r"line 1 has no 'prompt' but 'promt', 'response'; .*; did you mean",
        ),
        ("instruction", {"prompt": 3, "response": "b"}, "'prompt' is int, expected a string"),
        ("instruction", {"prompt": "a", "response": ""}, "'response' is empty"),
        ("instruction", [1], "line 1 is list, expected a JSON object"),
        ("classification", {"text": "a", "label": 1.5}, r"'label' is 1\.5, expected a whole number from 0 or a string"),
        ("classification", {"text": "a", "label": -1}, "'label' is -1"),
        ("double_heads", {"context": "a", "candidates": ["b"], "label": 0}, "is 1, expected a list of two or more"),
        ("double_heads", {"context": "a", "candidates": ["b", "c"], "label": 2}, "from 0 to 1"),
        ("double_heads", {"context": [1], "candidates": ["b", "c"], "label": 1}, "'context' is int"),
        ("instructions", {}, "task is 'instructions', expected .*did you mean 'instruction'"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, tokenizer, task, line, words):
    with pytest.raises(InputError, match=words):
        read_examples(lines(tmp_path, line), task, tokenizer)


def test_files_that_hold_no_examples_are_refused(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_examples(path, "instruction", tokenizer)
    path.write_text("\n\n")
    with pytest.raises(InputError, match="no examples"):
        read_examples(path, "instruction", tokenizer)
    path.write_text('\n{"prompt": ')
    with pytest.raises(InputError, match="line 2 is no JSON"):
        read_examples(path, "instruction", tokenizer)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="not UTF-8"):
        read_examples(path, "instruction", tokenizer)


def test_other_names_of_keys_can_be_given(tmp_path, tokenizer):
    path = lines(tmp_path, {"instruction": "a", "output": "b"})
    examples = read_examples(path, "instruction", tokenizer, keys={"prompt": "instruction", "response": "output"})
    assert len(examples) == 1
    with pytest.raises(InputError, match="keys has 'answer', expected some of prompt, response"):
        read_examples(path, "instruction", tokenizer, keys={"answer": "output"})
