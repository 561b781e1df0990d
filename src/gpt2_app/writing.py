"""Writing texts with a loaded model: one that is passed on as it grows, or several at once when they are done."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_core.errors import InputError

if TYPE_CHECKING:
    from gpt2_app.backends import Runner
    from gpt2_core.sampling import GenerationConfig
    from gpt2_core.tokenizer import GPT2Tokenizer

# Seeds that are drawn for people: short enough to be typed again.
_DRAWN_SEEDS = 1_000_000_000
_SEEDS = 1 << 64


def drawn_seed() -> int:
    """A fresh seed, short enough to be typed again."""
    return secrets.randbelow(_DRAWN_SEEDS)


def seed_of(first: int, sample: int) -> int:
    """The seed of sample `sample` (from 0): each has one of its own, so that each can be had again alone."""
    return (first + sample) % _SEEDS


# -- texts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A text that was written: the new characters, the new ids, and why it ended: "length", "end", "stop" or "time".

    seconds: how long its call took. log_probs: of each new id, where they were asked for. score: where texts are
    ranked, by what.
    """

    text: str
    ids: list[int]
    finish: str
    seconds: float
    log_probs: list[float] | None = None
    score: float | None = None


def write_text(
    runner: Runner,
    tokenizer: GPT2Tokenizer,
    prompt_ids: Sequence[int],
    settings: GenerationConfig,
    *,
    assistant: Runner | None = None,
    on_text: Callable[[str], Any] = lambda text: None,
) -> Sample:
    """Continue one prompt, passing characters to `on_text` as they are certain; with return_dict also log_probs.

    Raises: GenerationError, InputError, as the model's `generate`.
    """
    parts = []
    started = time.perf_counter()
    stream = runner.stream([prompt_ids], settings, tokenizer, assistant)
    with runner.place():
        for part in stream:
            parts.append(part)
            on_text(part)
    (done,) = stream.written
    seconds = time.perf_counter() - started
    return Sample("".join(parts), list(done.ids), done.finish, seconds, list(done.log_probs) or None)


def write_texts(
    runner: Runner,
    tokenizer: GPT2Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    assistant: Runner | None = None,
) -> list[Sample]:
    """Continue several prompts at once, or one by any search: all texts of the first prompt, then of the next.

    Raises: GenerationError, InputError, as the model's `generate`.
    """
    started = time.perf_counter()
    out = runner.complete(prompts, settings, tokenizer, assistant)
    seconds = time.perf_counter() - started
    width = max(map(len, prompts))
    rows, log_probs = runner.numbers(out.sequences), runner.numbers(out.log_probs)
    scores = [None] * len(rows) if out.sequences_scores is None else runner.numbers(out.sequences_scores)
    return [
        Sample(text, row[width : width + count], finish, seconds, noted[:count], score)
        for text, row, count, finish, noted, score in zip(
            out.texts or (), rows, out.new_tokens or (), out.finish_reasons or (), log_probs, scores, strict=True
        )
    ]


def check(
    runner: Runner,
    tokenizer: GPT2Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    assistant: Runner | None = None,
) -> None:
    """Raise what `write_text` or `write_texts` would before it computes anything.

    Raises: GenerationError, InputError.
    """
    if can_stream(settings):
        runner.stream(prompts, settings, tokenizer, assistant).close()
        return
    from gpt2_core.generation import prepare

    prepare(runner.config, list(prompts), generation_config=settings)


def with_padding(runner: Runner, settings: GenerationConfig) -> GenerationConfig:
    """Settings with something to fill shorter texts with, which nobody will see, where the model names nothing."""
    config = runner.config
    known = (settings.pad_token_id, config.pad_token_id, *config.eos_token_ids)
    if any(token is not None and token < config.vocab_size for token in known):
        return settings
    return settings.replace(pad_token_id=0)


def can_stream(settings: GenerationConfig) -> bool:
    """Whether a text's characters are known before it ends."""
    return settings.num_beams == 1 and settings.best_of is None


def text_of(tokenizer: GPT2Tokenizer, ids: Iterable[int]) -> str:
    """The text of these ids, special tokens left out; ids that the tokenizer does not have are U+FFFD."""
    from gpt2_core.stopping import text_of

    return text_of(tokenizer, ids)


# -- prompts -------------------------------------------------------------------------------------------------


def prompt_ids(runner: Runner, tokenizer: GPT2Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; those of the empty one are the token that stands between texts, so that a new one begins.

    Raises: InputError for an empty prompt where the model has no such token.
    """
    ids: list[int] = tokenizer.encode(prompt)
    if ids:
        return ids
    config = runner.config
    for token in (config.bos_token_id, *config.eos_token_ids):
        if token is not None and token < config.vocab_size:
            return [token]
    raise InputError("the prompt is empty, and this model has no token to begin a text with; give it some words")


def room(runner: Runner, prompt: Sequence[int]) -> int:
    """How many tokens fit after the prompt; at least 1, so that a prompt that is too long is the model's to refuse."""
    return max(1, runner.window - len(prompt))
