"""What Keras 3 makes files of: variables by the layers they belong to, in HDF5, and objects described in JSON.

    NAME.weights.h5            layers/dense/vars/0, layers/dense/vars/1, ...: the variables of a layer, by number;
                               the attribute `name` of layers/dense/vars is what the layer is called
    NAME.weights.json          the index where there are several: {"weight_map": {"/layers/dense/vars": file or files}}
    NAME_00000.weights.h5      each of them

A path is made of attributes of Python objects and, within lists, of classes in snake case, the second of a class with
_1 behind it. An object is described by {"module", "class_name", "config", "registered_name": "package>class"}. Here
nothing is imported or called by such a name: it is compared with those that are known.

Source: saving_lib.py (H5IOStore, ShardedH5IOStore) and serialization_lib.py of Keras 3.0 to 3.15.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2_core.checkpoints import hdf5
from gpt2_core.checkpoints.holds import About, Holds, objections
from gpt2_core.checkpoints.naming import PREFIX
from gpt2_core.checkpoints.renaming import Names
from gpt2_core.checkpoints.sharding import split, unique_keys
from gpt2_core.checkpoints.tensors import MappedFile, Tensor, file_tensor
from gpt2_core.errors import (
    CannotHoldError,
    CheckpointFormatError,
    CheckpointMismatchError,
    UnsafeCheckpointError,
)
from gpt2_core.files import atomic_write, file_inside, read_small_file
from gpt2_core.parameters import parameter_table

#: The version whose files ours are like; those of 3.0 on are read, and our own can be read from there on.
KERAS = "3.15.1"
SUFFIX, INDEX_SUFFIX = ".weights.h5", ".weights.json"
VARIABLES = "vars"
OPTIMIZER = "optimizer/"
#: Why the variables of an optimizer are left out.
STATE_OF_OPTIMIZER = "the state of the optimizer"

_MOST_JSON = 1 << 24  # bytes of an index or of a description of objects
_MOST_SHARDS = 10_000
_MOST_NAME = 255
_MOST_LISTED = 10


# JSON -----------------------------------------------------------------------------------------------------------------


def small_file(path: Path, most: int = _MOST_JSON) -> bytes:
    """The content of a small file. Raises: CheckpointFormatError if it is missing, no file, or larger than `most`."""
    try:
        if path.stat().st_size > most:
            raise CheckpointFormatError(f"{path} has {path.stat().st_size} bytes; expected at most {most}")
        return read_small_file(path, CheckpointFormatError)
    except FileNotFoundError as cause:
        raise CheckpointFormatError(f"{path} is not there; expected a small file; copy the whole folder") from cause
    except OSError as cause:
        raise CheckpointFormatError(f"{path} cannot be looked at: {cause.strerror}; check its permissions") from cause


def json_object(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object that `content` is. Raises: CheckpointFormatError; `what` is what it calls the file."""
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as cause:
        raise CheckpointFormatError(f"{what} is not JSON: {str(cause)[:200]}; fetch it again") from cause
    if not isinstance(found, dict):
        raise CheckpointFormatError(f"{what} holds {repr(found)[:100]}; expected a JSON object; fetch it again")
    return found


@dataclass(frozen=True)
class Described:
    """An object as Keras describes it: the name it is registered under, its settings, and all that is said of it."""

    name: str
    config: Mapping[str, Any]
    whole: Mapping[str, Any] = field(repr=False)

    @property
    def policy(self) -> str:
        """The name of its number format or policy, "" if it has none, or what else it has instead."""
        given = self.config.get("dtype")
        if given is None or isinstance(given, str):
            return given or ""
        named = given.get("config") if isinstance(given, dict) and given.get("class_name") == "DTypePolicy" else None
        name = named.get("name") if isinstance(named, dict) else None
        return name if isinstance(name, str) else repr(given)[:100]


def described(value: object) -> Described | None:
    """The object that `value`, read from JSON, describes; None if it describes none."""
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        return None
    name = value.get("registered_name") or value.get("class_name")
    return Described(name, value["config"], value) if isinstance(name, str) else None


