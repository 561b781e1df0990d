"""The models with a head: language model, double heads, and the three task heads.

Letters: B batch, N choices, T new positions, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

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
from gpt2_tf.fitting import Scored
from gpt2_tf.generation import GenerationMixin
from gpt2_tf.layers import Part, Tensor, dims, dropout, is_concrete, known
from gpt2_tf.model import TFGPT2Model
from gpt2_tf.outputs import ClassifierOutput, DoubleHeadsOutput, LMOutput, QuestionAnsweringOutput
from gpt2_tf.weights import PreTrainedModel, inputs_together, linear, registered


def cross_entropy(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """Mean negative log-likelihood in nats of ``labels`` (...) under ``logits`` (..., V), ignored labels left out.

    Half-precision logits are taken in float32. With every label ignored the mean of nothing is nan.

    Raises: InputError, for labels that are no whole numbers, or, outside tf.function on the CPU, that lie outside the
    vocabulary.
    """
    size = logits.shape[-1]
    check_whole_numbers(name, labels.dtype.name)
    keep = tf.reduce_all([tf.not_equal(labels, tf.cast(ignored, labels.dtype)) for ignored in IGNORED_LABELS], axis=0)
    if is_concrete(labels):
        kept = tf.boolean_mask(labels, keep).numpy()
        if kept.size and (kept.min() < 0 or kept.max() >= size):
            wrong = kept[(kept < 0) | (kept >= size)]
            raise out_of_range(name, int(wrong.min()), int(wrong.max()), size, LABELS_REMEDY)
    wide = logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(keep, labels, tf.zeros((), labels.dtype)), logits=wide
    )
    counted = tf.cast(keep, wide.dtype)
    return tf.reduce_sum(each * counted) / tf.reduce_sum(counted)


def shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The language-model loss: position t of logits (..., T, V) is scored on label t + 1 of (..., T).

    Raises: InputError, for labels of another shape or outside the vocabulary.
    """
    check_labels_shape("labels", known(labels), known(logits)[:-1])
    # The labels move, not the logits: those are a large tensor, which would be copied.
    nothing = tf.fill(dims(labels[..., :1]), tf.cast(IGNORED_LABELS[0], labels.dtype))
    return cross_entropy(logits, tf.concat((labels[..., 1:], nothing), axis=-1))


def last_real(
    input_ids: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None, like: Tensor
) -> Tensor:
    """The index of each row's last real token, (rows,), for hidden states ``like`` (rows, T, C).

    Real is what the mask says; without one, what is not ``pad_token_id``; without that, everything.
    """
    rows, T, _ = dims(like)
    if attention_mask is not None:
        shown = attention_mask[:, -T:]
        real = tf.not_equal(shown, tf.zeros((), shown.dtype))
    elif pad_token_id is not None and input_ids is not None:
        real = tf.not_equal(input_ids, tf.cast(pad_token_id, input_ids.dtype))
    else:
        return tf.fill((rows,), T - 1)
    return tf.reduce_max(tf.where(real, tf.range(T), 0), axis=-1)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Row i's vector at position ``index[i]``: (rows, T, C), (rows,) -> (rows, C)."""
    _, T, _ = dims(x)
    index = tf.cast(index, tf.int32)
    return tf.gather(x, tf.where(index < 0, index + T, index), batch_dims=1)


