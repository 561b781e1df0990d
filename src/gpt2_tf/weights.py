"""What all models share: building from a seed, loading, saving, tying, resizing, pruning."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from gpt2_core.checkpoints import Tensor as FileTensor
from gpt2_core.checkpoints.naming import Matching
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, ConfigError, Gpt2Error, InputError, nearest
from gpt2_core.initialization import initial_value
from gpt2_core.inputs import given_twice, ragged
from gpt2_core.parameters import Head, Parameter, parameter_table
from gpt2_core.pretrained import Pretrained, open_pretrained, save_pretrained
from gpt2_tf.exporting import ExportingMixin
from gpt2_tf.fitting import FittingMixin
from gpt2_tf.layers import Part, Tensor, dims, in_dtype, replace_layer, replace_variable

Model = TypeVar("Model", bound="PreTrainedModel")

DTYPES: Mapping[str, Any] = {
    "float32": tf.float32,
    "float16": tf.float16,
    "bfloat16": tf.bfloat16,
    "float64": tf.float64,
}

#: Makes a class known to Keras's own files, under one name in every process.
registered = keras.saving.register_keras_serializable(package="gpt2_tf")


class Linear(Part):
    """A linear layer whose kernel is (out, in), as the heads of the field's checkpoints store it."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = self.parameter("weight", n_out, n_in)
        self.bias = self.parameter("bias", n_out) if bias else None

    def call(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _linear(x, self.weight, self.bias)


class _Tied:
    """The language-model head that is the token table: no layer of its own, so that no file holds it twice."""

    bias = None

    def __init__(self, table: Any) -> None:
        self._table = (table,)

    @property
    def weight(self) -> Any:
        """The token table's variable, (V, C)."""
        return self._table[0].weight

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        return _linear(x, self.weight, None)


def _linear(x: Tensor, weight: Any, bias: Any) -> Tensor:
    shape = dims(x)
    y = tf.matmul(tf.reshape(x, (-1, shape[-1])), in_dtype(weight, x.dtype), transpose_b=True)
    y = y if bias is None else tf.nn.bias_add(y, in_dtype(bias, x.dtype))
    return tf.reshape(y, (*shape[:-1], weight.shape[0]))


def linear(n_in: int, n_out: int, bias: bool = True, **kwargs: Any) -> Linear:
    """A linear layer (in -> out) without values."""
    return Linear(n_in, n_out, bias=bias, **kwargs)


def inputs_together(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model's ``call`` take its arguments also as a dict or a list in the place of the first, and as arrays.

    Raises: InputError, for a name that ``call`` does not have or an argument given twice.
    """
    names = [name for name in inspect.signature(call).parameters if name not in ("self", "training")]

    def taking(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get(names[0])
        given: dict[str, Any] = dict(zip(names[1:], args[1:], strict=False))
        if isinstance(first, Mapping):
            together = dict(first)
        elif isinstance(first, list | tuple) and not _is_nested_numbers(first):
            together = dict(zip(names, first, strict=False))
        else:
            together = {names[0]: first}
        kwargs = {name: value for name, value in kwargs.items() if name != names[0]}
        for name, value in (*given.items(), *kwargs.items()):
            if together.get(name) is not None and value is not None:
                raise given_twice(name)
            together[name] = value
        for name in together:
            if name not in names and name != "training":
                raise InputError(
                    f"{type(self).__name__} takes no {name!r}{nearest(name, names)}; it takes {', '.join(names)}"
                )
        return call(self, **{name: _as_tensor(self, name, value) for name, value in together.items()})

    @functools.wraps(call)
    def in_our_words(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return taking(self, *args, **kwargs)
        except Gpt2Error as error:
            error._keras_call_info_injected = True  # type: ignore[attr-defined] # Keras would put its own words around ours
            raise

    return in_our_words


def _is_nested_numbers(value: Any) -> bool:
    """Whether ``value`` is numbers in plain lists, to any depth, rather than a list of tensors."""
    while isinstance(value, list | tuple) and len(value) > 0:
        value = value[0]
    return isinstance(value, int | float | np.integer | np.floating)


def _as_tensor(model: Any, name: str, value: Any) -> Any:
    """Arrays and nested lists of numbers as tensors; everything else as it is."""
    if not isinstance(value, np.ndarray | list | tuple) or name in ("past", "past_key_values"):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        raise ragged(name) from None
    tensor = tf.convert_to_tensor(array)
    return tf.cast(tensor, model.compute_dtype) if tensor.dtype.is_floating else tensor


def _policy(dtype: Any) -> Any:
    """The Keras policy that ``dtype`` means; None for the file's own format."""
    if dtype is None:
        return keras.config.dtype_policy()
    if dtype == "auto":
        return None
    if isinstance(dtype, keras.DTypePolicy):
        return dtype
    name = dtype.name if isinstance(dtype, tf.DType) else dtype
    known = [*DTYPES, "mixed_float16", "mixed_bfloat16"]
    if name not in known:
        hint = nearest(str(name), known)
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(known)}, or 'auto' for the file's own{hint}")
    return keras.DTypePolicy(name)


def _own_policy(pretrained: Pretrained) -> Any:
    """The number format of the file's token table, which the whole model takes under dtype="auto"."""
    row = pretrained.table[0]
    name = pretrained.checkpoint.dtype(pretrained.matching.names[row.name])
    if name not in DTYPES:
        raise CheckpointError(
            f"{pretrained.checkpoint.path} holds {row.name} as {name}, expected one of {', '.join(DTYPES)}; say which "
            "to convert to: dtype='float32'"
        )
    return keras.DTypePolicy(name)


def _from_file(tensor: FileTensor) -> np.ndarray[Any, Any]:
    """The numbers of a file's tensor; bfloat16 as the dtype that TensorFlow knows."""
    bits = tensor.raw()
    return bits.view(ml_dtypes.bfloat16) if tensor.dtype == "bfloat16" else bits


def _to_file(variable: Any) -> FileTensor:
    """The variable as a writer wants it, fetched from the device only when its turn comes."""
    name = keras.backend.standardize_dtype(variable.dtype)

    def load() -> np.ndarray[Any, Any]:
        value = np.ascontiguousarray(variable.numpy())
        return value.view(np.uint16) if name == "bfloat16" else value

    return FileTensor(name, tuple(variable.shape), load)


class PreTrainedModel(FittingMixin, ExportingMixin, keras.Model):
    """The base of every model: a config, parameters as the table says, and the ways in and out of files."""

    head: Head
    config: GPT2Config
    #: How the file that this model was loaded from went with it: what was ignored and why, what started afresh.
    loaded: Matching | None = None

    def __init__(self, config: GPT2Config, seed: int | None = 0, **kwargs: Any) -> None:
        """Build from ``config`` with the initial values of ``seed``; None leaves the values undefined.

        ``kwargs`` are Keras's: ``dtype`` (a number format or a policy such as "mixed_bfloat16"), ``name``,
        ``trainable``.

        Raises: ConfigError, where ``config`` is no GPT2Config.
        """
        if not isinstance(config, GPT2Config):
            raise ConfigError(
                f"the model needs a GPT2Config, got {type(config).__name__}; "
                f"for trained weights use {type(self).__name__}.from_pretrained(name_or_folder)"
            )
        super().__init__(**kwargs)
        self._allow_non_tensor_positional_args = True
        self.config = config
        with keras.name_scope(self.name):
            self._build(config)
        self.built = True
        if seed is not None:
            self._initialise(seed)

    def _build(self, config: GPT2Config) -> None:
        raise NotImplementedError

    # -- files -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_folder: str | Path,
        *,
        config: GPT2Config | None = None,
        dtype: Any = None,
        device: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        seed: int = 0,
    ) -> Model:
        """A trained model by name, folder or file, in any format that can be read.

        Args:
            name_or_folder: "gpt2-tales", a hub name such as "openai-community/gpt2", a folder, or a checkpoint file.
            config: instead of the config.json found there.
            dtype: number format of the parameters, or a Keras policy such as "mixed_bfloat16"; None is Keras's
                current policy, "auto" is that of the file's token table.
            device: where they go, as "CPU:0" or "GPU:0"; None leaves it to TensorFlow.
            revision, cache_dir, local_files_only: as the hub takes them.
            seed: initial values of a classification head that the file does not have.

        Raises: HubError, ConfigError, or CheckpointError and its kinds.
        """
        policy = _policy(dtype)
        pretrained = open_pretrained(
            name_or_folder,
            cls.head,
            config=config,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        with pretrained.checkpoint, tf.device(device):
            model = cls(pretrained.config, seed=None, dtype=policy or _own_policy(pretrained))
            for row, tensor in pretrained.tensors(seed):
                model._set(row.name, _from_file(tensor))
                tensor.release()
        model.loaded = pretrained.matching
        return model

    def save_pretrained(
        self, folder: str | Path, format: str = "safetensors", max_shard_bytes: int | str | None = None
    ) -> Path:
        """Write config.json and weights into ``folder``: all of it or, whatever happens, none of it.

        Args:
            format: "safetensors", "h5", or any other that is written: see docs/formats.md.
            max_shard_bytes: files of at most so many bytes, 5_000_000_000 or "5GB", with an index.

        Raises: CheckpointError for an unknown format, WriteError where the system refuses; InputError, while an adapter
        is held, which the file would lack.
        """
        self._refuse_adapter()
        return save_pretrained(
            folder,
            self.config,
            self.head,
            {row.name: _to_file(self.get_parameter(row.name)) for row in self.parameter_table()},
            architecture=type(self).__name__.removeprefix("TF"),
            format=format,
            max_shard_bytes=max_shard_bytes,
        )

    def _refuse_adapter(self) -> None:
        """Raise InputError where an adapter is held: a file of the model would not have what it has learnt."""
        if any(one.__dict__.get("_lora") is not None for one in (self, self._body())):
            raise InputError(
                "the model holds a LoRA adapter, which a file of the model does not have; put it into the kernels with "
                "merge(model), or save it alone with save_adapter(model, folder), both of gpt2_tf.adapters"
            )

    def save(self, *args: Any, **kwargs: Any) -> Any:  # Keras opens, and empties, the file before it asks for numbers
        """As Keras's. Raises: InputError, while an adapter is held, which the file would lack."""
        self._refuse_adapter()
        return super().save(*args, **kwargs)

    def save_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As Keras's. Raises: InputError, while an adapter is held, which the file would lack."""
        self._refuse_adapter()
        return super().save_weights(*args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """As Keras's, which comes here by whatever door, as ``keras.saving.save_model``.

        Raises: InputError, while an adapter is held, which the file would lack.
        """
        self._refuse_adapter()
        super().save_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """What Keras's own files say of the model."""
        return {
            "config": self.config.to_dict(),
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls: type[Model], config: dict[str, Any], custom_objects: Any = None) -> Model:
        """The model that ``get_config`` described, its values undefined."""
        given = dict(config)
        if isinstance(given.get("dtype"), dict):
            given["dtype"] = keras.saving.deserialize_keras_object(given["dtype"])
        return cls(GPT2Config.from_dict(given.pop("config")), seed=None, **given)

    # -- parameters ------------------------------------------------------------------------------------------

    def parameter_table(self) -> tuple[Parameter, ...]:
        """The rows of core's table for this model, in the order of the forward pass."""
        return parameter_table(self.config, self.head)

    def get_parameter(self, name: str) -> Any:
        """The Keras variable of the parameter table's row ``name``, as "transformer.h.0.attn.c_attn.weight".

        Raises: AttributeError, where the model has no such parameter.
        """
        found: Any = self
        for part in name.split("."):
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
        return found

    def _set(self, name: str, value: np.ndarray[Any, Any]) -> None:
        variable = self.get_parameter(name)
        tensor = tf.convert_to_tensor(value)
        variable.assign(tf.cast(tensor, variable.dtype))

    def _initialise(self, seed: int) -> None:
        for row in self.parameter_table():
            self._set(row.name, initial_value(row, seed))

    @property
    def variables(self) -> list[Any]:
        """As Keras's, with those of an adapter as long as the model holds one."""
        return [*super().variables, *self._of_adapter()]

    @property
    def weights(self) -> list[Any]:
        """As Keras's, with those of an adapter as long as the model holds one."""
        return [*super().weights, *self._of_adapter()]

    def _of_adapter(self) -> list[Any]:
        held = self.__dict__.get("_lora")
        return [] if held is None else list(held.variables.values())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model holds; a tied head counts once."""
        held = [*(self.get_parameter(row.name) for row in self.parameter_table()), *self._of_adapter()]
        variables = {id(v): v for v in held}
        return sum(int(np.prod(v.shape)) for v in variables.values() if v.trainable or not only_trainable)

    def _body(self) -> Any:  # no property: Keras's files walk through those, and would come back here without end
        """The transformer: this model itself, or what its head stands on."""
        return self if self.head is Head.NONE else self.transformer

    def get_input_embeddings(self) -> Any:
        """The token table, (V, C): a layer with a ``weight``."""
        return self._body().wte

    def set_input_embeddings(self, table: Any) -> None:
        """Replace the token table's values; the config's vocab_size and a tied head follow.

        ``table`` is a layer like ours, a ``keras.layers.Embedding``, a variable, or an array (V, C).

        Raises: InputError, where the width is not n_embd, or the rows do not match a head of its own.
        """
        values = getattr(table, "embeddings", getattr(table, "weight", table))
        shape = getattr(values, "shape", None)
        if shape is None or len(shape) != 2:
            raise InputError(f"the new token table is a {type(table).__name__}, expected a keras.layers.Embedding")
        rows, width = (int(size) for size in shape)
        if width != self.config.n_embd:
            raise InputError(f"the new token table is {width} wide, expected n_embd={self.config.n_embd}")
        head = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings and rows != head.weight.shape[0]:
            raise InputError(
                f"the new token table has {rows} rows, expected {head.weight.shape[0]} as the language-model head has, "
                "which is not tied to it; call resize_token_embeddings first"
            )
        replace_variable(self._body().wte, "weight", tf.convert_to_tensor(values))
        self._set_config(vocab_size=rows)

    def get_output_embeddings(self) -> Any:
        """The language-model head, or None where the model has none."""
        return getattr(self, "lm_head", None)

    def _language_head(self, config: GPT2Config) -> Any:
        """The token table itself, or a layer of its own where the config unties them."""
        if config.tie_word_embeddings:
            return _Tied(self.transformer.wte)
        return linear(config.n_embd, config.vocab_size, bias=False, name="lm_head", dtype=self.dtype_policy)

    def tie_weights(self) -> None:
        """Make the language-model head the token table itself, where the config says they are one."""
        if self.head in (Head.LM, Head.DOUBLE) and self.config.tie_word_embeddings:
            replace_layer(self, "lm_head", _Tied(self._body().wte))

    def _set_config(self, **changes: Any) -> None:
        self.config = self.config.replace(**changes)
        self._body().config = self.config
        self._parameters_replaced()

    def resize_token_embeddings(self, size: int) -> Any:
        """Grow or cut the vocabulary to ``size`` tokens; new rows start at the mean of the old ones.

        The mean keeps the chance of the new tokens near that of an average one, instead of far above it. Functions
        compiled and optimizers built for the old size do not fit any more: compile the model again.

        Raises: InputError, for a size below 1.
        """
        if not isinstance(size, int) or size < 1:
            raise InputError(f"the new vocabulary size is {size!r}, expected a whole number of at least 1")

        def resize(layer: Any) -> None:
            old = tf.convert_to_tensor(layer.weight)
            rows = old[:size]
            if size > old.shape[0]:
                wide = tf.cast(old, tf.float64 if old.dtype == tf.float64 else tf.float32)
                mean = tf.cast(tf.reduce_mean(wide, axis=0, keepdims=True), old.dtype)
                rows = tf.concat((rows, tf.repeat(mean, size - old.shape[0], axis=0)), axis=0)
            replace_variable(layer, "weight", rows)

        resize(self._body().wte)
        head = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings:
            resize(head)
        self._set_config(vocab_size=size)
        return self.get_input_embeddings()

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove attention heads for good: ``{layer: [heads]}``, numbered as in the unpruned model.

        Heads already removed are skipped. The config remembers, so a saved model loads as it is. Functions compiled
        and optimizers built before do not fit any more: compile the model again.

        Raises: ConfigError, for layers or heads that do not exist, or where a layer would keep none.
        """
        before = self.config
        merged = {layer: set(heads) for layer, heads in before.pruned_heads.items()}
        # Read as a config reads it, so that a layer named "0" is layer 0, and what cannot be read is a ConfigError.
        for layer, heads in before.replace(pruned_heads=heads_to_prune).pruned_heads.items():
            merged.setdefault(layer, set()).update(heads)
        after = before.replace(pruned_heads={layer: tuple(heads) for layer, heads in merged.items()})
        D = before.head_dim
        for layer in after.pruned_heads:
            alive = [h for h in range(before.n_head) if h not in before.pruned_heads.get(layer, ())]
            kept = [i for i, h in enumerate(alive) if h not in after.pruned_heads[layer]]
            attn = self._body().h[layer].attn
            index = (np.array(kept)[:, None] * D + np.arange(D)).flatten()
            packed = np.concatenate([index + part * len(alive) * D for part in range(3)])
            for owner, name, rows, axis in (
                (attn.c_attn, "weight", packed, 1),
                (attn.c_attn, "bias", packed, 0),
                (attn.c_proj, "weight", index, 0),
            ):
                replace_variable(owner, name, tf.gather(tf.convert_to_tensor(getattr(owner, name)), rows, axis=axis))
            attn.n_head = len(kept)
        self._set_config(pruned_heads=after.pruned_heads)

    def gradient_checkpointing_enable(self) -> None:
        """In training, recompute each block in the backward pass instead of keeping its activations."""
        self._body().gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._body().gradient_checkpointing = False
