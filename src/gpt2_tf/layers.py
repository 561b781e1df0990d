"""What the layers inside a model stand on: calling without ceremony, shapes while tracing, norm and dropout.

Letters: B batch, T new positions, C model width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

Tensor = Any  # what TensorFlow computes with: an eager or symbolic tf.Tensor


class Part(keras.layers.Layer):
    """A layer that is called from within a model alone.

    The model's own call has converted the inputs and set the number format, so a part is a plain function of tensors:
    Keras's checks, made anew for each of a model's hundred parts, would cost more than a small model itself.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.built = True  # its variables are made with it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as ``call``."""
        return self.call(*args, **kwargs)

    def parameter(self, name: str, *shape: int) -> Any:
        """A variable of this part, without values: they come from the seed or from a checkpoint.

        Under a mixed policy it is for the part to convert them, by `in_dtype`: a block that is recomputed for its
        gradients runs outside of Keras's own conversion.
        """
        return self.add_weight(name=name, shape=shape, initializer="zeros", autocast=False)

    def naming(self) -> Any:
        """A context in which the variables of parts made within are named after this part, as "h_0/attn/c_proj"."""
        return keras.name_scope(self.name)


def in_dtype(variable: Any, dtype: Any) -> Tensor:
    """The variable's numbers in the format ``dtype``."""
    value = variable.value
    return value if value.dtype == dtype else tf.cast(value, dtype)


def replace_variable(layer: Any, name: str, value: Tensor) -> None:
    """Put a variable with these numbers, of whatever shape, in the place of ``layer``'s variable ``name``."""
    own = list(layer.variables)
    for variable in own:
        layer._untrack_variable(variable)  # deleting the attribute does this too, and then walks through all of memory
    # All are put back in their order, in which Keras's files and optimizers count them.
    for variable in own:
        if variable.name == name:
            with contextlib.ExitStack() as scopes:
                for outer in variable.path.split("/")[:-2]:
                    scopes.enter_context(keras.name_scope(outer))
                new = layer.parameter(name, *value.shape)
            new.assign(value)
            new.trainable = variable.trainable
            setattr(layer, name, new)
        else:
            setattr(layer, variable.name, variable)


def replace_layer(owner: Any, name: str, new: Any) -> None:
    """Put ``new`` in the place of ``owner``'s layer ``name``, of which nothing stays behind."""
    old = getattr(owner, name)
    delattr(owner, name)
    owner._tracker.untrack(old)
    setattr(owner, name, new)


def dims(x: Tensor) -> list[Any]:
    """The sizes of ``x``: numbers where they are known, else scalar tensors."""
    known = x.shape.as_list()
    if None not in known:
        return list(known)
    traced = tf.shape(x)
    return [traced[axis] if size is None else size for axis, size in enumerate(known)]


def known(x: Tensor) -> tuple[int | None, ...]:
    """The shape of ``x`` as far as it is known while tracing; None for the rest."""
    return tuple(x.shape.as_list())


def is_concrete(x: Tensor) -> bool:
    """Whether the numbers of ``x`` can be looked at without waiting for an accelerator."""
    return tf.is_tensor(x) and not tf.is_symbolic_tensor(x) and "CPU" in x.device


class LayerNorm(Part):
    """Layer normalisation over the last axis, with gain and bias; in float32 where the input is narrower."""

    def __init__(self, width: int, eps: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps = eps
        self.weight = self.parameter("weight", width)
        self.bias = self.parameter("bias", width)

    def call(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        wide = x if x.dtype == tf.float64 else tf.cast(x, tf.float32)
        mean = tf.reduce_mean(wide, axis=-1, keepdims=True)
        centred = wide - mean
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        scale = tf.math.rsqrt(variance + self.eps)
        gain, bias = in_dtype(self.weight, wide.dtype), in_dtype(self.bias, wide.dtype)
        return tf.cast(centred * scale * gain + bias, x.dtype)


def dropout(x: Tensor, rate: float, seed: Tensor | None) -> Tensor:
    """Zero a share ``rate`` of ``x`` and scale up the rest; without a ``seed`` (2,) ``x`` as it is.

    The same seed drops the same places, so that recomputing a block for its gradients meets the same block.
    """
    if seed is None or rate == 0.0:
        return x
    if rate >= 1.0:
        return tf.zeros_like(x)
    # Whole numbers are drawn and compared as they are: tf.nn.experimental.stateless_dropout turns them into fractions.
    drawn = tf.random.stateless_uniform(tf.shape(x), seed, minval=None, maxval=None, dtype=tf.int32)
    kept = drawn >= tf.constant(min(int(rate * 2**32) - 2**31, 2**31 - 1), tf.int32)
    return x * tf.where(kept, tf.constant(1.0 / (1.0 - rate), x.dtype), tf.zeros((), x.dtype))