@registered
class TFGPT2LMHeadModel(GenerationMixin, PreTrainedModel):
    """The language model: logits of the next token at every position.

    The head is the token table itself unless ``config.tie_word_embeddings`` is false.
    """

    head = Head.LM
    _scored = (Scored("labels", "logits", shifted=True),)

    def _build(self, config: GPT2Config) -> None:
        self.transformer = TFGPT2Model(config, seed=None, name="transformer", dtype=self.dtype_policy)
        self.lm_head = self._language_head(config)

    @inputs_together
    def call(
        self,
        input_ids: Any = None,
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
        training: bool | None = None,
    ) -> LMOutput:
        """As ``TFGPT2Model.call``, with ``labels`` (B, T): the input ids themselves, shifted inside.

        Labels of -100 (and -1) do not count. Returns loss (scalar, nats per token), logits (B, T, V), past,
        hidden_states, attentions.

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
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
            training=training,
        )
        logits = self.lm_head(out.last_hidden_state)  # (B, T, V)
        loss = shifted_loss(logits, labels) if labels is not None else None
        return LMOutput(loss, logits, out.past, out.hidden_states, out.attentions)


class MultipleChoiceHead(Part):
    """One score for each sequence, from a summary of its hidden states."""

    def __init__(self, config: GPT2Config, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.summary_type = config.summary_type
        with self.naming():
            self.summary = linear(config.n_embd, 1, name="summary", dtype=self.dtype_policy)
        self.activation = tf.tanh if config.summary_activation == "tanh" else None
        self.summary_first_dropout = config.summary_first_dropout

    def call(self, x: Tensor, index: Tensor, seed: Tensor | None = None) -> Tensor:
        """(rows, T, C) and the position (rows,) that cls_index reads -> (rows,); a ``seed`` switches dropout on."""
        if self.summary_type == "last":
            picked = x[:, -1]
        elif self.summary_type == "first":
            picked = x[:, 0]
        elif self.summary_type == "mean":
            picked = tf.reduce_mean(x, axis=1)
        else:
            picked = rows_at(x, index)
        score = tf.squeeze(self.summary(dropout(picked, self.summary_first_dropout, seed)), axis=-1)
        return self.activation(score) if self.activation is not None else score


@registered
class TFGPT2DoubleHeadsModel(GenerationMixin, PreTrainedModel):
    """A language model and a multiple-choice head on one transformer.

    Source: Radford et al. 2018, section 4.2 (the auxiliary objective), as used for next-utterance choice.
    """

    head = Head.DOUBLE
    _scored = (Scored("labels", "logits", shifted=True), Scored("mc_labels", "mc_logits"))

    def _build(self, config: GPT2Config) -> None:
        self.transformer = TFGPT2Model(config, seed=None, name="transformer", dtype=self.dtype_policy)
        self.lm_head = self._language_head(config)
        self.multiple_choice_head = MultipleChoiceHead(config, name="multiple_choice_head", dtype=self.dtype_policy)

    @inputs_together
    def call(
        self,
        input_ids: Any = None,
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
        training: bool | None = None,
    ) -> DoubleHeadsOutput:
        """As ``TFGPT2LMHeadModel.call`` with an axis of choices: ``input_ids`` is (B, N, T).

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
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        if input_ids is not None:
            check_rank("input_ids", known(input_ids), "(batch, choice, position)", 3)
        else:
            check_rank("inputs_embeds", known(given), "(batch, choice, position, n_embd)", 4)
        check_not_empty(known(given))
        B, N, T = dims(given)[:3]
        shape = known(given)[:3]

        def fold(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            sizes = dims(tensor)
            return tf.reshape(tensor, (sizes[0] * sizes[1], *sizes[2:]))

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
            training=training,
        )
        x = out.last_hidden_state  # (B * N, T, C)
        logits = tf.reshape(self.lm_head(x), (B, N, T, self.lm_head.weight.shape[0]))
        if mc_token_ids is None:
            index = last_real(fold(input_ids), fold(attention_mask), self.config.pad_token_id, x)
        else:
            check_labels_shape("mc_token_ids", known(mc_token_ids), shape[:2])
            index = tf.reshape(mc_token_ids, (-1,))
            if is_concrete(index):
                low, high = int(tf.reduce_min(index)), int(tf.reduce_max(index))
                if low < -T or high >= T:
                    raise out_of_range("mc_token_ids", low, high, T, CHOICE_REMEDY)
        seed = tf.cast(self.transformer.seed_generator.next(), tf.int32) if training else None
        mc_logits = tf.reshape(self.multiple_choice_head(x, index, seed), (B, N))

        lm_loss = shifted_loss(logits, labels) if labels is not None else None
        mc_loss = None
        if mc_labels is not None:
            check_labels_shape("mc_labels", known(mc_labels), shape[:1])
            mc_loss = cross_entropy(mc_logits, mc_labels, "mc_labels")
        losses = [loss for loss in (lm_loss, mc_loss) if loss is not None]
        total = losses[0] + losses[1] if len(losses) == 2 else (losses[0] if losses else None)
        return DoubleHeadsOutput(
            total, logits, mc_logits, out.past, out.hidden_states, out.attentions, lm_loss, mc_loss
        )


