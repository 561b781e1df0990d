"""LoRA on our models: two thin matrices beside a kernel, trained in its place, merged into it or taken out again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

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
from gpt2_core.parameters import Parameter
from gpt2_tf.layers import Tensor, dropout, in_dtype
from gpt2_tf.weights import PreTrainedModel, _to_file


@dataclass
class _Held:
    """An adapter on a model: its variables by name, the layers it stands beside, and the seed of its dropout.

    ``heads``: the variables of a head that is trained with it. All are Keras's variables, which the model counts among
    its own as long as it holds the adapter: see ``PreTrainedModel.variables``.
    """

    lora: Lora
    variables: dict[str, Any] = field(default_factory=dict)
    heads: dict[str, Any] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)
    seed: Tensor | None = None


def attach(model: PreTrainedModel, lora: Lora, seed: int = 0) -> dict[str, Any]:
    """Freeze the model and stand an adapter beside its kernels; what is left to train by name.

    That is the adapter's parameters, which start from ``seed``, the same bits in every framework; and those of a head
    of the model's own, which is not frozen. They are TensorFlow's own variables, those of the model's
    ``trainable_variables``, which ``fit`` trains. Its dropout acts in ``fit`` and in ``gpt2 train``.

    Raises: ConfigError, for targets that the model does not have; InputError, where it has an adapter already.
    """
    if held_by(model) is not None:
        raise InputError("the model has an adapter already, expected none; merge it or detach it first")
    held = _Held(lora)
    for row in adapter_table(model.config, model.head, lora):
        if is_of_head(row.name):
            held.heads[row.name] = model.get_parameter(row.name)
            continue
        layer = model.get_parameter(row.name.rpartition(".")[0])
        held.variables[row.name] = _variable(row, seed, layer.weight, model.variable_dtype)
        if row.name.endswith(B):
            pair = held.variables[row.name.removesuffix(B) + A], held.variables[row.name]
            held.layers.append(layer)
            layer.__dict__["call"] = _beside(layer.call, held, *pair, len(held.layers))
    model._trainable = True  # Keras goes through the parts only where the next line changes something
    model.trainable = False
    model._trainable = True  # of the model alone: its parts stay frozen, what it holds besides is trained
    for variable in held.heads.values():
        variable.trainable = True
    model.__dict__["_lora"] = held  # past Keras, which would put the variables into its files
    model._parameters_replaced()  # what was traced so far calls the layers as they were
    return {name: variable._value for name, variable in (held.variables | held.heads).items()}


def _variable(row: Parameter, seed: int, kernel: Any, dtype: str) -> Any:
    """An adapter's parameter as Keras's own variable, named after the layer of the ``kernel`` that it stands beside."""
    with contextlib.ExitStack() as scopes:
        for outer in kernel.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(outer))
        return keras.Variable(initial_value(row, seed), dtype=dtype, autocast=False, name=row.name.rpartition(".")[2])


def attach_saved(model: PreTrainedModel, folder: str | Path) -> dict[str, Any]:
    """Freeze the model and stand a saved adapter, ours or peft's, beside its kernels; what is left to train by name.

    A head that was trained with the adapter takes the place of the model's.

    Raises: CheckpointError, where there is no adapter that can be read; CheckpointMismatchError, where it is another
    model's; InputError, where the model has an adapter already.
    """
    saved = fitted(read_adapter(folder), model.config, model.head)
    made = attach(model, saved.lora)
    for name, array in saved.arrays.items():
        made[name].assign(tf.cast(array, made[name].dtype))
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
    parameters = held.variables | held.heads
    rows = adapter_table(model.config, model.head, held.lora)
    tensors = {row.name: _to_file(parameters[row.name]) for row in rows}
    with atomic_folder(folder) as stage:
        architecture = type(model).__name__.removeprefix("TF")
        write_adapter(stage, held.lora, tensors, base, architecture, model.config.id2label)
    return Path(folder)


def _beside(call: Callable[[Tensor], Tensor], held: _Held, a: Any, b: Any, number: int) -> Callable[[Tensor], Tensor]:
    def with_adapter(x: Tensor) -> Tensor:
        seed = None if held.seed is None else tf.random.experimental.stateless_fold_in(held.seed, number)
        shape = tf.shape(x)
        flat = tf.reshape(dropout(x, held.lora.dropout, seed), (-1, x.shape[-1]))
        thin = tf.matmul(flat, in_dtype(a, x.dtype), transpose_b=True)
        added = tf.matmul(thin, in_dtype(b, x.dtype), transpose_b=True) * tf.cast(held.lora.scale, x.dtype)
        return call(x) + tf.reshape(added, tf.concat((shape[:-1], [b.shape[0]]), axis=0))

    return with_adapter


def held_by(model: PreTrainedModel) -> _Held | None:
    """The adapter that a model has."""
    return model.__dict__.get("_lora")


def adapter_parameters(model: PreTrainedModel) -> dict[str, Any]:
    """The adapter's parameters by name; none where the model has no adapter."""
    held = held_by(model)
    return {} if held is None else {name: variable._value for name, variable in held.variables.items()}


def detach(model: PreTrainedModel) -> None:
    """Take the adapter away; but for a head trained with it the model is what it was, and can be trained again."""
    held = held_by(model)
    if held is None:
        return
    for layer in held.layers:
        del layer.__dict__["call"]
    del model.__dict__["_lora"]
    model._trainable = False  # else the next line would change nothing for Keras, and so not reach the parts
    model.trainable = True
    model._parameters_replaced()


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
    before: list[tuple[Any, Tensor]] = []
    try:
        if held is not None:
            found = adapter_parameters(model)
            for layer in layers_of(found):
                kernel = model.get_parameter(f"{layer}.weight")
                before.append((kernel, tf.identity(kernel.value)))
                _merge_one(model, layer, found, held.lora.scale, 1)
        yield
    finally:
        for kernel, value in before:
            kernel.assign(value)


def unmerge(model: PreTrainedModel, lora: Lora, arrays: dict[str, Any]) -> None:
    """Take out of the kernels what `merge` put in: an adapter like ``lora`` with the parameters ``arrays`` by name.

    The kernels are back but for rounding.
    """
    for layer in layers_of(arrays):
        _merge_one(model, layer, arrays, lora.scale, -1)


def _merge_one(model: PreTrainedModel, layer: str, adapter: Mapping[str, Any], scale: float, sign: int) -> None:
    kernel, a, b = model.get_parameter(f"{layer}.weight"), adapter[layer + A], adapter[layer + B]
    old, first, second = (tf.cast(each, tf.float64).numpy() for each in (kernel.value, a, b))
    kernel.assign(tf.cast(merged(old, first, second, scale, sign), kernel.dtype))
