"""`gpt2 info`: what a checkpoint is, whether it fits its configuration, and where its numbers are."""

from __future__ import annotations

from typing import Annotated

import typer

from gpt2_app import failures


def command(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FOLDER|FILE", help="A model's name, its folder, or one checkpoint file.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor of the files.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not use the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a checkpoint: configuration, parameters, files, number formats, tying, and what does not fit.

    The names of GPT-2's sizes are known without their files: then the figures come from the configuration alone.
    Nothing but a configuration is ever downloaded. Exit code 4 where the files do not fit the configuration.
    """
    from gpt2_app.inspection import inspect

    found = inspect(name, offline=offline, tensors=tensors)
    if as_json:
        from gpt2_app.terminal import write_json

        write_json(found)
    else:
        from gpt2_app.info_view import show

        show(found)
    checkpoint = found["checkpoint"]
    if checkpoint is not None and checkpoint["fits"] is False:
        raise typer.Exit(failures.MISMATCH)
