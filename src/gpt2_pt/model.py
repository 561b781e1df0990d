"""GPT2Model: the transformer without a head. The forward pass is `GPT2Model.forward`, and there is only one.

Letters: B batch, T new positions, S all positions (cached and new), H heads, D head width, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.inputs import (
    POSITIONS_REMEDY,
    VOCABULARY_REMEDY,
    bad_head_mask,
    check_labels_shape,
    check_length,
    check_mask,
    check_not_empty,
    check_one_input,
    check_one_past,
    check_rank,
    check_tensor,
    check_whole_numbers,
    out_of_range,
)
from gpt2_core.parameters import Head
from gpt2_pt.attention import visible
from gpt2_pt.block import Block
from gpt2_pt.cache import Recorder, read_past
from gpt2_pt.outputs import BaseOutput
from gpt2_pt.weights import PreTrainedModel


def check_tensors(**inputs: Any) -> None:
    """What is given must be tensors.

    Raises: InputError.
    """
    for name, value in inputs.items():
        if value is not None and not isinstance(value, Tensor):
            remedy = "a torch.Tensor: torch.tensor(...), or tokenizer(..., return_tensors='pt')"
            check_tensor(name, value, False, remedy)


class Embedding(nn.Embedding):
    """A table of rows whose out-of-range error names the ids, the range and the remedy."""

    label = "input_ids"
    remedy = VOCABULARY_REMEDY

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, _weight=torch.empty(rows, width))

    def forward(self, ids: Tensor, label: str | None = None) -> Tensor:
        """(...) whole numbers -> (..., C); ``label`` is what the caller knows them as.

        Raises: InputError for ids outside the table; on a GPU, where looking costs a wait, only for rows of several
        ids outside training.
        """
        if torch.compiler.is_compiling() or ids.is_meta:
            return super().forward(ids)
        check_whole_numbers(label or self.label, str(ids.dtype).removeprefix("torch."), index=True)
        if ids.device.type == "cpu":
            try:
                return super().forward(ids)
            except IndexError:
                raise self._error(ids, label) from None
        if not self.training and ids.size(-1) > 1 and not ((ids >= 0) & (ids < self.num_embeddings)).all():
            raise self._error(ids, label)
        return super().forward(ids)

    def _error(self, ids: Tensor, label: str | None) -> InputError:
        return out_of_range(label or self.label, int(ids.min()), int(ids.max()), self.num_embeddings, self.remedy)


class PositionEmbedding(Embedding):
    """The learned positions."""

    label = "position_ids"
    remedy = POSITIONS_REMEDY


def positions_from(attention_mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    """Position ids (1 or B, T) of the new tokens: with a mask, the count of real tokens before each one."""
    if attention_mask is None:
        return torch.arange(S - T, S, device=device).unsqueeze(0)
    counted = attention_mask.to(torch.int64).cumsum(-1) - 1
    return counted.clamp_min(0)[:, S - T :]


def layer_head_masks(head_mask: Tensor | None, config: GPT2Config, B: int, T: int, S: int) -> list[Tensor | None]:
    """One mask a layer, broadcastable to (B, H, T, S), from (H,), (n_layer, H) or (n_layer, B, H, T, S).

    Raises: InputError for any other shape.
    """
    if head_mask is None:
        return [None] * config.n_layer
    shape = tuple(head_mask.shape)
    if len(shape) == 1:
        masks = [head_mask.view(1, -1, 1, 1)] * config.n_layer
    elif len(shape) in (2, 5) and shape[0] == config.n_layer:
        masks = [layer.view(1, -1, 1, 1) if layer.dim() == 1 else layer for layer in head_mask.unbind(0)]
    else:
        raise bad_head_mask(config, shape)
    for i, mask in enumerate(masks):
        wanted = (B, config.heads_of(i), T, S)
        if any(got not in (1, want) for got, want in zip(mask.shape, wanted, strict=True)):
            raise bad_head_mask(config, shape)
    return list(masks)


class GPT2Model(PreTrainedModel):
    """The bare transformer: token ids in, hidden states out.

    ``GPT2Model(config, seed=0)`` starts from the project's seeded initial values, the same bits in every framework;
    under ``torch.device("meta")`` nothing is allocated.

    Source: Radford et al. 2019, section 2.3.
    """

    head = Head.NONE

    def _build(self, config: GPT2Config) -> None:
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = PositionEmbedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
    ) -> BaseOutput:
        """Run the transformer over new tokens, after those in ``past``.

        Args:
            input_ids: (B, T) token ids from 0 to vocab_size - 1; or give ``inputs_embeds``.
            past: what an earlier call returned as ``past``; ``past_key_values`` is the same argument.
            attention_mask: (B, S), 1 for real tokens and 0 for padding, cached tokens included.
            token_type_ids: (B, T) ids embedded through the token table and added.
            position_ids: (B, T) from 0 to n_positions - 1; by default counted, over real tokens where there is a mask.
            head_mask: (H,), (n_layer, H) or (n_layer, B, H, T, S), multiplied into the attention probabilities.
            inputs_embeds: (B, T, C) instead of ``input_ids``.
            use_cache: return ``past``; by default as the config says.
            output_attentions: return the probabilities, n_layer of (B, H, T, S).
            output_hidden_states: return n_layer + 1 of (B, T, C).

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
        config = self.config
        past = check_one_past(past, past_key_values)
        check_one_input(input_ids, inputs_embeds)
        check_tensors(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, head_mask=head_mask,
            token_type_ids=token_type_ids, position_ids=position_ids,
        )  # fmt: skip
        if input_ids is not None:
            check_rank("input_ids", tuple(input_ids.shape), "(batch, position)", 2)
            shape = tuple(input_ids.shape)
        else:
            assert inputs_embeds is not None
            check_rank("inputs_embeds", tuple(inputs_embeds.shape), "(batch, position, n_embd)", 3)
            shape = tuple(inputs_embeds.shape[:2])
            check_labels_shape("inputs_embeds", tuple(inputs_embeds.shape), (*shape, config.n_embd))
        check_not_empty(shape)
        B, T = shape
        past = read_past(past, config, B)
        start = past[0][0].size(2) if past is not None else 0
        S = start + T
        if position_ids is None:
            check_length(config, T, start)
        elif tuple(position_ids.shape) not in ((T,), (1, T)):
            check_labels_shape("position_ids", tuple(position_ids.shape), (B, T))
        if token_type_ids is not None:
            check_labels_shape("token_type_ids", tuple(token_type_ids.shape), (B, T))
        if attention_mask is not None:
            check_mask(tuple(attention_mask.shape), B, T, start)
            attention_mask = attention_mask.to(torch.bool)

        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()

        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if position_ids is None:
            position_ids = positions_from(attention_mask, T, S, x.device)
        x = x + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids, "token_type_ids")
        x = self.drop(x)

        # None means plain causal attention over T = S positions, or one query that sees everything.
        mask: Tensor | None = None
        if attention_mask is not None or (start > 0 and (T > 1 or torch.compiler.is_compiling())):
            mask = visible(T, S, attention_mask, x.device)
        masks = layer_head_masks(head_mask, config, B, T, S)
        recorder = Recorder(past, T, config, keep=bool(use_cache) and not checkpointing)

        hidden: list[Tensor] = []
        attentions: list[Tensor] = []
        for i, block in enumerate(self.h):
            if output_hidden_states:
                hidden.append(x)

            def remember(k: Tensor, v: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                return recorder.remember(i, k, v)

            arguments = (x, mask, past is None, masks[i], remember, output_attentions)
            if checkpointing:
                x, probs = torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, probs = block(*arguments)
            if output_attentions:
                attentions.append(probs)
        x = self.ln_f(x)
        if output_hidden_states:
            hidden.append(x)
        return BaseOutput(
            last_hidden_state=x,
            past=recorder.result(),
            hidden_states=tuple(hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
