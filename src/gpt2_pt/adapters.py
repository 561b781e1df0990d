"""LoRA on our models: two thin matrices beside a kernel, trained in its place, merged into it or taken out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2_core.adapters import (
    A,
    B,
    Lora,
    adapter_table,
    fitted,
    is_of_head,
    layers_of,
    merged,
    read_adapter,
    write_adapter,
)
from gpt2_core.errors import InputError
from gpt2_core.files import atomic_folder
from gpt2_core.initialization import initial_value
from gpt2_pt.weights import PreTrainedModel, _to_file


@dataclass
class _Held:
    """An adapter on a model: what it is like, and the hooks that stand it beside its layers."""

    lora: Lora
    hooks: list[Any]


def attach(model: PreTrainedModel, lora: Lora, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze the model and stand an adapter beside its kernels; what is left to train by name.

    That is the adapter's parameters, which start from ``seed``, the same bits in every framework, and live in the
    layers themselves; and those of a head of the model's own, which is not frozen.

    Raises: ConfigError, for targets that the model does not have; InputError, where it has an adapter already.
    """
    if held_by(model) is not None:
        raise InputError("the model has an adapter already, expected none; merge it or detach it first")
    model.requires_grad_(False)
    made: dict[str, nn.Parameter] = {}
    held = _Held(lora, [])
    for row in adapter_table(model.config, model.head, lora):
        if is_of_head(row.name):
            made[row.name] = model.get_parameter(row.name)
            made[row.name].requires_grad_()
            continue
        owner, _, leaf = row.name.rpartition(".")
        parameter = nn.Parameter(torch.from_numpy(initial_value(row, seed)).to(model.device, model.dtype))
        layer = model.get_submodule(owner)
        layer.register_parameter(leaf, parameter)
        made[row.name] = parameter
        if row.name.endswith(B):
            held.hooks.append(layer.register_forward_hook(_beside(lora)))
    model.__dict__["_lora"] = held
    return made


def attach_saved(model: PreTrainedModel, folder: str | Path) -> dict[str, nn.Parameter]:
    """Freeze the model and stand a saved adapter, ours or peft's, beside its kernels; what is left to train by name.

    A head that was trained with the adapter takes the place of the model's.

    Raises: CheckpointError, where there is no adapter that can be read; CheckpointMismatchError, where it is another
    model's; InputError, where the model has an adapter already.
    """
    saved = fitted(read_adapter(folder), model.config, model.head)
    made = attach(model, saved.lora)
    with torch.no_grad():
        for name, array in saved.arrays.items():
            made[name].copy_(torch.from_numpy(array))
    return made


def save_adapter(model: PreTrainedModel, folder: str | Path, base: str = "") -> Path:
    """Write the adapter alone, as `attach_saved` and peft read it, with a head that is trained beside it; the folder.

    ``base`` is the name of the model that it stands beside, for those who read the file. All of it is written or,
    whatever happens, none of it.

    Raises: InputError, where the model has no adapter; WriteError, where the system refuses.
    """
    held = held_by(model)
    if held is None:
        raise InputError("the model has no adapter to save; attach one first, or save the model with save_pretrained")
    rows = adapter_table(model.config, model.head, held.lora)
    tensors = {row.name: _to_file(model.get_parameter(row.name)) for row in rows}
    with atomic_folder(folder) as stage:
        architecture = type(model).__name__
        write_adapter(stage, held.lora, tensors, base, architecture, model.config.id2label)
    return Path(folder)


def _beside(lora: Lora):  # type: ignore[no-untyped-def] # a hook's type is PyTorch's own affair
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = F.dropout(inputs[0], lora.dropout, training=layer.training)
        a, b = layer.lora_A, layer.lora_B
        return output + F.linear(F.linear(x, a), b) * lora.scale  # type: ignore[arg-type]

    return hook


def held_by(model: PreTrainedModel) -> _Held | None:
    """The adapter that a model has."""
    return model.__dict__.get("_lora")


def adapter_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; none where the model has no adapter."""
    return {name: value for name, value in model.named_parameters() if name.endswith((A, B))}


def detach(model: PreTrainedModel) -> None:
    """Take the adapter away; but for a head trained with it the model is what it was, and can be trained again."""
    held = held_by(model)
    if held is None:
        return
    for hook in held.hooks:
        hook.remove()
    for name in adapter_parameters(model):
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    del model.__dict__["_lora"]
    model.requires_grad_(True)


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Put what the adapter has learnt into the kernels, and take the adapter away."""
    held = held_by(model)
    if held is None:
        raise InputError("the model has no adapter to merge; attach one first")
    found = adapter_parameters(model)
    for layer in layers_of(found):
        _merge_one(model, layer, found, held.lora.scale, 1)
    detach(model)


@contextlib.contextmanager
def merged_kernels(model: PreTrainedModel) -> Iterator[None]:
    """The kernels with what an adapter has learnt in them, for as long as the block runs; as they are without one."""
    held = held_by(model)
    before: dict[nn.Parameter, Tensor] = {}
    try:
        if held is not None:
            found = adapter_parameters(model)
            for layer in layers_of(found):
                kernel = model.get_parameter(f"{layer}.weight")
                before[kernel] = kernel.data
                kernel.data = kernel.data.clone()
                with torch.no_grad():
                    _merge_one(model, layer, found, held.lora.scale, 1)
        yield
    finally:
        for kernel, data in before.items():
            kernel.data = data


@torch.no_grad()
def unmerge(model: PreTrainedModel, lora: Lora, arrays: dict[str, Any]) -> None:
    """Take out of the kernels what `merge` put in: an adapter like ``lora`` with the parameters ``arrays`` by name.

    The kernels are back but for rounding.
    """
    for layer in layers_of(arrays):
        _merge_one(model, layer, arrays, lora.scale, -1)


def _merge_one(model: PreTrainedModel, layer: str, adapter: Mapping[str, Any], scale: float, sign: int) -> None:
    kernel, a, b = model.get_parameter(f"{layer}.weight"), adapter[layer + A], adapter[layer + B]
    old, first, second = (torch.as_tensor(each).detach().to("cpu", torch.float64).numpy() for each in (kernel, a, b))
    kernel.copy_(torch.from_numpy(merged(old, first, second, scale, sign)))
