"""``compile``, ``fit``, ``evaluate`` and ``predict`` as Keras users know them, with the labels among the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from gpt2_core.errors import InputError
from gpt2_core.inputs import IGNORED_LABELS
from gpt2_core.outputs import Output


class FittingMixin:
    """The loss of the model's own head where ``compile`` names none, and metrics that skip ignored labels."""

    #: (argument that holds the labels, output they are about, whether position t is scored on label t + 1)
    _scored: tuple[tuple[str, str, bool], ...] = ()
    _own_loss = True

    def compile(self, optimizer: Any = "adamw", loss: Any = None, metrics: Any = None, **kwargs: Any) -> None:
        """As Keras's, except that without ``loss`` the model's own loss on its labels is what is minimised.

        Metrics then see the labels as ``y_true``, shifted for language models, and skip those that do not count.
        """
        self._own_loss = loss is None
        if self._own_loss and metrics is not None:
            # Keras passes weights, by which labels are skipped, to these alone.
            kwargs["weighted_metrics"] = _joined(metrics, kwargs.get("weighted_metrics"))
            metrics = None
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)  # type: ignore[misc]

    def train_step(self, data: Any) -> Any:
        """One step on a batch (x, y, weights); labels may be in x by name, or be y."""
        return super().train_step(self._with_labels(data))  # type: ignore[misc]

    def test_step(self, data: Any) -> Any:
        """One step of evaluation, as ``train_step``."""
        return super().test_step(self._with_labels(data))  # type: ignore[misc]

    def predict_step(self, data: Any) -> dict[str, Any]:
        """The outputs of one batch that can be put end to end: a dict of tensors by name, without ``past``."""
        x = _first(data)
        arguments = dict(x) if isinstance(x, Mapping) else {"input_ids": x}
        out = self(**(arguments | {"use_cache": False}), training=False)  # type: ignore[operator]
        return {name: value for name, value in out.items() if not name.endswith("loss")}

    def _with_labels(self, data: Any) -> Any:
        """``data`` with y among the inputs where the model's own loss is to score it."""
        if not self._own_loss or not isinstance(data, tuple) or len(data) < 2 or data[1] is None:
            return data
        x = dict(data[0]) if isinstance(data[0], Mapping) else {"input_ids": data[0]}
        if len(data) > 2 and data[2] is not None:
            raise InputError(
                "fit got sample weights, but the model's own loss is a mean over tokens; mark tokens that must not "
                f"count with {IGNORED_LABELS[0]} in labels, or compile with a loss of your own"
            )
        y = data[1]
        x |= dict(y) if isinstance(y, Mapping) else {self._scored[0][0] if self._scored else "labels": y}
        return (x,)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The model's own loss, or what ``compile`` was given, on the logits.

        Raises: InputError, where there are no labels to compute a loss from.
        """
        if not self._own_loss:
            return super().compute_loss(  # type: ignore[misc]
                x=x, y=y, y_pred=_main(y_pred), sample_weight=sample_weight, training=training
            )
        loss = getattr(y_pred, "loss", None)
        if loss is None:
            wanted = " and ".join(name for name, _, _ in self._scored) or "a head"
            raise InputError(
                f"{type(self).__name__} has nothing to compute a loss from, expected {wanted} among the inputs, as in "
                "fit({'input_ids': ids, 'labels': ids}); or compile with a loss of your own"
            )
        return tf.add_n([tf.cast(loss, tf.float32) if loss.dtype != tf.float64 else loss, *self.losses])  # type: ignore[attr-defined]

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Keras's metrics, on what the model's own loss is about: labels shifted as there, ignored ones left out."""
        if not self._own_loss:
            return super().compute_metrics(x, y, _main(y_pred), sample_weight)  # type: ignore[misc]
        truth, made, weights = {}, {}, {}
        for name, output, shifted in self._scored:
            labels = x.get(name) if isinstance(x, Mapping) else None
            logits = getattr(y_pred, output, None)
            if labels is None or logits is None:
                continue
            labels = tf.convert_to_tensor(labels)
            if shifted:
                labels, logits = labels[..., 1:], logits[..., :-1, :]
            if labels.dtype.is_integer:
                keep = tf.reduce_all([tf.not_equal(labels, ignored) for ignored in IGNORED_LABELS], axis=0)
                labels = tf.where(keep, labels, 0)
                weights[output] = tf.cast(keep, tf.float32)
            truth[output], made[output] = labels, logits
        if len(truth) == 1:
            (name,) = truth
            return super().compute_metrics(x, truth[name], made[name], weights.get(name))  # type: ignore[misc]
        return super().compute_metrics(x, truth, made, weights)  # type: ignore[misc]


def _joined(one: Any, other: Any) -> Any:
    if other is None:
        return one
    if isinstance(one, Mapping) or isinstance(other, Mapping):
        raise InputError("give metrics or weighted_metrics, not both: with the model's own loss they are the same")
    return [*one, *other]


def _first(data: Any) -> Any:
    return data[0] if isinstance(data, tuple) else data


def _main(out: Any) -> Any:
    """The logits of an output: what a loss of the user's own is about."""
    return getattr(out, "logits", None) if isinstance(out, Output) and "logits" in out else out
