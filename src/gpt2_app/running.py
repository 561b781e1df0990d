"""One run of a checkpoint in one framework, kept as numpy: what `gpt2 compare` holds against another run.

A framework is one class here and one line in `RUNNERS`; it is imported when it is used. All run on the CPU.

A run gives parameters, outputs and gradients. Large arrays go to files at once, so that memory is that of one model at
work and not of two models and all that they returned: comparing a model of 124M parameters at 1024 tokens keeps some
3 GB on the disk meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from gpt2_app.backends import SMALL
from gpt2_app.failures import reading_a_model
from gpt2_core.comparison import TOLERANCES, Array, Key, Side, named, rounded
from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.files import write_error
from gpt2_core.parameters import Head
from gpt2_core.pretrained import open_pretrained

K = TypeVar("K")
Inputs = Mapping[str, Array]

_KEPT = 1 << 20  # bytes; smaller arrays stay in memory
_CLASSES = {
    Head.NONE: "GPT2Model",
    Head.LM: "GPT2LMHeadModel",
    Head.DOUBLE: "GPT2DoubleHeadsModel",
    Head.SEQUENCE: "GPT2ForSequenceClassification",
    Head.TOKEN: "GPT2ForTokenClassification",
    Head.QA: "GPT2ForQuestionAnswering",
}


class Shelf(Mapping[K, Array]):
    """Arrays by name, the large ones in files of ``folder`` that are mapped when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._here: dict[K, Array | Path] = {}

    def put(self, name: K, array: Array) -> None:
        """Keep an array. Raises: WriteError, where there is no room for its file."""
        if array.nbytes < _KEPT:
            self._here[name] = array.copy()
            return
        file = self._folder / f"{len(self._here)}.npy"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            np.save(file, array)
        except OSError as cause:
            raise write_error(file, cause) from cause
        self._here[name] = file

    def __getitem__(self, name: K) -> Array:
        found = self._here[name]
        if isinstance(found, Path):
            mapped: Array = np.load(found, mmap_mode="r")
            return mapped
        return found

    def __iter__(self) -> Iterator[K]:
        return iter(self._here)

    def __len__(self) -> int:
        return len(self._here)


class Runner(Protocol):
    """A loaded model. ``gradients`` is asked after ``outputs`` was read to its end, and only if it was told to."""

    def __init__(self, source: str, head: Head, dtype: str) -> None: ...

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Each parameter by its name in the table, as the framework holds it."""

    def outputs(self, inputs: Inputs, gradients: bool) -> Iterator[tuple[Key, Array]]:
        """All that the model returns for ``inputs``; with ``gradients`` those of its loss are computed as well."""

    def gradients(self) -> Iterator[tuple[str, Array]]:
        """The gradient of the loss by each parameter."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint before it is run."""

    source: str
    head: Head
    config: GPT2Config
    stored: Mapping[str, str]


def look(source: str, head: Head) -> Checkpoint:
    """Open a checkpoint, by name, folder or file, and match it with its configuration.

    Raises: HubError for a name that is not found, Failure with exit code 3 for files that cannot be used.
    """
    with reading_a_model():
        found = open_pretrained(source, head)
        with found.checkpoint:
            stored = {name: found.checkpoint.dtype(theirs) for name, theirs in found.matching.names.items()}
    return Checkpoint(source, head, found.config, stored)


