"""`GenerationConfig`: everything that `generate` can be told, frozen and validated.

    GenerationConfig(max_new_tokens=..., do_sample=..., temperature=..., ...)
    resolve(generation_config, settings) -> GenerationConfig                       generate's two ways of saying it

What a setting would not change is refused rather than ignored: that is how people come to believe that it has no
effect. What the rules among them do stands in sampling.py, what the searches do in strategies.py and its neighbours.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_core.errors import GenerationError, nearest
from gpt2_core.uniforms import check_seed

# New tokens where neither max_new_tokens nor max_length says how many.
DEFAULT_NEW_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Everything `generate` can be told, frozen and validated.

    How long:
        max_new_tokens: how many tokens to add (20 where max_length is not given either).
        max_length: how long each text may get, its own prompt counted and its padding not; instead of max_new_tokens.
        min_new_tokens: no end-of-text token before this many new ones.
        max_time: seconds after which all texts end, each with at least one new token.
        stop_strings: a text ends with the token that completes one of these; needs ``tokenizer``.
        eos_token_id: ends a text, one id or several; None means the model's own, () means that nothing ends it.
        sliding_window: what happens when a text has more tokens than the model positions. False: an error before
            anything is computed. A number: the model reads at least this many of the last ones. True: half of them.

    Which token:
        do_sample: draw from the distribution; else take the likeliest token.
        temperature, top_k, top_p, min_p, typical_p: reshape the distribution; only with do_sample.
        repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens: change what may be chosen at all.
        begin_suppress_tokens: may not be the first new token.
        forced_bos_token_id, forced_eos_token_id: the first new token, and the last that max_new_tokens allows.
        forced_tokens: the token at each of some places, {place: id}, counted among the new tokens from 0.
        seed: a whole number from 0 to 2**64 - 1 that fixes all draws; None takes a fresh one.

    Which text, where several are weighed:
        num_beams: how many beginnings beam search follows. early_stopping: True ends it with that many finished
            texts, False when none is likely to get better, "never" when none can.
        num_beam_groups, diversity_penalty: groups of beams, in which a token that an earlier group chose costs so much.
        length_penalty: a text's score is its log-probability divided by its number of tokens to this power.
        best_of: draw so many texts of each prompt, and keep those with the best scores.
        penalty_alpha: contrastive search among the top_k likeliest: how much likeness to what was said counts.
        num_return_sequences: how many texts for each prompt; only with do_sample or num_beams.

    How fast, with the same text (or distribution):
        num_assistant_tokens: how many tokens ``assistant_model`` drafts at a time.
        prompt_lookup_num_tokens: draft up to so many tokens from the text itself; max_matching_ngram_size tokens, or
            fewer, must agree.

    What comes back:
        pad_token_id: fills the rows that ended early; None means the model's own, or else its end-of-text token.
        return_dict: a GenerationOutput with log-probabilities instead of the ids alone.
        output_scores: the scores (R, V) of each step in it.

    Raises: GenerationError, for unknown names, impossible values, and settings that contradict each other.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    max_time: float | None = None
    stop_strings: tuple[str, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    sliding_window: int | bool = False
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
    begin_suppress_tokens: tuple[int, ...] | None = None
    forced_bos_token_id: int | None = None
    forced_tokens: tuple[tuple[int, int], ...] | None = None
    forced_eos_token_id: int | None = None
    seed: int | None = None
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    best_of: int | None = None
    penalty_alpha: float | None = None
    num_return_sequences: int = 1
    num_assistant_tokens: int = 5
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    pad_token_id: int | None = None
    return_dict: bool = False
    output_scores: bool = False

    def __new__(cls, **settings: Any) -> GenerationConfig:  # noqa: D102 - here, so that a wrong name is our error
        _check_names(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, low, expected in _WHOLE:
            put(name, _whole(name, getattr(self, name), low, expected, optional=name in _OPTIONAL))
        for name, allowed, expected in _NUMBERS:
            put(name, _number(name, getattr(self, name), allowed, expected, optional=name in _OPTIONAL))
        for name in _FLAGS:
            put(name, _flag(name, getattr(self, name)))
        for name in _ID_LISTS:
            if getattr(self, name) is not None:
                put(name, _ids(name, getattr(self, name)))
        if self.eos_token_id is not None:
            several = _is_several(self.eos_token_id)
            ids = _ids("eos_token_id", self.eos_token_id if several else (self.eos_token_id,))
            put("eos_token_id", ids if several else ids[0])
        if self.bad_words_ids is not None:
            put("bad_words_ids", _words(self.bad_words_ids))
        if self.forced_tokens is not None:
            put("forced_tokens", _places(self.forced_tokens))
        if self.stop_strings is not None:
            put("stop_strings", _strings(self.stop_strings))
        put("early_stopping", _early_stopping(self.early_stopping))
        put("sliding_window", _window(self.sliding_window))
        if self.seed is not None:
            put("seed", check_seed(self.seed))
        _check_lengths(self)
        _check_idle(self)
        _check_exclusive(self)
        _check_numbers_of_texts(self)

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
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(GenerationConfig)}


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


# -- names ---------------------------------------------------------------------------------------------------

# What `generate` takes beside the settings: objects, which no file can hold.
_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "past",
    "assistant_model",
    "logits_processors",
    "tokenizer",
    "streamer",
    "on_token",
)
# Names that others use for what is called otherwise here.
_OTHER_NAMES: Mapping[str, str] = {
    "return_dict_in_generate": "return_dict",
    "output_logits": "output_scores",
    "logprobs": "return_dict",
    "stop": "stop_strings",
    "stop_sequences": "stop_strings",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "n": "num_return_sequences",
    "num_samples": "num_return_sequences",
    "beam_width": "num_beams",
    "beam_size": "num_beams",
    "forced_decoder_ids": "forced_tokens",
    "logits_processor": "logits_processors",
    "draft_model": "assistant_model",
    "past_key_values": "past",
}


def _check_names(settings: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(GenerationConfig)]
    for name in settings:
        if name in known:
            continue
        if name in _ARGUMENTS:
            raise GenerationError(f"{name} is an argument of generate(), not a setting; pass it there")
        other = _OTHER_NAMES.get(name)
        hint = f"; did you mean {other!r}?" if other else nearest(name, (*known, *_ARGUMENTS))
        raise GenerationError(f"generation has no setting {name!r}{hint or '; expected some of ' + ', '.join(known)}")


# -- values --------------------------------------------------------------------------------------------------

# (name, least value, what is expected)
_WHOLE = (
    ("max_new_tokens", 1, "None or a whole number of at least 1"),
    ("max_length", 1, "None or a whole number of at least 1"),
    ("min_new_tokens", 0, "a whole number of at least 0"),
    ("top_k", 0, "a whole number of at least 0, where 0 keeps all tokens"),
    ("no_repeat_ngram_size", 0, "a whole number of at least 0, where 0 allows all repeats"),
    ("forced_bos_token_id", 0, "None or a token id of at least 0"),
    ("forced_eos_token_id", 0, "None or a token id of at least 0"),
    ("num_beams", 1, "a whole number of at least 1"),
    ("num_beam_groups", 1, "a whole number of at least 1"),
    ("best_of", 1, "None or a whole number of at least 1"),
    ("num_return_sequences", 1, "a whole number of at least 1"),
    ("num_assistant_tokens", 1, "a whole number of at least 1"),
    ("prompt_lookup_num_tokens", 1, "None or a whole number of at least 1"),
    ("max_matching_ngram_size", 1, "a whole number of at least 1"),
    ("pad_token_id", 0, "None or a token id of at least 0"),
)

# (name, what is allowed, in words)
_NUMBERS = (
    ("max_time", lambda x: 0 < x < math.inf, "None or a number of seconds above 0"),
    (
        "temperature",
        lambda x: 0 < x < math.inf,
        "a number above 0 (for the likeliest token every time, leave out do_sample)",
    ),
    ("top_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1, where 1 keeps all tokens"),
    ("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1, where 0 keeps all tokens"),
    ("typical_p", lambda x: 0 < x <= 1, "a number above 0 and up to 1, where 1 keeps all tokens"),
    ("repetition_penalty", lambda x: 0 < x < math.inf, "a number above 0, where 1 changes nothing"),
    ("diversity_penalty", lambda x: 0 <= x < math.inf, "a number of at least 0, where 0 changes nothing"),
    ("length_penalty", lambda x: -math.inf < x < math.inf, "a finite number, where 0 leaves the length out"),
    ("penalty_alpha", lambda x: 0 < x <= 1, "None or a number above 0 and up to 1"),
)
_OPTIONAL = (
    "max_new_tokens",
    "max_length",
    "max_time",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "best_of",
    "prompt_lookup_num_tokens",
    "penalty_alpha",
    "pad_token_id",
)
_FLAGS = ("do_sample", "return_dict", "output_scores")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _whole(name: str, value: Any, low: int, expected: str, optional: bool) -> int | None:
    if value is None and optional:
        return None
    if not _is_whole(value) or value < low:
        raise GenerationError(f"{name} is {value!r}, expected {expected}")
    return int(value)


def _number(name: str, value: Any, allowed: Any, expected: str, optional: bool) -> float | None:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not allowed(value):
        raise GenerationError(f"{name} is {value!r}, expected {expected}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise GenerationError(f"{name} is {value!r}, expected true or false")
    return bool(value)


def _is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _ids(name: str, values: Any) -> tuple[int, ...]:
    if not _is_several(values):
        raise GenerationError(f"{name} is {values!r}, expected a list of token ids")
    values = tuple(values)
    for value in values:
        if not _is_whole(value) or value < 0:
            raise GenerationError(f"{name} holds {value!r}, expected token ids of at least 0")
    return tuple(int(value) for value in values)


def _words(values: Any) -> tuple[tuple[int, ...], ...]:
    if not _is_several(values) or not all(_is_several(word) for word in values):
        raise GenerationError(f"bad_words_ids is {values!r}, expected a list of words, each a list of token ids")
    words = tuple(_ids("bad_words_ids", word) for word in values)
    if not all(words):
        raise GenerationError("bad_words_ids holds an empty word, expected at least one token id in each; leave it out")
    return words


def _places(values: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of a place and a token id, by rising place."""
    pairs = values.items() if isinstance(values, Mapping) else values
    expected = "{place among the new tokens, from 0: token id}, as in {0: 464}"
    if not _is_several(pairs):
        raise GenerationError(f"forced_tokens is {values!r}, expected {expected}")
    out: dict[int, int] = {}
    for pair in pairs:
        if not _is_several(pair) or len(tuple(pair)) != 2 or not all(_is_whole(part) and part >= 0 for part in pair):
            raise GenerationError(f"forced_tokens holds {pair!r}, expected {expected}")
        place, token = (int(part) for part in pair)
        if out.setdefault(place, token) != token:
            raise GenerationError(f"forced_tokens names two tokens for place {place}; leave one out")
    return tuple(sorted(out.items()))


