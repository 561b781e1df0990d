"""The models with a head: language model, double heads, and the three task heads.

Letters: B batch, N choices, T new positions, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.inputs import (
    CHOICE_REMEDY,
    IGNORED_LABELS,
    LABELS_REMEDY,
    check_both_positions,
    check_labels_shape,
    check_not_empty,
    check_one_input,
    check_rank,
    check_whole_numbers,
    out_of_range,
)
from gpt2_core.parameters import Head
from gpt2_pt.generation import GenerationMixin
from gpt2_pt.model import GPT2Model, check_tensors
from gpt2_pt.outputs import ClassifierOutput, DoubleHeadsOutput, LMOutput, QuestionAnsweringOutput
from gpt2_pt.weights import PreTrainedModel, linear


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Mean negative log-likelihood in nats of ``labels`` (...) under ``logits`` (..., V), ignored labels left out.

    Half-precision logits are taken in float32. With every label ignored the mean of nothing is nan.

    Raises: InputError, for labels that are no whole numbers, or, on the CPU, that lie outside the vocabulary.
    """
    keep, other = IGNORED_LABELS
    size = logits.size(-1)
    check_whole_numbers(name, str(labels.dtype).removeprefix("torch."))
    labels = labels.to(torch.int64)
    labels = torch.where(labels == other, keep, labels)
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        wrong = (labels != keep) & ((labels < 0) | (labels >= size))
        if wrong.any():
            bad = labels[wrong]
            raise out_of_range(name, int(bad.min()), int(bad.max()), size, LABELS_REMEDY)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.reshape(-1, size), labels.reshape(-1), ignore_index=keep)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The language-model loss: position t of logits (..., T, V) is scored on label t + 1 of (..., T).

    Raises: InputError, for labels of another shape or outside the vocabulary.
    """
    check_labels_shape("labels", tuple(labels.shape), tuple(logits.shape[:-1]))
    # The labels move, not the logits: those are a large tensor, which would be copied.
    return cross_entropy(logits, F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABELS[0]))


def last_real(
    input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None, like: Tensor
) -> Tensor:
    """The index of each row's last real token, (rows,), for hidden states ``like`` (rows, T, C).

    Real is what the mask says; without one, what is not ``pad_token_id``; without that, everything.
    """
    rows, T = like.shape[:2]
    if attention_mask is not None:
        real = attention_mask[:, -T:].to(torch.bool)
    elif pad_token_id is not None and input_ids is not None:
        real = input_ids != pad_token_id
    else:
        return torch.full((rows,), T - 1, device=like.device)
    index = torch.arange(T, device=like.device)
    return torch.where(real, index, 0).amax(-1)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Row i's vector at position ``index[i]``: (rows, T, C), (rows,) -> (rows, C)."""
    return x[torch.arange(x.size(0), device=x.device), index]


class GPT2LMHeadModel(GenerationMixin, PreTrainedModel):
    """The language model: logits of the next token at every position.

    The head is the token table itself unless ``config.tie_word_embeddings`` is false.
    """

    head = Head.LM

    def _build(self, config: GPT2Config) -> None:
        self.transformer = GPT2Model(config, seed=None)
        self.lm_head = linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
    ) -> LMOutput:
        """As ``GPT2Model.forward``, with ``labels`` (B, T): the input ids themselves, shifted inside.

        Labels of -100 (and -1) do not count. Returns loss (scalar, nats per token), logits (B, T, V), past,
        hidden_states, attentions.

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
        check_tensors(labels=labels)
        out = self.transformer(
            input_ids,
            past,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            past_key_values=past_key_values,
        )
        logits = self.lm_head(out.last_hidden_state)  # (B, T, V)
        loss = shifted_loss(logits, labels) if labels is not None else None
        return LMOutput(loss, logits, out.past, out.hidden_states, out.attentions)


class MultipleChoiceHead(nn.Module):
    """One score for each sequence, from a summary of its hidden states."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.summary_type = config.summary_type
        self.summary = linear(config.n_embd, 1)
        self.activation = torch.tanh if config.summary_activation == "tanh" else None
        self.first_dropout = nn.Dropout(config.summary_first_dropout)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """(rows, T, C) and the position (rows,) that cls_index reads -> (rows,)."""
        if self.summary_type == "last":
            picked = x[:, -1]
        elif self.summary_type == "first":
            picked = x[:, 0]
        elif self.summary_type == "mean":
            picked = x.mean(dim=1)
        else:
            picked = rows_at(x, index)
        score: Tensor = self.summary(self.first_dropout(picked)).squeeze(-1)
        return self.activation(score) if self.activation is not None else score


