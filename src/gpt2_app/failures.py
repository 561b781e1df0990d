"""What went wrong, told to people and to machines, and the exit codes.

0    done
1    `gpt2 compare` found a difference, as diff and cmp say it
2    usage, or input that cannot be used
3    a checkpoint, configuration or vocabulary that cannot be read
4    files that do not fit: their own configuration (`gpt2 info`), or what they were made from (`gpt2 convert`)
5    something could not be written
6    a model's name or folder that was not found, or could not be downloaded
70   a bug in this program: please report its traceback
130  interrupted (Ctrl-C)        141  the reader of the output went away
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

from gpt2_app.main import BROKEN_PIPE, BUG, INTERRUPTED
from gpt2_app.wording import Options, in_options
from gpt2_core.errors import CheckpointError, ConfigError, Gpt2Error, HubError

DONE, DIFFERENT, USAGE, UNREADABLE, MISMATCH, UNWRITABLE, NOT_FOUND = range(7)


class Failure(Exception):
    """A library error with the exit code of the moment it came up in."""

    def __init__(self, error: Gpt2Error, code: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.code = code


@contextlib.contextmanager
def reading_a_model() -> Iterator[None]:
    """While files of a model are read, whatever is wrong with them is exit code 3, but for names not found."""
    try:
        yield
    except HubError:
        raise
    except Gpt2Error as error:
        raise Failure(error, UNREADABLE) from error
    except OSError as cause:  # that no reader foresaw: without this it would be taken for an error of writing
        which = f"{cause.filename}: " if cause.filename else ""
        reason = f"{which}{cause.strerror or cause}"
        unread = CheckpointError(f"the model's files cannot be read: {reason}; check the disk and the permissions")
        raise Failure(unread, UNREADABLE) from cause


def exit_code(error: BaseException) -> int:
    """The exit code that `error` stands for."""
    from gpt2_core.errors import WriteError

    if isinstance(error, Failure):
        return error.code
    for kind, code in (
        (KeyboardInterrupt, INTERRUPTED),
        (BrokenPipeError, BROKEN_PIPE),
        (WriteError, UNWRITABLE),
        (HubError, NOT_FOUND),
        ((CheckpointError, ConfigError), UNREADABLE),
        (Gpt2Error, USAGE),
        (OSError, UNWRITABLE),  # reading reports its own; what is left is writing to stdout
    ):
        if isinstance(error, kind):
            return code
    return BUG


def report(error: BaseException, *, as_json: bool, options: Options | None = None, typed: Sequence[str] = ()) -> int:
    """Tell what went wrong, on stderr and with `as_json` on stdout too; the exit code.

    `options` and `typed` are for `gpt2_app.wording.in_options`.
    """
    code = exit_code(error)
    if wants_traceback():
        from gpt2_app.terminal import write_traceback

        write_traceback(error)
    if code in (INTERRUPTED, BROKEN_PIPE):
        from gpt2_app.terminal import silence_stdout

        if code == BROKEN_PIPE:
            silence_stdout()
        return code
    shown = error.error if isinstance(error, Failure) else error
    message = in_options(shown, options or {}, typed)
    if isinstance(shown, OSError) and not isinstance(shown, Gpt2Error):
        message = f"cannot write the output: {shown.strerror or shown}; check the disk and what reads it"
    tell(type(shown).__name__, message, code, as_json=as_json)
    return code


def tell(kind: str, message: str, code: int, *, as_json: bool) -> None:
    """One red message on stderr; with `as_json` also ``{"error": ...}`` on stdout."""
    from rich.text import Text

    from gpt2_app.terminal import console, write_json

    if as_json:
        with contextlib.suppress(OSError):
            write_json(error_as_json(kind, message, code))
    out = console(stderr=True)
    out.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)


def error_as_json(kind: str, message: str, code: int) -> dict[str, object]:
    """What `--json` prints instead of a result."""
    return {"error": {"type": kind, "message": message, "exit_code": code}}


def wants_traceback() -> bool:
    """Whether errors are to be shown with where they came up: GPT2_DEBUG=1, or --debug, which sets it."""
    return os.environ.get("GPT2_DEBUG", "") not in ("", "0")


def clean_interrupt() -> None:
    """End a line that Ctrl-C broke off, where people look at it."""
    if sys.stdout.isatty():
        with contextlib.suppress(OSError):
            sys.stdout.write("\n")
            sys.stdout.flush()
