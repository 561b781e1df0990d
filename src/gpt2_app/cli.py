"""The commands of `gpt2`, and what is common to them: errors, exit codes, `--debug`, `--version`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gpt2_app import (
    bench,
    compare,
    convert,
    data,
    decode,
    encode,
    evaluate,
    failures,
    generate,
    info,
    train,
    vocabularies,
    write,
)
from gpt2_app.wording import Options
from gpt2_core.errors import Gpt2Error

# The class of all usage errors, under whichever name the installed typer has its click.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# How each command calls what the library's messages are about.
OPTIONS: Mapping[str, Options] = {
    "generate": generate.OPTIONS,
    "bench": bench.OPTIONS,
    "encode": vocabularies.OPTIONS,
    "decode": vocabularies.OPTIONS,
    "data": data.OPTIONS,
    "evaluate": evaluate.OPTIONS,
    "train": train.OPTIONS,
}

EPILOG = (
    "Exit codes: 0 done; 1 compare found a difference; 2 usage or bad input; 3 unreadable checkpoint or vocabulary; "
    "4 files that do not fit their configuration; 5 cannot write; 6 model not found or not downloaded; 70 a bug; "
    "130 interrupted. "
    "Models: gpt2-tales (ships with the package), gpt2 ... gpt2-xl, distilgpt2, any owner/name of the hub, or a folder."
)


class Door(TyperGroup):
    """The group of commands: turns what they raise into a message and an exit code."""

    _arguments: tuple[str, ...] = ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in click; remembers the arguments, for errors that come up before they are understood."""
        self._arguments = tuple(args[: args.index("--")] if "--" in args else args)
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            _make_harmless(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; library errors end as typer.Exit with the code they stand for."""
        as_json = "--json" in self._arguments
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _make_harmless(error)
            if as_json:
                from gpt2_app.terminal import write_json

                message = getattr(error, "message", None) or str(error)
                write_json(failures.error_as_json("UsageError", message, failures.USAGE))
            raise
        except (failures.Failure, Gpt2Error, OSError, KeyboardInterrupt) as error:
            options = OPTIONS.get(ctx.invoked_subcommand)
            code = failures.report(error, as_json=as_json, options=options, typed=self._arguments)
            raise typer.Exit(code) from error


def _make_harmless(error: Exception) -> None:
    """Usage errors are printed by typer itself, and quote what was typed."""
    from gpt2_app.terminal import harmless

    if isinstance(getattr(error, "message", None), str):
        error.message = harmless(error.message)  # type: ignore[attr-defined]


app = typer.Typer(
    name="gpt2",
    cls=Door,
    help="GPT-2 on the command line: write text, turn text into ids and back, look into checkpoints and compare them.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from gpt2_core import __version__

        typer.echo(f"gpt2-duet {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors; GPT2_DEBUG=1 does the same.")
    ] = False,
) -> None:
    if debug:
        os.environ["GPT2_DEBUG"] = "1"


def _paragraphs(command: Callable[..., None]) -> str:
    """The docstring of a command with each paragraph on one line: the terminal's width decides where it breaks."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


for _name, _command in (
    ("generate", generate.command),
    ("encode", encode.command),
    ("decode", decode.command),
    ("info", info.command),
    ("compare", compare.command),
    ("convert", convert.command),
    ("data", data.command),
    ("evaluate", evaluate.command),
    ("train", train.command),
    ("write", write.command),
    ("bench", bench.command),
):
    app.command(_name, help=_paragraphs(_command))(_command)
