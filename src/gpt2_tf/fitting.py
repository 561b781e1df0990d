"""``compile``, ``fit``, ``evaluate`` and ``predict`` as Keras users know them, with the labels among the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from gpt2_core.errors import InputError, nearest
from gpt2_core.inputs import IGNORED_LABELS, given_twice
from gpt2_core.outputs import Output
from gpt2_tf.layers import dims


class Scored(NamedTuple):
    """One thing that a head's loss is about."""

    labels: str  #: the argument that holds the right answers
    output: str  #: the field of the output that answers
    shifted: bool = False  #: whether position t is scored on label t + 1


@keras.saving.register_keras_serializable(package="gpt2_tf")
class Perplexity(keras.metrics.Mean):
    """exp of the mean negative log-likelihood, over every label that counts; ``y_pred`` are logits.

    A mean over tokens: batches with more of them weigh more, as they do not in the loss that ``fit`` reports.
    """

    def __init__(self, name: str = "perplexity", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Labels (...), logits (..., V) and weights (...)."""
        wide = y_pred if y_pred.dtype == tf.float64 else tf.cast(y_pred, tf.float32)
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.cast(y_true, tf.int64), logits=wide)
        super().update_state(each, sample_weight)

    def result(self) -> Any:
        """The perplexity so far, a scalar."""
        return tf.exp(super().result())


class _Metrics:
    """The metrics of a model that computes its own loss, by the output that they are about.

    Kept in an object of ours, in which Keras does not look for state: `FittingMixin.metrics` says what there is.
    """

    def __init__(self, given: Any = None, scored: tuple[Scored, ...] = ()) -> None:
        self.given = given
        self.by_output: dict[str, list[Any]] = {}
        if given is None:
            return
        several = len(scored) > 1
        outputs = [each.output for each in scored]
        wanted = given if isinstance(given, Mapping) else dict.fromkeys(outputs, given)
        for output in wanted:
            if output not in outputs:
                hint = nearest(str(output), outputs)
                raise InputError(f"metrics names the output {output!r}{hint}; expected {' and '.join(outputs)}")
        for output, metrics in wanted.items():
            metrics = metrics if isinstance(metrics, list | tuple) else [metrics]
            self.by_output[output] = [self._made(each, output if several else "") for each in metrics]

    @staticmethod
    def _made(given: Any, output: str) -> Any:
        """A metric object of ``given``, its name after the output's where there are several."""
        if isinstance(given, keras.metrics.Metric):
            # One object cannot count for two outputs.
            return type(given).from_config(given.get_config() | {"name": f"{output}_{given.name}"}) if output else given
        if given in ("accuracy", "acc"):
            metric = keras.metrics.SparseCategoricalAccuracy()
        elif given in ("crossentropy", "ce"):
            metric = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
        else:
            metric = keras.metrics.get(given)
            if not isinstance(metric, keras.metrics.Metric):
                metric = keras.metrics.MeanMetricWrapper(metric)
        name = given if isinstance(given, str) else getattr(given, "__name__", metric.name)
        metric.name = f"{output}_{name}" if output else name
        return metric

    def all(self) -> list[Any]:
        return [metric for metrics in self.by_output.values() for metric in metrics]


class FittingMixin:
    """The loss of the model's own head where ``compile`` names none, and metrics that skip ignored labels."""

    _scored: tuple[Scored, ...] = ()
    _own_loss = True
    _own_metrics = _Metrics()
    #: Whether the optimizer has begun to learn other variables than there are now: replaced, or frozen by an adapter.
    _outdated = False

    # -- what Keras's users call -------------------------------------------------------------------------------

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """As Keras's, except that without ``loss`` the model's own loss on its labels is what is minimised.

        Metrics then see the labels as ``y_true`` and the logits as ``y_pred``, shifted for language models, and skip
        labels that do not count. A model with two outputs to score takes a dict of metrics by output; a plain list is
        for both.

        With a ``loss`` of one's own, everything is Keras's: ``y_pred`` are the logits, and nothing is shifted. A dict
        of losses names outputs.

        Raises: InputError, for metrics of an output that the model does not have.
        """
        self._own_loss = loss is None
        if self._own_loss:
            if metrics is not None and weighted_metrics is not None:
                raise InputError("got metrics and weighted_metrics, which are the same with the model's own loss")
            given = metrics if metrics is not None else weighted_metrics
            made = _Metrics(given, self._scored)
            metrics = weighted_metrics = None
        else:
            made = _Metrics()
        super().compile(  # type: ignore[misc]
            optimizer=optimizer, loss=loss, loss_weights=loss_weights, metrics=metrics,
            weighted_metrics=weighted_metrics, **kwargs,
        )  # fmt: skip
        self._own_metrics = made
        self._outdated = False

    def get_compile_config(self) -> dict[str, Any]:
        """What ``compile`` was given, for Keras's own files."""
        config: dict[str, Any] = super().get_compile_config()  # type: ignore[misc]
        if config and self._own_loss:
            config = config | keras.saving.serialize_keras_object({"metrics": self._own_metrics.given})
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as ``get_compile_config`` described."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self._build_optimizer()

    @property
    def metrics(self) -> list[Any]:
        """All that the model counts while it is fitted or evaluated: the loss, then the metrics of ``compile``."""
        return [*super().metrics, *self._own_metrics.all()]  # type: ignore[misc]

    # -- the steps ---------------------------------------------------------------------------------------------

    def train_step(self, data: Any) -> Any:
        """One step on a batch (x, y, weights); labels may be in x by name, or be y."""
        held = self.__dict__.get("_lora")
        if held is None or not held.lora.dropout:
            return super().train_step(self._with_labels(data))  # type: ignore[misc]
        # Until the gradients are there: a block that is recomputed for them draws again.
        held.seed = tf.cast(self._body().seed_generator.next(), tf.int32)  # type: ignore[attr-defined]
        try:
            return super().train_step(self._with_labels(data))  # type: ignore[misc]
        finally:
            held.seed = None

    def test_step(self, data: Any) -> Any:
        """One step of evaluation, as ``train_step``."""
        return super().test_step(self._with_labels(data))  # type: ignore[misc]

    def predict_step(self, data: Any) -> dict[str, Any]:
        """The outputs of one batch that can be put end to end: a dict of tensors by name, without ``past``."""
        x = _named(data[0] if isinstance(data, tuple) else data)
        for each in self._scored:
            x.pop(each.labels, None)
        out = self(**(x | {"use_cache": False}), training=False)  # type: ignore[operator]
        return dict(out.items())

    def make_train_function(self, force: bool = False) -> Any:
        """As Keras's, with the optimizer's variables made first.

        Variables that are made while a function is traced have it traced a second time, which for a model of twelve
        blocks takes longer than many a fine-tuning.

        Raises: InputError, where the optimizer belongs to parameters that have been replaced, or to a model with
        another adapter.
        """
        if self._outdated:
            raise InputError(
                "the model was compiled before resize_token_embeddings, set_input_embeddings or prune_heads replaced "
                "parameters that its optimizer had begun to learn, or an adapter came or went; compile it again"
            )
        with self.distribute_strategy.scope():  # type: ignore[attr-defined]
            self._build_optimizer()
        return super().make_train_function(force)  # type: ignore[misc]

    def _build_optimizer(self) -> None:
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.trainable_variables)  # type: ignore[attr-defined]

    def _parameters_replaced(self) -> None:
        """Forget what was compiled for the old ones."""
        self.train_function = self.test_function = self.predict_function = None
        if getattr(getattr(self, "optimizer", None), "built", False):
            self._outdated = True

    def _with_labels(self, data: Any) -> Any:
        """``data`` with y among the inputs where the model's own loss is to score it.

        Raises: InputError, for weights, which that loss does not know, or labels given twice.
        """
        if not self._own_loss or not isinstance(data, tuple) or len(data) < 2 or data[1] is None:
            return data
        if len(data) > 2 and data[2] is not None:
            raise InputError(
                "fit got sample_weight or class_weight, but the model's own loss is a plain mean; mark what must not "
                f"count with {IGNORED_LABELS[0]} in labels, or compile with a loss of your own"
            )
        x, y = _named(data[0]), data[1]
        names = [each.labels for each in self._scored] or ["labels"]
        if not isinstance(y, Mapping):
            y = dict(zip(names, y if isinstance(y, list | tuple) else [y], strict=False))
        for name in y:
            if x.get(name) is not None:
                raise given_twice(name)
        return (x | dict(y),)

    # -- what the steps call -----------------------------------------------------------------------------------

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The model's own loss, or what ``compile`` was given, on the logits.

        Raises: InputError, where there are no labels to compute a loss from.
        """
        if not self._own_loss:
            return super().compute_loss(  # type: ignore[misc]
                x=x, y=y, y_pred=self._answers(y_pred), sample_weight=sample_weight, training=training
            )
        loss = getattr(y_pred, "loss", None)
        if loss is None:
            wanted = " and ".join(each.labels for each in self._scored) or "a head"
            raise InputError(
                f"{type(self).__name__} has nothing to compute a loss from, expected {wanted} among the inputs, as in "
                "fit({'input_ids': ids, 'labels': ids}); or compile with a loss of your own"
            )
        loss = loss if loss.dtype == tf.float64 else tf.cast(loss, tf.float32)
        for other in self.losses:  # type: ignore[attr-defined]
            loss += tf.cast(tf.reduce_sum(other), loss.dtype)
        # Gradients are summed over replicas, of which each sees a part of the batch.
        return loss / tf.distribute.get_strategy().num_replicas_in_sync

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Keras's metrics, on what the model's own loss is about: labels shifted as there, ignored ones left out."""
        if not self._own_loss:
            return super().compute_metrics(x, y, self._answers(y_pred), sample_weight)  # type: ignore[misc]
        for each in self._scored:
            metrics = self._own_metrics.by_output.get(each.output, ())
            labels = x.get(each.labels, x.get(f"lm_{each.labels}")) if isinstance(x, Mapping) else None
            if metrics and labels is not None:
                _count(metrics, tf.convert_to_tensor(labels), y_pred[each.output], each.shifted)
        return self.get_metrics_result()  # type: ignore[attr-defined]

    def _answers(self, out: Any) -> Any:
        """What a loss of the user's own is about: the outputs that it names, else the main one."""
        if not isinstance(out, Output):
            return out
        loss = self._compile_config.config["loss"]  # type: ignore[attr-defined]
        if isinstance(loss, Mapping):
            return {name: out[name] for name in loss}
        return out[self._scored[0].output] if self._scored else out[0]


