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


# ---- the same cuts in whole arrays -------------------------------------------------------------------------------
#
# Text comes as UTF-8. 0xFF, which is in no UTF-8, is a barrier: it is a piece of its own, and the text on its two
# sides is cut as if they were two texts.

BARRIER = 4  # the class of 0xFF
BARRIER_BYTE = 0xFF
PADDING = b"\xff" * 16  # behind the text, so that a look ahead needs no check
_LEAD = 8  # a byte that begins a character of two bytes or more; its class is looked up afterwards
_REST = 9  # a byte within a character

_QUOTE, _BLANK = 0x27, 0x20
_S, _D, _M, _T, _L, _V, _E, _R = b"sdmtlver"


def _byte_classes() -> bytes:
    table = bytearray([OTHER]) * 128 + bytearray([_REST]) * 64 + bytearray([_LEAD]) * 63 + bytearray([BARRIER])
    for code in range(128):
        char = chr(code)
        if char.isalpha():
            table[code] = LETTER
        elif char.isdigit():
            table[code] = NUMBER
        elif char in " \t\n\v\f\r":
            table[code] = SPACE
    return bytes(table)


_BYTE_CLASSES = _byte_classes()


def piece_starts(data: bytes) -> NDArray[np.int64]:
    """Where each piece of UTF-8 text begins, in bytes.

    Each rule of the pattern compares a byte with its neighbours:
    a piece begins where the class changes, unless a blank stands before (it belongs to the piece that follows);
    the last space of several begins a piece if there is text after it;
    an apostrophe that begins a piece takes s, d, m, t, ll, ve or re with it, and what follows begins a piece.
    """
    size = len(data)
    if not size:
        return np.zeros(0, np.int64)
    padded = data + PADDING
    text = np.frombuffer(padded, np.uint8)
    classes, wide_spaces = _classes(padded, size)
    change = np.ones(size + 1, bool)
    np.not_equal(classes[1 : size + 1], classes[:size], out=change[1:])
    after_blank = text[:size] == _BLANK
    space = classes[:size] == SPACE
    last_space = space & ~change[:size] & change[1:]
    barriers = np.flatnonzero(classes[: size + 1] == BARRIER) if BARRIER_BYTE in data else np.array([size])
    last_space[barriers[barriers > 0] - 1] = False
    starts = np.zeros(size + 4, bool)
    np.greater(change[1:size], after_blank[: size - 1], out=starts[1:size])
    starts[0] = True
    starts[:size] |= last_space
    if wide_spaces is not None:  # the last space of several begins at its first byte
        first, last = wide_spaces
        starts[first] |= last_space[last]
        starts[last] &= ~last_space[last]
    starts[barriers] = starts[barriers + 1] = True
    _contractions(starts, text, classes, size)
    return np.flatnonzero(starts[:size])


def _contractions(starts: NDArray[np.bool_], text: NDArray[np.uint8], classes: NDArray[np.uint8], size: int) -> None:
    quotes = np.flatnonzero(text[:size] == _QUOTE)
    if not len(quotes):
        return
    # classes[-1] and text[-1] belong to the padding, as they should for a quote that begins the text
    quotes = quotes[(classes[quotes - 1] != OTHER) & (text[quotes - 1] != _BLANK)]
    one, two = text[quotes + 1], text[quotes + 2]
    short = (one == _S) | (one == _D) | (one == _M) | (one == _T)
    long = ((one == _L) & (two == _L)) | ((one == _V) & (two == _E)) | ((one == _R) & (two == _E))
    starts[quotes[short | long] + 1] = False
    starts[quotes[short] + 2] = True
    starts[quotes[long] + 3] = True


def _classes(padded: bytes, size: int) -> tuple[NDArray[np.uint8], tuple[NDArray[np.int64], NDArray[np.int64]] | None]:
    """The class of each byte, that of its character; and the first and last byte of each space of several bytes."""
    translated = padded.translate(_BYTE_CLASSES)
    if _LEAD not in translated:
        return np.frombuffer(translated, np.uint8), None
    classes = np.frombuffer(bytearray(translated), np.uint8)
    text = np.frombuffer(padded, np.uint8)
    places = np.flatnonzero(classes[:size] == _LEAD)
    length = 2 + (text[places] >= 0xE0) + (text[places] >= 0xF0)
    codes = _code_points(text, places, length)
    kinds = class_table().take(codes)
    classes[places] = classes[places + 1] = kinds
    for more in (3, 4):
        longer = length >= more
        if longer.any():
            classes[places[longer] + (more - 1)] = kinds[longer]
    wide = np.flatnonzero(kinds == SPACE)
    return classes, (places[wide], places[wide] + length[wide] - 1)


def _code_points(text: NDArray[np.uint8], places: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int32]:
    """UTF-8 decoded at the given places: 6 bits of each further byte below the 5, 4 or 3 of the first."""
    codes = text[places].astype(np.int32) & (0x7F >> length).astype(np.int32)
    codes = codes << 6 | (text[places + 1] & 0x3F)
    for more in (3, 4):
        longer = np.flatnonzero(length >= more)
        if len(longer):
            codes[longer] = codes[longer] << 6 | (text[places[longer] + (more - 1)] & 0x3F)
    return codes


def safe_cut(data: bytes, start: int, end: int) -> int:
    """The last place in data[start + 1 : end] where cutting the text in two changes no piece; `start` if none.

    There the class changes, and the character before is no space (spaces look ahead) and no apostrophe that might
    take letters with it.
    """
    window = 1 << 10
    while True:
        low = max(end - window, start)
        while low > start and data[low] & 0xC0 == 0x80:
            low -= 1
        while start < end < len(data) and data[end] & 0xC0 == 0x80:  # leave out a character that is not whole
            end -= 1
        part = data[low:end]
        classes, _ = _classes(part + PADDING, len(part))
        before, here = classes[: max(len(part) - 1, 0)], classes[1 : max(len(part), 1)]
        safe = (before != here) & (before != SPACE) & ~((before == OTHER) & (here == LETTER))
        found = np.flatnonzero(safe)
        if len(found):
            return low + int(found[-1]) + 1
        if low == start:
            return start
        window *= 8
