"""The outputs of the models, known to TensorFlow's and Keras's tree functions (tf.function, Functional models)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import optree

from gpt2_core.outputs import (
    BaseOutput,
    ClassifierOutput,
    DoubleHeadsOutput,
    LMOutput,
    Output,
    QuestionAnsweringOutput,
)
from gpt2_tf.cache import Past

__all__ = ["BaseOutput", "ClassifierOutput", "DoubleHeadsOutput", "LMOutput", "QuestionAnsweringOutput"]


def _register(cls: Any) -> None:
    names = [f.name for f in fields(cls)]

    def parts(out: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        kept = tuple(name for name in names if getattr(out, name) is not None)
        return tuple(getattr(out, name) for name in kept), kept

    def whole(kept: Any, values: Any) -> Any:
        fields_of = dict(zip(kept, values, strict=True))
        if isinstance(fields_of.get("past"), tuple):  # tf.function gives a plain one back
            fields_of["past"] = Past(fields_of["past"])
        return cls(**fields_of)

    def flatten(out: Output) -> tuple[tuple[str, ...], tuple[Any, ...]]:
        values, kept = parts(out)
        return kept, values

    # The protocol by which tf.function takes dataclasses apart: metadata first, then the parts.
    cls.__tf_flatten__ = flatten
    cls.__tf_unflatten__ = staticmethod(whole)
    optree.register_pytree_node(cls, lambda out: (*parts(out), parts(out)[1]), whole, namespace="keras")


for _cls in (BaseOutput, LMOutput, DoubleHeadsOutput, ClassifierOutput, QuestionAnsweringOutput):
    _register(_cls)
