"""Cross-entropy over the whole vocabulary without ever holding all logits: some rows at a time, gradients at once.

Letters: R rows (batch times position), C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpt2_core.errors import InputError
from gpt2_core.inputs import IGNORED_LABELS
from gpt2_pt.products import serves, times

#: Logits held at a time. Fewer make the table's gradient be read and written more often, more take more memory.
LOGITS = 1 << 24


def chunked_loss(hidden: Tensor, table: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """``weight`` times the sum of cross-entropies, in nats, of ``targets`` (R,) under hidden (R, C) @ table.T (C, V).

    ``weight`` is a scalar tensor, through which no gradient goes. Targets of -100 do not count. Products are taken in
    the format of ``hidden``, the sum over the vocabulary and the gradient of the table in float32 (or float64).
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or table.requires_grad):
        loss: Tensor = _Chunked.apply(hidden, table, targets, weight)  # type: ignore[no-untyped-call]
        return loss
    return chunked_sum(hidden, table, targets) * weight


def chunked_sum(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """The sum of cross-entropies alone, as `chunked_loss`, for what is not trained on."""
    total = hidden.new_zeros((), dtype=_wide(hidden))
    head = table.to(hidden.dtype)
    by_onednn = serves(hidden, head)
    for rows in _slices(hidden, table):
        logits = times(hidden[rows], head) if by_onednn else hidden[rows] @ head.T
        total += torch.nn.functional.cross_entropy(
            logits.to(total.dtype), targets[rows], ignore_index=IGNORED_LABELS[0], reduction="sum"
        )
    return total


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slices(hidden: Tensor, table: Tensor) -> list[slice]:
    size = max(1, LOGITS // table.size(0))
    return [slice(start, start + size) for start in range(0, hidden.size(0), size)]


class _Chunked(torch.autograd.Function):
    """The forward pass makes the gradients as well: the logits of a slice are at hand just then.

    So gradients of gradients are not to be had; asking for them raises.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        wide = _wide(hidden)
        head = table.to(hidden.dtype)
        counts = targets != IGNORED_LABELS[0]
        picked = torch.where(counts, targets, 0).unsqueeze(1)  # (R, 1)
        factor = counts.unsqueeze(1).to(wide) * weight  # (R, 1)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_onednn = serves(hidden, head)
        # oneDNN is fastest where the table's gradient is written as (C, V).
        d_table = None
        if ctx.needs_input_grad[1]:
            d_table = table.new_zeros(table.shape[::-1] if by_onednn else table.shape, dtype=wide)
        total = hidden.new_zeros((), dtype=wide)
        minus_one = hidden.new_full((), -1.0, dtype=wide)
        for rows in _slices(hidden, table):
            logits = (times(hidden[rows], head) if by_onednn else hidden[rows] @ head.T).to(wide)  # (R', V)
            torch.log_softmax(logits, -1, out=logits)
            total -= (logits.gather(1, picked[rows]) * factor[rows]).sum()
            probs = logits.exp_()
            probs.scatter_add_(1, picked[rows], minus_one.expand_as(picked[rows]))
            slope = probs.to(hidden.dtype)
            scaled = factor[rows].to(hidden.dtype)
            if d_hidden is not None:
                torch.mul(times(slope, head.T) if by_onednn else slope @ head, scaled, out=d_hidden[rows])
            if d_table is not None:
                part = hidden[rows] * scaled
                if by_onednn:
                    d_table += times(part.T, slope.T)
                elif part.dtype == wide:
                    d_table.addmm_(slope.T, part)
                else:
                    d_table += (slope.T @ part).to(wide)
        if by_onednn and d_table is not None:
            d_table = d_table.T.contiguous()
        ctx.save_for_backward(d_hidden, d_table)
        ctx.format = table.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise InputError(
                "the loss made slice by slice has no gradients of gradients; take those of the model's own loss, "
                "model(..., labels=labels).loss"
            )
        d_hidden, d_table = ctx.saved_tensors
        slope = upstream[0]
        # On a GPU looking costs more than multiplying.
        if torch.compiler.is_compiling() or slope.device.type != "cpu" or slope.item() != 1.0:
            d_hidden = None if d_hidden is None else d_hidden * slope.to(d_hidden.dtype)
            d_table = None if d_table is None else d_table * slope
        return d_hidden, None if d_table is None else d_table.to(ctx.format), None, None