def _count(metrics: Iterable[Any], labels: Any, made: Any, shifted: bool) -> None:
    """Update ``metrics`` with what the model ``made`` of ``labels``; those that are no class do not count."""
    if shifted:  # the labels move, not the logits: those are a large tensor, which would be copied
        nothing = tf.fill(dims(labels[..., :1]), tf.cast(IGNORED_LABELS[0], labels.dtype))
        labels = tf.concat((labels[..., 1:], nothing), axis=-1)
    weights = None
    if labels.dtype.is_integer:
        if labels.shape.rank == made.shape.rank and labels.shape[-1] == 1:
            labels = labels[..., 0]
        keep = (labels >= 0) & (labels < tf.cast(tf.shape(made)[-1], labels.dtype))
        labels, weights = tf.where(keep, labels, tf.zeros((), labels.dtype)), tf.cast(keep, tf.float32)
    for metric in metrics:
        if weights is None and isinstance(metric, keras.metrics.SparseCategoricalAccuracy):
            raise InputError(
                f"the metric {metric.name!r} counts classes, but labels has dtype {labels.dtype.name}; for several "
                "labels at once use keras.metrics.BinaryAccuracy(threshold=0.0)"
            )
        metric.update_state(labels, made, weights)


def _named(x: Any) -> dict[str, Any]:
    """The inputs by name; one that stands alone is the ids.

    Raises: InputError, for several without names.
    """
    if isinstance(x, Mapping):
        return dict(x)
    if isinstance(x, list | tuple):
        if len(x) != 1:
            raise InputError(
                f"got {len(x)} inputs without names, expected a dict: {{'input_ids': ids, 'attention_mask': mask}}"
            )
        x = x[0]
    return {"input_ids": x}
