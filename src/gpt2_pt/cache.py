"""``past``: the keys and values of the tokens seen so far, as a value.

Giving the same ``past`` to two continuations is right both times. Without gradients it owns preallocated buffers:
a continuation appends in place where nobody else has appended, and copies otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gpt2_core.config import GPT2Config
from gpt2_core.inputs import check_past, check_past_shape, unreadable_past

Layer = tuple[Tensor, Tensor]


class _Store:
    """Buffers (B, H, capacity, D) of every layer, and how far they are filled."""

    def __init__(self, layers: list[Layer], filled: int) -> None:
        self.layers = layers
        self.filled = filled
        self._lock = threading.Lock()

    def claim(self, start: int, stop: int, like: Tensor) -> bool:
        """Take positions ``start`` to ``stop`` for good, if they are free and numbers like ``like`` fit there.

        Two threads may continue one ``past``, as when a server keeps that of a common prompt: one of them gets it.
        """
        buffer = self.layers[0][0]
        if buffer.dtype != like.dtype or buffer.device != like.device or buffer.size(2) < stop:
            return False
        if buffer.is_inference() and not torch.is_inference_mode_enabled():
            return False  # PyTorch forbids writing to these tensors outside inference mode
        with self._lock:
            if self.filled != start:
                return False
            self.filled = stop
            return True


class Past(tuple[Layer, ...]):
    """A tuple of n_layer pairs (key, value), each of shape (B, H, S, D)."""

    _store: _Store | None

    def __new__(cls, layers: Iterable[Layer], store: _Store | None = None) -> Past:  # noqa: D102
        self = super().__new__(cls, layers)
        self._store = store
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the room behind it, and as a copy of its own.
        return (Past, (tuple((key.clone(), value.clone()) for key, value in self),))

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
    if past is None:
        return None
    layers: Any = past
    if not isinstance(past, Past):
        try:
            layers = [(layer[0], layer[1]) for layer in past]
        except (TypeError, IndexError):
            raise unreadable_past(config, type(past).__name__) from None
    if len(layers) == 0:
        return None
    check_past(config, len(layers))
    first = layers[0][0]
    length = first.shape[2] if isinstance(first, Tensor) and first.dim() == 4 else 0
    for i, pair in enumerate(layers):
        for tensor in pair:
            if not isinstance(tensor, Tensor):
                raise unreadable_past(config, f"{type(past).__name__} of {type(tensor).__name__}")
            check_past_shape(i, tuple(tensor.shape), (batch, config.heads_of(i), length, config.head_dim))
    if length == 0:  # nothing was read yet: the same as no past, whose attention is plainly causal
        return None
    return layers if isinstance(layers, Past) else Past(layers)


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
        self.in_place = keep and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.store: _Store | None = None

    def remember(self, layer: int, k: Tensor, v: Tensor) -> Layer:
        """Append the new keys and values (B, H, T, D) of ``layer``; returns those of all positions (B, H, S, D)."""
        if not self.in_place:
            if self.past is not None:
                old_k, old_v = self.past[layer]
                # Under autocast a past may be of another width than what is computed now.
                k, v = torch.cat((old_k.to(k.dtype), k), dim=2), torch.cat((old_v.to(v.dtype), v), dim=2)
            if self.keep:
                self.layers.append((k, v))
            return k, v
        if self.store is None:
            store = self.past._store if self.past is not None else None
            free = store is not None and store.claim(self.start, self.stop, k)
            self.store = store if free else _Store([], self.stop)
        assert self.store is not None
        buffers = self.store.layers
        if len(buffers) <= layer:
            buffers.append((self._grown(layer, 0, k), self._grown(layer, 1, v)))
        buffer_k, buffer_v = buffers[layer]
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
        return Past(self.layers, self.store)
