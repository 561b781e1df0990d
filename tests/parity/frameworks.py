"""What the parity tests ask of a framework, and how each answers. A framework is one class here and one line below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pytest

from gpt2_core.config import GPT2Config


class Framework(Protocol):
    """Models of one framework, fed with numpy and read as numpy."""

    name: str

    def build(self, config: GPT2Config, head: str, parameters: Mapping[str, np.ndarray], dtype: str = "float64") -> Any:
        """A model in evaluation mode with these parameters."""

    def rounded(self, parameters: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
        """The parameters as ``dtype`` holds them, in float64."""

    def run(self, model: Any, gradients: bool = False, **inputs: Any) -> Any:
        """The output of the model for inputs in numpy (``past`` in whichever way)."""

    def past(self, model: Any, layers: Any) -> Any:
        """A cache in numpy as the framework's tensors: plain pairs."""

    def stacked(self, past: Any) -> Any:
        """A cache as version 2 gave it: a tuple of stacked (2, B, H, S, D) tensors."""

    def numpy(self, value: Any) -> Any:
        """Tensors, in any nest of tuples, as float64 arrays."""

    def gradients(self, model: Any, **inputs: Any) -> tuple[float, dict[str, np.ndarray]]:
        """The loss and its gradients by the names of the parameter table."""

    def train(self, model: Any, batches: Sequence[Mapping[str, np.ndarray]], **adamw: float) -> list[float]:
        """The losses of the model on the batches, each before its step of AdamW: lr, beta1, beta2, eps, decay."""

    def parameters(self, model: Any) -> dict[str, np.ndarray]:
        """What the parameters are, in their own number format where numpy has it, else widened."""


