"""What a recipe asks for, made ready: tokenizer, data, model, framework; run; and what it leaves behind.

runs/tales/
    recipe.toml  metrics.jsonl  metrics.csv  curves.png  samples.txt
    data-0123456789abcdef/     the text as token shards, where a text was given
    states/step-00000200/      what the run goes on from
    final/                     the model, with its tokenizer
    adapter/                   with LoRA: the adapter alone
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_app.failures import reading_a_model
from gpt2_app.vocabularies import load_tokenizer
from gpt2_core.config import GPT2Config
from gpt2_core.errors import ConfigError, InputError
from gpt2_core.files import atomic_write, make_folder
from gpt2_core.parameters import Head
from gpt2_core.recipe import Recipe, read_recipe, write_recipe
from gpt2_core.training import Run, Training, flops_per_token, planned_steps

if TYPE_CHECKING:
    from gpt2_core.checkpoints.tensors import Tensor
    from gpt2_core.data import Batches, Examples
    from gpt2_core.tokenizer import GPT2Tokenizer

RECIPE, FINAL, ADAPTER, SAMPLES = "recipe.toml", "final", "adapter", "samples.txt"
_MODULES = {"pt": "gpt2_pt.training", "tf": "gpt2_tf.training"}
_TEXTS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".gz", ".xz", ".bz2", "")
_SAMPLE = re.compile(rb"^=== step (\d+) ===$", re.MULTILINE)  # as keep_sample writes it
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout", "classifier_dropout")
_PATIENCE = 3600.0  # seconds that other processes wait for the first to tokenise a text


@dataclass(frozen=True)
class Ready:
    """A run that is about to begin."""

    recipe: Recipe
    folder: Path
    framework: str
    training: Training
    tokenizer: GPT2Tokenizer
    batches: Batches
    block_size: int
    steps: int
    resumed: bool
    tokens: int

    @property
    def speaks(self) -> bool:
        """Whether this process tells what goes on."""
        return self.training.is_first


def device_of(framework: str, name: str | None) -> str | None:
    """The device as the framework calls it. Raises: InputError, where it is not there."""
    from gpt2_app import backends

    if framework == "pt":
        return str(backends.torch_device(name)) if name is not None else None
    if name is None:
        return None
    import gpt2_tf  # noqa: F401 - before TensorFlow, whose banner it holds back

    # isort: split
    import tensorflow as tf

    return backends.tensorflow_device(tf, name)


@contextlib.contextmanager
def prepared(
    recipe: Recipe,
    folder: Path,
    framework: str,
    *,
    resume: bool = False,
    run: Run | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Ready]:
    """Yield the run that a recipe asks for, gone on from its last state where ``resume`` says so.

    Raises: ConfigError, InputError, HubError, CheckpointError or WriteError, each naming what is wrong.
    """
    if framework == "tf":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    elif framework not in _MODULES:
        raise InputError(f"framework {framework!r} cannot train, expected pt or tf; pip install 'gpt2-duet[pt]'")
    if not recipe.data:
        raise ConfigError("the recipe has no data; set data to a text, a folder of texts, or token shards")
    _check_folder(folder, resume)
    tokenizer = load_tokenizer(recipe.model)
    module: Any = importlib.import_module(_MODULES[framework])
    with module.processes(device_of(framework, recipe.device)) as (rank, world_size, place):
        train, validation = _data(recipe, folder, tokenizer, rank == 0, progress)
        config = config_of(recipe, train if recipe.task == "classification" else None)
        _check_vocabulary(train, config)
        if validation is not None:
            _check_vocabulary(validation, config)
            _check_classes(validation, config)
        block = recipe.block_size or config.n_positions
        if block > config.n_positions:
            raise ConfigError(f"block_size={block} is more than the model's n_positions={config.n_positions}; lower it")
        batches = _batches(recipe, train, block, framework, rank, world_size)
        steps = planned_steps(recipe, batches.rows * block, block)
        run = run or Run()
        run.folder = folder
        if not run.prompt:
            run.prompt = tokenizer.encode(recipe.sample_prompt) or [tokenizer.eos_token_id or 0]
        if recipe.sample_every and recipe.head is Head.LM:
            _check_prompt(run.prompt, config)
        with reading_a_model():
            model = module.build_model(recipe, config, place)
        backend = module.Trainer(model, recipe, rank=rank, world_size=world_size)
        run.flops_per_token = flops_per_token(config, block)
        run.peak_flops = backend.peak_flops()
        evaluation = None
        if validation is not None:
            evaluation = _scored(recipe, validation, block, framework, rank, world_size)
        elif recipe.eval_every:
            raise ConfigError(
                f"eval_every={recipe.eval_every} has nothing to evaluate on: {recipe.data} has no validation part; set "
                "validation to a path, or eval_every=0"
            )
        training = Training(recipe, backend, batches, run, steps=steps, evaluation=evaluation)
        resumed = resume and training.resume()
        if rank == 0:
            make_folder(folder)
            write_recipe(folder / RECIPE, recipe)
            cut_samples(folder, training.progress.step)
        yield Ready(
            recipe, folder, framework, training, tokenizer, batches, block, steps, resumed, batches.rows * block
        )


def config_of(recipe: Recipe, classes: Examples | None = None) -> GPT2Config:
    """The configuration of the recipe's model, with the recipe's changes made and the ``classes`` of its data.

    Raises: ConfigError, HubError.
    """
    with reading_a_model():
        config = GPT2Config.from_pretrained(recipe.model)
    changes: dict[str, Any] = dict(recipe.config)
    if recipe.dropout is not None:
        changes |= dict.fromkeys(_DROPOUTS, recipe.dropout)
    config = config.replace(**changes)
    return config if classes is None else _with_classes(config, classes, changes)


def _with_classes(config: GPT2Config, classes: Examples, asked: Mapping[str, Any]) -> GPT2Config:
    """The configuration with as many classes as the data have, or are ``asked`` for, and their names."""
    count = classes.num_labels
    if "num_labels" in asked or "id2label" in asked:
        if config.num_labels < count:
            raise ConfigError(
                f"config.num_labels is {config.num_labels}, and {classes.source} has {count} classes; leave it out, "
                f"or set it to {count} or more"
            )
        count = config.num_labels
    if classes.label_names is None or "id2label" in asked:
        return config.replace(num_labels=count)
    names = dict(enumerate([*classes.label_names, *(f"LABEL_{n}" for n in range(len(classes.label_names), count))]))
    label2id = {name: number for number, name in names.items()}
    return config.replace(num_labels=count, id2label=names, extra={**config.extra, "label2id": label2id})


def _check_folder(folder: Path, resume: bool) -> None:
    from gpt2_core.training_state import steps_in

    steps = steps_in(folder / "states")
    if steps and not resume:
        raise InputError(
            f"{folder} holds a run of {steps[-1]} steps; go on with it with --resume, or begin another with --out"
        )
    if resume and not steps and not (folder / RECIPE).exists():
        raise InputError(f"{folder} holds no run to resume; leave --resume out to begin one")


# -- data ----------------------------------------------------------------------------------------------------


def _data(
    recipe: Recipe,
    folder: Path,
    tokenizer: GPT2Tokenizer,
    is_first: bool,
    progress: Callable[[int, int], None] | None,
) -> tuple[Any, Any]:
    """What is trained on, and what is evaluated on or None."""
    if recipe.task != "lm":
        return _examples(recipe, tokenizer)
    path, part = Path(recipe.data), None
    if is_text(path):
        share = 0.0 if recipe.validation is not None else recipe.val_fraction
        path = _tokenised(path, folder, recipe.model, tokenizer, share, is_first, progress)
        part = "train" if share else None
    from gpt2_core.data import open_data

    train = open_data(path, part)
    if recipe.validation is not None:
        other = Path(recipe.validation)
        if is_text(other):
            other = _tokenised(other, folder, recipe.model, tokenizer, 0.0, is_first, progress)
            return train, open_data(other)
        return train, open_data(other, "val" if other.is_dir() and _has_validation(other) else None)
    return train, open_data(path, "val") if _has_validation(path) else None


def can_be_evaluated(source: str) -> bool:
    """Whether there will be validation data without being named: of a text a share is kept, shards may have a part."""
    path = Path(source)
    return is_text(path) or _has_validation(path)


def _has_validation(path: Path) -> bool:
    from gpt2_core.data_shards import VAL, parts_of

    return path.is_dir() and VAL in parts_of(path)  # one that is damaged is there, and reported when it is opened


def is_text(path: Path) -> bool:
    """Whether this is a text (or a folder of texts) that has yet to be tokenised."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
        return not any(file.suffix in (".bin", ".npy") or file.name == "manifest.json" for file in files)
    return path.suffix.lower() in _TEXTS


