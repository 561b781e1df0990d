"""LoRA: beside a kernel two thin matrices, which are trained in its place. Names, shapes and values; no framework.

    adapter_table(config, head, lora) -> rows as of the parameter table: "<layer>.lora_A" and "<layer>.lora_B"
    merged(kernel, a, b, scale)          the kernel with what was learned in it
    write_adapter(folder, ...), read_adapter(folder)

A layer gives x @ W + b + scale * (x @ A.T) @ B.T, with A (rank, in), B (out, rank) and scale = alpha / rank. B starts
at zero, so that training starts from the model as it is.

The file is that of the field (peft: ``adapter_model.safetensors`` and ``adapter_config.json``), which reads ours.

Source: Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import safetensors
from gpt2_core.checkpoints.tensors import Tensor
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, ConfigError, nearest
from gpt2_core.files import atomic_write, read_small_file
from gpt2_core.parameters import Head, Parameter, parameter_table

A, B = ".lora_A", ".lora_B"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_THEIRS = "base_model.model."


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
    """The rows of the adapter's own parameters, two for each kernel that it stands beside.

    A starts from a normal distribution of standard deviation 1 / sqrt(in), B at zero (Hu et al. 2021, section 4.1).
    """
    rows: list[Parameter] = []
    for kernel in target_kernels(config, head, lora.targets):
        layer = kernel.name.removesuffix(".weight")
        n_in, n_out = kernel.shape
        rows.append(Parameter(layer + A, (lora.rank, n_in), "normal", 1 / math.sqrt(n_in), True))
        rows.append(Parameter(layer + B, (n_out, lora.rank), "zeros", 0.0, True))
    return tuple(rows)


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

    Raises: CheckpointError, for an adapter beside a kernel that is not there.
    """
    out = dict(kernels)
    for name in adapter:
        if not name.endswith(A):
            continue
        layer = name.removesuffix(A)
        if f"{layer}.weight" not in out or layer + B not in adapter:
            raise CheckpointError(f"the adapter has {name}, but there is no {layer}.weight or no {layer}{B} to it")
        kernel = f"{layer}.weight"
        out[kernel] = merged(out[kernel], adapter[name], adapter[layer + B], scale, sign)
    return out


def write_adapter(folder: Path, lora: Lora, tensors: Mapping[str, Tensor], base: str) -> None:
    """Write an adapter, under our names of its parameters, as the field stores it. Raises: WriteError."""
    renamed = {f"{_THEIRS}{name}.weight": tensor for name, tensor in tensors.items()}
    safetensors.write(folder / WEIGHTS, renamed)
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
    }
    with atomic_write(folder / SETTINGS) as file:
        file.write(json.dumps(settings, indent=1).encode("utf-8") + b"\n")


def read_adapter(folder: str | Path) -> tuple[Lora, dict[str, NDArray[Any]], str]:
    """What an adapter is like, its arrays under our names, and the name of the model that it stands beside.

    Raises: CheckpointError, where a file is missing, damaged, or of a kind of adapter that is not plain LoRA.
    """
    folder = Path(folder)
    try:
        settings = json.loads(read_small_file(folder / SETTINGS, CheckpointError))
        lora = Lora(
            int(settings["r"]), float(settings["lora_alpha"]), tuple(settings["target_modules"]),
            float(settings.get("lora_dropout", 0.0)),
        )  # fmt: skip
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {SETTINGS}; expected the folder of a LoRA adapter") from None
    except (ValueError, KeyError, TypeError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{folder / SETTINGS} cannot be used ({cause}); expected a LoRA adapter's") from cause
    if settings.get("use_rslora") or settings.get("use_dora") or settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / SETTINGS} is not of plain LoRA, which alone can be read here")
    with safetensors.read(folder / WEIGHTS) as file:
        arrays = {
            name.removeprefix(_THEIRS).removesuffix(".weight"): np.array(tensor.array())
            for name, tensor in file.items()
        }
    return lora, arrays, str(settings.get("base_model_name_or_path", ""))