def _strings(values: Any) -> tuple[str, ...]:
    strings = (values,) if isinstance(values, str) else tuple(values) if _is_several(values) else (values,)
    for value in strings:
        if not isinstance(value, str):
            raise GenerationError(f"stop_strings holds {value!r}, expected a text or a list of texts")
        if not value:
            raise GenerationError("stop_strings holds an empty text, which every text holds; give at least a character")
    return strings


def _early_stopping(value: Any) -> bool | str:
    if value == "never" or isinstance(value, (bool, np.bool_)):
        return value if value == "never" else bool(value)
    raise GenerationError(f"early_stopping is {value!r}, expected True, False or 'never'")


def _window(value: Any) -> int | bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if not _is_whole(value) or value < 1:
        raise GenerationError(
            f"sliding_window is {value!r}, expected True, False, or the least number of tokens that the model looks "
            "back on"
        )
    return int(value)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# -- contradictions ------------------------------------------------------------------------------------------


def _check_lengths(config: GenerationConfig) -> None:
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


def _given(config: GenerationConfig, name: str) -> bool:
    """Whether a setting differs from its default."""
    return bool(getattr(config, name) != DEFAULTS[name])


# Settings without meaning -> whether they have one, without what they have none, how to give them one.
_IDLE: tuple[tuple[tuple[str, ...], Any, str, str], ...] = (
    (
        ("temperature", "top_p", "min_p", "typical_p", "best_of"),
        lambda config: config.do_sample,
        "sampling",
        "do_sample=True",
    ),
    (
        ("top_k",),
        lambda config: config.do_sample or config.penalty_alpha is not None,
        "sampling",
        "do_sample=True (or penalty_alpha, for contrastive search)",
    ),
    (
        ("num_return_sequences",),
        lambda config: config.do_sample or config.num_beams > 1,
        "sampling or beams",
        "do_sample=True or num_beams",
    ),
    (("num_beam_groups", "early_stopping"), lambda config: config.num_beams > 1, "beams", "num_beams"),
    (("diversity_penalty",), lambda config: config.num_beam_groups > 1, "groups of beams", "num_beam_groups"),
    (
        ("length_penalty",),
        lambda config: config.num_beams > 1 or config.best_of is not None,
        "texts to weigh",
        "num_beams or best_of",
    ),
    (
        ("max_matching_ngram_size",),
        lambda config: config.prompt_lookup_num_tokens is not None,
        "drafts from the text itself",
        "prompt_lookup_num_tokens",
    ),
    (("output_scores",), lambda config: config.return_dict, "an output to put them in", "return_dict=True"),
)


