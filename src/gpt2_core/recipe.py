"""The recipe of a run: everything that training can be told, in one frozen, validated object.

    Recipe(data="tales.txt", lr=3e-4, steps=500)
    read_recipe("recipe.toml", {"lr": "1e-4"}) -> Recipe         the file, then what the command line says
    write_recipe(path, recipe)                                   as it is saved with the run
    differences(one, other)                                      what says that a run would not be the same run

A recipe file is TOML. Its tables (``[model]``, ``[data]``, ``[optimizer]``, ...) only put related settings under one
heading: every setting has a name of its own, and ``--set lr=1e-4`` and ``--set optimizer.lr=1e-4`` are the same.

TOML because people write recipes by hand and want comments in them; Python reads it from 3.11 on, and the small package
tomli is what Python took over. JSON is read too. What is written needs no package: it is names and values.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gpt2_core.errors import ConfigError, nearest
from gpt2_core.files import atomic_write, read_small_file
from gpt2_core.parameters import Head
from gpt2_core.schedule import KINDS

TASKS: Mapping[str, Head] = {
    "lm": Head.LM,
    "instruction": Head.LM,
    "classification": Head.SEQUENCE,
    "double_heads": Head.DOUBLE,
}
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("packed", "documents")
OPTIMIZERS = ("adamw", "muon")
PARALLEL = ("auto", "none", "ddp", "fsdp")
#: What of a recipe may change when a run goes on: how long, how often it says or keeps what, on what it runs, and where
#: the data are (that they are the same is seen by themselves).
FREE = frozenset(
    ("steps", "epochs", "log_every", "eval_every", "eval_batches", "save_every", "sample_every", "sample_prompt",
     "sample_tokens", "keep_last", "keep_best", "patience", "device", "parallel", "compile", "gradient_checkpointing",
     "tensorboard", "data", "validation")
)  # fmt: skip


def _setting(section: str, default: Any, check: Callable[[Any], Any], expected: str) -> Any:
    return field(default=default, metadata={"section": section, "check": check, "expected": expected})


# -- checks: each gives the value as it is kept, or raises ValueError ------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _whole(least: int, most: int | None = None) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            raise ValueError
        return value

    return check


def _number(allowed: Callable[[float], bool]) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        if not math.isfinite(value) or not allowed(float(value)):
            raise ValueError
        return float(value)

    return check


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(nearest(str(value), choices))
        return str(value)

    return check


def _texts(value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) and each for each in values):
        raise ValueError
    return tuple(values)


def _table(value: Any) -> tuple[tuple[str, Any], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        made = tuple(sorted((str(name), each) for name, each in pairs))
        json.dumps(made)
    except (TypeError, ValueError) as cause:
        raise ValueError from cause
    for name, each in made:
        if not _can_be_written(each):
            raise ValueError(f"; {name!r} is {each!r}, which no recipe can hold; leave it out")
    return made


def _can_be_written(value: Any) -> bool:
    """Whether TOML has a word for it, and JSON: neither None nor what is not finite, at any depth."""
    if isinstance(value, Mapping):
        return all(_can_be_written(each) for each in value.values())
    if isinstance(value, (list, tuple)):
        return all(_can_be_written(each) for each in value)
    return value is not None and (not isinstance(value, float) or math.isfinite(value))


def _or_none(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


_SHARE = _number(lambda value: 0 <= value < 1)
_POSITIVE = _number(lambda value: value > 0)
_NOT_NEGATIVE = _number(lambda value: value >= 0)
_COUNT = _whole(1)
_COUNT_OR_NEVER = _whole(0)
_WHOLE = "a whole number of at least 1"
_WHOLE_OR_NEVER = "a whole number of at least 0, where 0 means never"
_A_SHARE = "a number from 0 to below 1"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run can be told, frozen and validated.

    [model]
        model: where the weights come from: a name, a folder, or a checkpoint file.
        from_scratch: take the configuration of ``model`` alone, and the initial values of ``seed``.
        config: changes of that configuration, as {n_layer = 6}.
        task: "lm", "instruction" (prompts do not count), "classification", or "double_heads" (next utterance).
        dropout: the chance of all places of dropout; None leaves the configuration's.
        freeze: patterns of parameter names that are not trained, as "transformer.h.[0-5].*".

    [data]
        data, validation: what is trained on and what is evaluated on: token shards, a text or a folder of them; for the
            other tasks examples in .jsonl.
        mode: "packed" rows of text after text, or "documents", one a row with padding.
        batch_size: rows of a micro-batch, of all processes together. accumulation: micro-batches of a step.
        block_size: tokens of a row; None is the model's n_positions.
        shuffle: draw the order of each epoch from the seed.
        val_fraction: the share of ``data`` kept for evaluation, where it is a text or examples and there is no
            ``validation``.

    [optimizer]
        lr, beta1, beta2, eps, weight_decay: AdamW's (Loshchilov & Hutter 2019). Decay falls on the rows of the
            parameter table that say so: weights, not biases and gains.
        optimizer: "adamw" for all of them, or "muon" for the blocks' kernels (Jordan et al. 2024), with its own
            ``momentum`` and the same lr and weight_decay, and AdamW for the rest.
        clip: the largest global norm of the gradients; 0 leaves them.
        schedule, warmup_steps, min_lr, cooldown_steps: as in schedule.py.
        steps, epochs: how long; one of them.

    [precision]
        dtype: what is computed in; weights and moments stay in float32. float16 scales the loss, from ``loss_scale``.
        gradient_checkpointing: compute activations again instead of keeping them. compile: torch.compile, or XLA.
        device: "cpu", "cuda", ... None takes a GPU where there is one.
        parallel: what several processes share: "ddp" the batch, "fsdp" the weights too; "auto" is ddp if there are any.

    [ema]
        ema_decay: a second set of weights, which keeps this share of itself a step and follows the first; 0 for none.

    [lora]
        lora_rank: train two thin matrices beside each target instead of it (Hu et al. 2021); 0 for none.
        lora_alpha: their product counts lora_alpha / lora_rank. lora_dropout: of what they read.
        lora_targets: the last parts of the kernels' names.

    [run]
        seed: of initial values, the order of the data, and dropout.
        log_every, eval_every, save_every, sample_every: in steps. eval_batches: 0 evaluates on all there is.
        sample_prompt, sample_tokens: what is written along the way.
        keep_last, keep_best: how many saved states stay.
        patience: stop after so many evaluations without a better loss; 0 never.
        tensorboard: write its files too, where a package that can is installed.

    Raises: ConfigError, for impossible values and settings that contradict each other.
    """

    model: str = _setting("model", "gpt2-tales", _text, "a model's name, its folder or a checkpoint file")
    from_scratch: bool = _setting("model", False, _flag, "true or false")
    config: tuple[tuple[str, Any], ...] = _setting("model", (), _table, "a table, as {n_layer = 6}")
    task: str = _setting("model", "lm", _one_of(*TASKS), f"one of {', '.join(TASKS)}")
    dropout: float | None = _setting("model", None, _or_none(_SHARE), _A_SHARE)
    freeze: tuple[str, ...] = _setting("model", (), _texts, "a list of patterns, as ['transformer.wte.*']")

    data: str = _setting("data", "", _any_text, "the path of token shards or of a text")
    validation: str | None = _setting("data", None, _or_none(_text), "a path")
    mode: str = _setting("data", "packed", _one_of(*MODES), f"one of {', '.join(MODES)}")
    batch_size: int = _setting("data", 8, _COUNT, _WHOLE)
    accumulation: int = _setting("data", 1, _COUNT, _WHOLE)
    block_size: int | None = _setting("data", None, _or_none(_whole(2)), "a whole number of at least 2")
    shuffle: bool = _setting("data", True, _flag, "true or false")

    val_fraction: float = _setting("data", 0.1, _SHARE, _A_SHARE)

    lr: float = _setting("optimizer", 1e-4, _POSITIVE, "a number above 0")
    beta1: float = _setting("optimizer", 0.9, _SHARE, _A_SHARE)
    beta2: float = _setting("optimizer", 0.95, _SHARE, _A_SHARE)
    eps: float = _setting("optimizer", 1e-8, _POSITIVE, "a number above 0")
    weight_decay: float = _setting("optimizer", 0.1, _NOT_NEGATIVE, "a number of at least 0")
    optimizer: str = _setting("optimizer", "adamw", _one_of(*OPTIMIZERS), f"one of {', '.join(OPTIMIZERS)}")
    momentum: float = _setting("optimizer", 0.95, _SHARE, _A_SHARE)
    clip: float = _setting(
        "optimizer", 1.0, _NOT_NEGATIVE, "a number of at least 0, where 0 leaves gradients as they are"
    )
    schedule: str = _setting("optimizer", "cosine", _one_of(*KINDS), f"one of {', '.join(KINDS)}")
    warmup_steps: int = _setting("optimizer", 0, _whole(0), "a whole number of at least 0")
    min_lr: float = _setting("optimizer", 0.0, _NOT_NEGATIVE, "a number of at least 0")
    cooldown_steps: int = _setting("optimizer", 0, _whole(0), "a whole number of at least 0")
    steps: int | None = _setting("optimizer", None, _or_none(_COUNT), _WHOLE)
    epochs: float | None = _setting("optimizer", None, _or_none(_POSITIVE), "a number above 0")

    dtype: str = _setting("precision", "float32", _one_of(*DTYPES), f"one of {', '.join(DTYPES)}")
    loss_scale: float = _setting("precision", 65536.0, _POSITIVE, "a number above 0")
    gradient_checkpointing: bool = _setting("precision", False, _flag, "true or false")
    compile: bool = _setting("precision", False, _flag, "true or false")
    device: str | None = _setting("precision", None, _or_none(_text), "a device, as cpu or cuda")
    parallel: str = _setting("precision", "auto", _one_of(*PARALLEL), f"one of {', '.join(PARALLEL)}")

    ema_decay: float = _setting("ema", 0.0, _SHARE, _A_SHARE)

    lora_rank: int = _setting("lora", 0, _whole(0), "a whole number of at least 0")
    lora_alpha: float = _setting("lora", 16.0, _POSITIVE, "a number above 0")
    lora_dropout: float = _setting("lora", 0.0, _SHARE, _A_SHARE)
    lora_targets: tuple[str, ...] = _setting("lora", ("attn.c_attn",), _texts, "a list of names, as ['attn.c_attn']")

    seed: int = _setting("run", 0, _whole(0, 2**32 - 1), "a whole number from 0 to 2**32 - 1")
    log_every: int = _setting("run", 1, _COUNT, _WHOLE)
    eval_every: int = _setting("run", 0, _COUNT_OR_NEVER, _WHOLE_OR_NEVER)
    eval_batches: int = _setting("run", 0, _whole(0), "a whole number of at least 0, where 0 means all")
    save_every: int = _setting("run", 0, _COUNT_OR_NEVER, "a whole number of at least 0; 0 saves at the end")
    sample_every: int = _setting("run", 0, _COUNT_OR_NEVER, _WHOLE_OR_NEVER)
    sample_prompt: str = _setting("run", "", _any_text, "a text")
    sample_tokens: int = _setting("run", 60, _COUNT, _WHOLE)
    keep_last: int = _setting("run", 2, _COUNT, _WHOLE)
    keep_best: int = _setting("run", 1, _whole(0), "a whole number of at least 0")
    patience: int = _setting("run", 0, _COUNT_OR_NEVER, _WHOLE_OR_NEVER)
    tensorboard: bool = _setting("run", False, _flag, "true or false")

    def __new__(cls, **settings: Any) -> Recipe:  # noqa: D102 - here, so that a wrong name is our error
        for name in settings:
            _check_name(name)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            try:
                object.__setattr__(self, each.name, each.metadata["check"](value))
            except ValueError as cause:
                raise ConfigError(f"{each.name} is {value!r}, expected {each.metadata['expected']}{cause}") from None
        _check_together(self)

    @property
    def head(self) -> Head:
        """What the task puts on the transformer."""
        return TASKS[self.task]

    def replace(self, **changes: Any) -> Recipe:
        """A copy with ``changes`` applied and validated; of steps and epochs the one given takes the other's place.

        Raises: ConfigError.
        """
        for name in changes:
            _check_name(name)
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if changes.get(one) is not None and other not in changes:
                changes[other] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as values that JSON can hold."""
        out: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "config":
                value = dict(value)
            out[each.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """A recipe from settings by name, where those of a section may also stand in a table of their own.

        Raises: ConfigError.
        """
        return cls(**_flattened(data))


SECTIONS: Mapping[str, tuple[str, ...]] = {
    section: tuple(each.name for each in fields(Recipe) if each.metadata["section"] == section)
    for section in dict.fromkeys(each.metadata["section"] for each in fields(Recipe))
}
SETTINGS = tuple(each.name for each in fields(Recipe))
_SECTION = {name: section for section, names in SECTIONS.items() for name in names}
# What others call the same thing.
_OTHER_NAMES: Mapping[str, str] = {
    "learning_rate": "lr",
    "max_steps": "steps",
    "max_iters": "steps",
    "num_train_epochs": "epochs",
    "gradient_accumulation_steps": "accumulation",
    "grad_clip": "clip",
    "max_grad_norm": "clip",
    "warmup_iters": "warmup_steps",
    "lr_scheduler_type": "schedule",
    "context_length": "block_size",
    "per_device_train_batch_size": "batch_size",
    "adam_epsilon": "eps",
    "early_stopping": "patience",
    "init_from": "model",
    "rank": "lora_rank",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_last",
}


def _check_name(name: str) -> None:
    if name in SETTINGS:
        return
    hint = f"; it is called {_OTHER_NAMES[name]!r} here" if name in _OTHER_NAMES else nearest(name, SETTINGS)
    raise ConfigError(f"a recipe has no setting {name!r}{hint}")


def _check_together(recipe: Recipe) -> None:
    if recipe.steps is not None and recipe.epochs is not None:
        raise ConfigError(f"got both steps={recipe.steps} and epochs={recipe.epochs}, expected one of them")
    if recipe.min_lr > recipe.lr:
        raise ConfigError(f"min_lr={recipe.min_lr} is more than lr={recipe.lr}; lower it")
    if recipe.schedule == "constant" and recipe.min_lr and not recipe.cooldown_steps:
        raise ConfigError(
            f"min_lr={recipe.min_lr} has no effect on schedule='constant' without cooldown_steps; leave it out, or set "
            "those"
        )
    if recipe.cooldown_steps and recipe.schedule != "constant":
        raise ConfigError(
            f"cooldown_steps={recipe.cooldown_steps} has no effect on schedule={recipe.schedule!r}, which falls by "
            "itself; leave it out, or set schedule='constant'"
        )
    if recipe.steps is not None and recipe.warmup_steps + recipe.cooldown_steps > recipe.steps:
        raise ConfigError(
            f"warmup_steps={recipe.warmup_steps} and cooldown_steps={recipe.cooldown_steps} are more than "
            f"steps={recipe.steps}; lower them"
        )
    if recipe.patience and not recipe.eval_every:
        raise ConfigError(f"patience={recipe.patience} has no effect without evaluations; set eval_every")
    if recipe.eval_every and recipe.validation is None and not recipe.val_fraction and recipe.task != "lm":
        raise ConfigError(f"eval_every={recipe.eval_every} has nothing to evaluate on; set validation or val_fraction")
    if recipe.lora_rank and recipe.freeze:
        raise ConfigError("lora_rank freezes every weight of the model already; leave freeze out")
    if recipe.optimizer != "muon" and recipe.momentum != Recipe.momentum:
        raise ConfigError(
            f"momentum={recipe.momentum} has no effect on optimizer={recipe.optimizer!r}, whose own is beta1; leave it "
            "out, or set optimizer='muon'"
        )
    if recipe.optimizer == "muon" and recipe.lora_rank:
        raise ConfigError("optimizer 'muon' trains the blocks' kernels, which lora_rank freezes; set it to 'adamw'")
    if recipe.optimizer == "muon" and recipe.parallel == "fsdp":
        raise ConfigError("optimizer 'muon' needs whole kernels, which parallel='fsdp' shares out; set it to 'ddp'")


def _flattened(data: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in data.items():
        table = isinstance(value, Mapping) and name != "config"
        inner = value if table and name in SECTIONS else {name: value}
        if table and name not in SECTIONS:
            hint = nearest(name, list(SECTIONS))
            raise ConfigError(f"a recipe has no table [{name}]; expected {', '.join(SECTIONS)}{hint}")
        for each, given in inner.items():
            _check_name(each)
            if table and _SECTION[each] != name:
                raise ConfigError(f"{each} stands in [{name}], expected in [{_SECTION[each]}]; move it there")
            if each in out:
                raise ConfigError(f"{each} is given twice; leave one out")
            out[each] = given
    return out


# -- files ---------------------------------------------------------------------------------------------------


def read_recipe(path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a TOML file (or JSON, by its name), with ``overrides`` as typed: {"lr": "1e-4"}.

    Raises: ConfigError, where the file is missing or not valid, or the recipe is not.
    """
    path = Path(path)
    try:
        text = read_small_file(path, ConfigError).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; expected a recipe in TOML") from None
    except UnicodeDecodeError as cause:
        raise ConfigError(f"{path} is not text ({cause}); expected a recipe in TOML") from cause
    data = _json(path, text) if path.suffix == ".json" else _toml(path, text)
    try:
        return _with(_flattened(data), overrides or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, str]) -> Recipe:
    """The recipe of ``settings`` with ``overrides`` as typed on a command line.

    Raises: ConfigError.
    """
    return _with(dict(settings), overrides)


