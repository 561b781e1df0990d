"""How the next token is chosen, on the device: the rules of `gpt2_core.sampling`, for all rows at once.

What each rule means, its edge cases and its source stand there; `tests/pt/test_sampling.py` holds these to it.

Letters: R rows, V vocabulary, n tokens so far. ``history`` (R, n) holds -1 where a row has padding, on the left.
A rule takes scores (R, V) in float64 and gives scores (R, V); a banned token's score is -inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gpt2_core.sampling import GenerationConfig, active_rules


def repetition_penalty(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Make tokens of the row, prompt included, less likely."""
    R, V = scores.shape
    seen = torch.zeros(R, V + 1, dtype=torch.bool, device=scores.device)
    seen.scatter_(1, torch.where(history < 0, V, history), True)  # padding falls into a column of its own
    penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen[:, :V], penalised, scores)


def no_repeat_ngram_size(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """Ban every token that would make ``size`` consecutive tokens occur a second time in the row."""
    R, V = scores.shape
    if history.size(1) < size:
        return scores
    grams = history.unfold(1, size, 1)  # (R, n - size + 1, size)
    before = history[:, history.size(1) - (size - 1) :]  # the size - 1 tokens that the new one follows
    repeats = (grams[:, :, :-1] == before.unsqueeze(1)).all(-1) & (grams >= 0).all(-1)
    banned = torch.zeros(R, V + 1, dtype=torch.bool, device=scores.device)
    banned.scatter_(1, torch.where(repeats, grams[:, :, -1], V), True)
    return scores.masked_fill(banned[:, :V], -math.inf)


def bad_words_ids(scores: Tensor, history: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Ban the last token of each word where the row ends in the tokens before it."""
    scores = scores.clone()
    for word in words:
        *before, last = word
        if len(before) > history.size(1):
            continue
        ends = history[:, history.size(1) - len(before) :] == history.new_tensor(before)
        scores[:, last] = scores[:, last].masked_fill(ends.all(-1), -math.inf)
    return scores


def min_new_tokens(scores: Tensor, made: int, least: int, eos_ids: Sequence[int]) -> Tensor:
    """Ban the end-of-text tokens while fewer than ``least`` new tokens were made."""
    return suppress_tokens(scores, eos_ids) if made < least else scores


def suppress_tokens(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Ban these tokens everywhere."""
    index = torch.tensor(list(tokens), dtype=torch.int64, device=scores.device)
    return scores.index_fill(1, index, -math.inf)


def temperature(scores: Tensor, value: float) -> Tensor:
    """Divide the scores."""
    return scores / value


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, of equal ones the lower ids."""
    k = min(k, scores.size(1))
    edge = scores.topk(k).values[:, -1:]  # (R, 1): the lowest score that is kept
    above, tied = scores > edge, scores == edge
    room = k - above.sum(-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(-1) <= room))
    return scores.masked_fill(~keep, -math.inf)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of the likeliest tokens whose probability reaches ``p``."""
    order = scores.sort(descending=True, stable=True).indices
    return _keep_reaching(scores, softmax(scores), order, p)


def min_p(scores: Tensor, p: float) -> Tensor:
    """Keep the tokens at least ``p`` times as likely as the likeliest one."""
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + math.log(p), -math.inf)


def typical_p(scores: Tensor, p: float) -> Tensor:
    """Keep the smallest set of the most typical tokens whose probability reaches ``p``."""
    probabilities = softmax(scores)
    surprisal = torch.where(probabilities > 0, -probabilities.log(), math.inf)
    entropy = torch.where(probabilities > 0, probabilities * surprisal, 0.0).sum(-1, keepdim=True)
    order = (surprisal - entropy).abs().sort(stable=True).indices
    return _keep_reaching(scores, probabilities, order, p)


def _keep_reaching(scores: Tensor, probabilities: Tensor, order: Tensor, p: float) -> Tensor:
    """Keep the first tokens of ``order`` until their probability is at least ``p``; at least one."""
    summed = probabilities.gather(1, order).cumsum(-1)
    # A token stays if the sum before it is still short of p.
    before = torch.cat((torch.zeros_like(summed[:, :1]), summed[:, :-1]), dim=1)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, before < p)
    return scores.masked_fill(~keep, -math.inf)


def apply_rules(
    scores: Tensor, history: Tensor, config: GenerationConfig, made: int = 0, eos_ids: Sequence[int] = ()
) -> Tensor:
    """All rules that ``config`` switches on, in the order of `gpt2_core.sampling.RULES`: logits (R, V) -> (R, V)."""
    scores = scores.to(torch.float64)
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
    return torch.softmax(scores, dim=-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token at ``uniforms`` (R,) of the way through each row of probabilities (R, V), in id order: (R,)."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def choose(scores: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """The next tokens (R,): drawn by uniform numbers (R,), else the likeliest, of equals the lower id."""
    if uniforms is not None:
        return draw(softmax(scores), uniforms)
    best = scores == scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.size(1), device=scores.device)
    return torch.where(best, ids, scores.size(1)).amin(-1)


def problem(scores: Tensor) -> Tensor:
    """What is wrong with each row (R,): 0 nothing, 1 nan or +inf, 2 every token banned."""
    numbers = torch.isnan(scores).any(-1) | torch.isposinf(scores).any(-1)
    banned = torch.isneginf(scores).all(-1)
    return torch.where(numbers, 1, torch.where(banned, 2, 0))