def _check_idle(config: GenerationConfig) -> None:
    for names, has_effect, without, remedy in _IDLE:
        for name in names:
            if _given(config, name) and not has_effect(config):
                raise GenerationError(
                    f"{name}={getattr(config, name)!r} has no effect without {without}; "
                    f"pass {remedy}, or leave {name} at {DEFAULTS[name]!r}"
                )


# Settings that exclude each other -> why.
_EXCLUSIVE: tuple[tuple[str, str, str], ...] = (
    ("penalty_alpha", "do_sample", "contrastive search draws nothing"),
    ("penalty_alpha", "num_beams", "contrastive search follows one beginning, beam search several"),
    ("penalty_alpha", "prompt_lookup_num_tokens", "contrastive search weighs every token against all before it"),
    ("num_beam_groups", "do_sample", "diverse beam search draws nothing"),
    ("best_of", "num_beams", "both weigh several texts, each in its own way"),
    ("num_beams", "prompt_lookup_num_tokens", "beam search follows several beginnings, a draft is of one"),
    ("num_beams", "output_scores", "beams change places at every step"),
    ("penalty_alpha", "output_scores", "contrastive search weighs more than scores"),
    ("best_of", "output_scores", "the scores would be those of all drafts"),
    ("prompt_lookup_num_tokens", "output_scores", "several tokens are chosen at a step"),
    ("prompt_lookup_num_tokens", "sliding_window", "a draft may not cross the place where the window slides"),
)


