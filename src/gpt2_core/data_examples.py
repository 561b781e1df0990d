"""Examples of tasks, one JSON object a line, as rows for `Batches`: instruction pairs, classes, next utterances.

    task            a line has                          a row is                          learnt
    instruction     "prompt", "response"                <end> prompt response <end>       response <end>
    classification  "text", "label"                     text <end>                        the class
    double_heads    "context", "candidates", "label"    for each candidate                the right one's tokens,
                                                        <end> context candidate <end>     and which is right

<end> is the tokenizer's end-of-text token. Prompt and response are tokenised each by itself and joined as they are: put
a space or a line feed between them into one of the two. A context may be a list of turns, which line feeds join. A
label is a number from 0 or, for classes, any string; of the candidates it is the place of the right one.

A row that is too long loses the beginning of its prompt or context, then the end of what is learnt. The class is read
at the last token, <end>, which stays.

Source: Radford et al. 2018, section 3.3 (the last token is the one a class is read from); Wolf et al. 2019,
"TransferTransfo", section 4 (next utterance among distractors, the language model on the right one alone).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.data_batches import IGNORED, Batch, Ids
from gpt2_core.data_order import Order
from gpt2_core.errors import InputError, TokenizerError, nearest

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer

INSTRUCTION, CLASSIFICATION, DOUBLE_HEADS = "instruction", "classification", "double_heads"
TASKS: Mapping[str, tuple[str, ...]] = {
    INSTRUCTION: ("prompt", "response"),
    CLASSIFICATION: ("text", "label"),
    DOUBLE_HEADS: ("context", "candidates", "label"),
}


@dataclass(frozen=True)
class Examples:
    """Tokenised examples of one task; `Batches` takes them in the place of `TokenData`.

    Attributes:
        source, task: for messages, and what the rows are for.
        choices: sequences of each example: 1, or the number of candidates.
        labels: the class or the right candidate of each example, (E,); None for instruction pairs.
        label_names: the classes by number, where the file has names; else None.
        num_labels: how many classes there are; 0 for other tasks.
        vocab_size: of the tokenizer.
        fingerprint: others for other examples.
    """

    source: str
    task: str
    choices: int
    labels: Ids | None
    label_names: tuple[str, ...] | None
    num_labels: int
    vocab_size: int
    fingerprint: str
    _tokens: NDArray[np.int32]  # all sequences one after the other
    _ends: Ids  # where each sequence ends among them, (sequences + 1,), the first is 0
    _begins: Ids  # how many tokens of each sequence are read only
    _chosen: Ids  # the examples that are meant, (E,)

    def __len__(self) -> int:
        return len(self._chosen)

    def rows(self, block_size: int) -> ExampleRows:
        """The rows for batches of at most ``block_size`` tokens."""
        return ExampleRows(self, block_size)

    def cut(self, block_size: int) -> int:
        """How many examples are longer than ``block_size`` and lose tokens."""
        lengths = np.diff(self._ends).reshape(-1, self.choices)[self._chosen]
        return int((lengths > block_size).any(axis=1).sum())

    def split(self, val_fraction: float, seed: int = 0) -> tuple[Examples, Examples]:
        """Two disjoint parts, the second of about this share and at least one example; the seed decides.

        Raises: InputError, where one of them would be empty.
        """
        if not 0 < val_fraction < 1:
            raise InputError(f"val_fraction is {val_fraction!r}, expected a share between 0 and 1")
        if len(self) < 2:
            raise InputError(f"{self.source} has {len(self)} example, which cannot be split; give it more")
        count = min(max(round(val_fraction * len(self)), 1), len(self) - 1)
        order = Order(len(self), seed, 0)(np.arange(len(self)))
        parts = (np.sort(order[count:]), np.sort(order[:count]))
        train, val = (
            replace(self, _chosen=self._chosen[part], fingerprint=f"{self.fingerprint}:{name}:{val_fraction}:{seed}")
            for part, name in zip(parts, ("train", "val"), strict=True)
        )
        return train, val


class ExampleRows:
    """The rows of `Examples`, cut to ``block_size`` tokens."""

    def __init__(self, examples: Examples, block_size: int) -> None:
        if block_size < 2:
            raise InputError(f"block_size is {block_size}, expected at least 2 for examples of tasks")
        self.fingerprint = examples.fingerprint
        self._of, self._block = examples, block_size

    def __len__(self) -> int:
        return len(self._of)

    def _sequences(self, numbers: Ids) -> Ids:
        """The sequences of these examples: (B, choices)."""
        choices = self._of.choices
        return self._of._chosen[numbers][:, None] * choices + np.arange(choices)

    def lengths(self, numbers: Ids) -> Ids | None:
        """The tokens of each row, of its longest choice: (B,)."""
        at = self._sequences(numbers)
        longest: Ids = (self._of._ends[at + 1] - self._of._ends[at]).max(axis=1)
        return np.minimum(longest, self._block)

    def batch(self, numbers: Ids, epochs: Ids, width: int) -> Batch:
        """The rows with these numbers, filled up to ``width``; they are the same in every epoch."""
        at = self._sequences(numbers)
        B, N = at.shape
        examples = self._of
        right = None if examples.labels is None else examples.labels[examples._chosen[numbers]]
        ids = np.full((B, N, width), int(examples._tokens[-1]), np.int64)  # the last of all is <end>
        learnt = np.full((B, N, width + 1), IGNORED, np.int64)
        mask = np.zeros((B, N, width), np.int64)
        for row, choice in np.ndindex(B, N):
            tokens, begin = self._cut(int(at[row, choice]))
            ids[row, choice, : len(tokens)] = tokens
            mask[row, choice, : len(tokens)] = 1
            if examples.task == INSTRUCTION or (right is not None and right[row] == choice):
                learnt[row, choice, begin : len(tokens)] = tokens[begin:]
        labels, targets = learnt[..., :-1], learnt[..., 1:]
        if examples.task == INSTRUCTION:
            return Batch(ids[:, 0], labels[:, 0], targets[:, 0], mask[:, 0])
        assert right is not None
        if examples.task == CLASSIFICATION:
            return Batch(ids[:, 0], right, None, mask[:, 0])
        return Batch(ids, labels, targets, mask, mask.sum(-1) - 1, right)

    def _cut(self, sequence: int) -> tuple[NDArray[np.int32], int]:
        """The tokens of a sequence, cut where it is too long, and how many of them are read only."""
        start, end = self._of._ends[sequence], self._of._ends[sequence + 1]
        tokens, begin = self._of._tokens[start:end], int(self._of._begins[sequence])
        over = len(tokens) - self._block
        if over <= 0:
            return tokens, begin
        of_prompt = min(over, max(begin - 1, 0))  # its first token, <end>, stays
        tokens = np.concatenate((tokens[: min(1, begin)], tokens[min(1, begin) + of_prompt :]))
        if len(tokens) > self._block:
            last = tokens[-1:] if self._of.task != INSTRUCTION else tokens[:0]
            tokens = np.concatenate((tokens[: self._block - len(last)], last))
        return tokens, begin - of_prompt


# ---- reading ---------------------------------------------------------------------------------------------------


def read_examples(
    path: str | os.PathLike[str],
    task: str,
    tokenizer: GPT2Tokenizer,
    *,
    keys: Mapping[str, str] | None = None,
    label_names: Sequence[str] | None = None,
) -> Examples:
    """The examples of a file with one JSON object a line.

    task: "instruction", "classification" or "double_heads"; what a line has for each stands above.
    keys: where the file calls a thing otherwise, as in ``{"response": "output"}``.
    label_names: the classes in the order of their numbers, so that a second file has the same numbers; by default those
        that the file has, sorted.

    Raises: InputError naming the line, what is wrong with it and what was expected; TokenizerError for a tokenizer
    without an end-of-text token.
    """
    if task not in TASKS:
        raise InputError(f"task is {task!r}, expected {', '.join(TASKS)}{nearest(str(task), list(TASKS))}")
    end = tokenizer.eos_token_id
    if end is None:
        raise TokenizerError('the tokenizer has no end-of-text token; set one: tokenizer.eos_token = "<|endoftext|>"')
    named = {name: (keys or {}).get(name, name) for name in TASKS[task]}
    for name in keys or {}:
        if name not in named:
            raise InputError(f"keys has {name!r}, expected some of {', '.join(named)}{nearest(name, list(named))}")
    lines = list(json_lines(path, named.values()))
    if not lines:
        raise InputError(f"{path} has no examples; expected one JSON object a line with {', '.join(named.values())}")
    read = {INSTRUCTION: _pairs, CLASSIFICATION: _texts, DOUBLE_HEADS: _candidates}[task]
    before, after, labels = read(str(path), named, lines)
    names: tuple[str, ...] | None = None
    if task == CLASSIFICATION:
        labels, names = _classes(str(path), labels, label_names)
    choices = len(after) // len(lines)
    tokens, ends, begins = _tokenised(tokenizer, before, after, end)
    numbers = None if labels is None else np.array(labels, np.int64)
    count = 0
    if numbers is not None and task == CLASSIFICATION:
        count = len(names) if names is not None else int(numbers.max()) + 1
    return Examples(
        str(path), task, choices, numbers, names, count, len(tokenizer), _fingerprint(task, tokens, ends, numbers),
        tokens, ends, begins, np.arange(len(lines)),
    )  # fmt: skip


def json_lines(path: str | os.PathLike[str], keys: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one JSON value a line, each with its line's number from 1; empty lines do not count.

    Raises: InputError for a file that cannot be read, a line that is no JSON object, and one without one of ``keys``.
    """
    wanted = list(keys)
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json_object(str(path), number, line, wanted)
    except UnicodeDecodeError as cause:
        raise InputError(f"{path} is not UTF-8 ({cause}); convert it first, for example with iconv") from cause
    except OSError as cause:
        raise InputError(
            f"{path} cannot be read: {cause.strerror}; give a file with one JSON object a line that has "
            f"{', '.join(wanted)}"
        ) from cause


