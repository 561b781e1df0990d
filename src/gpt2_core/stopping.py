"""Stop strings: where a text ends that may not go on, however its tokens are cut.

    StopFinder(tokenizer, stops)     after(id) -> the finder one token on; .found, whether a stop string came up
    TextPieces(tokenizer, stops)     push(id), finish() -> the characters that are certain; .stopped
    text_of(tokenizer, ids, stops) -> the text up to the first stop string

All of them read bytes, as the tokens do: a stop string may begin and end inside tokens, and inside characters that two
tokens share. Special tokens are no text. An id that the tokenizer does not have, as a model with a padded vocabulary
may write it, is U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gpt2_core.errors import GenerationError

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer

_UNKNOWN = "\ufffd".encode()


def spell(tokenizer: GPT2Tokenizer, index: int) -> bytes:
    """The bytes of one token; none of a special one."""
    if index >= len(tokenizer):
        return _UNKNOWN
    return tokenizer.decode_bytes([index], skip_special_tokens=True)


def check_stops(stops: Sequence[str], tokenizer: GPT2Tokenizer | None) -> None:
    """Stop strings need a tokenizer in which they are text.

    Raises: GenerationError.
    """
    if tokenizer is None:
        raise GenerationError(
            f"stop_strings={list(stops)!r} needs the tokenizer, which knows what tokens say; pass tokenizer="
        )
    for stop in stops:
        if stop in tokenizer.all_special_tokens:
            raise GenerationError(
                f"the stop string {stop!r} is a special token, which is no text; pass its id as "
                f"eos_token_id={tokenizer.convert_tokens_to_ids(stop)}"
            )


class StopFinder:
    """Looks for stop strings in a text that grows by tokens. It never changes, so that beams can share it."""

    def __init__(self, tokenizer: GPT2Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop.encode() for stop in stops]
        self._tail = b""
        self.found = False

    def after(self, index: int) -> StopFinder:
        """What is known one token on."""
        new = object.__new__(StopFinder)
        new._tokenizer, new._stops = self._tokenizer, self._stops
        text = self._tail + spell(self._tokenizer, index)
        new.found = self.found or any(stop in text for stop in self._stops)
        longest = max(map(len, self._stops)) - 1  # more of what was looked through cannot matter
        new._tail = text[max(0, len(text) - longest) :]
        return new


class TextPieces:
    """The characters of tokens that come one by one, as far as they are certain.

    Held back is what may become a stop string, and what is not yet a character. The pieces together are the text up to
    the first stop string, or all of it.
    """

    def __init__(self, tokenizer: GPT2Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop.encode() for stop in stops]
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)
        self._held = b""
        self.stopped = False

    def push(self, index: int) -> str:
        """The characters that this token makes certain, maybe none; none after a stop string."""
        if self.stopped:
            return ""
        self._held += spell(self._tokenizer, index)
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._release(min(places), final=True)
        return self._release(len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return "" if self.stopped else self._release(len(self._held), final=True)

    def _release(self, count: int, final: bool = False) -> str:
        ready, self._held = self._held[:count], self._held[count:]
        return self._decoder.decode(ready, final=final)


def text_of(tokenizer: GPT2Tokenizer, ids: Iterable[int], stops: Sequence[str] = ()) -> str:
    """The text of these tokens up to the first stop string."""
    pieces = TextPieces(tokenizer, stops)
    return "".join([*(pieces.push(int(index)) for index in ids), pieces.finish()])


def _overlap(text: bytes, stop: bytes) -> int:
    """How many bytes at the end of ``text`` are the beginning of ``stop``, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
