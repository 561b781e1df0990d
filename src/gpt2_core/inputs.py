"""Checks on what goes into a model, worded once: frameworks pass in shapes and numbers, never tensors.

A size that is not known yet, as while a graph is traced, is None in a shape: it fits everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError

# Labels that the loss skips: the field's -100, and -1 as version 2 of its library wrote it.
IGNORED_LABELS = (-100, -1)


Shape = Sequence["int | None"]


def _fits(got: Shape, expected: Shape) -> bool:
    """Whether two shapes can be one, as far as they are known."""
    return len(got) == len(expected) and all(
        None in (one, other) or one == other for one, other in zip(got, expected, strict=True)
    )


def check_tensor(name: str, value: Any, good: bool, expected: str) -> None:
    """``value`` must be what the framework computes with; ``expected`` says what that is and how to get it.

    Raises: InputError.
    """
    if not good:
        raise InputError(f"{name} is a {type(value).__name__}, expected {expected}")


def check_whole_numbers(name: str, dtype: str, *, index: bool = False) -> None:
    """``dtype`` must be one of whole numbers; with ``index`` one that looks up rows.

    Raises: InputError.
    """
    if index and dtype not in ("int32", "int64"):
        raise InputError(f"{name} has dtype {dtype}, expected int64 or int32: whole numbers")
    if "float" in dtype:
        raise InputError(f"{name} has dtype {dtype}, expected whole numbers")


def check_one_input(input_ids: Any, inputs_embeds: Any) -> None:
    """Exactly one of the two must be given.

    Raises: InputError.
    """
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise InputError(f"got {got} of input_ids and inputs_embeds; give exactly one of them")


def check_one_past(past: Any, past_key_values: Any) -> Any:
    """``past`` under either name; both at once are refused.

    Raises: InputError.
    """
    if past is not None and past_key_values is not None:
        raise InputError("got both past and past_key_values, which are two names of one argument; give one of them")
    return past if past is not None else past_key_values


def check_rank(name: str, shape: Shape, expected: str, rank: int) -> None:
    """The tensor must have ``rank`` axes, described by ``expected`` as in "(batch, position)".

    Raises: InputError.
    """
    if len(shape) != rank:
        raise InputError(f"{name} has shape {tuple(shape)}, expected {rank} axes: {expected}")


def check_not_empty(shape: Shape) -> None:
    """A sequence of no tokens, or a batch of no rows, has no logits.

    Raises: InputError.
    """
    if 0 in shape:
        raise InputError(
            f"the input is empty: its shape is {tuple(shape)}, expected at least one row of one token. "
            "To generate from nothing, start with the end-of-text token, bos_token_id"
        )


def check_length(config: GPT2Config, new: int | None, past: int | None) -> None:
    """``new`` tokens after ``past`` cached ones must fit into the learned positions.

    Raises: InputError.
    """
    new, past = new or 0, past or 0
    total = new + past
    if total > config.n_positions:
        cached = f" ({past} from past)" if past else ""
        raise InputError(
            f"the input is {total} tokens long{cached} but this model has {config.n_positions} positions; "
            "shorten the input, or read it in pieces"
        )


def check_mask(mask_shape: Shape, batch: int | None, new: int | None, past: int | None) -> None:
    """An attention mask covers the cached and the new tokens: (batch, past + new).

    Raises: InputError.
    """
    total = None if past is None or new is None else past + new
    if not _fits(mask_shape, (batch, total)):
        raise InputError(
            f"attention_mask has shape {tuple(mask_shape)}, expected {(batch, total)}: "
            f"one number for each of the {past} cached and {new} new tokens of each row"
        )


def check_past(config: GPT2Config, layers: int) -> None:
    """``past`` must hold one pair for each layer.

    Raises: InputError.
    """
    if layers != config.n_layer:
        raise InputError(f"past has {layers} layers, expected {config.n_layer}: pass back what this model returned")


def check_past_shape(layer: int, shape: Shape, expected: Shape) -> None:
    """A cached key or value is (batch, head, position, head_dim).

    Raises: InputError.
    """
    if not _fits(shape, expected):
        raise InputError(
            f"past[{layer}] has shape {tuple(shape)}, expected {tuple(expected)}: (batch, head, position, head_dim)"
        )


def out_of_range(name: str, low: int, high: int, size: int, remedy: str) -> InputError:
    """The error for ids that run from ``low`` to ``high`` where 0 to ``size - 1`` was expected."""
    bad = low if low < 0 else high
    return InputError(f"{name} holds {bad}, expected ids from 0 to {size - 1}; {remedy}")


VOCABULARY_REMEDY = (
    "use the tokenizer that belongs to this model, or resize_token_embeddings(len(tokenizer)) after adding tokens"
)
POSITIONS_REMEDY = "positions count the tokens of a row from 0"
LABELS_REMEDY = "mark positions that must not count with -100"


def check_labels_shape(name: str, got: Shape, expected: Shape) -> None:
    """Labels must have the shape of what they label.

    Raises: InputError.
    """
    if not _fits(got, expected):
        raise InputError(f"{name} has shape {tuple(got)}, expected {tuple(expected)}")


def check_ids(name: str, values: ArrayLike, size: int, remedy: str) -> NDArray[np.int64]:
    """Whole numbers from 0 to ``size - 1``, as int64: for input that is in numpy already.

    Raises: InputError, for another kind of number or one out of range.
    """
    given = np.asarray(values)
    if given.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {given.dtype}, expected whole numbers")
    if given.size and (given.min() < 0 or given.max() >= size):
        raise out_of_range(name, int(given.min()), int(given.max()), size, remedy)
    return given.astype(np.int64)


def unreadable_past(config: GPT2Config, kind: str) -> InputError:
    """The error for a ``past`` of type ``kind`` that holds no pairs."""
    return InputError(
        f"past is a {kind}, expected {config.n_layer} pairs (key, value): pass back what this model returned"
    )


def bad_head_mask(config: GPT2Config, shape: Shape) -> InputError:
    """The error for a head mask of a shape that fits neither heads nor layers."""
    return InputError(
        f"head_mask has shape {tuple(shape)}, expected ({config.n_head},), "
        f"({config.n_layer}, {config.n_head}) or ({config.n_layer}, batch, head, position, position)"
    )


def check_both_positions(start_positions: Any, end_positions: Any) -> None:
    """An answer has both a start and an end, or is not given at all.

    Raises: InputError.
    """
    if (start_positions is None) != (end_positions is None):
        raise InputError("got only one of start_positions and end_positions; give both, or neither")


CHOICE_REMEDY = "mc_token_ids are positions within the new tokens of each choice"


def given_twice(name: str) -> InputError:
    """The error for an argument that came both by itself and among others."""
    return InputError(f"{name} was given twice, by itself and among the inputs in the first argument; give it once")


def ragged(name: str) -> InputError:
    """The error for rows of different lengths."""
    return InputError(
        f"{name} has rows of different lengths, expected (batch, position); "
        "pad them (tokenizer(texts, padding=True)) and pass attention_mask"
    )