def _with(settings: dict[str, Any], overrides: Mapping[str, str]) -> Recipe:
    for typed, text in overrides.items():
        section, _, name = typed.rpartition(".")
        if section == "config":
            settings["config"] = dict(settings.get("config", {})) | {name: _value(text)}
            continue
        if section and section not in SECTIONS:
            hint = nearest(section, list(SECTIONS))
            raise ConfigError(f"a recipe has no table [{section}]; expected {', '.join(SECTIONS)}{hint}")
        _check_name(name)
        if section and _SECTION[name] != section:
            raise ConfigError(f"{name} belongs to [{_SECTION[name]}], got {typed}; write {_SECTION[name]}.{name}")
        value = _value(text)
        if name in ("steps", "epochs") and value is not None:
            settings.pop("epochs" if name == "steps" else "steps", None)
        if name in ("freeze", "lora_targets") and isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if name in ("model", "data", "validation", "sample_prompt") and value is not None:
            value = text  # a path may look like a number
        settings[name] = value
    return Recipe(**settings)


def _value(text: str) -> Any:
    """What was typed, as JSON where it is JSON: numbers, true, null, lists; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None, "none": None}.get(text, text)


def _json(path: Path, text: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise ConfigError(f"{path} is not valid JSON ({cause}); mend it") from cause
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, expected an object of names and values")
    return data


def _toml(path: Path, text: str) -> Mapping[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as cause:
            raise ConfigError(
                f"{path} is TOML, which Python reads from 3.11 on, and before with the package tomli; install it, "
                "or write the recipe as .json"
            ) from cause
    try:
        data: Mapping[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as cause:
        raise ConfigError(f"{path} is not valid TOML ({cause}); mend it") from cause
    return data


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file holds it: every setting that is not None, by section."""
    settings = recipe.to_dict()
    lines: list[str] = []
    for section, names in SECTIONS.items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"{name} = {_as_toml(settings[name])}" for name in names if settings[name] is not None]
    return "\n".join(lines) + "\n"


