"""Where the `gpt2` command starts: streams and last words; the commands themselves are in `gpt2_app.cli`."""

from __future__ import annotations

import sys
from typing import NoReturn

# 128 + the numbers of SIGINT and SIGPIPE, as shells count; here, because nothing may be imported before the first try.
INTERRUPTED, BROKEN_PIPE = 130, 141
# EX_SOFTWARE of sysexits.h: Python's own 1 for an exception would read as a difference that `gpt2 compare` found.
BUG = 70


def main() -> NoReturn:
    """Run the command with the arguments of this process and leave it with an exit code; see `gpt2_app.failures`."""
    code: int | str | None = 0
    try:
        from gpt2_app.cli import app
        from gpt2_app.terminal import prepare_streams

        prepare_streams()
        try:
            app(prog_name="gpt2")
        except SystemExit as leaving:
            # rich, and typer around it, leave with 1 where the reader of their output has gone.
            code = BROKEN_PIPE if isinstance(leaving.__context__, BrokenPipeError) else leaving.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        from gpt2_app.terminal import silence_stdout

        silence_stdout()
        code = BROKEN_PIPE
    except Exception as error:
        _traceback(error)
        code = BUG
    sys.exit(code)


def _traceback(error: Exception) -> None:
    """Where a bug came up, harmless for terminals; also where it is that the commands cannot be imported."""
    try:
        from gpt2_app.terminal import write_traceback
    except Exception:
        import traceback

        traceback.print_exception(error)
    else:
        write_traceback(error)


if __name__ == "__main__":
    main()
