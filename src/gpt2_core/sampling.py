"""How the next token is chosen: the settings, each rule once and in order, and the draw.

`GenerationConfig` names the rules; `apply_rules` walks them in the order of `RULES`; `draw` turns what is left and a
uniform number into a token. This is the specification, in float64 numpy, one row at a time: what the frameworks do
fast is tested against it.

    GenerationConfig(max_new_tokens=..., do_sample=..., temperature=..., ...)      frozen, validated
    resolve(generation_config, settings) -> GenerationConfig                       generate's two ways of saying it
    apply_rules(scores (V,), history (n,), settings, made, eos_ids) -> (V,)        all rules, in order
    softmax(scores (V,)) -> (V,)      draw(probabilities (V,), uniform) -> id      choose(scores, uniform | None) -> id
    check_scores(scores, row, step)                                                nan, +inf, or every token banned

Letters: V vocabulary, n tokens of the row so far (prompt and new ones, padding left out), R rows.

A rule takes scores (V,) and gives scores (V,); a banned token's score is -inf. Scores are logits until softmax.
Wherever a rule ranks tokens, equal ones are ranked by id, the lower first.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2_core.errors import GenerationError, nearest
from gpt2_core.uniforms import check_seed

Scores = NDArray[np.float64]
Ids = NDArray[np.int64]

# New tokens where neither max_new_tokens nor max_length says how many.
DEFAULT_NEW_TOKENS = 20


# -- settings ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Everything `generate` can be told, frozen and validated.

    max_new_tokens: how many tokens to add (20 where max_length is not given either).
    max_length: how long each text may get, its own prompt counted and its padding not; instead of max_new_tokens.
    min_new_tokens: no end-of-text token before this many new ones.
    do_sample: draw from the distribution; else take the likeliest token.
    temperature, top_k, top_p, min_p, typical_p: reshape the distribution; only with do_sample.
    repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens: change what may be chosen at all.
    eos_token_id: ends a text, one id or several; None means the model's own, () means that nothing ends it.
    pad_token_id: fills the rows that ended early; None means the model's own, or else its end-of-text token.
    num_return_sequences: how many texts to draw for each prompt; only with do_sample.
    seed: a whole number from 0 to 2**64 - 1 that fixes all draws; None takes a fresh one.

    Raises: GenerationError, for unknown names, impossible values, and settings that contradict each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    num_return_sequences: int = 1
    seed: int | None = None

    def __new__(cls, **settings: Any) -> GenerationConfig:  # noqa: D102 - here, so that a wrong name is our error
        _check_names(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, low, expected in _WHOLE:
            put(name, _whole(name, getattr(self, name), low, expected, optional=name in _OPTIONAL))
        for name, allowed, expected in _NUMBERS:
            put(name, _number(name, getattr(self, name), allowed, expected))
        if not isinstance(self.do_sample, (bool, np.bool_)):
            raise GenerationError(f"do_sample is {self.do_sample!r}, expected true or false")
        put("do_sample", bool(self.do_sample))
        if self.eos_token_id is not None:
            several = _is_several(self.eos_token_id)
            ids = _ids("eos_token_id", self.eos_token_id if several else (self.eos_token_id,))
            put("eos_token_id", ids if several else ids[0])
        if self.suppress_tokens is not None:
            put("suppress_tokens", _ids("suppress_tokens", self.suppress_tokens))
        if self.bad_words_ids is not None:
            put("bad_words_ids", _words(self.bad_words_ids))
        if self.seed is not None:
            put("seed", check_seed(self.seed))
        _check_contradictions(self)

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with ``changes`` applied and validated.

        Of max_new_tokens and max_length the one in ``changes`` takes the place of the other.

        Raises: GenerationError.
        """
        _check_names(changes)
        for one, other in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
            if changes.get(one) is not None and other not in changes:
                changes[other] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as values that JSON can hold."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                out[field.name] = _plain(value)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationConfig:
        """Settings from the keys of a ``generation_config.json``.

        Keys that do not bear on the text (versions, names beginning with an underscore, model outputs) are passed
        over, and so are features this library does not have where the file leaves them switched off.

        Raises: GenerationError, for features it does not have and impossible values.
        """
        settings: dict[str, Any] = {}
        for key, value in data.items():
            if value is None or key.startswith("_") or key in _NO_EFFECT:
                continue
            if key in _FOREIGN_OFF:
                if value != _FOREIGN_OFF[key]:
                    raise GenerationError(
                        f"{key} is {value!r}, which this version does not have; expected {_FOREIGN_OFF[key]!r} or no "
                        "such key. Remove it, or pass the settings you want to generate()"
                    )
                continue
            settings[key] = value
        return cls(**settings)

    @classmethod
    def from_json_file(cls, path: str | Path) -> GenerationConfig:
        """Read one ``generation_config.json``.

        Raises: GenerationError, where the file is missing, may not be read, is not JSON, or holds impossible values.
        """
        from gpt2_core.files import read_small_file

        path = Path(path)
        try:
            data = json.loads(read_small_file(path, GenerationError).decode("utf-8"))
        except FileNotFoundError:
            raise GenerationError(f"{path} does not exist; expected generation settings as JSON") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise GenerationError(f"{path} is not valid JSON ({error}); download it again or mend it") from error
        if not isinstance(data, dict):
            raise GenerationError(f"{path} holds a {type(data).__name__}, expected an object of names and values")
        try:
            return cls.from_dict(data)
        except GenerationError as error:
            raise GenerationError(f"{path}: {error}") from error


