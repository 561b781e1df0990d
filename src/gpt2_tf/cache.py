"""``past``: the keys and values of the tokens seen so far, as a value.

Giving the same ``past`` to two continuations is right both times: tensors never change, and a continuation makes new
ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import optree
import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_core.inputs import check_past, check_past_shape, unreadable_past
from gpt2_tf.layers import Tensor, dims, known

Layer = tuple[Tensor, Tensor]


class Past(tuple[Layer, ...]):
    """A tuple of n_layer pairs (key, value), each of shape (B, H, S, D)."""

    def __new__(cls, layers: Iterable[Layer]) -> Past:  # noqa: D102
        return super().__new__(cls, layers)

    @property
    def length(self) -> Any:
        """How many positions it holds: a number where it is known, else a scalar tensor."""
        return dims(self[0][0])[2]

    def reorder(self, rows: Tensor) -> Past:
        """The past of the batch rows ``rows`` (any number of them, repeats allowed), as beam search needs it."""
        return Past((tf.gather(key, rows), tf.gather(value, rows)) for key, value in self)

    def crop(self, length: int) -> Past:
        """The first ``length`` positions; appending to it later leaves this one as it is."""
        return Past((key[:, :, :length], value[:, :, :length]) for key, value in self)


def read_past(past: Any, config: GPT2Config, batch: int | None) -> Past | None:
    """``past`` in any form users have it, as ``Past``: pairs, or version 2's stacked (2, B, H, S, D) tensors.

    Raises: InputError, where layers, batch or heads do not fit the model.
    """
    if past is None:
        return None
    layers: Any = past
    if tf.is_tensor(past) and past.shape.rank == 6:  # all layers in one tensor, as an exported model passes it on
        layers = tf.unstack(past)
    if not isinstance(past, Past):
        try:
            layers = [(layer[0], layer[1]) for layer in layers]
        except (TypeError, IndexError):
            raise unreadable_past(config, type(past).__name__) from None
    if len(layers) == 0:
        return None
    check_past(config, len(layers))
    first = layers[0][0]
    length = known(first)[2] if tf.is_tensor(first) and first.shape.rank == 4 else None
    for i, pair in enumerate(layers):
        for tensor in pair:
            if not tf.is_tensor(tensor) or tensor.shape.rank is None:
                raise unreadable_past(config, f"{type(past).__name__} of {type(tensor).__name__}")
            check_past_shape(i, known(tensor), (batch, config.heads_of(i), length, config.head_dim))
    if length == 0:  # nothing was read yet: the same as no past
        return None
    return layers if isinstance(layers, Past) else Past(layers)


class Recorder:
    """Collects the keys and values of one forward pass, layer by layer."""

    def __init__(self, past: Past | None, new: Any, config: GPT2Config, keep: bool) -> None:
        self.past = past
        self.start = past.length if past is not None else 0
        self.stop = self.start + new
        self.keep = keep
        self.layers: list[Layer] = []

    def remember(self, layer: int, k: Tensor, v: Tensor) -> Layer:
        """Append the new keys and values (B, H, T, D) of ``layer``; returns those of all positions (B, H, S, D)."""
        if self.past is not None:
            old_k, old_v = self.past[layer]
            # A past may have been computed in another number format.
            k, v = tf.concat((tf.cast(old_k, k.dtype), k), axis=2), tf.concat((tf.cast(old_v, v.dtype), v), axis=2)
        if self.keep:
            self.layers.append((k, v))
        return k, v

    def result(self) -> Past | None:
        """The new ``past``; None where it was not asked for."""
        return Past(self.layers) if self.keep else None


# Keras walks arguments and outputs with optree, to which a subclass of tuple would be one opaque leaf.
optree.register_pytree_node(Past, lambda past: (tuple(past), None), lambda _, layers: Past(layers), namespace="keras")
