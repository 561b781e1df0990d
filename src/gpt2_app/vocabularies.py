"""The tokenizer that a command works with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_app.failures import reading_a_model

if TYPE_CHECKING:
    from pathlib import Path

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
    """The tokenizer of a model: the one inside its file, where it has one, else that of its name or folder.

    Raises: Failure with exit code 3 for files that cannot be used, HubError for a name that cannot be found.
    """
    from gpt2_core.files import existing
    from gpt2_core.tokenizer import GPT2Tokenizer

    with reading_a_model():
        path = existing(name)
        inside = None if path is None else _inside(path)
        if inside is not None:
            return inside
        is_file = path is not None and not path.is_dir()
        return GPT2Tokenizer.from_pretrained(path.parent if path is not None and is_file else name)


def _inside(path: Path) -> GPT2Tokenizer | None:
    """The tokenizer that a checkpoint's file holds beside its tensors, if it does; of a folder, where no other is."""
    import tempfile
    from pathlib import Path

    from gpt2_core.checkpoints import open_checkpoint
    from gpt2_core.checkpoints.tokenizers import hub_files, parts_beside
    from gpt2_core.errors import CheckpointError
    from gpt2_core.tokenizer import GPT2Tokenizer

    if path.is_dir() and parts_beside(path) is not None:
        return None
    try:
        with open_checkpoint(path) as checkpoint:
            if checkpoint.tokenizer is None:
                return None
            parts = checkpoint.tokenizer()
    except CheckpointError:  # whoever needs the weights will say so
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in hub_files(parts):
            (Path(folder) / name).write_bytes(content)
        return GPT2Tokenizer.from_pretrained(folder)


def check_special(value: str) -> str:
    """A typer callback: one of the three ways to take special tokens in a text."""
    if value not in _SPECIAL:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(_SPECIAL)}")
    return value


def id_dtype(size: int) -> str:
    """The numpy dtype of ids of a vocabulary of `size` tokens in files: uint16 where that holds them, else uint32."""
    return "<u2" if size <= 1 << 16 else "<u4"
