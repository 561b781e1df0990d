"""``past``: the keys and values of the tokens seen so far, as a value.

Giving the same ``past`` to two continuations is right both times. Without gradients it owns preallocated buffers:
a continuation appends in place where nobody else has appended, and copies otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.inputs import check_past, check_past_shape

Layer = tuple[Tensor, Tensor]


class _Store:
    """Buffers (B, H, capacity, D) of every layer, and how far they are filled."""

    def __init__(self, layers: list[Layer], filled: int) -> None:
        self.layers = layers
        self.filled = filled

    @property
    def capacity(self) -> int:
        return self.layers[0][0].size(2)


class Past(tuple[Layer, ...]):
    """A tuple of n_layer pairs (key, value), each of shape (B, H, S, D)."""

    _store: _Store | None

    def __new__(cls, layers: Iterable[Layer], store: _Store | None = None) -> Past:  # noqa: D102
        self = super().__new__(cls, layers)
        self._store = store
        return self

    @property
    def length(self) -> int:
        """How many positions it holds."""
        return self[0][0].size(2)

    def reorder(self, rows: Tensor) -> Past:
        """The past of the batch rows ``rows`` (any number of them, repeats allowed), as beam search needs it."""
        return Past((key.index_select(0, rows), value.index_select(0, rows)) for key, value in self)

    def crop(self, length: int) -> Past:
        """The first ``length`` positions; appending to it later leaves this one as it is."""
        return Past((key[:, :, :length], value[:, :, :length]) for key, value in self)


def read_past(past: Any, config: GPT2Config, batch: int) -> Past | None:
    """``past`` in any form users have it, as ``Past``: pairs, or version 2's stacked (2, B, H, S, D) tensors.

    Raises: InputError, where layers, batch or heads do not fit the model.
    """
    if past is None or isinstance(past, Past):
        layers: Sequence[Any] = past or ()
    else:
        try:
            layers = [(layer[0], layer[1]) for layer in past]
        except (TypeError, IndexError):
            raise InputError(
                f"past is a {type(past).__name__}, expected {config.n_layer} pairs (key, value): "
                "pass back what this model returned"
            ) from None
    if len(layers) == 0:
        return None
    check_past(config, len(layers))
    length = layers[0][0].size(2)
    for i, pair in enumerate(layers):
        for tensor in pair:
            check_past_shape(i, tuple(tensor.shape), (batch, config.heads_of(i), length, config.head_dim))
    return past if isinstance(past, Past) else Past(layers)


class Recorder:
    """Collects the keys and values of one forward pass, layer by layer, in whichever way costs least."""

    def __init__(self, past: Past | None, new: int, config: GPT2Config, keep: bool) -> None:
        self.past = past
        self.start = past.length if past is not None else 0
        self.stop = self.start + new
        self.keep = keep
        self.limit = config.n_positions
        self.n_layer = config.n_layer
        self.layers: list[Layer] = []
        # In-place writes would break gradients and defeat tracing: there plain concatenation serves.
        in_place = keep and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.buffers: list[Layer] | None = None
        if in_place:
            self.buffers = self._claim(past) or []

    def _claim(self, past: Past | None) -> list[Layer] | None:
        """The buffers of ``past``, if the room behind it is still free; it is ours from here on."""
        store = past._store if past is not None else None
        if store is None or store.filled != self.start or store.capacity < self.stop:
            return None
        if store.layers[0][0].is_inference() and not torch.is_inference_mode_enabled():
            return None
        store.filled = self.stop
        self._claimed = store
        return store.layers

    def remember(self, layer: int, k: Tensor, v: Tensor) -> Layer:
        """Append the new keys and values (B, H, T, D) of ``layer``; returns those of all positions (B, H, S, D)."""
        if self.buffers is None:
            if self.past is not None:
                old_k, old_v = self.past[layer]
                k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
            if self.keep:
                self.layers.append((k, v))
            return k, v
        if len(self.buffers) <= layer:
            self.buffers.append((self._grown(layer, 0, k), self._grown(layer, 1, v)))
        buffer_k, buffer_v = self.buffers[layer]
        buffer_k[:, :, self.start : self.stop] = k
        buffer_v[:, :, self.start : self.stop] = v
        pair = buffer_k[:, :, : self.stop], buffer_v[:, :, : self.stop]
        self.layers.append(pair)
        return pair

    def _grown(self, layer: int, which: int, new: Tensor) -> Tensor:
        B, H, _, D = new.shape
        # Half as much again, so that n appends copy O(n) in all; never past what the model can address.
        capacity = max(self.stop, min(self.limit, self.stop + max(64, self.stop // 2)))
        buffer = new.new_empty(B, H, capacity, D)
        if self.past is not None:
            buffer[:, :, : self.start] = self.past[layer][which]
        return buffer

    def result(self) -> Any:
        """The new ``past``; a plain tuple of pairs while tracing; None where it was not asked for."""
        if not self.keep:
            return None
        if torch.compiler.is_compiling():
            return tuple(self.layers)
        if self.buffers is None:
            return Past(self.layers)
        store = getattr(self, "_claimed", None) or _Store(self.buffers, self.stop)
        return Past(self.layers, store)
