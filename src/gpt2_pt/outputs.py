"""The outputs of the models, known to PyTorch's tree functions (export, FSDP, ``tree_map``)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch.utils import _pytree as pytree

from gpt2_core.outputs import (
    BaseOutput,
    ClassifierOutput,
    DoubleHeadsOutput,
    LMOutput,
    Output,
    QuestionAnsweringOutput,
)
from gpt2_pt.cache import Past

__all__ = ["BaseOutput", "ClassifierOutput", "DoubleHeadsOutput", "LMOutput", "QuestionAnsweringOutput"]


def _register(cls: type[Output]) -> None:
    names = [f.name for f in fields(cls)]

    def flatten(out: Output) -> tuple[list[Any], list[str]]:
        kept = [name for name in names if getattr(out, name) is not None]
        return [getattr(out, name) for name in kept], kept

    def flatten_with_keys(out: Output) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[str]]:
        values, kept = flatten(out)
        return [(pytree.GetAttrKey(name), value) for name, value in zip(kept, values, strict=True)], kept

    def unflatten(values: Any, kept: list[str]) -> Output:
        return cls(**dict(zip(kept, values, strict=True)))

    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        serialized_type_name=f"gpt2_core.outputs.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


for _cls in (BaseOutput, LMOutput, DoubleHeadsOutput, ClassifierOutput, QuestionAnsweringOutput):
    _register(_cls)

pytree.register_pytree_node(
    Past,
    lambda past: (list(past), None),
    lambda layers, _: Past(layers),
    serialized_type_name="gpt2_pt.cache.Past",
    flatten_with_keys_fn=lambda past: ([(pytree.SequenceKey(i), layer) for i, layer in enumerate(past)], None),
)
