"""The tokenizer that a command works with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_app.failures import reading_a_model

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer

DEFAULT_MODEL = "gpt2-tales"
_SPECIAL = ("allow", "forbid", "text")

OPTIONS = {'use "gpt2"': ("use --model gpt2",)}
TokenizerOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="NAME|FOLDER", help="Whose vocabulary; the names of GPT-2's sizes need no network."
    ),
]


def load_tokenizer(name: str) -> GPT2Tokenizer:
    """The tokenizer of a model: of a name, a folder, or the folder of a checkpoint file.

    Raises: Failure with exit code 3 for files that cannot be used, HubError for a name that cannot be found.
    """
    from gpt2_core.files import existing
    from gpt2_core.tokenizer import GPT2Tokenizer

    with reading_a_model():
        path = existing(name)
        is_file = path is not None and not path.is_dir()
        return GPT2Tokenizer.from_pretrained(path.parent if path is not None and is_file else name)


def check_special(value: str) -> str:
    """A typer callback: one of the three ways to take special tokens in a text."""
    if value not in _SPECIAL:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(_SPECIAL)}")
    return value


def id_dtype(size: int) -> str:
    """The numpy dtype of ids of a vocabulary of `size` tokens in files: uint16 where that holds them, else uint32."""
    return "<u2" if size <= 1 << 16 else "<u4"
