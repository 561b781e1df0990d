"""Cutting text into the pieces that BPE never merges across: GPT-2's pattern, three times.

    '(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+      (openai/gpt-2, src/encoder.py)

`split_by_regex` is the pattern as it stands: the readable twin, which the tests hold the others to. `split` is for
short texts, with the standard library's `re`. `piece_starts` finds the same cuts in a whole array of bytes.

What is a letter, a number or a space is fixed by a table of Unicode 16.0 (``assets/unicode-16-classes.txt``): the
same text has the same ids under every version of Python and of `regex`, and those are tiktoken's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3
UNICODE_VERSION = "16.0"

_ASCII_PATTERN = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
# One ASCII character of each class stands for all others of it; the letter is in no contraction.
_STAND_IN = {OTHER: "!", LETTER: "a", NUMBER: "0", SPACE: "\t"}


def split_by_regex(text: str) -> list[str]:
    """The pieces of `text` by the pattern itself; letters and numbers are those of the installed `regex`."""
    import regex

    pieces: list[str] = regex.findall(PATTERN, text)
    return pieces


def split(text: str) -> list[str]:
    """The pieces of `text`: ``"Hello  world's"`` gives ``["Hello", " ", " world", "'s"]``.

    ASCII text goes through the pattern with its classes spelt out, twice as fast as `regex` and without its import.
    In other text each character is first replaced by an ASCII one of its class, and the cuts are carried over.
    """
    if text.isascii():
        return _ASCII_PATTERN.findall(text)
    return list(_cut(text, _ASCII_PATTERN.findall(text.translate(_stand_ins()))))


def _cut(text: str, shapes: list[str]) -> Iterator[str]:
    start = 0
    for shape in shapes:
        end = start + len(shape)
        yield text[start:end]
        start = end


class _StandIns(dict[int, str]):
    def __missing__(self, code: int) -> str:
        stand_in = _STAND_IN[int(class_table()[code])]
        if len(self) < 1 << 14:
            self[code] = stand_in
        return stand_in


@functools.cache
def _stand_ins() -> _StandIns:
    return _StandIns({code: chr(code) for code in range(128)})


@functools.cache
def class_table() -> NDArray[np.uint8]:
    """The class of every code point: (0x110000,), OTHER, LETTER, NUMBER or SPACE."""
    table = np.full(0x110000, OTHER, np.uint8)
    text = (Path(__file__).parent / "assets" / "unicode-16-classes.txt").read_text(encoding="ascii")
    for line in text.splitlines():
        name, *runs = line.split()
        code = {"letter": LETTER, "number": NUMBER, "space": SPACE}[name]
        for run in runs:
            first, _, last = run.partition("-")
            table[int(first, 16) : int(last or first, 16) + 1] = code
    table.flags.writeable = False
    return table
