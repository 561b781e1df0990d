"""LoRA: beside a kernel two thin matrices, which are trained in its place. Names, shapes and values; no framework.

    adapter_table(config, head, lora) -> rows as of the parameter table: "<layer>.lora_A" and "<layer>.lora_B",
                                         and those of the model's own head, which is trained whole
    merged(kernel, a, b, scale)          the kernel with what was learned in it
    write_adapter(folder, ...), read_adapter(folder)
    fitted(adapter, config, head)        a read adapter under the names of one model, or why it is not for it
    adapted(source, folder)              a model about to be converted, with an adapter merged

A layer gives x @ W + b + scale * (x @ A.T) @ B.T, with A (rank, in), B (out, rank) and scale = alpha / rank. B starts
at zero, so that training starts from the model as it is.

The file is that of the field (peft: ``adapter_model.safetensors`` and ``adapter_config.json``), which reads ours, and
whose own are read here.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import bin as pickled
from gpt2_core.checkpoints import safetensors
from gpt2_core.checkpoints.naming import PREFIX
from gpt2_core.checkpoints.tensors import Checkpoint, Tensor, converted
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointMismatchError, ConfigError, nearest
from gpt2_core.files import atomic_write, read_small_file
from gpt2_core.parameters import Head, Parameter, parameter_table

if TYPE_CHECKING:
    from gpt2_core.conversion import Source

A, B = ".lora_A", ".lora_B"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_OLDER_WEIGHTS = "adapter_model.bin"  # peft before 0.6
_THEIRS, _SUFFIX = "base_model.model.", ".weight"
# Settings of peft that change what an adapter computes, in ways that are not made here (peft 0.21, LoraConfig).
_NOT_PLAIN = (
    "use_dora", "use_qalora", "lora_bias", "rank_pattern", "alpha_pattern", "alora_invocation_tokens",
    "layer_replication", "trainable_token_indices", "target_parameters", "arrow_config", "use_bdlora", "kasa_config",
)  # fmt: skip
# Ways to begin that leave the model beside it as it was; others, as "pissa", take something out of its kernels.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")
# What peft takes a model to be for: by its class.
_TASKS = {
    "GPT2LMHeadModel": "CAUSAL_LM",
    "GPT2DoubleHeadsModel": "CAUSAL_LM",
    "GPT2ForSequenceClassification": "SEQ_CLS",
    "GPT2ForTokenClassification": "TOKEN_CLS",
    "GPT2ForQuestionAnswering": "QUESTION_ANS",
}
# The heads that are trained whole beside an adapter: they start from chance. peft names them alike.
_HEADS = {
    "score": Head.SEQUENCE, "multiple_choice_head": Head.DOUBLE, "classifier": Head.TOKEN, "qa_outputs": Head.QA,
}  # fmt: skip
# The heads whose outputs are classes, and where the file of weights keeps their names: peft's settings have no place.
_OF_CLASSES = (Head.SEQUENCE, Head.TOKEN)
_NAMES = "id2label"
# Settings that leave some of the target's layers out.
_SOME_LAYERS = ("layers_to_transform", "exclude_modules")


@dataclass(frozen=True)
class Lora:
    """What a LoRA adapter is like: the rank of its matrices, their weight, and beside which kernels they stand."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank


def target_kernels(config: GPT2Config, head: Head | str, targets: Sequence[str]) -> tuple[Parameter, ...]:
    """The kernels of the blocks whose layer's name ends in one of ``targets``, as "attn.c_attn" or "c_proj".

    Raises: ConfigError, for a target that no layer has.
    """
    rows = [row for row in parameter_table(config, head) if ".h." in f".{row.name}" and len(row.shape) == 2]
    layers = {row.name: row.name.removesuffix(".weight") for row in rows}
    found: set[str] = set()
    for target in targets:
        here = {name for name, layer in layers.items() if f".{layer}".endswith(f".{target}")}
        if not here:
            known = sorted({layer.split(".h.")[-1].split(".", 1)[1] for layer in layers.values()})
            raise ConfigError(
                f"lora_targets has {target!r}, expected some of {', '.join(known)}{nearest(target, known)}"
            )
        found |= here
    return tuple(row for row in rows if row.name in found)


def adapter_table(config: GPT2Config, head: Head | str, lora: Lora) -> tuple[Parameter, ...]:
    """The rows of what is trained: two for each kernel that the adapter stands beside, and the head's own, if any.

    A starts from a normal distribution of standard deviation 1 / sqrt(in), B at zero (Hu et al. 2021, section 4.1).
    A head of its own (not a language model's, which is the token table) is trained whole, under its own names.
    """
    rows: list[Parameter] = []
    for kernel in target_kernels(config, head, lora.targets):
        layer = kernel.name.removesuffix(".weight")
        n_in, n_out = kernel.shape
        rows.append(Parameter(layer + A, (lora.rank, n_in), "normal", 1 / math.sqrt(n_in), True))
        rows.append(Parameter(layer + B, (n_out, lora.rank), "zeros", 0.0, True))
    return (*rows, *(row for row in parameter_table(config, head) if is_of_head(row.name)))


