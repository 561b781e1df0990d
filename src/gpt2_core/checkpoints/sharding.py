"""One checkpoint in one file or in several with an index, as the hub lays them out.

    model.safetensors                                       single
    model-00001-of-00002.safetensors, model-00002-of-...    shards
    model.safetensors.index.json                            {"metadata": {"total_size": bytes},
                                                             "weight_map": {tensor name: file name}}

Source: the layout that transformers' save_pretrained writes (documentation, "Sharded checkpoints").
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpt2_core.checkpoints.tensors import Checkpoint, MappedFile, Tensor, as_tensors
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_folder, atomic_write, file_inside, finish_interrupted_save

_INDEX_LIMIT = 1 << 24  # bytes; an index has about a hundred per tensor
_MOST_LISTED = 20

WriteFile = Callable[[Path, Mapping[str, Tensor], Mapping[str, str] | None], None]
ReadFile = Callable[[Path, bool], Checkpoint]


@dataclass(frozen=True)
class Layout:
    """The names that one format gives its files: `stem` + `suffix`; files ending in one of `suffixes` are its own."""

    format: str
    stem: str
    suffix: str
    suffixes: tuple[str, ...]

    @property
    def single(self) -> str:
        """The name when one file holds everything."""
        return self.stem + self.suffix

    @property
    def index(self) -> str:
        """The name of the index of shards."""
        return f"{self.single}.index.json"

    def shard(self, number: int, count: int) -> str:
        """The name of shard `number` of `count`, counted from one."""
        return f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}"

    def owns(self, name: str) -> bool:
        """Whether a file of this name, in a model's folder, is a checkpoint of this format or a part of one."""
        shard = rf"{re.escape(self.stem)}-\d{{5}}-of-\d{{5}}{re.escape(self.suffix)}"
        return name in (self.single, self.index) or re.fullmatch(shard, name) is not None

    def find(self, path: Path) -> Path | None:
        """The file to open in the folder `path`: the single file if there is one, else the index, else None."""
        return next((path / name for name in (self.single, self.index) if (path / name).is_file()), None)


def read_layout(layout: Layout, path: Path, read_file: ReadFile, *, writable: bool) -> Checkpoint:
    """Open a folder, an index, or a single file. Raises: CheckpointError, and what `read_file` raises."""
    found: Path | None = path
    if path.is_dir():
        finish_interrupted_save(path)
        found = layout.find(path)
    if found is None:
        raise CheckpointError(
            f"{path} holds no {layout.format} checkpoint: expected {layout.single} or {layout.index}, "
            f"found {describe_folder(path)}"
        )
    return _read_shards(layout, found, read_file, writable) if found.suffix == ".json" else read_file(found, writable)