SETTINGS: tuple[str, ...] = tuple(field.name for field in fields(GenerationConfig))


def resolve(generation_config: GenerationConfig | None, settings: Mapping[str, Any]) -> GenerationConfig:
    """The settings of one call: ``generation_config`` (or the defaults) with ``settings`` in place of its own.

    Raises: GenerationError.
    """
    if generation_config is None:
        return GenerationConfig(**settings)
    if not isinstance(generation_config, GenerationConfig):
        raise GenerationError(
            f"generation_config is a {type(generation_config).__name__}, expected a GenerationConfig; "
            "make one with GenerationConfig.from_dict(...)"
        )
    return generation_config.replace(**settings)


# (name, least value, what is expected)
_WHOLE = (
    ("max_new_tokens", 1, "None or a whole number of at least 1"),
    ("max_length", 1, "None or a whole number of at least 1"),
    ("min_new_tokens", 0, "a whole number of at least 0"),
    ("top_k", 0, "a whole number of at least 0, where 0 keeps all tokens"),
    ("no_repeat_ngram_size", 0, "a whole number of at least 0, where 0 allows all repeats"),
    ("pad_token_id", 0, "None or a token id of at least 0"),
    ("num_return_sequences", 1, "a whole number of at least 1"),
)
_OPTIONAL = ("max_new_tokens", "max_length", "pad_token_id")

# (name, what is allowed, in words)
_NUMBERS = (
    (
        "temperature",
        lambda x: 0 < x < math.inf,
        "a number above 0 (for the likeliest token every time, leave out do_sample)",
    ),
    ("top_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1, where 1 keeps all tokens"),
    ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1, where 0 keeps all tokens"),
    ("typical_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1, where 1 keeps all tokens"),
    ("repetition_penalty", lambda x: 0 < x < math.inf, "a number above 0, where 1 changes nothing"),
)

# Settings that have no meaning unless tokens are drawn.
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "num_return_sequences")

# Keys that generation_config.json files of the field carry and that do not change the text.
_NO_EFFECT = (
    "transformers_version",
    "bos_token_id",
    "use_cache",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
)
# Features of the field that this version does not have, with the value that switches each off.
_FOREIGN_OFF: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}


def _check_names(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(GenerationConfig)]
    for name in settings:
        if name not in known:
            hint = nearest(name, known) or f"; expected some of {', '.join(known)}"
            raise GenerationError(f"generation has no setting {name!r}{hint}")


def _whole(name: str, value: Any, low: int, expected: str, optional: bool) -> int | None:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise GenerationError(f"{name} is {value!r}, expected {expected}")
    return int(value)