def layers_of(names: Iterable[str]) -> list[str]:
    """The layers that an adapter stands beside, by the names of its parameters."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def is_of_head(name: str) -> bool:
    """Whether a parameter is one of a head's own, which is trained whole beside an adapter."""
    return name.partition(".")[0] in _HEADS


def merged(kernel: NDArray[Any], a: NDArray[Any], b: NDArray[Any], scale: float, sign: int = 1) -> NDArray[Any]:
    """The kernel (in, out) with what A (rank, in) and B (out, rank) learned; ``sign`` -1 takes it out again.

    The sum is rounded once, to the kernel's own format.
    """
    learned = (b.astype(np.float64) @ a.astype(np.float64)).T * (sign * scale)
    result: NDArray[Any] = (kernel.astype(np.float64) + learned).astype(kernel.dtype)
    return result


def merge_all(
    kernels: Mapping[str, NDArray[Any]], adapter: Mapping[str, NDArray[Any]], scale: float, sign: int = 1
) -> dict[str, NDArray[Any]]:
    """All parameters by name, those that the ``adapter`` stands beside merged with it; ``kernels`` are not changed.

    A head that was trained with it is taken as it is; ``sign`` -1 leaves it.

    Raises: CheckpointError, for an adapter beside a kernel that is not there.
    """
    out = dict(kernels)
    for name in adapter:
        if is_of_head(name) and sign > 0:
            out[name] = adapter[name]
        if not name.endswith(A):
            continue
        layer = name.removesuffix(A)
        if f"{layer}.weight" not in out or layer + B not in adapter:
            raise CheckpointError(f"the adapter has {name}, but there is no {layer}.weight or no {layer}{B} to it")
        kernel = f"{layer}.weight"
        out[kernel] = merged(out[kernel], adapter[name], adapter[layer + B], scale, sign)
    return out


def write_adapter(
    folder: Path,
    lora: Lora,
    tensors: Mapping[str, Tensor],
    base: str,
    architecture: str = "GPT2LMHeadModel",
    labels: Mapping[int, str] | None = None,
) -> None:
    """Write an adapter, under our names of its parameters, as the field stores it.

    ``architecture`` is the class of the model that it stands beside, by which peft chooses its own wrapper; ``labels``
    are the names of its classes, which are kept where the adapter has a head of classes.

    Raises: WriteError.
    """
    renamed = {f"{_THEIRS}{name}{_SUFFIX if name.endswith((A, B)) else ''}": each for name, each in tensors.items()}
    metadata = {"format": "pt"}  # the default, which transformers asks for
    if labels is not None and _of_classes(tensors):
        metadata[_NAMES] = json.dumps({str(number): name for number, name in labels.items()})
    safetensors.write(folder / WEIGHTS, renamed, metadata=metadata)
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": sorted({name.partition(".")[0] for name in tensors if is_of_head(name)}) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": _TASKS.get(architecture),
    }
    with atomic_write(folder / SETTINGS) as file:
        file.write(json.dumps(settings, indent=1).encode("utf-8") + b"\n")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A saved adapter: where it was read, what it is like, its arrays by name, and the model it was trained beside.

    ``labels`` are the names of the classes of its head, where it has one and keeps them.
    """

    folder: Path
    lora: Lora
    arrays: Mapping[str, NDArray[Any]]
    base: str
    labels: Mapping[int, str] | None = None

    def __str__(self) -> str:
        return (
            f"{self.folder} (a LoRA adapter of rank {self.lora.rank}, trained beside {self.base or 'no named model'})"
        )


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter is like, its arrays under our names, and the name of the model that it stands beside.

    ``folder`` may also be its file of weights. Nothing in a file is executed.

    Raises: CheckpointError, where a file is missing, damaged, or of a kind of adapter that is not plain LoRA.
    """
    folder = Path(folder).expanduser()
    if folder.name in (WEIGHTS, _OLDER_WEIGHTS):
        folder = folder.parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist or is no folder; expected that of a LoRA adapter")
    try:
        settings = json.loads(read_small_file(folder / SETTINGS, CheckpointError))
        _check_plain(settings, folder / SETTINGS)
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
        if rank < 1 or not math.isfinite(alpha):
            raise ValueError(f"r={rank}, lora_alpha={alpha}")
        # Their scale is then alpha / sqrt(r) (Kalajdzievski 2023, "A rank stabilization scaling factor").
        alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1.0
        named, dropout = settings["target_modules"], float(settings.get("lora_dropout") or 0.0)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {SETTINGS}; expected the folder of a LoRA adapter") from None
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{folder / SETTINGS} cannot be used ({cause}); expected a LoRA adapter's") from cause
    arrays, metadata = _arrays(folder)
    # A pattern, or only some layers: the arrays themselves say beside which kernels they stand.
    if not isinstance(named, list) or any(settings.get(name) for name in _SOME_LAYERS):
        named = layers_of(arrays)
    lora = Lora(rank, alpha, tuple(str(target) for target in named), dropout)
    labels = _labels(metadata, arrays, folder / WEIGHTS)
    return Adapter(folder, lora, arrays, str(settings.get("base_model_name_or_path") or ""), labels)


