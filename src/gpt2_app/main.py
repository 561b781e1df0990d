"""Where the `gpt2` command starts: streams and last words; the commands themselves are in `gpt2_app.cli`."""

from __future__ import annotations

import sys
from typing import NoReturn


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
            code = leaving.code
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        from gpt2_app.terminal import silence_stdout

        silence_stdout()
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    main()