def _examples(recipe: Recipe, tokenizer: GPT2Tokenizer) -> tuple[Any, Any]:
    from gpt2_core.data_examples import read_examples

    found = read_examples(recipe.data, recipe.task, tokenizer)
    _check_several_classes(found)
    if recipe.validation is not None:
        apart = read_examples(recipe.validation, recipe.task, tokenizer, label_names=found.label_names)
        if found.label_names is None and apart.label_names is not None:
            raise InputError(
                f"{recipe.validation} names its classes ({', '.join(map(repr, apart.label_names[:4]))}), but those of "
                f"{recipe.data} are numbers; give the same labels in both"
            )
        return found, apart
    return found.split(recipe.val_fraction, recipe.seed) if recipe.val_fraction else (found, None)


def _check_several_classes(data: Examples) -> None:
    if data.task != "classification" or data.labels is None or int(data.labels.min()) != int(data.labels.max()):
        return
    only = int(data.labels[0])
    raise InputError(
        f"{data.source}: every example has the label {only if data.label_names is None else data.label_names[only]!r}, "
        "expected at least two classes, as there is nothing to learn from one; add examples of the others"
    )


def _tokenised(
    path: Path,
    folder: Path,
    model: str,
    tokenizer: GPT2Tokenizer,
    share: float,
    is_first: bool,
    progress: Callable[[int, int], None] | None,
) -> Path:
    """The shards of a text, beside the run; made once for each state of the text, by the first process."""
    from gpt2_core.data_shards import MANIFEST
    from gpt2_core.data_writing import write_data

    if not path.exists():
        raise InputError(f"{path} is not there; expected a text, a folder of texts, or token shards")
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    seen = [(str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    key = hashlib.sha256(repr((seen, model, share)).encode()).hexdigest()[:16]
    target = folder / f"data-{key}"
    if not (target / MANIFEST).exists():
        if is_first:
            make_folder(folder)
            write_data(path, target, tokenizer=tokenizer, val_fraction=share, progress=progress)
        else:
            _wait_for(target / MANIFEST)
    return target


def _wait_for(path: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise InputError(f"{path} did not appear; the first process may have ended: look at what it wrote")
        time.sleep(0.2)


def _check_vocabulary(data: Any, config: GPT2Config) -> None:
    if hasattr(data, "check_vocabulary"):
        data.check_vocabulary(config.vocab_size)
    elif data.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {data.vocab_size} tokens, and the model {config.vocab_size}; take a model of this "
            "vocabulary"
        )


def _check_classes(data: Any, config: GPT2Config) -> None:
    if getattr(data, "task", "") == "classification" and (most := int(data.labels.max())) >= config.num_labels:
        raise InputError(
            f"{data.source} has the label {most}, expected one below {config.num_labels}, which is how many classes "
            "the model has; train on data that have it, or set config.num_labels"
        )


def _check_prompt(prompt: Sequence[int], config: GPT2Config) -> None:
    if len(prompt) >= config.n_positions:
        raise ConfigError(
            f"sample_prompt has {len(prompt)} tokens, expected fewer than the model's n_positions="
            f"{config.n_positions}; shorten it"
        )
    if max(prompt) >= config.vocab_size:
        raise ConfigError(
            f"the prompt of samples has the token {max(prompt)}, and the model's vocabulary has {config.vocab_size}; "
            "these are not the tokenizer's data: set sample_every=0, or model to one of their vocabulary"
        )


def _batches(recipe: Recipe, data: Any, block: int, framework: str, rank: int, world_size: int, **more: Any) -> Batches:
    from gpt2_core.data import Batches

    settings: dict[str, Any] = {"seed": recipe.seed, "shuffle": recipe.shuffle} | more
    return Batches(
        data, batch_size=recipe.batch_size, block_size=block, mode=recipe.mode, rank=rank, world_size=world_size,
        # A new shape has TensorFlow trace its functions again.
        padding="block" if framework == "tf" else "longest", **settings,
    )  # fmt: skip


def _scored(recipe: Recipe, data: Any, block: int, framework: str, rank: int, world_size: int) -> Callable[[], Batches]:
    """All of the validation data, from the beginning each time."""
    if hasattr(data, "tokens") and recipe.mode == "packed":
        block = min(block, len(data) - 1)
    return lambda: _batches(recipe, data, block, framework, rank, world_size, shuffle=False, epochs=1)


# -- what is left behind -------------------------------------------------------------------------------------


def finish(ready: Ready) -> Path:
    """Write the model, the table of metrics and the curves; give the model's folder. Raises: WriteError."""
    from gpt2_core import adapters
    from gpt2_core.pretrained import save_pretrained
    from gpt2_core.training_log import draw_curves, write_table

    training = ready.training
    about, final = training.backend.about, training.backend.final()
    adapter: Mapping[str, Tensor] = {}
    if about.lora is not None:
        groups = training.backend.export()
        adapter = groups.get("ema") or groups["adapter"]
    if not ready.speaks:
        for tensor in (*final.values(), *adapter.values()):
            tensor.raw()  # what the processes hold together is put together by all of them
        return ready.folder / FINAL
    save_pretrained(ready.folder / FINAL, about.config, ready.recipe.head, final, architecture=about.architecture)
    ready.tokenizer.save_pretrained(ready.folder / FINAL)
    if about.lora is not None:
        make_folder(ready.folder / ADAPTER)
        labels = about.config.id2label
        adapters.write_adapter(ready.folder / ADAPTER, about.lora, adapter, about.base, about.architecture, labels)
    write_table(ready.folder)
    draw_curves(ready.folder)
    return ready.folder / FINAL


def keep_sample(folder: Path, step: int, text: str) -> None:
    """Add what the model wrote to samples.txt. Raises: WriteError."""
    path = folder / SAMPLES
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as file:
        file.write(before + f"=== step {step} ===\n{text}\n\n".encode())


def cut_samples(folder: Path, step: int) -> None:
    """Drop from samples.txt what was written after ``step``, which is written again. Raises: WriteError."""
    path = folder / SAMPLES
    if not path.exists():
        return
    before = path.read_bytes()
    later = (each.start() for each in _SAMPLE.finditer(before) if int(each[1]) > step)
    with atomic_write(path) as file:
        file.write(before[: next(later, len(before))])


def recipe_in(folder: Path, overrides: Mapping[str, str]) -> Recipe:
    """The recipe of the run in a folder. Raises: ConfigError."""
    return read_recipe(folder / RECIPE, overrides)
