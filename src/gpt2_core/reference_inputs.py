"""What goes into the reference model, read from lists or arrays and checked.

Letters: B rows, T new tokens, S all tokens, H heads, D width of one head, C model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.inputs import (
    POSITIONS_REMEDY,
    VOCABULARY_REMEDY,
    bad_head_mask,
    check_ids,
    check_labels_shape,
    check_length,
    check_mask,
    check_not_empty,
    check_past,
    check_past_shape,
    check_rank,
    unreadable_past,
)

Array = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass
class Inputs:
    """Checked input: ids (B, T) or embeddings (B, T, C), the cache, and what goes with them; None where not given."""

    B: int
    T: int
    S: int
    input_ids: Ids | None
    inputs_embeds: Array | None
    past: tuple[tuple[Array, Array], ...] | None
    attention_mask: NDArray[np.bool_] | None
    token_type_ids: Ids | None
    position_ids: Ids | None


def read_arrays(**given: Any) -> list[Any]:
    """Each argument as an array, None where it was not given, in the order given.

    Raises: InputError, for rows of different lengths and for what are no numbers.
    """
    return [None if value is None else _read_array(name, value) for name, value in given.items()]


def _read_array(name: str, value: Any) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(
            f"{name} has rows of different lengths, expected rows of one length; pad them "
            "(tokenizer(texts, padding=True)) and pass attention_mask"
        ) from None
    if array.dtype.kind in "OSU":
        raise InputError(f"{name} holds {array.dtype.type.__name__}, expected numbers")
    return array


def read_inputs(
    config: GPT2Config,
    input_ids: Any,
    inputs_embeds: Any,
    past: Any,
    attention_mask: Any,
    token_type_ids: Any,
    position_ids: Any,
) -> Inputs:
    """Everything that enters the transformer, as arrays of fixed types.

    Raises: InputError, for shapes, ids or lengths that the model cannot take.
    """
    if inputs_embeds is None:
        check_rank("input_ids", np.shape(input_ids), "(batch, position)", 2)
        B, T = np.shape(input_ids)
        check_not_empty((B, T))
        input_ids = check_ids("input_ids", input_ids, config.vocab_size, VOCABULARY_REMEDY)
    else:
        inputs_embeds = np.asarray(inputs_embeds, np.float64)
        check_rank("inputs_embeds", inputs_embeds.shape, "(batch, position, n_embd)", 3)
        B, T = inputs_embeds.shape[:2]
        check_not_empty((B, T))
        check_labels_shape("inputs_embeds", inputs_embeds.shape, (B, T, config.n_embd))
    past = read_past(config, past, B)
    S = T + (past[0][0].shape[2] if past is not None else 0)
    if attention_mask is not None:
        attention_mask = np.asarray(attention_mask) != 0
        check_mask(attention_mask.shape, B, T, S - T)
    if token_type_ids is not None:
        check_labels_shape("token_type_ids", np.shape(token_type_ids), (B, T))
        token_type_ids = check_ids("token_type_ids", token_type_ids, config.vocab_size, VOCABULARY_REMEDY)
    if position_ids is None:
        check_length(config, T, S - T)
    else:
        position_ids = check_ids("position_ids", position_ids, config.n_positions, POSITIONS_REMEDY)
        if position_ids.shape not in ((T,), (1, T)):
            check_labels_shape("position_ids", position_ids.shape, (B, T))
    return Inputs(B, T, S, input_ids, inputs_embeds, past, attention_mask, token_type_ids, position_ids)


def read_past(config: GPT2Config, past: Any, batch: int) -> tuple[tuple[Array, Array], ...] | None:
    """``past`` as n_layer pairs (key, value), each (B, H, S, D); version 2's stacked (2, B, H, S, D) too.

    Raises: InputError, where layers, batch or heads do not fit the model.
    """
    if past is None or (isinstance(past, (tuple, list)) and not past):
        return None
    try:
        layers = tuple((np.asarray(pair[0], np.float64), np.asarray(pair[1], np.float64)) for pair in past)
    except (TypeError, IndexError, ValueError):
        raise unreadable_past(config, type(past).__name__) from None
    check_past(config, len(layers))
    length = layers[0][0].shape[2] if layers[0][0].ndim == 4 else 0
    for i, pair in enumerate(layers):
        for array in pair:
            check_past_shape(i, array.shape, (batch, config.heads_of(i), length, config.head_dim))
    return layers


def read_head_masks(config: GPT2Config, head_mask: Any, B: int, T: int, S: int) -> list[Any]:
    """One factor a layer, broadcastable to (B, H, T, S), from (H,), (n_layer, H) or (n_layer, B, H, T, S).

    Raises: InputError, for any other shape.
    """
    if head_mask is None:
        return [1.0] * config.n_layer
    given = np.asarray(head_mask, np.float64)
    if given.ndim == 1:
        masks = [given[None, :, None, None]] * config.n_layer
    elif given.ndim in (2, 5) and len(given) == config.n_layer:
        masks = [layer[None, :, None, None] if layer.ndim == 1 else layer for layer in given]
    else:
        raise bad_head_mask(config, given.shape)
    for i, layer in enumerate(masks):
        try:
            np.broadcast_to(layer, (B, config.heads_of(i), T, S))
        except ValueError:
            raise bad_head_mask(config, given.shape) from None
    return masks
