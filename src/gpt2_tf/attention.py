"""Causal self-attention.

Letters: B batch, T new positions, S all positions (cached and new), H heads, D head width, C model width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_tf.layers import Part, Tensor, dims, in_dtype, known
from gpt2_tf.layers import dropout as drop

#: Queries taken at a time where nothing but the result is wanted: their scores stay in the processor's cache, and
#: keys after the last of them are left out.
_QUERIES = 128


class Conv1D(Part):
    """A linear layer whose kernel is (in, out), as the released checkpoints store it."""

    def __init__(self, n_in: int, n_out: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = self.parameter("weight", n_in, n_out)
        self.bias = self.parameter("bias", n_out)

    def call(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        shape = dims(x)
        flat = tf.matmul(tf.reshape(x, (-1, shape[-1])), in_dtype(self.weight, x.dtype))
        return tf.reshape(tf.nn.bias_add(flat, in_dtype(self.bias, x.dtype)), (*shape[:-1], self.bias.shape[0]))


def visible(T: Any, S: Any, attention_mask: Tensor | None) -> Tensor:
    """Which key each query may see: (1 or B, 1, T, S), True where it may; ``attention_mask`` (B, S) is boolean.

    A query sees itself and what came before, except padding; itself always, so that a padded query has a defined
    (and unused) result instead of 0/0.
    """
    query = tf.range(S - T, S)[:, None]
    key = tf.range(S)[None, :]
    causal = key <= query  # (T, S)
    if attention_mask is None:
        return causal[None, None]
    real = attention_mask[:, None, None, :]
    return (causal & real) | (key == query)


def attend(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, H, S, D)
    v: Tensor,  # (B, H, S, D)
    mask: Tensor | None,  # (1 or B, 1, T, S); None where every query sees every key
    *,
    scale: float,
    dropout: float = 0.0,
    head_mask: Tensor | None = None,  # broadcastable to (B, H, T, S)
    upcast: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention written out: the result (B, H, T, D) and the probabilities (B, H, T, S).

    ``upcast`` takes product and softmax in float32, for half-precision weights (Mistral's
    ``reorder_and_upcast_attn``). ``dropout`` needs a ``seed``.
    """
    if upcast and q.dtype != tf.float64:
        q, k = tf.cast(q, tf.float32), tf.cast(k, tf.float32)
    # Scaling the queries costs T * D products instead of T * S, and keeps half-precision scores in range.
    scores = tf.matmul(q * scale, k, transpose_b=True)
    if mask is not None:
        scores = tf.where(mask, scores, tf.cast(-np.inf, scores.dtype))
    probs = tf.cast(tf.nn.softmax(scores, axis=-1), v.dtype)
    probs = drop(probs, dropout, seed)
    if head_mask is not None:
        probs = probs * tf.cast(head_mask, probs.dtype)
    return tf.matmul(probs, v), probs


class Attention(Part):
    """Multi-head causal self-attention of one block, with a cache of keys and values."""

    def __init__(self, config: GPT2Config, layer: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_head = config.heads_of(layer)
        self.head_dim = config.head_dim
        self.attn_pdrop = config.attn_pdrop
        self.resid_pdrop = config.resid_pdrop
        self.upcast = config.reorder_and_upcast_attn
        self.scale = 1.0 / math.sqrt(config.head_dim) if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        attended = self.n_head * self.head_dim
        with self.naming():
            self.c_attn = Conv1D(config.n_embd, 3 * attended, name="c_attn", dtype=self.dtype_policy)
            self.c_proj = Conv1D(attended, config.n_embd, name="c_proj", dtype=self.dtype_policy)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> three of (B, H, T, D)."""
        B, T, _ = dims(x)
        packed = tf.reshape(self.c_attn(x), (B, T, 3, self.n_head, self.head_dim))
        q, k, v = tf.unstack(tf.transpose(packed, (2, 0, 3, 1, 4)), num=3)
        return q, k, v

    def call(
        self,
        q: Tensor,  # (B, H, T, D)
        k: Tensor,  # (B, H, S, D)
        v: Tensor,  # (B, H, S, D)
        mask: Tensor | None,  # (1 or B, 1, T, S); None where ``causal`` says it all
        causal: bool,  # without a mask: T is S and each query sees what came before; else one query sees everything
        head_mask: Tensor | None = None,
        need_probs: bool = False,
        seeds: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the block adds to the residual stream (B, T, C), and the probabilities (B, H, T, S) when needed.

        ``seeds`` switch dropout on: one for the probabilities, one for the result.
        """
        of_probs, of_result = seeds if seeds is not None else (None, None)
        T = known(q)[2]
        probs: Tensor | None = None
        if causal and mask is None and T is not None and T > _QUERIES and not need_probs and head_mask is None:
            y = self._in_pieces(q, k, v, T, of_probs)
        else:
            if causal and mask is None:
                mask = visible(dims(q)[2], dims(k)[2], None)
            y, probs = attend(
                q, k, v, mask, scale=self.scale, dropout=self.attn_pdrop, head_mask=head_mask, upcast=self.upcast,
                seed=of_probs,
            )  # fmt: skip
        B, _, T, _ = dims(y)
        y = tf.reshape(tf.transpose(y, (0, 2, 1, 3)), (B, T, self.n_head * self.head_dim))
        return drop(self.c_proj(y), self.resid_pdrop, of_result), probs if need_probs else None

    def _in_pieces(self, q: Tensor, k: Tensor, v: Tensor, T: int, seed: Tensor | None) -> Tensor:
        """Causal attention (B, H, T, D), some queries at a time."""
        sizes = [min(_QUERIES, T - start) for start in range(0, T, _QUERIES)]
        # Split and joined, not sliced: the gradient of a slice is a whole tensor of zeros for every slice.
        queries, keys, values = (tf.split(x, sizes, axis=2) for x in (q, k, v))
        pieces = []
        for piece, size in enumerate(sizes):
            start = piece * _QUERIES
            stop = start + size
            y, _ = attend(
                queries[piece], tf.concat(keys[: piece + 1], axis=2), tf.concat(values[: piece + 1], axis=2),
                visible(size, stop, None), scale=self.scale, dropout=self.attn_pdrop, upcast=self.upcast,
                seed=None if seed is None else tf.random.experimental.stateless_fold_in(seed, start),
            )  # fmt: skip
            pieces.append(y)
        return tf.concat(pieces, axis=2)