@registered
class TFGPT2ForSequenceClassification(PreTrainedModel):
    """One answer a text, read at its last real token."""

    head = Head.SEQUENCE
    _scored = (Scored("labels", "logits"),)

    def _build(self, config: GPT2Config) -> None:
        self.transformer = TFGPT2Model(config, seed=None, name="transformer", dtype=self.dtype_policy)
        self.score = linear(config.n_embd, config.num_labels, bias=False, name="score", dtype=self.dtype_policy)

    @inputs_together
    def call(
        self,
        input_ids: Any = None,
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
        training: bool | None = None,
    ) -> ClassifierOutput:
        """As ``TFGPT2Model.call``; returns loss (with labels) and logits (B, num_labels).

        The last real token is found by the mask, else by ``config.pad_token_id``, else it is the last. The loss
        follows ``config.problem_type``; where that is None: mean squared error for one label, cross-entropy for
        whole-number ``labels`` (B,), binary cross-entropy for fractional ``labels`` (B, num_labels).

        Raises: InputError, for shapes, ids, labels or lengths that this model cannot take.
        """
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
            training=training,
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
                kind = "multi_label_classification" if labels.dtype.is_floating else "single_label_classification"
        if kind == "single_label_classification":
            check_labels_shape("labels", known(labels), known(logits)[:1])
            return cross_entropy(logits, labels)
        if kind == "multi_label_classification":
            check_labels_shape("labels", known(labels), known(logits))
            each = tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.cast(labels, logits.dtype), logits=logits)
            return tf.reduce_mean(each)
        if kind == "regression":
            if labels.shape.rank == 1 and self.config.num_labels == 1:
                labels = labels[:, None]
            check_labels_shape("labels", known(labels), known(logits))
            return tf.reduce_mean(tf.square(logits - tf.cast(labels, logits.dtype)))
        raise InputError(
            f"config.problem_type is {kind!r}, expected None, 'regression', 'single_label_classification' or "
            "'multi_label_classification'"
        )


@registered
class TFGPT2ForTokenClassification(PreTrainedModel):
    """One answer a token."""

    head = Head.TOKEN
    _scored = (Scored("labels", "logits"),)

    def _build(self, config: GPT2Config) -> None:
        self.transformer = TFGPT2Model(config, seed=None, name="transformer", dtype=self.dtype_policy)
        chance = config.classifier_dropout
        # The field's rule: classifier_dropout, or 0.1 where the config does not say.
        self.classifier_dropout = 0.1 if chance is None else chance
        self.classifier = linear(config.n_embd, config.num_labels, name="classifier", dtype=self.dtype_policy)

    @inputs_together
    def call(
        self,
        input_ids: Any = None,
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
        training: bool | None = None,
    ) -> ClassifierOutput:
        """As ``TFGPT2Model.call``; returns loss (with ``labels`` (B, T), not shifted) and logits (B, T, num_labels).

        Raises: InputError, for shapes, ids, labels or lengths that this model cannot take.
        """
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
            training=training,
        )
        seed = tf.cast(self.transformer.seed_generator.next(), tf.int32) if training else None
        logits = self.classifier(dropout(out.last_hidden_state, self.classifier_dropout, seed))  # (B, T, num_labels)
        loss = None
        if labels is not None:
            check_labels_shape("labels", known(labels), known(logits)[:-1])
            loss = cross_entropy(logits, labels)
        return ClassifierOutput(loss, logits, out.past, out.hidden_states, out.attentions)


@registered
class TFGPT2ForQuestionAnswering(PreTrainedModel):
    """Where in the text an answer starts and ends."""

    head = Head.QA
    _scored = (Scored("start_positions", "start_logits"), Scored("end_positions", "end_logits"))

    def _build(self, config: GPT2Config) -> None:
        self.transformer = TFGPT2Model(config, seed=None, name="transformer", dtype=self.dtype_policy)
        self.qa_outputs = linear(config.n_embd, 2, name="qa_outputs", dtype=self.dtype_policy)

    @inputs_together
    def call(
        self,
        input_ids: Any = None,
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
        training: bool | None = None,
    ) -> QuestionAnsweringOutput:
        """As ``TFGPT2Model.call``; returns loss (with both positions, (B,)), start_logits and end_logits (B, T).

        Positions outside the text do not count, as for answers cut off by truncation.

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
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
            training=training,
        )
        start_logits, end_logits = tf.unstack(self.qa_outputs(out.last_hidden_state), num=2, axis=-1)  # (B, T) each
        loss = None
        check_both_positions(start_positions, end_positions)
        if start_positions is not None and end_positions is not None:
            parts = []
            T = dims(start_logits)[1]
            for name, logits, wanted in (
                ("start_positions", start_logits, start_positions),
                ("end_positions", end_logits, end_positions),
            ):
                wanted = wanted[:, 0] if wanted.shape.rank == 2 and wanted.shape[1] == 1 else wanted
                check_labels_shape(name, known(wanted), known(logits)[:1])
                inside = (wanted >= 0) & (wanted < tf.cast(T, wanted.dtype))
                parts.append(
                    cross_entropy(logits, tf.where(inside, wanted, tf.cast(IGNORED_LABELS[0], wanted.dtype)), name)
                )
            loss = (parts[0] + parts[1]) / 2
        return QuestionAnsweringOutput(loss, start_logits, end_logits, out.past, out.hidden_states, out.attentions)