class GPT2DoubleHeadsModel(GenerationMixin, PreTrainedModel):
    """A language model and a multiple-choice head on one transformer.

    Source: Radford et al. 2018, section 4.2 (the auxiliary objective), as used for next-utterance choice.
    """

    head = Head.DOUBLE

    def _build(self, config: GPT2Config) -> None:
        self.transformer = GPT2Model(config, seed=None)
        self.lm_head = linear(config.n_embd, config.vocab_size, bias=False)
        self.multiple_choice_head = MultipleChoiceHead(config)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mc_token_ids: Tensor | None = None,
        labels: Tensor | None = None,
        mc_labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        lm_labels: Tensor | None = None,
        past_key_values: Any = None,
    ) -> DoubleHeadsOutput:
        """As ``GPT2LMHeadModel.forward`` with an axis of choices: ``input_ids`` is (B, N, T).

        Args:
            mc_token_ids: (B, N) the position each choice is scored at; by default its last token that is not padding.
            labels: (B, N, T) for the language model, shifted inside; ``lm_labels`` is the same argument.
            mc_labels: (B,) the right choice.

        Returns loss (the sum of lm_loss and mc_loss, of those that have labels), logits (B, N, T, V),
        mc_logits (B, N), past, hidden_states and attentions with B and N folded into one axis.

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
        if labels is not None and lm_labels is not None:
            raise InputError("got both labels and lm_labels, which are two names of one argument; give one of them")
        labels = labels if labels is not None else lm_labels
        check_one_input(input_ids, inputs_embeds)
        check_tensors(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels,
            token_type_ids=token_type_ids, position_ids=position_ids, mc_token_ids=mc_token_ids, mc_labels=mc_labels,
        )  # fmt: skip
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if input_ids is not None:
            check_rank("input_ids", tuple(input_ids.shape), "(batch, choice, position)", 3)
        else:
            check_rank("inputs_embeds", tuple(given.shape), "(batch, choice, position, n_embd)", 4)
        check_not_empty(tuple(given.shape))
        B, N, T = given.shape[:3]

        def fold(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.reshape(-1, *tensor.shape[2:])

        out = self.transformer(
            fold(input_ids),
            past,
            fold(attention_mask),
            fold(token_type_ids),
            fold(position_ids),
            head_mask,
            fold(inputs_embeds),
            use_cache,
            output_attentions,
            output_hidden_states,
            past_key_values=past_key_values,
        )
        x = out.last_hidden_state  # (B * N, T, C)
        logits = self.lm_head(x).view(B, N, T, -1)
        if mc_token_ids is None:
            index = last_real(fold(input_ids), fold(attention_mask), self.config.pad_token_id, x)
        else:
            check_labels_shape("mc_token_ids", tuple(mc_token_ids.shape), (B, N))
            index = mc_token_ids.reshape(B * N)
            if not torch.compiler.is_compiling() and index.device.type == "cpu" and ((index < -T) | (index >= T)).any():
                raise out_of_range("mc_token_ids", int(index.min()), int(index.max()), T, CHOICE_REMEDY)
        mc_logits = self.multiple_choice_head(x, index).view(B, N)

        lm_loss = shifted_loss(logits, labels) if labels is not None else None
        mc_loss = None
        if mc_labels is not None:
            check_labels_shape("mc_labels", tuple(mc_labels.shape), (B,))
            mc_loss = cross_entropy(mc_logits, mc_labels, "mc_labels")
        losses = [loss for loss in (lm_loss, mc_loss) if loss is not None]
        total = losses[0] + losses[1] if len(losses) == 2 else (losses[0] if losses else None)
        return DoubleHeadsOutput(
            total, logits, mc_logits, out.past, out.hidden_states, out.attentions, lm_loss, mc_loss
        )


class GPT2ForSequenceClassification(PreTrainedModel):
    """One answer a text, read at its last real token."""

    head = Head.SEQUENCE

    def _build(self, config: GPT2Config) -> None:
        self.transformer = GPT2Model(config, seed=None)
        self.score = linear(config.n_embd, config.num_labels, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
    ) -> ClassifierOutput:
        """As ``GPT2Model.forward``; returns loss (with labels) and logits (B, num_labels).

        The last real token is found by the mask, else by ``config.pad_token_id``, else it is the last. The loss
        follows ``config.problem_type``; where that is None: mean squared error for one label, cross-entropy for
        whole-number ``labels`` (B,), binary cross-entropy for fractional ``labels`` (B, num_labels).

        Raises: InputError, for shapes, ids, labels or lengths that this model cannot take.
        """
        check_tensors(labels=labels)
        out = self.transformer(
            input_ids,
            past,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            past_key_values=past_key_values,
        )
        x = out.last_hidden_state
        logits = self.score(rows_at(x, last_real(input_ids, attention_mask, self.config.pad_token_id, x)))
        loss = None if labels is None else self._loss(logits, labels)
        return ClassifierOutput(loss, logits, out.past, out.hidden_states, out.attentions)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            if self.config.num_labels == 1:
                kind = "regression"
            else:
                kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "single_label_classification":
            check_labels_shape("labels", tuple(labels.shape), (logits.size(0),))
            return cross_entropy(logits, labels)
        if kind == "multi_label_classification":
            check_labels_shape("labels", tuple(labels.shape), tuple(logits.shape))
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        if kind == "regression":
            if labels.dim() == 1 and self.config.num_labels == 1:
                labels = labels.unsqueeze(-1)
            check_labels_shape("labels", tuple(labels.shape), tuple(logits.shape))
            return F.mse_loss(logits, labels.to(logits.dtype))
        raise InputError(
            f"config.problem_type is {kind!r}, expected None, 'regression', 'single_label_classification' or "
            "'multi_label_classification'"
        )


class GPT2ForTokenClassification(PreTrainedModel):
    """One answer a token."""

    head = Head.TOKEN

    def _build(self, config: GPT2Config) -> None:
        self.transformer = GPT2Model(config, seed=None)
        chance = config.classifier_dropout
        # The field's rule: classifier_dropout, or 0.1 where the config does not say.
        self.dropout = nn.Dropout(0.1 if chance is None else chance)
        self.classifier = linear(config.n_embd, config.num_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
    ) -> ClassifierOutput:
        """As ``GPT2Model.forward``; returns loss (with ``labels`` (B, T), not shifted) and logits (B, T, num_labels).

        Raises: InputError, for shapes, ids, labels or lengths that this model cannot take.
        """
        check_tensors(labels=labels)
        out = self.transformer(
            input_ids,
            past,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            past_key_values=past_key_values,
        )
        logits = self.classifier(self.dropout(out.last_hidden_state))  # (B, T, num_labels)
        loss = None
        if labels is not None:
            check_labels_shape("labels", tuple(labels.shape), tuple(logits.shape[:-1]))
            loss = cross_entropy(logits, labels)
        return ClassifierOutput(loss, logits, out.past, out.hidden_states, out.attentions)


class GPT2ForQuestionAnswering(PreTrainedModel):
    """Where in the text an answer starts and ends."""

    head = Head.QA

    def _build(self, config: GPT2Config) -> None:
        self.transformer = GPT2Model(config, seed=None)
        self.qa_outputs = linear(config.n_embd, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
    ) -> QuestionAnsweringOutput:
        """As ``GPT2Model.forward``; returns loss (with both positions, (B,)), start_logits and end_logits (B, T).

        Positions outside the text do not count, as for answers cut off by truncation.

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
        check_tensors(start_positions=start_positions, end_positions=end_positions)
        out = self.transformer(
            input_ids,
            past,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            past_key_values=past_key_values,
        )
        start_logits, end_logits = self.qa_outputs(out.last_hidden_state).unbind(-1)  # (B, T) each
        loss = None
        check_both_positions(start_positions, end_positions)
        if start_positions is not None and end_positions is not None:
            parts = []
            T = start_logits.size(1)
            for name, logits, wanted in (
                ("start_positions", start_logits, start_positions),
                ("end_positions", end_logits, end_positions),
            ):
                wanted = wanted.reshape(wanted.size(0)) if wanted.dim() == 2 and wanted.size(1) == 1 else wanted
                check_labels_shape(name, tuple(wanted.shape), (logits.size(0),))
                inside = (wanted >= 0) & (wanted < T)
                parts.append(cross_entropy(logits, torch.where(inside, wanted, IGNORED_LABELS[0]), name))
            loss = (parts[0] + parts[1]) / 2
        return QuestionAnsweringOutput(loss, start_logits, end_logits, out.past, out.hidden_states, out.attentions)
