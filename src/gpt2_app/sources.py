"""Where text comes from: an argument, a file, or standard input, always as UTF-8, in pieces that can stand alone."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import typer

from gpt2_core.errors import InputError

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer

CHUNK = 1 << 22  # bytes read at a time
_TAIL = 1 << 16  # characters looked at first for a place to cut

# Before a space or line feed that follows something else a piece of GPT-2's pattern always ends, and the pattern never
# looks back: text cut there has the same ids as the whole. (Python's \s holds all of the pattern's and a few more.)
_CUT = re.compile(r"\S(?=[ \n])")


@contextlib.contextmanager
def open_source(file: Path | None) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of `file`, or of standard input for None and "-", and their name for messages.

    Raises: InputError, where it cannot be read.
    """
    if file is None or str(file) == "-":
        if sys.stdin.isatty():
            from gpt2_app.terminal import note

            note("reading from the terminal; end with Ctrl-D")
        yield sys.stdin.buffer, "standard input"
        return
    try:
        stream = file.open("rb")
    except OSError as cause:
        raise InputError(f"cannot read {file}: {cause.strerror}; give a file, or - for standard input") from cause
    with stream:
        yield stream, str(file)


def read_bytes(stream: BinaryIO, name: str, size: int = CHUNK) -> Iterator[bytes]:
    """What is there, in pieces, until the end. Raises: InputError, where reading fails, as on a folder."""
    read = stream.read
    if isinstance(stream, io.BufferedReader) and stream.isatty():
        read = stream.read1  # what there is: to fill a piece it would wait beyond the first Ctrl-D
    while True:
        try:
            data = read(size)
        except OSError as cause:
            raise InputError(f"cannot read {name}: {cause.strerror}; give a file, or - for standard input") from cause
        if not data:
            return
        yield data


def check_argument(text: str, what: str) -> str:
    """`text`, a command line argument, as UTF-8, also where the locale made Python read its bytes as something less.

    Raises: InputError for bytes that are no UTF-8.
    """
    if text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError as cause:
        raise InputError(
            f"{what} is not valid UTF-8 ({cause}); check the terminal's encoding, or give the text in a file"
        ) from cause


def one_source(text: str | None, file: Path | None, what: str) -> None:
    """Raise a usage error where both an argument and a file are given."""
    if text is not None and file is not None:
        raise typer.BadParameter(f"got both {what} and --file {file}; give one of them")


def decoded(stream: BinaryIO, name: str) -> Iterator[str]:
    """Bytes as UTF-8 text, in pieces cut anywhere between characters.

    Raises: InputError with the place of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    done = 0
    for data in _with_end(read_bytes(stream, name)):
        held = len(decoder.getstate()[0])
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as cause:
            place = done - held + cause.start
            raise InputError(
                f"{name} is not UTF-8: byte 0x{cause.object[cause.start]:02x} at {place}; convert it to UTF-8 first, "
                f"for example with iconv"
            ) from cause
        done += len(data)


def _with_end(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield from pieces
    yield b""


def texts(stream: BinaryIO, name: str, *, whole: bool = False) -> Iterator[str]:
    """The text in pieces that can be encoded one by one, with the same ids as the whole; one piece if `whole`.

    Memory is that of a few pieces, except where a text has no place to cut it.
    """
    waiting: list[str] = []
    for piece in decoded(stream, name):
        cut = None if whole else _last_cut(piece)
        if cut is None:
            waiting.append(piece)
            continue
        yield "".join([*waiting, piece[:cut]])
        waiting = [piece[cut:]]
    rest = "".join(waiting)
    if rest:
        yield rest


def _last_cut(text: str) -> int | None:
    """The last place where `text` may be cut, if there is one."""
    for start in dict.fromkeys((max(0, len(text) - _TAIL), 0)):
        cut = None
        for match in _CUT.finditer(text, start):
            cut = match.end()
        if cut is not None:
            return cut
    return None


def can_be_cut(tokenizer: GPT2Tokenizer) -> bool:
    """Whether no token of the tokenizer holds a space as such: pieces write theirs as Ġ, added tokens may not."""
    shown = "".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    return not any(char.isspace() for char in set(shown))