def _check_exclusive(config: GenerationConfig) -> None:
    for one, other, why in _EXCLUSIVE:
        if _given(config, one) and _given(config, other):
            raise GenerationError(
                f"got both {one}={getattr(config, one)!r} and {other}={getattr(config, other)!r}, which exclude each "
                f"other: {why}; leave one out"
            )
    if config.penalty_alpha is not None and config.top_k < 2:
        raise GenerationError(
            f"penalty_alpha={config.penalty_alpha} with top_k={config.top_k}, expected at least 2 candidates to weigh; "
            "pass top_k, such as 4"
        )


def _check_numbers_of_texts(config: GenerationConfig) -> None:
    wanted = config.num_return_sequences
    for name, most in (("num_beams", config.num_beams if config.num_beams > 1 else None), ("best_of", config.best_of)):
        if most is not None and wanted > most:
            raise GenerationError(
                f"num_return_sequences={wanted} is more than {name}={most}; raise {name} or ask for fewer"
            )
    if config.num_beams % config.num_beam_groups:
        raise GenerationError(
            f"num_beams={config.num_beams} does not divide into num_beam_groups={config.num_beam_groups} equal groups; "
            f"expected a multiple, such as num_beams={config.num_beam_groups * 2}"
        )
    if config.num_beam_groups > 1 and config.diversity_penalty == 0:
        raise GenerationError(
            f"num_beam_groups={config.num_beam_groups} with diversity_penalty=0 would follow the same texts in every "
            "group; pass a diversity_penalty above 0, such as 0.5"
        )


# -- files of the field --------------------------------------------------------------------------------------

# Keys that generation_config.json files of the field carry and that do not change the text.
_NO_EFFECT = (
    "transformers_version",
    "bos_token_id",
    "use_cache",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "return_dict_in_generate",
)
# Features of the field that this version does not have, with the value that switches each off.
_FOREIGN_OFF: Mapping[str, Any] = {
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
}
