"""Writing one text: tokens as they come, as characters, up to a stop text, the end of text, or the length asked for."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Sample:
    """A text that was written: the new characters, the new ids, and why it ended: "length", "end" or "stop"."""

    text: str
    ids: list[int]
    finish: str
    seconds: float


class Speller:
    """Characters from ids that come one by one, special tokens left out.

    An id that the tokenizer does not have, as a model with a padded vocabulary may write it, is U+FFFD.
    """

    def __init__(self, tokenizer: GPT2Tokenizer) -> None:
        self._stream = tokenizer.decode_stream(skip_special_tokens=True)
        self._size = len(tokenizer)

    def push(self, index: int) -> str:
        """The characters that this id completes, maybe none."""
        return self._stream.push(index) if index < self._size else self._stream.finish() + "\ufffd"

    def finish(self) -> str:
        """What is left of a character that was begun."""
        return self._stream.finish()


def text_of(tokenizer: GPT2Tokenizer, ids: Sequence[int]) -> str:
    """The text of these ids, as a `Speller` spells it."""
    speller = Speller(tokenizer)
    return "".join([*map(speller.push, ids), speller.finish()])


class _Enough(Exception):
    """Raised out of a model's loop when a stop text has come up."""


class Listener:
    """Takes new ids one by one and passes on their characters; holds back what may become a stop text.

    The parts passed on together are `text`: all that the ids say up to the first stop text, or to the end.
    """

    def __init__(self, tokenizer: GPT2Tokenizer, stops: Sequence[str], on_text: Callable[[str], Any]) -> None:
        self._stream = Speller(tokenizer)
        self._stops = tuple(stops)
        self._on_text = on_text
        self._held = ""
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False

    def hear(self, new: Sequence[int]) -> None:
        """Take the new id of one step. Raises: _Enough, which ends the text, at a stop text."""
        self.ids.append(int(new[0]))
        self._take(self._stream.push(self.ids[-1]))
        if self.stopped:
            raise _Enough

    def finish(self) -> None:
        """Pass on what is held back."""
        if not self.stopped:
            self._take(self._stream.finish())
        if not self.stopped:
            self._pass_on(len(self._held))

    def _take(self, text: str) -> None:
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self._pass_on(min(found))
            self.stopped = True
        else:
            self._pass_on(len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0))

    def _pass_on(self, count: int) -> None:
        ready, self._held = self._held[:count], self._held[count:]
        self.text += ready
        if ready:
            self._on_text(ready)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def write_text(
    runner: Runner,
    tokenizer: GPT2Tokenizer,
    prompt_ids: Sequence[int],
    settings: GenerationConfig,
    *,
    stops: Sequence[str] = (),
    on_text: Callable[[str], Any] = lambda text: None,
) -> Sample:
    """Continue one prompt, passing characters to `on_text` as they are certain.

    Raises: GenerationError, InputError, as the model's `generate`.
    """
    listener = Listener(tokenizer, stops, on_text)
    started = time.perf_counter()
    with contextlib.suppress(_Enough):
        runner.generate([list(prompt_ids)], settings, listener.hear)
    seconds = time.perf_counter() - started
    listener.finish()
    ends = eos_ids(runner, settings)
    finish = "stop" if listener.stopped else "end" if listener.ids and listener.ids[-1] in ends else "length"
    return Sample(listener.text, listener.ids, finish, seconds)


def eos_ids(runner: Runner, settings: GenerationConfig) -> tuple[int, ...]:
    """The ids that end a text."""
    chosen = settings.eos_token_id
    if chosen is None:
        return runner.config.eos_token_ids
    return chosen if isinstance(chosen, tuple) else (chosen,)


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