def _check_plain(settings: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for an adapter that computes something else than plain LoRA."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} is of {kind!r}, not of plain LoRA, which alone can be read here")
    found = [name for name in _NOT_PLAIN if settings.get(name)]
    if not set(_HEADS).issuperset(settings.get("modules_to_save") or ()):
        found.append("modules_to_save")
    if settings.get("bias", "none") not in (None, "none"):
        found.append("bias")
    if settings.get("init_lora_weights") not in _BEGINNINGS:
        found.append("init_lora_weights")
    if found:
        told = ", ".join(f"{name}={settings[name]!r}" for name in found)
        raise CheckpointError(
            f"{path} is not of plain LoRA, which alone can be read here: it has {told}; merge it with the library that "
            "made it"
        )


def _arrays(folder: Path) -> tuple[dict[str, NDArray[Any]], Mapping[str, str]]:
    """The arrays of an adapter under our names, and the metadata of their file."""
    older = not (folder / WEIGHTS).exists() and (folder / _OLDER_WEIGHTS).exists()
    with pickled.read(folder / _OLDER_WEIGHTS) if older else safetensors.read(folder / WEIGHTS) as file:
        named = {name.removeprefix(_THEIRS): np.array(tensor.array()) for name, tensor in file.items()}
        metadata = dict(file.metadata)
    lora = (A + _SUFFIX, B + _SUFFIX)
    ours = {name.removesuffix(_SUFFIX) if name.endswith(lora) else name: array for name, array in named.items()}
    return ours, metadata


def _of_classes(tensors: Mapping[str, Any]) -> list[str]:
    """Those of the tensors that have one row for each class."""
    return [name for name in tensors if _HEADS.get(name.partition(".")[0]) in _OF_CLASSES]


def _labels(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]], path: Path) -> dict[int, str] | None:
    """The names of the classes, where the file keeps them. Raises: CheckpointError, for some that cannot be used."""
    heads = _of_classes(arrays)
    if _NAMES not in metadata or not heads:
        return None
    try:
        labels = {int(number): str(name) for number, name in json.loads(metadata[_NAMES]).items()}
    except (ValueError, AttributeError, RecursionError) as cause:
        raise CheckpointError(
            f"{path} has metadata {_NAMES} that cannot be read ({cause}); expected names of classes by number; fetch "
            "the file again"
        ) from cause
    if sorted(labels) != list(range(len(arrays[heads[0]]))):
        raise CheckpointError(
            f"{path} names the classes {sorted(labels)}, expected 0 to {len(arrays[heads[0]]) - 1}, the rows of its "
            f"{heads[0]}; fetch the file again"
        )
    return labels


def fitted(adapter: Adapter, config: GPT2Config, head: Head | str) -> Adapter:
    """The adapter under the names of one model: an adapter of a model without a head fits that model with any.

    Where a model's head was not trained with the adapter, `arrays` have none of it.

    Raises: CheckpointMismatchError with all that is missing, unexpected or misshaped.
    """
    table = {row.name: row for row in parameter_table(config, head)}
    layers = [name.removesuffix(".weight") for name in table if ".h." in f".{name}"]
    targets = [_named_here(target, table) for target in adapter.lora.targets]
    known = tuple(one for one in targets if any(f".{layer}".endswith(f".{one}") for layer in layers))
    lora = replace(adapter.lora, targets=known)
    arrays = {_named_here(name, table): array for name, array in adapter.arrays.items()}
    headed = any(map(is_of_head, arrays))
    table_of_all = adapter_table(config, head, lora)
    rows = {row.name: row.shape for row in table_of_all if headed or not is_of_head(row.name)}
    missing = [name for name in rows if name not in arrays]
    unexpected = [name for name in arrays if name not in rows]
    there = {name: shape for name, shape in rows.items() if name in arrays}
    misshaped = [(name, arrays[name].shape, want) for name, want in there.items() if arrays[name].shape != want]
    if missing or unexpected or misshaped or not rows:
        raise CheckpointMismatchError(
            str(adapter), missing, unexpected, misshaped,
            remedy="check that the adapter was trained beside this model, or one of the same shapes",
        )  # fmt: skip
    return replace(adapter, lora=lora, arrays=arrays)