def run(
    framework: str, checkpoint: Checkpoint, dtype: str, inputs: Inputs | None, folder: Path, *, gradients: bool = False
) -> Side:
    """Load the checkpoint with weights of ``dtype`` and run it; without ``inputs`` only its parameters are read.

    Everything large is kept in ``folder`` for as long as the result is used.

    Raises: Failure with exit code 3 for files that cannot be used; InputError, where the framework cannot do this;
    WriteError, where the disk is full.
    """
    head = checkpoint.head
    if gradients and inputs is not None and not _has_loss(inputs):
        raise InputError(
            f"gradients are those of a loss, and head {head.value!r} on this input has none; leave out --gradients, or "
            "compare the language model (--head lm) on at least two tokens"
        )
    runner = RUNNERS[framework](checkpoint.source, head, dtype)
    parameters: Shelf[str] = Shelf(folder / "parameters")
    outputs: Shelf[Key] = Shelf(folder / "outputs")
    slopes: Shelf[str] = Shelf(folder / "gradients")
    for name, array in runner.parameters():
        parameters.put(name, array)
    if inputs is not None:
        for key, array in runner.outputs(inputs, gradients):
            outputs.put(key, array)
        if gradients:
            for name, array in runner.gradients():
                slopes.put(name, array)
    return Side(
        checkpoint.source,
        framework,
        dtype,
        checkpoint.config,
        parameters,
        outputs,
        slopes if gradients and inputs is not None else None,
        checkpoint.stored,
    )


# -- what a head is given ------------------------------------------------------------------------------------


def inputs_of(config: GPT2Config, head: Head, ids: Array) -> dict[str, Array]:
    """What a model with ``head`` is run on: ids (B, T), and labels of its kind so that it has a loss.

    The double-heads model gets each row twice, as it is and backwards, as two choices.
    """
    rows, T = ids.shape
    labels = np.arange(rows) % config.num_labels
    if head is Head.NONE:
        return {"input_ids": ids}
    if head is Head.LM:
        return {"input_ids": ids, "labels": ids} if T > 1 else {"input_ids": ids}
    if head is Head.DOUBLE:
        both = np.ascontiguousarray(np.stack((ids, ids[:, ::-1]), axis=1))
        return {"input_ids": both, "mc_labels": np.zeros(rows, np.int64)} | ({"labels": both} if T > 1 else {})
    if head is Head.TOKEN:
        return {"input_ids": ids, "labels": ids % config.num_labels}
    if head is Head.QA:
        return {"input_ids": ids, "start_positions": labels % T, "end_positions": np.full(rows, T - 1)}
    kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if kind == "single_label_classification":
        return {"input_ids": ids, "labels": labels}
    return {"input_ids": ids, "labels": (np.arange(rows * config.num_labels) % 2.0).reshape(rows, -1)}


def _has_loss(inputs: Inputs) -> bool:
    """Whether these inputs give a loss."""
    return any(name.endswith(("labels", "positions")) for name in inputs)


# -- the frameworks ------------------------------------------------------------------------------------------

# Every framework is run twice: as it is used, with its fast attention, and once more for the attentions alone, which
# only the way that writes them out can return.
_AS_USED = {"use_cache": True, "output_hidden_states": True, "output_attentions": False}
_ATTENTIONS = {"use_cache": False, "output_hidden_states": False, "output_attentions": True}


class _PyTorch:
    def __init__(self, source: str, head: Head, dtype: str) -> None:
        import torch

        import gpt2_pt

        self._torch = torch
        with reading_a_model():
            self._model = getattr(gpt2_pt, _CLASSES[head]).from_pretrained(source, dtype=dtype, device="cpu")
        if self._model.num_parameters() < SMALL:
            torch.set_num_threads(1)

    def _numpy(self, tensor: Any) -> Array:
        tensor = tensor.detach()
        array: Array = (tensor.float() if tensor.dtype == self._torch.bfloat16 else tensor).numpy()
        return array

    def parameters(self) -> Iterator[tuple[str, Array]]:
        for row in self._model.parameter_table():
            yield row.name, self._numpy(self._model.get_parameter(row.name))

    def outputs(self, inputs: Inputs, gradients: bool) -> Iterator[tuple[Key, Array]]:
        tensors = {name: self._torch.from_numpy(array) for name, array in inputs.items()}
        with self._torch.set_grad_enabled(gradients):
            out = self._model(**tensors, **_AS_USED)
            if gradients:
                out.loss.backward()
        for key, tensor in named(out):
            yield key, self._numpy(tensor)
        del out, tensor
        with self._torch.no_grad():
            out = self._model(tensors["input_ids"], **_ATTENTIONS)
        for key, tensor in named(out):
            if key.kind == "attentions":
                yield key, self._numpy(tensor)

    def gradients(self) -> Iterator[tuple[str, Array]]:
        for row in self._model.parameter_table():
            slope = self._model.get_parameter(row.name).grad
            if slope is not None:
                yield row.name, self._numpy(slope)


