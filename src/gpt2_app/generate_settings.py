"""What `gpt2 generate` was asked for: settings from options, and prompts from where they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gpt2_app import writing
from gpt2_app.sources import check_argument, decoded, one_source, open_source
from gpt2_core.errors import InputError

if TYPE_CHECKING:
    from gpt2_core.sampling import GenerationConfig
    from gpt2_core.tokenizer import GPT2Tokenizer

# For stories: a little cooler than the model's own distribution, which keeps a small one on its subject, and without
# its long tail; 40 is what the samples published with GPT-2 were drawn with (openai/gpt-2, README.md).
TEMPERATURE, TOP_K = 0.7, 40
LENGTH = 200  # about 150 words
FILL = -1
# Candidates of contrastive search: Su et al. 2022 look at 3 to 10, and at few where a model is small.
CANDIDATES = 4

# Library's name -> how it is typed, the usual way first.
NAMES: Mapping[str, tuple[str, ...]] = {
    "max_new_tokens": ("--length", "--max-new-tokens", "-n"),
    "min_new_tokens": ("--min-new-tokens",),
    "max_time": ("--max-time",),
    "stop_strings": ("--stop",),
    "eos_token_id": ("--eos",),
    "sliding_window": ("--sliding-window",),
    "temperature": ("--temperature", "-t"),
    "top_k": ("--top-k",),
    "top_p": ("--top-p",),
    "min_p": ("--min-p",),
    "typical_p": ("--typical-p",),
    "repetition_penalty": ("--repetition-penalty",),
    "no_repeat_ngram_size": ("--no-repeat-ngram-size",),
    "bad_words_ids": ("--bad-words",),
    "begin_suppress_tokens": ("--begin-suppress",),
    "suppress_tokens": ("--suppress",),
    "num_beams": ("--beams", "--num-beams"),
    "num_beam_groups": ("--beam-groups", "--num-beam-groups"),
    "diversity_penalty": ("--diversity-penalty",),
    "length_penalty": ("--length-penalty",),
    "early_stopping": ("--early-stopping",),
    "penalty_alpha": ("--penalty-alpha",),
    "best_of": ("--best-of",),
    "num_assistant_tokens": ("--assistant-tokens",),
    "prompt_lookup_num_tokens": ("--prompt-lookup",),
    "max_matching_ngram_size": ("--max-matching-ngram",),
    "num_return_sequences": ("--num-return-sequences",),
    "seed": ("--seed", "-s"),
}
# What has no effect where nothing is drawn.
_DRAWN = ("temperature", "top_k", "top_p", "min_p", "typical_p", "best_of")
_EARLY: Mapping[str, bool | str] = {"yes": True, "true": True, "no": False, "false": False, "never": "never"}


# -- settings ------------------------------------------------------------------------------------------------


def settings_of(
    asked: Mapping[str, Any], *, greedy: bool, sample: bool, samples: int, base: GenerationConfig | None
) -> GenerationConfig:
    """The settings of a call; ``asked`` by the library's names, None where an option was not given.

    Without ``base``, settings from a file, tokens are drawn as stories like it. Seeds are drawn where they are needed.

    Raises: typer.BadParameter for options that contradict each other, GenerationError for impossible values.
    """
    from gpt2_core.sampling import GenerationConfig

    given = {name: value for name, value in asked.items() if value is not None}
    start = {} if base is None else base.to_dict()
    way = _way(given, base, greedy=greedy, sample=sample)
    if way is not None:
        _check_undrawn(given, way, samples)
        if start.get("do_sample"):
            start = {name: value for name, value in start.items() if name not in (*_DRAWN, "do_sample", "seed")}
        if "penalty_alpha" in given:
            start["top_k"] = CANDIDATES
    else:
        if given.get("temperature") == 0:
            raise typer.BadParameter("--temperature 0 divides by nothing; for the likeliest token use --greedy")
        start = {"temperature": TEMPERATURE, "top_k": TOP_K} | start if base is None else start
        given["do_sample"] = True
        if given.get("seed") is None and start.get("seed") is None:
            given["seed"] = writing.drawn_seed()
    if "max_new_tokens" in given or base is None or not start.keys() & {"max_new_tokens", "max_length"}:
        start.pop("max_length", None)
        asked_for = given.get("max_new_tokens")
        given["max_new_tokens"] = LENGTH if asked_for in (None, FILL) else asked_for
    return GenerationConfig(**start | given)


def _way(given: Mapping[str, Any], base: GenerationConfig | None, *, greedy: bool, sample: bool) -> str | None:
    """The option because of which nothing is drawn; None where tokens are."""
    searches = [name for name in ("penalty_alpha", "num_beams") if given.get(name) not in (None, 1)]
    if greedy:
        in_file = base is not None and (base.penalty_alpha is not None or base.num_beams > 1)
        others = [NAMES[name][0] for name in searches] + ["--sample"] * sample + ["the search of --settings"] * in_file
        if others:
            raise typer.BadParameter(f"--greedy and {others[0]} choose in two ways; leave out one of them")
        return "--greedy"
    if sample:
        return None
    if searches:
        return NAMES[searches[0]][0]
    greedy_file = base is not None and not base.do_sample and not any(name in given for name in _DRAWN)
    return "--settings" if greedy_file else None


def _check_undrawn(given: Mapping[str, Any], way: str, samples: int) -> None:
    more = ", or add --sample" if way == "--beams" else ""
    if samples > 1:
        several = "; for several texts use --num-return-sequences" if way == "--beams" else ""
        raise typer.BadParameter(
            f"{way} writes the same text every time; leave out --samples {samples}, or leave out {way}{several}"
        )
    idle = [NAMES[name][0] for name in _DRAWN if name in given]
    if way == "--penalty-alpha" and "--top-k" in idle:  # there it is the number of candidates
        idle.remove("--top-k")
    if idle:
        raise typer.BadParameter(f"{', '.join(idle)} cannot change what {way} takes; leave out one or the other{more}")


def fitted(settings: GenerationConfig, length: int | None, room: int) -> GenerationConfig:
    """The length asked for as it is; the default cut to what fits; all that fits for FILL."""
    if length == FILL:
        return settings.replace(max_new_tokens=room)
    if length is None and settings.max_new_tokens == LENGTH and settings.sliding_window is False and room < LENGTH:
        return settings.replace(max_new_tokens=room, min_new_tokens=min(settings.min_new_tokens, room))
    return settings


def banned(tokenizer: GPT2Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The ids of each word as it stands, and of it with a space before it, as it stands within a text."""
    return [
        list(ids) for ids in dict.fromkeys(tuple(tokenizer.encode(lead + word)) for word in words for lead in ("", " "))
    ]