class PyTorch:
    name = "pt"

    def __init__(self) -> None:
        self.torch = pytest.importorskip("torch")
        import gpt2_pt

        self.classes = {
            "none": gpt2_pt.GPT2Model,
            "lm": gpt2_pt.GPT2LMHeadModel,
            "double": gpt2_pt.GPT2DoubleHeadsModel,
            "sequence": gpt2_pt.GPT2ForSequenceClassification,
            "token": gpt2_pt.GPT2ForTokenClassification,
            "qa": gpt2_pt.GPT2ForQuestionAnswering,
        }

    def build(self, config, head, parameters, dtype="float64"):
        model = self.classes[head](config, seed=None).to(getattr(self.torch, dtype)).eval()
        with self.torch.no_grad():
            assert {row.name for row in model.parameter_table()} == set(parameters)
            for name, value in parameters.items():
                model.get_parameter(name).copy_(self.torch.from_numpy(np.array(value)))
        return model

    def rounded(self, parameters, dtype):
        kind = getattr(self.torch, dtype)
        return {name: self.torch.from_numpy(value).to(kind).double().numpy() for name, value in parameters.items()}

    def _put(self, model, value):
        if not isinstance(value, np.ndarray):
            return value
        tensor = self.torch.from_numpy(np.array(value))
        return tensor.to(model.dtype) if tensor.is_floating_point() else tensor

    def run(self, model, gradients=False, **inputs):
        with self.torch.set_grad_enabled(gradients):
            return model(**{name: self._put(model, value) for name, value in inputs.items()})

    def past(self, model, layers):
        return tuple((self._put(model, np.array(key)), self._put(model, np.array(value))) for key, value in layers)

    def stacked(self, past):
        return tuple(self.torch.stack((key, value)) for key, value in past)

    def numpy(self, value):
        if isinstance(value, tuple):
            return tuple(self.numpy(item) for item in value)
        return value.detach().double().numpy()

    def gradients(self, model, **inputs):
        model.zero_grad()
        loss = self.run(model, gradients=True, **inputs).loss
        loss.backward()
        found = {row.name: model.get_parameter(row.name).grad for row in model.parameter_table()}
        return loss.item(), {name: grad.numpy().copy() for name, grad in found.items() if grad is not None}

    def train(self, model, batches, *, lr, beta1, beta2, eps, decay):
        optimizer = self.torch.optim.AdamW(model.parameters(), lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = self.run(model, gradients=True, **batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def parameters(self, model):
        found = {row.name: model.get_parameter(row.name).detach() for row in model.parameter_table()}
        return {
            name: (value.float() if value.dtype == self.torch.bfloat16 else value).numpy().copy()
            for name, value in found.items()
        }


class TensorFlow:
    name = "tf"

    def __init__(self) -> None:
        pytest.importorskip("tensorflow")
        pytest.importorskip("keras")
        import gpt2_tf  # first: it keeps TensorFlow's banner off the terminal

        self.tf = pytest.importorskip("tensorflow")
        self.classes = {
            "none": gpt2_tf.TFGPT2Model,
            "lm": gpt2_tf.TFGPT2LMHeadModel,
            "double": gpt2_tf.TFGPT2DoubleHeadsModel,
            "sequence": gpt2_tf.TFGPT2ForSequenceClassification,
            "token": gpt2_tf.TFGPT2ForTokenClassification,
            "qa": gpt2_tf.TFGPT2ForQuestionAnswering,
        }

    def build(self, config, head, parameters, dtype="float64"):
        model = self.classes[head](config, seed=None, dtype=dtype)
        assert {row.name for row in model.parameter_table()} == set(parameters)
        for name, value in parameters.items():
            model.get_parameter(name).assign(self.tf.cast(np.array(value), dtype))
        return model

    def rounded(self, parameters, dtype):
        return {name: self.tf.cast(self.tf.cast(value, dtype), "float64").numpy() for name, value in parameters.items()}

    def _put(self, model, value):
        if not isinstance(value, np.ndarray):
            return value
        tensor = self.tf.constant(value)
        return self.tf.cast(tensor, model.dtype) if tensor.dtype.is_floating else tensor

    def run(self, model, gradients=False, **inputs):
        return model(**{name: self._put(model, value) for name, value in inputs.items()})

    def past(self, model, layers):
        return tuple((self._put(model, np.array(key)), self._put(model, np.array(value))) for key, value in layers)

    def stacked(self, past):
        return tuple(self.tf.stack((key, value)) for key, value in past)

    def numpy(self, value):
        if isinstance(value, tuple):
            return tuple(self.numpy(item) for item in value)
        return self.tf.cast(value, "float64").numpy()

    def gradients(self, model, **inputs):
        names = [row.name for row in model.parameter_table()]
        variables = [model.get_parameter(name) for name in names]
        with self.tf.GradientTape() as tape:
            loss = self.run(model, gradients=True, **inputs).loss
        found = zip(names, tape.gradient(loss, variables), strict=True)
        return float(loss), {name: self.tf.convert_to_tensor(grad).numpy() for name, grad in found if grad is not None}

    def train(self, model, batches, *, lr, beta1, beta2, eps, decay):
        import keras

        optimizer = keras.optimizers.AdamW(lr, weight_decay=decay, beta_1=beta1, beta_2=beta2, epsilon=eps)
        variables = [model.get_parameter(row.name) for row in model.parameter_table()]
        losses = []
        for step, batch in enumerate(batches, 1):
            # PyTorch adds epsilon after the correction of the second moment, as Kingma & Ba's algorithm 1 does,
            # Keras before it, as the end of their section 2 allows: this much smaller it is the same.
            optimizer.epsilon = eps * math.sqrt(1 - beta2**step)
            with self.tf.GradientTape() as tape:
                loss = self.run(model, gradients=True, **batch).loss
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            losses.append(float(loss))
        return losses

    def parameters(self, model):
        found = {row.name: model.get_parameter(row.name) for row in model.parameter_table()}
        return {name: (self.tf.cast(v, "float32") if v.dtype == "bfloat16" else v).numpy() for name, v in found.items()}


FRAMEWORKS = {"pt": PyTorch, "tf": TensorFlow}