def _named_here(name: str, table: Mapping[str, Any]) -> str:
    """The name with or without the transformer's prefix, as the model has it."""
    if not name.startswith((PREFIX, "h.")):
        return name
    return (PREFIX if any(each.startswith(PREFIX) for each in table) else "") + name.removeprefix(PREFIX)


# -- into a model that is converted ----------------------------------------------------------------------------


def adapted(source: Source, folder: str | Path) -> Source:
    """A model about to be converted, with the adapter in ``folder`` merged; each kernel when it is fetched.

    Raises: CheckpointError, where there is no adapter that can be read; CheckpointMismatchError, where it is another
    model's.
    """
    saved = read_adapter(folder)
    source = _with_labels(_with_head(source, saved), saved)
    adapter = fitted(saved, source.config, source.head)
    checkpoint, tensors = source.checkpoint, dict(source.checkpoint)
    layers = layers_of(adapter.arrays)
    for layer in layers:
        there = source.matching.names[f"{layer}.weight"]
        tensors[there] = _merged_tensor(tensors[there], adapter, layer)
    heads = [name for name in adapter.arrays if is_of_head(name)]
    for name in heads:
        there = source.matching.names[name]
        tensors[there] = converted(Tensor.of(adapter.arrays[name]), tensors[there].dtype)
    note = f"{adapter} is merged into {len(layers)} kernels"
    if heads:
        note += f"; {', '.join(heads)} {'is' if len(heads) == 1 else 'are'} as trained with it"
    return replace(source, checkpoint=_holding(checkpoint, tensors, (*checkpoint.notes, note)))


def _with_head(source: Source, adapter: Adapter) -> Source:
    """The model with the head that was trained with the adapter, where it has none of its own: as yet the adapter's."""
    found = {_HEADS[name.partition(".")[0]] for name in adapter.arrays if is_of_head(name)}
    if len(found) != 1 or source.head in found or source.head not in (Head.NONE, Head.LM):
        return source
    head = found.pop()
    config = source.config
    if head is not Head.DOUBLE:
        rows = {len(array) for name, array in adapter.arrays.items() if is_of_head(name)}
        config = config.replace(num_labels=max(rows))
    names, tensors = {}, dict(source.checkpoint)
    kind = next(iter(source.tensors().values())).dtype
    for row in parameter_table(config, head):
        if is_of_head(row.name):
            if row.name not in adapter.arrays:
                return source  # `fitted` tells what does not fit
            names[row.name] = row.name
            tensors[row.name] = converted(Tensor.of(adapter.arrays[row.name]), kind)
        else:
            names[row.name] = source.matching.names[_named_here(row.name, source.matching.names)]
    return replace(
        source,
        checkpoint=_holding(source.checkpoint, tensors, source.checkpoint.notes),
        known=replace(source.known, config=config),
        head=head,
        matching=replace(source.matching, names=names),
    )


def _with_labels(source: Source, adapter: Adapter) -> Source:
    """The model with the names of the classes that the adapter's head was trained for, under both keys of the field."""
    if adapter.labels is None or source.config.num_labels != len(adapter.labels):
        return source  # another number of classes: `fitted` tells what does not fit
    numbers = {name: number for number, name in adapter.labels.items()}
    extra = {**source.config.extra, "label2id": numbers}
    config = source.config.replace(id2label=adapter.labels, extra=extra)
    return replace(source, known=replace(source.known, config=config))


def _holding(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], notes: tuple[str, ...]) -> Checkpoint:
    """The checkpoint with other tensors and notes."""
    return Checkpoint(
        tensors,
        format=checkpoint.format,
        path=checkpoint.path,
        files=checkpoint.files,
        metadata=checkpoint.metadata,
        close=checkpoint.close,
        config=checkpoint.config,
        head=checkpoint.head,
        tokenizer=checkpoint.tokenizer,
        names_in_file=checkpoint.names_in_file,
        ignored=checkpoint.ignored,
        notes=notes,
        config_file=checkpoint.config_file,
    )


def _merged_tensor(kernel: Tensor, adapter: Adapter, layer: str) -> Tensor:
    """The kernel with what was learned in it, rounded once to the format that it is stored in."""
    a, b = adapter.arrays[layer + A], adapter.arrays[layer + B]

    def load() -> NDArray[Any]:
        wide = merged(kernel.array().astype(np.float64), a, b, adapter.lora.scale)
        return converted(Tensor.of(wide), kernel.dtype).raw()

    return Tensor(kernel.dtype, kernel.shape, load, kernel.release)