def early_stopping(value: str | None) -> bool | str | None:
    """`--early-stopping`: yes, no, or never."""
    if value is None:
        return None
    if value.lower() not in _EARLY:
        raise typer.BadParameter(f"--early-stopping is {value!r}, expected yes, no or never")
    return _EARLY[value.lower()]


def sliding_window(value: str | None) -> bool | int | None:
    """`--sliding-window`: half of the positions, or a number."""
    if value is None or value == "half":
        return None if value is None else True
    if not value.isdecimal():
        raise typer.BadParameter(f"--sliding-window is {value!r}, expected half, or a whole number of at least 1")
    return int(value)


def stop_texts(values: Sequence[str] | None) -> tuple[str, ...] | None:
    """`--stop`: None where it was not given."""
    if values and "" in values:
        raise typer.BadParameter("--stop is an empty text, which every text holds; give at least one character")
    return tuple(check_argument(value, "--stop") for value in values) if values else None


# -- prompts -------------------------------------------------------------------------------------------------


def prompts_of(prompt: str | None, file: Path | None, many: Path | None) -> list[str]:
    """One prompt, from the argument, a file or standard input; or all those of the file ``many``."""
    one_source(prompt, file, "PROMPT")
    if many is None:
        return [_prompt(prompt, file)]
    if prompt is not None or file is not None:
        raise typer.BadParameter(f"got both a prompt and --prompts {many}; give one of them")
    with open_source(many) as (stream, name):
        lines = "".join(decoded(stream, name)).split("\n")
    found = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{many} holds no prompt; expected one on each line")
    if many.suffix not in (".jsonl", ".ndjson"):
        return [line for _, line in found]
    return [_from_json(line, f"line {number} of {many}") for number, line in found]


def _from_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as cause:
        raise InputError(f"{where} is not JSON ({cause}); expected a string, or an object with a prompt") from cause
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(f"{where} holds no prompt; expected a string, or an object with a string called prompt")
    return text


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None:
        return check_argument(prompt, "PROMPT")
    if file is None and sys.stdin.isatty():
        return ""
    with open_source(file) as (stream, name):
        text = "".join(decoded(stream, name))
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
