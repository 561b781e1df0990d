"""Checkpoints on disk: one module per format, all with the same verbs; this package finds the right one.

A format is a module of this package with

    NAME, RANK       its name (also the module's), and its place when a folder holds several: lower is preferred
    FILES            the file names looked for in a folder, best first
    find(path)       the file to open if a file or folder holds this format, else None
    owns(name)       whether a file of this name in a model's folder belongs to it
    read(path, *, writable=False) -> Checkpoint
    write(path, tensors, *, metadata=None, max_shard_bytes=None) -> tuple of the files written

so adding a format is adding a file. Tensors are named and laid out as the hub does, whatever the file does: a format
that differs renames on the way in and out. What a format may have besides, with what is assumed if it has not:

    HOLDS                              what its files can hold (`holds.Holds`); else all that the hub's can
    NAMES                              its table of names and layouts (`renaming.Names`); else names are the hub's
    stored_dtype(name, shape, dtype)   the number format of a parameter where `dtype` was asked for; else `dtype`
    rounded(name, tensor, dtype)       the tensor as it will be read back, for the dtypes in HOLDS.quantized
    remarks(about)                     sentences that a person should read before such a model is written
    SUFFIXES                           how names of files end that are one of this format; else that of FILES[0]

and `write` takes ``about=`` (`holds.About`) if HOLDS says that the config or the tokenizer goes inside. What `read`
learns beyond tensors it gives as attributes of the Checkpoint. docs/adding-a-format.md is the specification.

`open_checkpoint` opens whatever is there; `save_checkpoint` writes one.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from gpt2_core.checkpoints.holds import About, Holds, holds_of
from gpt2_core.checkpoints.sharding import describe_folder
from gpt2_core.checkpoints.tensors import (
    STORAGE,
    Checkpoint,
    Tensor,
    round_to_bfloat16,
    widen_bfloat16,
)
from gpt2_core.errors import CheckpointError, nearest
from gpt2_core.files import (
    LFS_POINTER_BYTES,
    atomic_folder,
    finish_interrupted_save,
    refuse_lfs_pointer,
    size_in_bytes,
)

__all__ = [
    "STORAGE",
    "About",
    "Checkpoint",
    "Format",
    "Holds",
    "Tensor",
    "detect",
    "formats",
    "holds_of",
    "is_weight_file",
    "open_checkpoint",
    "round_to_bfloat16",
    "save_checkpoint",
    "widen_bfloat16",
]


class Format(Protocol):
    """What a module of this package offers to be a format."""

    NAME: str
    RANK: int
    FILES: tuple[str, ...]

    def find(self, path: Path) -> Path | None:
        """The file to open if `path`, a file or a folder, holds this format, else None."""

    def owns(self, name: str) -> bool:
        """Whether a file of this name, in a model's folder, belongs to a checkpoint of this format."""

    def read(self, path: str | Path, *, writable: bool = False) -> Checkpoint:
        """Open a checkpoint; see the module."""

    def write(
        self,
        path: str | Path,
        tensors: Mapping[str, Tensor | NDArray[Any]],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int | None = None,
    ) -> tuple[Path, ...]:
        """Write a checkpoint; see the module."""


@lru_cache(maxsize=1)
def formats() -> Mapping[str, Format]:
    """All formats by name, the preferred first: the modules here that have a NAME, a `read` and a `write`."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [cast(Format, module) for module in modules if hasattr(module, "NAME") and hasattr(module, "read")]
    return {each.NAME: each for each in sorted(found, key=lambda each: each.RANK)}


def detect(path: str | Path) -> tuple[str, Path]:
    """The format of a file or folder, and the file to open there.

    Raises: CheckpointError listing what is there and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        finish_interrupted_save(path)
    for name, each in formats().items():
        try:
            found = each.find(path)
        except OSError as cause:
            raise CheckpointError(f"cannot look into {path}: {cause.strerror}; expected a readable file") from cause
        if found is not None:
            return name, found
    _refuse_pointers(path)
    expected = ", ".join(file for each in formats().values() for file in each.FILES)
    if path.is_dir():
        raise CheckpointError(
            f"{path} holds no checkpoint: expected one of {expected}; found {describe_folder(path)}; "
            f"give the file itself if it has another name"
        )
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint file, or a folder with one of {expected}")
    beside = next((name for name, each in formats().items() if each.find(path.parent) is not None), None)
    remedy = f"; the folder {path.parent} holds {beside}: give that" if beside else ""
    raise CheckpointError(f"{path} is in no format that is read here; expected one of {', '.join(formats())}{remedy}")


def _refuse_pointers(path: Path) -> None:
    """Raise CheckpointFormatError if the file, or one of a folder's that a format would open, is a git-LFS pointer."""
    names = [name for each in formats().values() for name in each.FILES]
    for file in [path / name for name in names] if path.is_dir() else [path]:
        with contextlib.suppress(OSError):
            if file.is_file():
                with file.open("rb") as opened:
                    refuse_lfs_pointer(file, opened.read(LFS_POINTER_BYTES))


def open_checkpoint(path: str | Path, *, format: str | None = None, writable: bool = False) -> Checkpoint:
    """Open the checkpoint in a file or folder, of whatever format unless `format` names it.

    In a folder with several the preference is: safetensors, its index of shards, pytorch_model.bin, its index.
    Tensors are fetched when asked for, as read-only views of the mapped file where the format allows; with
    `writable` the views may be changed, in this process alone. Raises: CheckpointError and its kinds.
    """
    if format is not None:
        return named_format(format).read(path, writable=writable)
    name, found = detect(path)
    return formats()[name].read(found, writable=writable)


def save_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    format: str = "safetensors",
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | str | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write `tensors` into a folder as its only checkpoint: those of any other format there are removed at the end.

    `max_shard_bytes` splits them into files of at most so many bytes; it may have a unit, as in "5GB". `about` is
    needed by formats that keep the config inside, and ignored by the others.
    Raises: CheckpointError, WriteError; either way the folder is as it was.
    """
    folder, chosen = Path(folder), named_format(format)
    most = size_in_bytes("max_shard_bytes", max_shard_bytes)
    with atomic_folder(folder, replaces=is_weight_file) as stage:
        written = write_with(chosen, stage, tensors, metadata=metadata, max_shard_bytes=most, about=about)
        names = [file.relative_to(stage) for file in written]
    return tuple(folder / name for name in names)


def write_with(
    chosen: Format,
    path: Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """`chosen.write`, with what it wants to know about the model if it wants to.

    Raises: CheckpointError if it does and nothing is known, and what `write` raises.
    """
    if not holds_of(chosen).wants_about:
        return chosen.write(path, tensors, metadata=metadata, max_shard_bytes=max_shard_bytes)
    if about is None:
        raise CheckpointError(
            f"{chosen.NAME} keeps the configuration inside, and none was given; give about=About(config, head), or use "
            f"`gpt2 convert`, which finds it"
        )
    informed = cast(Callable[..., tuple[Path, ...]], chosen.write)
    return informed(path, tensors, metadata=metadata, max_shard_bytes=max_shard_bytes, about=about)


def named_format(name: str) -> Format:
    """The format called `name`. Raises: CheckpointError listing them."""
    try:
        return formats()[name]
    except KeyError:
        known = ", ".join(formats())
        raise CheckpointError(
            f"format {name!r} is not known; expected one of {known}{nearest(name, list(formats()))}"
        ) from None


def is_weight_file(name: str) -> bool:
    """Whether a file of this name, in a model's folder, belongs to a checkpoint of any format."""
    return any(each.owns(name) for each in formats().values())