def _as_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {_as_toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_as_toml(each) for each in value) + "]"
    if isinstance(value, float):
        return repr(value) if "e" in repr(value) or "." in repr(value) else f"{value!r}.0"
    if isinstance(value, str):
        # JSON's escapes are TOML's, which wants DEL escaped as well.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def write_recipe(path: str | Path, recipe: Recipe) -> None:
    """Write ``recipe`` as TOML, or as JSON by the file's name. Raises: WriteError."""
    path = Path(path)
    text = json.dumps(recipe.to_dict(), indent=1) + "\n" if path.suffix == ".json" else to_toml(recipe)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def differences(old: Recipe, new: Recipe, *, free: frozenset[str] = FREE) -> list[str]:
    """What ``new`` has otherwise than ``old``, as "lr is 0.1, and was 0.2", but for what is ``free`` to change."""
    return [
        f"{name} is {getattr(new, name)!r}, and was {getattr(old, name)!r}"
        for name in SETTINGS
        if name not in free and getattr(old, name) != getattr(new, name)
    ]


def frozen(names: Sequence[str], patterns: Sequence[str]) -> frozenset[str]:
    """Which of the parameters ``names`` the ``patterns`` freeze; "*" stands for anything, "[0-5]" for one of these.

    Raises: ConfigError, for a pattern that no name fits, or where none is left to train.
    """
    out: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ConfigError(f"freeze has {pattern!r}, which fits no parameter{nearest(pattern, list(names))}")
        out |= found
    if patterns and len(out) == len(set(names)):
        raise ConfigError(f"freeze={list(patterns)!r} leaves nothing to train; leave some parameters out of it")
    return frozenset(out)