class _TensorFlow:
    def __init__(self, source: str, head: Head, dtype: str) -> None:
        # TensorFlow's own remarks (which kernels it has, that there is no GPU) are no news to anybody here.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import gpt2_tf  # isort: skip - before TensorFlow, whose banner it holds back
        import tensorflow

        self._tf = tensorflow
        self._slopes: dict[str, Any] = {}
        with reading_a_model(), tensorflow.device("/CPU:0"):
            self._model = getattr(gpt2_tf, f"TF{_CLASSES[head]}").from_pretrained(source, dtype=dtype)

    def _numpy(self, tensor: Any) -> Array:
        array = np.asarray(tensor)
        # ml_dtypes' bfloat16, which numpy itself knows nothing of.
        return array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float32)

    def parameters(self) -> Iterator[tuple[str, Array]]:
        for row in self._model.parameter_table():
            yield row.name, self._numpy(self._model.get_parameter(row.name))

    def outputs(self, inputs: Inputs, gradients: bool) -> Iterator[tuple[Key, Array]]:
        with self._tf.device("/CPU:0"):
            tensors = {name: self._tf.constant(array) for name, array in inputs.items()}
            ids = tensors.pop("input_ids")
            out = self._with_gradients(ids, tensors) if gradients else self._model(ids, **tensors, **_AS_USED)
        for key, tensor in named(out):
            yield key, self._numpy(tensor)
        del out, tensor
        with self._tf.device("/CPU:0"):
            out = self._model(ids, **_ATTENTIONS)
        for key, tensor in named(out):
            if key.kind == "attentions":
                yield key, self._numpy(tensor)

    def _with_gradients(self, ids: Any, labels: Mapping[str, Any]) -> Any:
        variables = {row.name: self._model.get_parameter(row.name).value for row in self._model.parameter_table()}
        with self._tf.GradientTape() as tape:
            out = self._model(ids, **labels, **_AS_USED)
        slopes = tape.gradient(out.loss, list(variables.values()))
        self._slopes = {name: slope for name, slope in zip(variables, slopes, strict=True) if slope is not None}
        return out

    def gradients(self) -> Iterator[tuple[str, Array]]:
        for name, slope in self._slopes.items():
            yield name, self._numpy(self._tf.convert_to_tensor(slope))  # lookups have sparse ones


class _Numpy:
    """The reference: float64 arithmetic, on weights as ``dtype`` holds them."""

    def __init__(self, source: str, head: Head, dtype: str) -> None:
        from gpt2_core.reference import ReferenceModel

        with reading_a_model():
            found = open_pretrained(source, head)
            with found.checkpoint:
                values = {row.name: rounded(tensor.array(), dtype) for row, tensor in found.tensors()}
                self._model = ReferenceModel(found.config, values, head)
        self._dtype = dtype

    def parameters(self) -> Iterator[tuple[str, Array]]:
        for name, value in self._model.parameters.items():
            yield name, rounded(value, self._dtype)

    def outputs(self, inputs: Inputs, gradients: bool) -> Iterator[tuple[Key, Array]]:
        if gradients:
            raise InputError(
                "the numpy reference computes no gradients; leave out --gradients, or compare two of pt and tf"
            )
        asked: dict[str, Any] = {**inputs, **_AS_USED, "output_attentions": True}
        # What is no number is found and told by whoever compares.
        with np.errstate(invalid="ignore", over="ignore"):
            out = self._model(**asked)
        for key, value in named(out):
            yield key, np.asarray(value)

    def gradients(self) -> Iterator[tuple[str, Array]]:
        yield from ()


RUNNERS: Mapping[str, type[Runner]] = {"pt": _PyTorch, "tf": _TensorFlow, "numpy": _Numpy}
DTYPES = tuple(TOLERANCES)
