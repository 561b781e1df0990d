"""What stands on the reference transformer: language model, multiple choice, classifiers, and their losses.

Kernels of heads are (out, in), as the checkpoints of the field store them; so it is x @ weight.T.

Letters: B rows, N choices of each, T new tokens, C model width, V vocabulary, L labels. Losses are in nats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.inputs import (
    CHOICE_REMEDY,
    IGNORED_LABELS,
    LABELS_REMEDY,
    check_both_positions,
    check_labels_shape,
    check_not_empty,
    check_rank,
    out_of_range,
)
from gpt2_core.outputs import BaseOutput, ClassifierOutput, DoubleHeadsOutput, LMOutput, QuestionAnsweringOutput
from gpt2_core.parameters import PREFIX, Head

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

# Which head reads which argument.
_READS: dict[Head, tuple[str, ...]] = {
    Head.NONE: (),
    Head.LM: ("labels",),
    Head.DOUBLE: ("labels", "mc_token_ids", "mc_labels"),
    Head.SEQUENCE: ("labels",),
    Head.TOKEN: ("labels",),
    Head.QA: ("start_positions", "end_positions"),
}


def unused_arguments(head: Head, **given: Any) -> list[str]:
    """Names of the arguments that were given and that ``head`` would not read."""
    return [name for name, value in given.items() if value is not None and name not in _READS[head]]


# -- losses --------------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, labels: Any, name: str = "labels") -> np.float64:
    """Mean of -log(probability of the label): logits (..., V), labels (...) -> (); nan where all are ignored.

    >>> round(float(cross_entropy(np.zeros((2, 4)), [3, -100])), 4)      # log 4: one of four, all alike
    1.3863

    Raises: InputError, for labels outside the vocabulary that are not ignored.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {labels.dtype}, expected whole numbers")
    counts = ~np.isin(labels, IGNORED_LABELS)
    kept, wanted = logits[counts], labels[counts]  # (n, V), (n,)
    if not len(wanted):
        return np.float64(np.nan)
    if wanted.min() < 0 or wanted.max() >= logits.shape[-1]:
        raise out_of_range(name, int(wanted.min()), int(wanted.max()), logits.shape[-1], LABELS_REMEDY)
    highest = kept.max(axis=-1)
    log_total = highest + np.log(np.exp(kept - highest[:, None]).sum(axis=-1))  # (n,)
    loss: np.float64 = (log_total - kept[np.arange(len(kept)), wanted]).mean()
    return loss


def shifted_loss(logits: Array, labels: Any) -> np.float64:
    """The language-model loss: position t of logits (..., T, V) is scored on label t + 1 of (..., T)."""
    labels = np.asarray(labels)
    check_labels_shape("labels", labels.shape, logits.shape[:-1])
    return cross_entropy(logits[..., :-1, :], labels[..., 1:])


# -- one function a head -------------------------------------------------------------------------------------


def vocabulary_logits(weights: dict[str, Array], config: GPT2Config, x: Array) -> Array:
    """(..., C) -> (..., V), through the token table itself unless the head is untied."""
    name = f"{PREFIX}wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits: Array = x @ weights[name].T
    return logits


def language_model(weights: dict[str, Array], config: GPT2Config, out: BaseOutput, labels: Any) -> LMOutput:
    """Logits (B, T, V) of the next token at every position."""
    logits = vocabulary_logits(weights, config, out.last_hidden_state)
    loss = None if labels is None else shifted_loss(logits, labels)
    return LMOutput(loss, logits, out.past, out.hidden_states, out.attentions)


def token_classifier(weights: dict[str, Array], out: BaseOutput, labels: Any) -> ClassifierOutput:
    """Logits (B, T, L), one answer a token."""
    logits = out.last_hidden_state @ weights["classifier.weight"].T + weights["classifier.bias"]
    loss = None
    if labels is not None:
        check_labels_shape("labels", np.shape(labels), logits.shape[:-1])
        loss = cross_entropy(logits, labels)
    return ClassifierOutput(loss, logits, out.past, out.hidden_states, out.attentions)


def question_answering(
    weights: dict[str, Array], out: BaseOutput, start_positions: Any, end_positions: Any
) -> QuestionAnsweringOutput:
    """Where an answer starts and ends: (B, T) each. Positions outside the text do not count."""
    logits = out.last_hidden_state @ weights["qa_outputs.weight"].T + weights["qa_outputs.bias"]  # (B, T, 2)
    start, end = logits[..., 0], logits[..., 1]
    check_both_positions(start_positions, end_positions)
    loss = None
    if start_positions is not None:
        loss = (_position_loss(start, "start_positions", start_positions)
                + _position_loss(end, "end_positions", end_positions)) / 2  # fmt: skip
    return QuestionAnsweringOutput(loss, start, end, out.past, out.hidden_states, out.attentions)


def _position_loss(logits: Array, name: str, wanted: Any) -> np.float64:
    wanted = np.asarray(wanted)
    wanted = wanted[:, 0] if wanted.ndim == 2 and wanted.shape[1] == 1 else wanted
    check_labels_shape(name, wanted.shape, logits.shape[:1])
    inside = (wanted >= 0) & (wanted < logits.shape[1])
    return cross_entropy(logits, np.where(inside, wanted, IGNORED_LABELS[0]), name)


