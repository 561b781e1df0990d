"""The three streams: UTF-8 everywhere, colour and progress for people only, and a closed pipe is no error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from rich.console import Console

# Unicode's pictures of the control characters: what text contains must not steer the terminal that shows it.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def prepare_streams() -> None:
    """Text goes in and out as UTF-8, whatever the locale; only a terminal keeps another encoding that it has.

    What an encoding cannot write is escaped, so that no output fails half-way.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            keep = stream.isatty() and stream.encoding.lower() not in ("ascii", "us-ascii", "ansi_x3.4-1968")
            stream.reconfigure(encoding=None if keep else "utf-8", errors="backslashreplace")


def silence_stdout() -> None:
    """Point stdout at nothing, so that flushing it once more at exit cannot fail; for when its reader has gone."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())
        os.close(nothing)


def console(*, stderr: bool = False) -> Console:
    """A rich console, which knows about terminals, widths, NO_COLOR and FORCE_COLOR."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def write(text: str) -> None:
    """Text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def binary_stdout() -> BinaryIO:
    """Stdout for bytes; what was written as text before it comes first."""
    sys.stdout.flush()
    return sys.stdout.buffer


def write_json(value: Any) -> None:
    """One JSON value on one line of stdout."""
    write(json.dumps(value, ensure_ascii=False) + "\n")


def harmless(text: str) -> str:
    """`text` with control characters but for line feeds and tabs made visible: for terminals."""
    return text.translate(_PICTURES)


def note(text: str, style: str = "dim") -> None:
    """A remark for people, on stderr."""
    console(stderr=True).print(text, style=style, markup=False, soft_wrap=True)


@contextlib.contextmanager
def busy(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on stderr what is going on while it does, if stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(what):
        yield
