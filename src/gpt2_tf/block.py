"""One transformer block: attention and a feed-forward layer, each behind a layer norm and added to the stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_tf.attention import Attention, Conv1D
from gpt2_tf.layers import LayerNorm, Part, Tensor, dropout

# 0.5 * (1 + tanh(u)) is the logistic function of 2u, which takes fewer passes over memory.
_TWICE_ROOT = 2.0 * math.sqrt(2.0 / math.pi)


def gelu_new(x: Tensor) -> Tensor:
    """GELU by tanh, as the released models use it (Hendrycks & Gimpel 2016, section 2)."""
    return x * tf.sigmoid(x * (_TWICE_ROOT + 0.044715 * _TWICE_ROOT * tf.square(x)))


def gelu_fast(x: Tensor) -> Tensor:
    """GELU by tanh with sqrt(2/pi) rounded to 0.7978845608, as some forks of the field wrote it."""
    return x * tf.sigmoid(2.0 * 0.7978845608 * x * (1.0 + 0.044715 * tf.square(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by the logistic function (Hendrycks & Gimpel 2016, section 2)."""
    return x * tf.sigmoid(1.702 * x)


def _gelu(x: Tensor) -> Tensor:
    # tf.nn.gelu rounds its constants to float32, also for float64.
    return 0.5 * x * (1.0 + tf.math.erf(x * math.sqrt(0.5)))


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": _gelu,
    "gelu_fast": gelu_fast,
    "quick_gelu": quick_gelu,
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


class MLP(Part):
    """The feed-forward layer: C -> inner -> C."""

    def __init__(self, config: GPT2Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with self.naming():
            self.c_fc = Conv1D(config.n_embd, config.inner_dim, name="c_fc", dtype=self.dtype_policy)
            self.c_proj = Conv1D(config.inner_dim, config.n_embd, name="c_proj", dtype=self.dtype_policy)
        self.act = ACTIVATIONS[config.activation_function]
        self.resid_pdrop = config.resid_pdrop

    def call(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); a ``seed`` switches dropout on."""
        x = self.act(self.c_fc(x))  # (B, T, inner)
        x = self.c_proj(x)  # (B, T, C)
        return dropout(x, self.resid_pdrop, seed)


class Block(Part):
    """``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, config: GPT2Config, layer: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        policy = self.dtype_policy
        with self.naming():
            self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon, name="ln_1", dtype=policy)
            self.attn = Attention(config, layer, name="attn", dtype=policy)
            self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon, name="ln_2", dtype=policy)
            self.mlp = MLP(config, name="mlp", dtype=policy)

    def call(
        self,
        x: Tensor,  # (B, T, C)
        mask: Tensor | None,
        causal: bool,
        head_mask: Tensor | None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        need_probs: bool,
        seeds: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (B, T, C), and the attention probabilities when needed.

        ``remember`` takes this block's new keys and values (B, H, T, D) and gives those of all positions.
        ``seeds`` switch dropout on.
        """
        q, k, v = self.attn.qkv(self.ln_1(x))
        k, v = remember(k, v)
        attended, probs = self.attn(q, k, v, mask, causal, head_mask, need_probs, None if seeds is None else seeds[:2])
        x = x + attended
        x = x + self.mlp(self.ln_2(x), None if seeds is None else seeds[2])
        return x, probs
