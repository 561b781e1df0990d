"""How the next token is chosen, on the device: the rules of `gpt2_core.sampling`, for all rows at once.

What each rule means, its edge cases and its source stand there; `tests/tf/test_sampling.py` holds these to it.

Letters: R rows, V vocabulary, n tokens so far. ``history`` (R, n) holds -1 where a row has padding, on the left.
A rule takes scores (R, V) in float64 and gives scores (R, V); a banned token's score is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from gpt2_core.sampling import GenerationConfig, active_rules
from gpt2_tf.layers import Tensor, dims


def _ban(scores: Tensor, banned: Tensor) -> Tensor:
    return tf.where(banned, tf.cast(-math.inf, scores.dtype), scores)


def _marked(ids: Tensor, R: Any, V: int) -> Tensor:
    """Which tokens ``ids`` (R, n) names, (R, V); V and -1 name none."""
    rows = tf.repeat(tf.range(R), tf.shape(ids)[1])
    flat = tf.reshape(tf.cast(ids, tf.int32), (-1,))
    inside = (flat >= 0) & (flat < V)
    places = tf.stack((rows, tf.where(inside, flat, V)), axis=1)
    # Those that name none fall into a column of their own.
    return tf.scatter_nd(places, tf.ones_like(flat), (R, V + 1))[:, :V] > 0


def repetition_penalty(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make tokens of the row, prompt included, less likely."""
    R, V = dims(scores)
    penalised = tf.where(scores > 0, scores / penalty, scores * penalty)
    return tf.where(_marked(history, R, V), penalised, scores)


def no_repeat_ngram_size(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Ban every token that would make ``size`` consecutive tokens occur a second time in the row."""
    R, V = dims(scores)
    n = dims(history)[1]
    if isinstance(n, int) and n < size:
        return scores
    count = tf.maximum(n - size + 1, 0)
    grams = tf.gather(history, tf.range(count)[:, None] + tf.range(size)[None, :], axis=1)  # (R, count, size)
    before = history[:, n - (size - 1) :]  # the size - 1 tokens that the new one follows
    repeats = tf.reduce_all(grams[:, :, :-1] == before[:, None], axis=-1) & tf.reduce_all(grams >= 0, axis=-1)
    return _ban(scores, _marked(tf.where(repeats, grams[:, :, -1], -1), R, V))


def bad_words_ids(scores: Tensor, history: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Ban the last token of each word where the row ends in the tokens before it."""
    _, V = dims(scores)
    n = dims(history)[1]
    for word in words:
        *before, last = word
        if isinstance(n, int) and len(before) > n:
            continue
        ends = tf.reduce_all(history[:, n - len(before) :] == tf.constant(before, history.dtype), axis=-1)
        scores = _ban(scores, ends[:, None] & (tf.range(V) == last)[None])
    return scores


def min_new_tokens(scores: Tensor, made: int, least: int, eos_ids: Sequence[int]) -> Tensor:
    """Ban the end-of-text tokens while fewer than ``least`` new tokens were made."""
    return suppress_tokens(scores, eos_ids) if made < least else scores


def suppress_tokens(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Ban these tokens everywhere."""
    if len(tokens) == 0:
        return scores
    listed = tf.constant(list(tokens), tf.int32)
    return _ban(scores, tf.reduce_any(tf.range(dims(scores)[1])[:, None] == listed, axis=1)[None])


def temperature(scores: Tensor, value: float) -> Tensor:
    """Divide the scores."""
    return scores / value


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, of equal ones the lower ids."""
    k = min(k, dims(scores)[1])
    edge = tf.math.top_k(scores, k).values[:, -1:]  # (R, 1): the lowest score that is kept
    above, tied = scores > edge, scores == edge
    room = k - tf.reduce_sum(tf.cast(above, tf.int32), axis=-1, keepdims=True)
    keep = above | (tied & (tf.cumsum(tf.cast(tied, tf.int32), axis=-1) <= room))
    return _ban(scores, ~keep)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of the likeliest tokens whose probability reaches ``p``."""
    return _keep_reaching(scores, softmax(scores), tf.argsort(-scores, axis=-1, stable=True), p)


def min_p(scores: Tensor, p: float) -> Tensor:
    """Keep the tokens at least ``p`` times as likely as the likeliest one."""
    return _ban(scores, scores < tf.reduce_max(scores, axis=-1, keepdims=True) + math.log(p))


def typical_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of the most typical tokens whose probability reaches ``p``."""
    probabilities = softmax(scores)
    there = probabilities > 0
    surprisal = tf.where(there, -tf.math.log(probabilities), tf.cast(math.inf, scores.dtype))
    entropy = tf.reduce_sum(tf.where(there, probabilities * surprisal, 0.0), axis=-1, keepdims=True)
    order = tf.argsort(tf.abs(surprisal - entropy), axis=-1, stable=True)
    return _keep_reaching(scores, probabilities, order, p)


def _keep_reaching(scores: Tensor, probabilities: Tensor, order: Tensor, p: float) -> Tensor:
    """Keep the first tokens of ``order`` until their probability is at least ``p``; at least one."""
    # A token stays if the sum before it is still short of p.
    before = tf.cumsum(tf.gather(probabilities, order, batch_dims=1), axis=-1, exclusive=True)
    back = tf.argsort(order, axis=-1)  # where each token stands in the order
    return _ban(scores, ~tf.gather(before < p, back, batch_dims=1))


def apply_rules(
    scores: Tensor, history: Tensor, config: GenerationConfig, made: int = 0, eos_ids: Sequence[int] = ()
) -> Tensor:
    """All rules that ``config`` switches on, in the order of `gpt2_core.sampling.RULES`: logits (R, V) -> (R, V)."""
    scores = tf.cast(scores, tf.float64)
    for name in active_rules(config):
        rule, value = _BY_NAME[name], getattr(config, name)
        if rule in (repetition_penalty, no_repeat_ngram_size, bad_words_ids):
            scores = rule(scores, history, value)
        elif rule is min_new_tokens:
            scores = rule(scores, made, value, eos_ids)
        else:
            scores = rule(scores, value)
    return scores


_BY_NAME: Mapping[str, Callable[..., Tensor]] = {
    rule.__name__: rule
    for rule in (
        repetition_penalty,
        no_repeat_ngram_size,
        bad_words_ids,
        min_new_tokens,
        suppress_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        typical_p,
    )
}


def softmax(scores: Tensor) -> Tensor:
    """Probabilities (R, V) of scores (R, V)."""
    return tf.nn.softmax(scores, axis=-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at ``uniforms`` (R,) of the way through each row of probabilities (R, V), in id order: (R,)."""
    cumulative = tf.cumsum(probabilities, axis=-1)
    target = tf.cast(uniforms, cumulative.dtype)[:, None] * cumulative[:, -1:]
    return tf.cast(tf.searchsorted(cumulative, target, side="right")[:, 0], tf.int64)


def choose(scores: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """The next tokens (R,): drawn by uniform numbers (R,), else the likeliest, of equals the lower id."""
    if uniforms is not None:
        return draw(softmax(scores), uniforms)
    return tf.argmax(scores, axis=-1, output_type=tf.int64)  # of equals it takes the first


def problem(scores: Tensor) -> Tensor:
    """What is wrong with each row (R,): 0 nothing, 1 nan or +inf, 2 every token banned."""
    infinite = tf.math.is_inf(scores)
    numbers = tf.reduce_any(tf.math.is_nan(scores) | (infinite & (scores > 0)), axis=-1)
    banned = tf.reduce_all(infinite & (scores < 0), axis=-1)
    return tf.where(numbers, 1, tf.where(banned, 2, 0))