def description(module: str, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The description of an object of a class registered as `name`, "package>class"."""
    registered = name if ">" in name else None
    return {
        "module": module,
        "class_name": name.rpartition(">")[2],
        "config": dict(config),
        "registered_name": registered,
    }


def policy(dtype: str) -> dict[str, Any]:
    """The description of a number format."""
    return description("keras", "DTypePolicy", {"name": dtype})


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Open files of weights: tensors by their paths, layers/dense/vars/0."""

    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    close: Callable[[], None]
    _contents: tuple[hdf5.Contents, ...] = field(repr=False)

    def name_of(self, layer: str) -> str | None:
        """What the layer at this path, layers/dense, is called; None if the files do not say."""
        return self._text((*layer.split("/"), VARIABLES), "name", _MOST_NAME)

    def root_text(self, attribute: str) -> str | None:
        """The text of an attribute of the root, which `write_weights` may have split over several."""
        whole, parts = self._text((), attribute), list[str]()
        while whole is None and (part := self._text((), f"{attribute}{len(parts)}")) is not None:
            parts.append(part)
        return "".join(parts) or None if whole is None else whole

    def _text(self, path: hdf5.Names, attribute: str, *most: int) -> str | None:
        try:
            found = (each.text(path, attribute, *most) for each in self._contents)
            return next((text for text in found if text is not None), None)
        except CheckpointFormatError as cause:
            raise CheckpointFormatError(f"{self.files[0]} is damaged: {cause}") from cause


def open_weights(path: Path, *, writable: bool = False) -> Weights:
    """Open a .weights.h5, or the .weights.json of several.

    Raises: UnsafeCheckpointError for what leads to another file or folder; CheckpointFormatError for anything damaged,
    and for an index and files that do not go together.
    """
    if path.name.endswith(".json"):
        return _open_shards(path, writable)
    file = MappedFile(path, writable=writable)
    return weights_in(file, hdf5.Window(file, 0, file.size))


def weights_in(file: MappedFile, window: hdf5.Window) -> Weights:
    """The weights in a part of a mapped file, which is closed if they cannot be read. Raises: as `open_weights`."""
    with closing_if_it_fails(file.close), of_sound_weights(file.path):
        contents = hdf5.contents(window)
        tensors = {
            "/".join(each.path): file_tensor(file, each.dtype, each.shape, window.start + each.offset)
            for each in contents.arrays
        }
    return Weights((file.path,), tensors, file.close, (contents,))


@contextmanager
def closing_if_it_fails(close: Callable[[], None]) -> Iterator[None]:
    """Close what was opened if what follows raises."""
    try:
        yield
    except BaseException:
        close()
        raise


@contextmanager
def of_sound_weights(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be read."""
    try:
        yield
    except UnsafeCheckpointError as cause:
        raise UnsafeCheckpointError(f"{path} is not safe to read: {cause}") from cause
    except CheckpointFormatError as cause:
        raise CheckpointFormatError(f"{path} is not a sound file of Keras: {cause}") from cause


def _open_shards(index: Path, writable: bool) -> Weights:
    """Every file that an index names; all that does not go together is reported together."""
    wanted = _weight_map(index)
    absent = [name for name in wanted if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointFormatError(
            f"{index} names {len(wanted)} files, of which {len(absent)} are missing: {_some(absent)}; fetch them"
        )
    opened: dict[str, Weights] = {}

    def close() -> None:
        for each in opened.values():
            each.close()

    with closing_if_it_fails(close):
        for name in wanted:
            opened[name] = open_weights(index.parent / name, writable=writable)
        problems = _disagreements(wanted, opened)
        if problems:
            raise CheckpointFormatError(
                f"the files of {index} do not go with it\n  " + "\n  ".join(problems) + "\nremedy: fetch them again"
            )
    return Weights(
        (index, *(each.files[0] for each in opened.values())),
        {path: tensor for each in opened.values() for path, tensor in each.tensors.items()},
        close,
        tuple(contents for each in opened.values() for contents in each._contents),
    )


def _weight_map(index: Path) -> dict[str, set[str]]:
    """The files that an index names, in order, with the groups of each."""
    content = json_object(small_file(index), str(index))
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f'{index} is no index of Keras: expected {{"weight_map": {{group: file}}}}')
    wanted: dict[str, set[str]] = {}
    for group, names in weight_map.items():
        for name in names if isinstance(names, list) else [names]:
            if not isinstance(name, str):
                raise CheckpointFormatError(f"{index} gives {repr(name)[:100]} as the file of {group}; expected a name")
            wanted.setdefault(name, set()).add(group.strip("/"))
    if len(wanted) > _MOST_SHARDS:
        raise CheckpointFormatError(f"{index} names {len(wanted)} files; expected at most {_MOST_SHARDS}")
    for name in wanted:
        file_inside(index.parent, name, what=str(index))
        if not name.endswith(SUFFIX):
            raise CheckpointFormatError(f"{index} names {name[:100]!r}; expected files that end in {SUFFIX}")
    return wanted


def _disagreements(wanted: Mapping[str, set[str]], opened: Mapping[str, Weights]) -> list[str]:
    problems, homes = [], dict[str, str]()
    for file, weights in opened.items():
        there = {path.rpartition("/")[0] for path in weights.tensors}
        absent, unlisted = sorted(wanted[file] - there), sorted(there - wanted[file])
        if absent:
            problems.append(f"{file} lacks {len(absent)} groups that the index puts there: {_some(absent)}")
        if unlisted:
            problems.append(f"{file} holds {len(unlisted)} groups that the index does not put there: {_some(unlisted)}")
        twice = [path for path in weights.tensors if homes.setdefault(path, file) != file]
        if twice:
            problems.append(f"{file} holds {len(twice)} tensors that another one holds too: {_some(twice)}")
    return problems


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(name[:200] for name in names[:_MOST_LISTED]) + more


def renamed(names: Names, there: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by our names, those without a row of the table by their paths with a / in front; and our names -> theirs.

    So no path, whatever it is, can be taken for a name of ours.
    """
    rows = {name for row in names.rows(names.layers_in(there)) for name in row.theirs}
    found = names.from_file({name: tensor for name, tensor in there.items() if name in rows})
    others = {name: tensor for name, tensor in there.items() if name not in rows}
    others |= {name: tensor for name, tensor in found.tensors.items() if name not in found.names_in_file}
    ours = {name: found.tensors[name] for name in found.names_in_file}
    return ours | {f"/{name}": tensor for name, tensor in others.items()}, found.names_in_file


# Writing --------------------------------------------------------------------------------------------------------------

Attributes = Mapping[hdf5.Names, Mapping[str, hdf5.Attribute]]


def whole_model(name: str, holds: Holds, tensors: Mapping[str, Tensor], about: About) -> str:
    """Check that a format can hold a model, and that all of its tensors and nothing else are there; give their dtype.

    Raises: CannotHoldError with all reasons; CheckpointMismatchError.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    reasons = objections(name, holds, about.config, about.head, dtypes)
    if reasons:
        raise CannotHoldError(f"this model cannot be written as {name}: {'; '.join(reasons)}")
    given = {each.removeprefix(PREFIX): tensor.shape for each, tensor in tensors.items()}
    table = {row.name.removeprefix(PREFIX): row.shape for row in parameter_table(about.config, about.head)}
    missing, more = [each for each in table if each not in given], [each for each in given if each not in table]
    misshaped = [(each, given[each], shape) for each, shape in table.items() if given.get(each, shape) != shape]
    if missing or more or misshaped or len(given) < len(tensors):
        remedy = f"give the tensors of this configuration and head to write {name}, each once; a tied head is none"
        raise CheckpointMismatchError("to be written", missing, more, misshaped, remedy)
    return next(iter(dtypes))


def arrays_of(tensors: Mapping[str, Tensor]) -> dict[hdf5.Names, Tensor]:
    """Tensors by path, as `hdf5.write` takes them."""
    return {tuple(path.split("/")): tensor for path, tensor in tensors.items()}


def write_weights(path: Path, tensors: Mapping[str, Tensor], attributes: Attributes) -> None:
    """Write one .weights.h5. Raises: CheckpointError, WriteError."""
    with atomic_write(path) as file:
        hdf5.write(file, arrays_of(tensors), attributes)


def write_shards(folder: Path, stem: str, tensors: Mapping[str, Tensor], most: int) -> list[str]:
    """Write files of at most `most` bytes and their index; the names of all. Raises: CheckpointError, WriteError."""
    weight_map: dict[str, list[str]] = {}
    names = []
    for number, paths in enumerate(split(tensors, most)):
        names.append(f"{stem}_{number:05d}{SUFFIX}")
        write_weights(folder / names[-1], {path: tensors[path] for path in paths}, {(): {}})
        for group in dict.fromkeys(path.rpartition("/")[0] for path in paths):
            weight_map.setdefault(f"/{group}", []).append(names[-1])
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    names.append(stem + INDEX_SUFFIX)
    with atomic_write(folder / names[-1]) as file:
        file.write(as_json(index))
    return names


def as_json(value: Mapping[str, Any]) -> bytes:
    """As Keras writes it."""
    return json.dumps(value, indent=4).encode()


def shard_pattern(stem: str) -> re.Pattern[str]:
    """The names of shards."""
    return re.compile(rf"{re.escape(stem)}_\d{{5,9}}{re.escape(SUFFIX)}")


def long_text(attribute: str, text: str) -> dict[str, hdf5.Attribute]:
    """A text as one attribute or, where it is longer than HDF5 allows, as several: see `Weights.root_text`."""
    size = hdf5.MOST_ATTRIBUTE
    parts = [text[at : at + size] for at in range(0, len(text), size)] if text.isascii() else [text]
    return {attribute: text} if len(parts) <= 1 else {f"{attribute}{n}": part for n, part in enumerate(parts)}