def write_layout(
    layout: Layout,
    path: Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    write_file: WriteFile,
    *,
    metadata: Mapping[str, str] | None,
    max_shard_bytes: int | None,
) -> tuple[Path, ...]:
    """Write to the file `path` if its suffix is one of the format's, else to the folder `path`; give the files.

    Raises: CheckpointError, WriteError; whatever is raised, `path` is as it was.
    """
    given = as_tensors(tensors)
    if path.suffix in layout.suffixes and not path.is_dir():
        if max_shard_bytes is not None:
            raise CheckpointError(f"{path} is one file; give a folder to write shards of {max_shard_bytes} bytes")
        write_file(path, given, metadata)
        return (path,)
    shards = split(given, max_shard_bytes)
    with atomic_folder(path, replaces=layout.owns) as stage:
        names = [layout.single]
        if len(shards) > 1:
            names = [layout.shard(number, len(shards)) for number in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            write_file(stage / name, {key: given[key] for key in shard}, metadata)
        if len(shards) > 1:
            with atomic_write(stage / layout.index) as file:
                file.write(_index(given, dict(zip(names, shards, strict=True))))
            names.append(layout.index)
    return tuple(path / name for name in names)


def split(tensors: Mapping[str, Tensor], most: int | None) -> list[list[str]]:
    """Names in groups of at most `most` bytes, in order; a tensor larger than that has a group to itself."""
    if most is None:
        return [list(tensors)]
    if most < 1:
        raise CheckpointError(f"max_shard_bytes is {most}; expected at least 1, or None for a single file")
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    return shards


def describe_folder(path: Path) -> str:
    """The files of a folder in words, for messages."""
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as cause:
        return f"nothing readable ({cause.strerror})"
    shown = ", ".join(names[:_MOST_LISTED])
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return shown + more if names else "an empty folder"


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object whose keys are all different. Raises: ValueError."""
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key {key[:200]!r} stands there more than once")
        seen[key] = value
    return seen


def shard_names(path: Path) -> dict[str, list[str]]:
    """The files that the index at `path` names, in order, with the tensors of each.

    Raises: CheckpointFormatError if it is no index, UnsafeCheckpointError if a file is not within its folder.
    """
    file = MappedFile(path)
    if file.size > _INDEX_LIMIT:
        raise CheckpointFormatError(f"{path} has {file.size} bytes; expected an index of at most {_INDEX_LIMIT}")
    try:
        content = json.loads(file.bytes(0, file.size).decode("utf-8"), object_pairs_hook=unique_keys)
        weight_map = content["weight_map"]
        pairs = [(str(name), where) for name, where in weight_map.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        raise CheckpointFormatError(
            f'{path} is not an index of shards ({cause}); expected {{"weight_map": {{tensor name: file name}}}}'
        ) from cause
    shards: dict[str, list[str]] = {}
    for name, where in pairs:
        if not isinstance(where, str):
            raise CheckpointFormatError(f"{path} gives {str(where)[:200]} as the file of {name}; expected a file name")
        shards.setdefault(where, []).append(name)
    for where in shards:
        file_inside(path.parent, where, what=str(path))
    if not shards:
        raise CheckpointFormatError(f"{path} lists no tensor; expected at least one in weight_map")
    return shards


def _index(tensors: Mapping[str, Tensor], shards: Mapping[str, Sequence[str]]) -> bytes:
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def _read_shards(layout: Layout, path: Path, read_file: ReadFile, writable: bool) -> Checkpoint:
    """Open every shard of an index; what does not fit together is reported together."""
    wanted = shard_names(path)
    absent = [name for name in wanted if not (path.parent / name).is_file()]
    if absent:
        raise CheckpointFormatError(
            f"{path} lists {len(wanted)} files of which {len(absent)} are missing: {_some(absent)}; "
            f"fetch them, or copy the whole folder again"
        )
    opened = {name: read_file(path.parent / name, writable) for name in wanted}
    problems = _disagreements(wanted, opened)
    if problems:
        raise CheckpointFormatError(
            f"the shards of {path} do not fit its index\n  " + "\n  ".join(problems) + "\nremedy: fetch them again"
        )

    def close() -> None:
        for shard in opened.values():
            shard.close()

    return Checkpoint(
        {name: opened[file][name] for file, names in wanted.items() for name in names},
        format=layout.format,
        path=path,
        files=[path, *(path.parent / name for name in wanted)],
        metadata=next(iter(opened.values())).metadata,
        close=close,
    )


def _disagreements(wanted: Mapping[str, Sequence[str]], opened: Mapping[str, Checkpoint]) -> list[str]:
    problems = []
    homes: dict[str, list[str]] = {}
    for file, shard in opened.items():
        listed = set(wanted[file])
        absent = [name for name in wanted[file] if name not in shard]
        unlisted = [name for name in shard if name not in listed]
        for name in shard:
            homes.setdefault(name, []).append(file)
        if absent:
            problems.append(f"{file} lacks {len(absent)} tensors that the index puts there: {_some(absent)}")
        if unlisted:
            problems.append(
                f"{file} holds {len(unlisted)} tensors that the index does not put there: {_some(unlisted)}"
            )
    twice = [name for name, files in homes.items() if len(files) > 1]
    if twice:
        problems.append(f"{len(twice)} tensors stand in more than one file: {_some(twice)}")
    return problems


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
