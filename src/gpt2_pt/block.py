"""One transformer block: attention and a feed-forward layer, each behind a layer norm and added to the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_core.config import GPT2Config
from gpt2_pt.attention import Attention, Conv1D


def gelu_new(x: Tensor) -> Tensor:
    """GELU by tanh, as the released models use it (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


def gelu_fast(x: Tensor) -> Tensor:
    """GELU by tanh with sqrt(2/pi) rounded to 0.7978845608, as some forks of the field wrote it."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    """GELU by the logistic function (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu": F.gelu,
    "gelu_fast": gelu_fast,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class MLP(nn.Module):
    """The feed-forward layer: C -> inner -> C."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.inner_dim)
        self.c_proj = Conv1D(config.inner_dim, config.n_embd)
        self.act = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.act(self.c_fc(x))  # (B, T, inner)
        x = self.c_proj(x)  # (B, T, C)
        return self.dropout(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,  # (B, T, C)
        mask: Tensor | None,
        causal: bool,
        head_mask: Tensor | None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        need_probs: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after this block (B, T, C), and the attention probabilities when needed.

        ``remember`` takes this block's new keys and values (B, H, T, D) and gives those of all positions.
        """
        q, k, v = self.attn.qkv(self.ln_1(x))
        k, v = remember(k, v)
        attended, probs = self.attn(q, k, v, mask, causal, head_mask, need_probs)
        x = x + attended
        x = x + self.mlp(self.ln_2(x))
        return x, probs