def json_object(path: str, number: int, line: str, keys: Sequence[str]) -> dict[str, Any]:
    """The object of one line, which must have all of ``keys``. Raises: InputError naming the line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as cause:
        raise InputError(
            f'{path}, line {number} is no JSON ({cause}); expected one JSON object a line, as in {{"{keys[0]}": ...}}'
        ) from cause
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {number} is {type(value).__name__}, expected a JSON object with {keys[0]!r}")
    for key in keys:
        if key not in value:
            raise InputError(
                f"{path}, line {number} has no {key!r} but {', '.join(map(repr, list(value)[:9])) or 'nothing'}; "
                f"name the key that the file uses, or add it{nearest(key, list(value))}"
            )
    return value


Lines = Sequence[tuple[int, Mapping[str, Any]]]
# What is read only (None: nothing, not even <end>), what follows it, and the labels.
Parts = tuple[list[str] | None, list[str], list[Any] | None]


def _string(path: str, number: int, name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise InputError(f"{path}, line {number}: {name!r} is {type(value).__name__}, expected a string")


def _pairs(path: str, named: Mapping[str, str], lines: Lines) -> Parts:
    prompt, response = (
        [_string(path, number, named[name], line[named[name]]) for number, line in lines]
        for name in ("prompt", "response")
    )
    for (number, _), text in zip(lines, response, strict=True):
        if not text:
            raise InputError(
                f"{path}, line {number}: {named['response']!r} is empty; there is nothing to learn from it"
            )
    return prompt, response, None


def _texts(path: str, named: Mapping[str, str], lines: Lines) -> Parts:
    texts = [_string(path, number, named["text"], line[named["text"]]) for number, line in lines]
    labels = [line[named["label"]] for _, line in lines]
    for (number, _), label in zip(lines, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, (int, str)) or (isinstance(label, int) and label < 0):
            raise InputError(
                f"{path}, line {number}: {named['label']!r} is {label!r}, expected a whole number from 0 or a string"
            )
    return None, texts, labels


def _candidates(path: str, named: Mapping[str, str], lines: Lines) -> Parts:
    contexts, candidates, labels = [], [], []
    count = 0
    for number, line in lines:
        context, several, label = (line[named[name]] for name in TASKS[DOUBLE_HEADS])
        turns = context if isinstance(context, list) else [context]
        if not isinstance(several, list) or len(several) < 2 or (count and len(several) != count):
            got = len(several) if isinstance(several, list) else type(several).__name__
            raise InputError(
                f"{path}, line {number}: {named['candidates']!r} is {got}, expected a list of "
                f"{count or 'two or more'} strings, as many on every line"
            )
        count = len(several)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
            raise InputError(
                f"{path}, line {number}: {named['label']!r} is {label!r}, expected the place of the right candidate, "
                f"from 0 to {count - 1}"
            )
        joined = "\n".join(_string(path, number, named["context"], turn) for turn in turns)
        contexts += [joined] * count
        candidates += [_string(path, number, named["candidates"], each) for each in several]
        labels.append(label)
    return contexts, candidates, labels


def _classes(
    path: str, labels: list[Any] | None, label_names: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...] | None]:
    """The classes as numbers, and their names where they have some."""
    given = labels or []
    if all(isinstance(label, int) for label in given):
        if label_names is not None and max(given) >= len(label_names):
            raise InputError(f"{path} has the label {max(given)}, expected one below {len(label_names)} (label_names)")
        return list(given), None if label_names is None else tuple(label_names)
    names = tuple(label_names) if label_names is not None else tuple(sorted({str(label) for label in given}))
    place = {name: number for number, name in enumerate(names)}
    for label in given:
        if str(label) not in place:
            raise InputError(
                f"{path} has the label {label!r}, expected one of {', '.join(map(repr, names))}; give all classes as "
                f"label_names{nearest(str(label), names)}"
            )
    return [place[str(label)] for label in given], names


def _tokenised(
    tokenizer: GPT2Tokenizer, before: list[str] | None, after: list[str], end: int
) -> tuple[NDArray[np.int32], Ids, Ids]:
    """All sequences one after the other, where each ends, and how many tokens of each are read only."""
    learnt = tokenizer.encode_batch(after)
    read: list[list[int]] = (
        [[]] * len(after) if before is None else [[end, *ids] for ids in tokenizer.encode_batch(before)]
    )
    begins = np.array([len(ids) for ids in read], np.int64)
    sizes = begins + np.array([len(ids) + 1 for ids in learnt], np.int64)
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    tokens = np.empty(int(ends[-1]), np.int32)
    for i, (some, more) in enumerate(zip(read, learnt, strict=True)):
        tokens[ends[i] : ends[i + 1]] = [*some, *more, end]
    return tokens, ends, begins


def _fingerprint(task: str, tokens: NDArray[np.int32], ends: Ids, labels: Ids | None) -> str:
    import hashlib

    digest = hashlib.sha256(task.encode())
    for array in (tokens, ends, labels):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