def last_real(input_ids: Any, attention_mask: Any, pad_token_id: int | None, B: int, T: int) -> Ids:
    """The index (B,) of each row's last real token among the new ones.

    Real is what the mask says; without one, what is not ``pad_token_id``; without that, everything.
    """
    if attention_mask is not None:
        real = np.asarray(attention_mask)[:, -T:] != 0
    elif pad_token_id is not None and input_ids is not None:
        real = np.asarray(input_ids) != pad_token_id
    else:
        return np.full(B, T - 1)
    last: Ids = np.where(real, np.arange(T), 0).max(axis=1)
    return last


def sequence_classifier(
    weights: dict[str, Array], config: GPT2Config, out: BaseOutput, last: Ids, labels: Any
) -> ClassifierOutput:
    """Logits (B, L), read at each row's last real token."""
    picked = out.last_hidden_state[np.arange(len(last)), last]  # (B, C)
    logits = picked @ weights["score.weight"].T
    loss = None if labels is None else _sequence_loss(logits, config, np.asarray(labels))
    return ClassifierOutput(loss, logits, out.past, out.hidden_states, out.attentions)


def _sequence_loss(logits: Array, config: GPT2Config, labels: NDArray[Any]) -> np.float64:
    """The loss of ``config.problem_type``; where that is None, of what the labels look like."""
    kind = config.problem_type
    if kind is None:
        whole = "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else whole
    if kind == "single_label_classification":
        check_labels_shape("labels", labels.shape, logits.shape[:1])
        return cross_entropy(logits, labels)
    if labels.ndim == 1 and config.num_labels == 1:
        labels = labels[:, None]
    check_labels_shape("labels", labels.shape, logits.shape)
    if kind == "regression":
        return np.float64(((logits - labels) ** 2).mean())
    # Binary cross-entropy of each label on its own, written so that no exponential overflows.
    return np.float64((np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))).mean())


# -- double heads --------------------------------------------------------------------------------------------


def choices_of(input_ids: Any, inputs_embeds: Any) -> tuple[int, int]:
    """(B, N) of input with an axis of choices.

    Raises: InputError, for input without one.
    """
    if input_ids is not None:
        shape = np.shape(input_ids)
        check_rank("input_ids", shape, "(batch, choice, position)", 3)
    else:
        shape = np.shape(inputs_embeds)
        check_rank("inputs_embeds", shape, "(batch, choice, position, n_embd)", 4)
    check_not_empty(shape)
    return shape[0], shape[1]


def fold(given: Any) -> Any:
    """(B, N, ...) -> (B * N, ...); None stays None."""
    if given is None:
        return None
    array = np.asarray(given)
    return array.reshape(-1, *array.shape[2:])


def double_heads(
    weights: dict[str, Array],
    config: GPT2Config,
    out: BaseOutput,
    last: Ids,  # (B * N,)
    choices: Any,  # (B, N)
    labels: Any,
    mc_token_ids: Any,
    mc_labels: Any,
) -> DoubleHeadsOutput:
    """Logits (B, N, T, V) of the language model and one score for each choice (B, N)."""
    x = out.last_hidden_state  # (B * N, T, C)
    logits = vocabulary_logits(weights, config, x).reshape(*choices, x.shape[1], -1)
    index = last if mc_token_ids is None else _choice_index(mc_token_ids, choices, x.shape[1])
    picked = _summary(x, config.summary_type, index)  # (B * N, C)
    score = picked @ weights["multiple_choice_head.summary.weight"].T + weights["multiple_choice_head.summary.bias"]
    mc_logits = (np.tanh(score) if config.summary_activation == "tanh" else score).reshape(choices)
    lm_loss = None if labels is None else shifted_loss(logits, labels)
    mc_loss = None
    if mc_labels is not None:
        check_labels_shape("mc_labels", np.shape(mc_labels), choices[:1])
        mc_loss = cross_entropy(mc_logits, mc_labels, "mc_labels")
    losses = [loss for loss in (lm_loss, mc_loss) if loss is not None]
    total = sum(losses[1:], losses[0]) if losses else None
    return DoubleHeadsOutput(total, logits, mc_logits, out.past, out.hidden_states, out.attentions, lm_loss, mc_loss)


def _choice_index(mc_token_ids: Any, choices: tuple[int, int], T: int) -> Ids:
    """Where each choice is read, (B * N,); negative ones count from the end."""
    index = np.asarray(mc_token_ids)
    check_labels_shape("mc_token_ids", index.shape, choices)
    if index.min() < -T or index.max() >= T:
        raise out_of_range("mc_token_ids", int(index.min()), int(index.max()), T, CHOICE_REMEDY)
    return index.reshape(-1)


def _summary(x: Array, kind: str, index: Ids) -> Array:
    """One vector for each sequence: (rows, T, C) -> (rows, C)."""
    if kind == "mean":
        mean: Array = x.mean(axis=1)
        return mean
    at: Any = {"last": -1, "first": 0}.get(kind, index)
    picked: Array = x[np.arange(len(x)), at]
    return picked
