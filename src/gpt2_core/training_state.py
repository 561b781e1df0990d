"""What a training run is at one moment, in files that every framework reads, written as one.

    runs/tales/states/
        step-00000200/
            state.json             the step, the place in the data, the scale of the loss, the best so far, metrics
            config.json            the folder is also a model: Model.from_pretrained("runs/tales/states/step-00000200")
            model.safetensors      the weights, or adapter_model.safetensors where an adapter is trained
            optimizer.safetensors  exp_avg.NAME and exp_avg_sq.NAME, the moments of AdamW (of Muon the first alone)
            ema.safetensors        the weights that follow, where there are such

Names are those of the parameter table, numbers are float32, layouts are the released ones, so a run that one framework
began the other takes up. There is no state of a random generator: dropout is drawn from the seed and the step.

A folder appears by one rename when all of it is on the disk. Killed at any moment, there is the last state or the one
before, never a part of one; what is left of a part is removed by the next save.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gpt2_core import adapters
from gpt2_core.checkpoints import safetensors
from gpt2_core.checkpoints.tensors import Tensor
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import STAGING, atomic_folder, atomic_write, read_small_file

VERSION = 1
MODEL, OPTIMIZER, EMA, STATE = "model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"
GROUPS = ("model", "adapter", "exp_avg", "exp_avg_sq", "ema")
_NAME = re.compile(r"step-(\d{8,})\Z")

Groups = Mapping[str, Mapping[str, Tensor]]


@dataclass
class Progress:
    """How far a run is: everything about a state but its tensors.

    ``updates`` counts the steps that changed the weights, which those with too large a scale of the loss do not;
    ``good_steps`` those since that scale last changed. ``best`` are the lowest losses of the evaluations, each with its
    step, ``worse`` counts evaluations since the lowest. ``metrics`` are the last rows of the log.
    """

    step: int = 0
    updates: int = 0
    tokens: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    loss_scale: float = 1.0
    good_steps: int = 0
    best: list[tuple[float, int]] = field(default_factory=list)
    worse: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class About:
    """What the tensors of a run belong to."""

    config: GPT2Config
    architecture: str
    lora: adapters.Lora | None = None
    base: str = ""


def folder_of(states: Path, step: int) -> Path:
    """Where the state after ``step`` steps stands."""
    return states / f"step-{step:08d}"


def steps_in(states: Path) -> list[int]:
    """The steps whose states there are, in order."""
    if not states.is_dir():
        return []
    found = (_NAME.match(entry.name) for entry in states.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def save_state(states: Path, progress: Progress, groups: Groups, about: About, recipe: Mapping[str, Any]) -> Path:
    """Write the state of a run as one folder, and give it; one that is there already is left as it is.

    ``groups`` hold float32 tensors by name: "model" or "adapter", "exp_avg", "exp_avg_sq", and "ema" if there is one.

    Raises: WriteError where the system refuses, as for a full disk; the states that are there stay.
    """
    folder = folder_of(states, progress.step)
    if folder.exists():
        return folder
    _sweep(states)
    with atomic_folder(folder) as stage:
        _write_model(stage, groups, about)
        moments = {
            f"{group}.{name}": tensor
            for group in ("exp_avg", "exp_avg_sq")
            for name, tensor in groups.get(group, {}).items()
        }
        safetensors.write(stage / OPTIMIZER, moments)
        if groups.get("ema"):
            safetensors.write(stage / EMA, groups["ema"])
        content = {"version": VERSION, "recipe": dict(recipe), **asdict(progress)}
        with atomic_write(stage / STATE) as file:
            file.write(json.dumps(content, indent=1).encode("utf-8") + b"\n")
    return folder


def _write_model(stage: Path, groups: Groups, about: About) -> None:
    if about.lora is not None:
        labels = about.config.id2label
        adapters.write_adapter(stage, about.lora, groups["adapter"], about.base, about.architecture, labels)
        return
    extra = dict(about.config.extra) | {"architectures": [about.architecture], "dtype": "float32"}
    extra.pop("torch_dtype", None)
    about.config.replace(extra=extra).save_pretrained(stage)
    safetensors.write(stage / MODEL, groups["model"])


@dataclass(frozen=True)
class Saved:
    """A state that was read: ``groups`` are fetched from the files when asked for."""

    folder: Path
    progress: Progress
    recipe: Mapping[str, Any]
    groups: Groups


@contextlib.contextmanager
def open_state(folder: str | Path) -> Iterator[Saved]:
    """Yield the state that stands in ``folder``, its tensors for as long as the block runs.

    Raises: CheckpointError, where there is none; CheckpointFormatError, where it is damaged or of a newer version.
    """
    folder = Path(folder)
    progress, recipe = _read_state(folder / STATE)
    with contextlib.ExitStack() as files:
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
        for group, name in (("model", MODEL), ("ema", EMA)):
            if (folder / name).exists():
                groups[group] = dict(files.enter_context(safetensors.read(folder / name)))
        if (folder / adapters.WEIGHTS).exists():
            arrays = adapters.read_adapter(folder).arrays
            groups["adapter"] = {name: Tensor.of(array) for name, array in arrays.items()}
        for name, tensor in files.enter_context(safetensors.read(folder / OPTIMIZER)).items():
            group, _, of = name.partition(".")
            if group not in ("exp_avg", "exp_avg_sq"):
                raise CheckpointFormatError(f"{folder / OPTIMIZER} holds {name!r}, expected exp_avg.* and exp_avg_sq.*")
            groups[group][of] = tensor
        yield Saved(folder, progress, recipe, groups)


def _read_state(path: Path) -> tuple[Progress, Mapping[str, Any]]:
    try:
        content = json.loads(read_small_file(path, CheckpointError))
        version, recipe = content.pop("version"), content.pop("recipe")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {STATE}; expected the state of a training run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointFormatError(f"{path} is damaged ({cause}); go on from an earlier state") from cause
    if version != VERSION:
        raise CheckpointFormatError(f"{path} is of version {version}, expected {VERSION}; use a newer gpt2-duet")
    known = {each.name for each in fields(Progress)}
    if set(content) != known:
        raise CheckpointFormatError(f"{path} holds {sorted(content)}, expected {sorted(known)}")
    content["best"] = [(float(loss), int(step)) for loss, step in content["best"]]
    return Progress(**content), recipe


def prune(states: Path, keep_last: int, keep: Collection[int] = ()) -> list[int]:
    """Remove all but the ``keep_last`` newest states and those after the steps ``keep``; give the steps removed."""
    steps = steps_in(states)
    removed = [step for step in steps[: max(0, len(steps) - keep_last)] if step not in keep]
    remove(states, removed)
    return removed


def remove(states: Path, steps: Iterable[int]) -> None:
    """Remove the states after these steps.

    A folder is renamed before it is emptied, so that a kill leaves no part of a state under a state's name.
    """
    for step in steps:
        folder = folder_of(states, step)
        gone = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.removed")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _sweep(states: Path) -> None:
    """Remove what killed processes left: states half removed, and those half written. One process writes to a run."""
    if states.is_dir():
        for entry in states.iterdir():
            if entry.name.startswith(".step-") and entry.name.endswith((".removed", STAGING)):
                shutil.rmtree(entry, ignore_errors=True)


def check_groups(saved: Saved, expected: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """What was saved must be what the run has, name by name and shape by shape.

    Raises: CheckpointError, saying what differs.
    """
    for group in GROUPS:
        have = {name: tuple(tensor.shape) for name, tensor in saved.groups[group].items()}
        want = {name: tuple(shape) for name, shape in expected.get(group, {}).items()}
        if have != want:
            wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
            some = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise CheckpointError(
                f"{saved.folder} does not fit this run: {group} differs in {some}; resume with the recipe that it was "
                "saved with, or begin another run"
            )