def _number(name: str, value: Any, allowed: Any, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not allowed(value):
        raise GenerationError(f"{name} is {value!r}, expected {expected}")
    return float(value)


def _is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _ids(name: str, values: Any) -> tuple[int, ...]:
    if not _is_several(values):
        raise GenerationError(f"{name} is {values!r}, expected a list of token ids")
    values = tuple(values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise GenerationError(f"{name} holds {value!r}, expected token ids of at least 0")
    return tuple(int(value) for value in values)


def _words(values: Any) -> tuple[tuple[int, ...], ...]:
    if not _is_several(values) or not all(_is_several(word) for word in values):
        raise GenerationError(f"bad_words_ids is {values!r}, expected a list of words, each a list of token ids")
    words = tuple(_ids("bad_words_ids", word) for word in values)
    if not all(words):
        raise GenerationError("bad_words_ids holds an empty word, expected at least one token id in each; leave it out")
    return words


def _check_contradictions(config: GenerationConfig) -> None:
    if config.max_new_tokens is not None and config.max_length is not None:
        raise GenerationError(
            f"got both max_new_tokens={config.max_new_tokens} and max_length={config.max_length}, "
            "expected one of them: max_new_tokens leaves the prompt out, max_length counts it"
        )
    if config.max_length is None:
        limit = DEFAULT_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens
        if config.min_new_tokens > limit:
            raise GenerationError(
                f"min_new_tokens={config.min_new_tokens} is more than max_new_tokens={limit}; "
                "raise max_new_tokens or lower min_new_tokens"
            )
    if not config.do_sample:
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name in _SAMPLING_ONLY and value != field.default:
                raise GenerationError(
                    f"{field.name}={value!r} has no effect without sampling; "
                    f"pass do_sample=True, or leave {field.name} at {field.default!r}"
                )


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# -- the rules, in order -------------------------------------------------------------------------------------


def repetition_penalty(scores: Scores, history: Ids, penalty: float) -> Scores:
    """Make tokens of the row, prompt included, less likely: positive scores are divided by it, others multiplied.

    Each distinct token is penalised once, however often it occurred. Below 1 it rewards repetition.

    >>> repetition_penalty(np.array([4.0, -4.0, 4.0]), np.array([0, 1, 0]), 2.0)
    array([ 2., -8.,  4.])

    Source: Keskar et al. 2019 (CTRL), section 4.1, with negative scores multiplied, as the field does.
    """
    seen = np.unique(history)
    scores = scores.copy()
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def no_repeat_ngram_size(scores: Scores, history: Ids, size: int) -> Scores:
    """Ban every token that would make ``size`` consecutive tokens occur a second time in the row, prompt included.

    With size 1 that is every token of the row; with fewer than ``size`` tokens there is nothing to repeat.

    >>> no_repeat_ngram_size(np.zeros(3), np.array([0, 1, 2, 0]), 2)      # 0 was followed by 1
    array([  0., -inf,   0.])

    Source: Paulus et al. 2017, section 2.5.
    """
    n = len(history)
    before = history[n - (size - 1) :] if size > 1 else history[:0]  # the size - 1 tokens that the new one follows
    banned = [history[i + size - 1] for i in range(n - size + 1) if np.array_equal(history[i : i + size - 1], before)]
    return _ban(scores, banned)


def bad_words_ids(scores: Scores, history: Ids, words: Sequence[Sequence[int]]) -> Scores:
    """Ban the last token of each word where the row ends in the tokens before it; one-token words always.

    >>> bad_words_ids(np.zeros(3), np.array([0, 1]), [[2], [1, 0], [2, 1]])
    array([-inf,   0., -inf])
    """
    banned = []
    for word in words:
        before = list(word[:-1])
        if list(history[len(history) - len(before) :]) == before:
            banned.append(word[-1])
    return _ban(scores, banned)


def min_new_tokens(scores: Scores, made: int, least: int, eos_ids: Sequence[int]) -> Scores:
    """Ban the end-of-text tokens while fewer than ``least`` new tokens were made."""
    return _ban(scores, eos_ids) if made < least else scores


def suppress_tokens(scores: Scores, tokens: Sequence[int]) -> Scores:
    """Ban these tokens everywhere."""
    return _ban(scores, tokens)


def temperature(scores: Scores, value: float) -> Scores:
    """Divide the scores: below 1 the likely gets likelier, above 1 the distribution flattens."""
    return scores / value


def top_k(scores: Scores, k: int) -> Scores:
    """Keep the k highest scores; all, where there are fewer. (That 0 switches the rule off is `apply_rules`' affair.)

    >>> top_k(np.array([1.0, 3.0, 3.0, 3.0]), 2)
    array([-inf,   3.,   3., -inf])

    Source: Fan et al. 2018, section 5.4.
    """
    return _keep(scores, _ranked(-scores)[:k])


def top_p(scores: Scores, p: float) -> Scores:
    """Keep the smallest set of the likeliest tokens whose probability reaches ``p``; at least one.

    >>> top_p(np.log(np.array([0.125, 0.5, 0.25, 0.125])), 0.75).round(2)
    array([ -inf, -0.69, -1.39,  -inf])

    Source: Holtzman et al. 2020, section 3.1.
    """
    order = _ranked(-scores)
    return _keep(scores, order[: _reaching(softmax(scores)[order], p)])


def min_p(scores: Scores, p: float) -> Scores:
    """Keep the tokens at least ``p`` times as likely as the likeliest one: score >= highest score + log(p).

    >>> min_p(np.log(np.array([0.125, 0.5, 0.25, 0.125])), 0.5).round(2)
    array([ -inf, -0.69, -1.39,  -inf])

    Source: Nguyen et al. 2024, "Min-p sampling", section 3.
    """
    return _keep(scores, np.flatnonzero(scores >= scores.max() + math.log(p)))


def typical_p(scores: Scores, p: float) -> Scores:
    """Keep the smallest set of the most typical tokens whose probability reaches ``p``; at least one.

    Typical is what carries about as much information as expected: tokens are ranked by the distance between their
    surprisal, -log(probability), and the entropy of the distribution.

    >>> typical_p(np.log(np.array([0.8, 0.1, 0.06, 0.04])), 0.5).round(2)
    array([-0.22,  -inf,  -inf,  -inf])

    Source: Meister et al. 2023, "Locally typical sampling", section 4.
    """
    probabilities = softmax(scores)
    possible = probabilities > 0
    surprisal = np.full_like(scores, np.inf)
    surprisal[possible] = -np.log(probabilities[possible])
    entropy = float(np.sum(probabilities[possible] * surprisal[possible]))
    order = _ranked(np.abs(surprisal - entropy))
    return _keep(scores, order[: _reaching(probabilities[order], p)])


# The order in which the rules apply. First what may be chosen at all, then the shape of what is drawn from: the
# latter rules see only what the former left. docs/decisions/0003-sampling-rules.md says why.
RULES = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_new_tokens",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
)


def active_rules(config: GenerationConfig) -> tuple[str, ...]:
    """The rules that ``config`` switches on, in the order in which they apply."""
    off = {field.name: field.default for field in fields(config)}
    return tuple(name for name in RULES if getattr(config, name) not in (off[name], ()))


def apply_rules(
    scores: ArrayLike, history: ArrayLike, config: GenerationConfig, made: int = 0, eos_ids: Sequence[int] = ()
) -> Scores:
    """All rules that ``config`` switches on, in the order of `RULES`.

    Args:
        scores: (V,) logits of the next token.
        history: (n,) ids of the row so far: its prompt and new tokens, without padding.
        config: the settings; a rule whose setting is at its default (top_k=0, top_p=1, ...) is off.
        made: how many of the tokens in ``history`` are new.
        eos_ids: the tokens that end this text.
    """
    out: Scores = np.array(scores, np.float64)
    row: Ids = np.asarray(history, np.int64)
    for name in active_rules(config):
        rule, value = _BY_NAME[name], getattr(config, name)
        if rule in (repetition_penalty, no_repeat_ngram_size, bad_words_ids):
            out = rule(out, row, value)
        elif rule is min_new_tokens:
            out = rule(out, made, value, eos_ids)
        else:
            out = rule(out, value)
    return out


_BY_NAME: Mapping[str, Any] = {
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


def _ban(scores: Scores, ids: Sequence[int]) -> Scores:
    scores = scores.copy()
    scores[list(ids)] = -np.inf
    return scores


def _keep(scores: Scores, ids: Ids) -> Scores:
    kept = np.full_like(scores, -np.inf)
    kept[ids] = scores[ids]
    return kept


def _ranked(cost: Scores) -> Ids:
    """Ids by rising cost, equal ones by id."""
    return np.argsort(cost, kind="stable")


def _reaching(probabilities: Scores, p: float) -> int:
    """How many of the first probabilities it takes until their sum is at least ``p``."""
    short = np.cumsum(probabilities) < p
    # Where rounding keeps even the sum of all below p, all it is.
    return min(int(np.count_nonzero(short)) + 1, len(probabilities))


# -- the draw ------------------------------------------------------------------------------------------------


def softmax(scores: Scores) -> Scores:
    """Probabilities (V,) of scores (V,); -inf gives exactly 0."""
    weights = np.exp(scores - scores.max())
    out: Scores = weights / weights.sum()
    return out


def draw(probabilities: Scores, uniform: float) -> int:
    """The token at ``uniform`` of the way: the first whose cumulative sum, in id order, exceeds uniform * total.

    ``uniform`` is in [0, 1). A token of probability 0 is never drawn, as it leaves the sum where it was. The total
    is the last cumulative sum, not 1, so that rounding cannot leave the draw without a token.

    >>> [draw(np.array([0.25, 0.0, 0.75]), u) for u in (0.0, 0.24, 0.25, 0.99)]
    [0, 0, 2, 2]
    """
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def choose(scores: Scores, uniform: float | None = None) -> int:
    """The next token: drawn where there is a uniform number, else the likeliest, of equal ones the lower id."""
    return int(np.argmax(scores)) if uniform is None else draw(softmax(scores), uniform)


def check_scores(scores: Scores, row: int, step: int) -> None:
    """Something must be left to choose from, and it must be numbers.

    Raises: GenerationError, where scores hold nan or +inf, or where every token is banned.
    """
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise not_numbers(row, step)
    if np.isneginf(scores).all():
        raise all_banned(row, step)


def not_numbers(row: int, step: int) -> GenerationError:
    """The error for logits that hold nan or +inf."""
    return GenerationError(
        f"the logits of row {row} at new token {step} hold nan or +inf, expected finite numbers; check the weights "
        "for nan, or compute in a wider number format than float16"
    )


def all_banned(row: int, step: int) -> GenerationError:
    """The error for a row where the rules leave no token."""
    return GenerationError(
        f"every token of row {row} is banned at new token {step}, expected at least one to choose from; relax "
        "bad_words_ids, suppress_tokens, no_repeat_ngram_size or min_new_tokens"
    )
