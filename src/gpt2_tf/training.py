"""The arithmetic of training in TensorFlow: what `gpt2_core.training` calls a backend, on one device or several.

    model = build_model(recipe, config)
    backend = Trainer(model, recipe)
    Training(recipe, backend, batches, Run(folder), steps=1000).train()

Under a strategy of tf.distribute (`processes` makes one) the replicas share the batch. The state is the same in all
cases: whole tensors by name, so a run goes on with another number of replicas.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from gpt2_core import muon
from gpt2_core.adapters import A, B, Lora, adapter_table, layers_of, merged
from gpt2_core.checkpoints.tensors import Tensor as FileTensor
from gpt2_core.config import GPT2Config
from gpt2_core.data_batches import IGNORED, Batch
from gpt2_core.errors import ConfigError, InputError
from gpt2_core.parameters import Head, Parameter
from gpt2_core.recipe import Recipe, frozen
from gpt2_core.training import Update
from gpt2_core.training_state import About, Groups
from gpt2_tf.adapters import attach, held_by
from gpt2_tf.chunked import chunked_loss, chunked_sum
from gpt2_tf.heads import TFGPT2DoubleHeadsModel, TFGPT2ForSequenceClassification, TFGPT2LMHeadModel, last_real
from gpt2_tf.layers import Tensor
from gpt2_tf.muon import step as muon_step
from gpt2_tf.weights import PreTrainedModel

CLASSES: Mapping[Head, type[PreTrainedModel]] = {
    Head.LM: TFGPT2LMHeadModel,
    Head.DOUBLE: TFGPT2DoubleHeadsModel,
    Head.SEQUENCE: TFGPT2ForSequenceClassification,
}
_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def build_model(recipe: Recipe, config: GPT2Config, place: str | None = None) -> PreTrainedModel:
    """The model that a recipe begins with, its weights in float32.

    ``config`` is the recipe's, with its changes made. Raises: as ``from_pretrained``.
    """
    cls = CLASSES[recipe.head]
    policy = _POLICIES[recipe.dtype]
    with tf.device(place):
        if recipe.from_scratch:
            return cls(config, seed=recipe.seed, dtype=policy)
        return cls.from_pretrained(recipe.model, config=config, dtype=policy, device=place, seed=recipe.seed)


class Objective:
    """The model and its loss on a batch, in one forward pass: what is differentiated and compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def call(self, inputs: Mapping[str, Tensor], weights: Tensor, training: bool = True) -> tuple[Tensor, Tensor]:
        """The sum of losses of tokens or classes, and of choices (or zero), times ``weights`` (2,)."""
        model: Any = self.model
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if model.head is Head.SEQUENCE:
            out = model(ids, attention_mask=mask, use_cache=False, training=training)
            return _cross_entropy(out.logits, inputs["labels"]) * weights[0], tf.zeros(())
        if model.head is Head.DOUBLE:
            ids = tf.reshape(ids, (-1, ids.shape[-1]))
            mask = None if mask is None else tf.reshape(mask, (-1, mask.shape[-1]))
        x = model.transformer(ids, attention_mask=mask, use_cache=False, training=training).last_hidden_state
        flat, targets = tf.reshape(x, (-1, x.shape[-1])), tf.reshape(inputs["targets"], (-1,))
        table = model.lm_head.weight.value
        if training:
            loss = chunked_loss(flat, table, targets, weights[0])
        else:
            loss = chunked_sum(flat, table, targets) * weights[0]
        if model.head is Head.LM:
            return loss, tf.zeros(())
        rows, choices = inputs["input_ids"].shape[:2]
        index = inputs.get("mc_token_ids")
        at = last_real(ids, mask, model.config.pad_token_id, x) if index is None else tf.reshape(index, (-1,))
        seed = tf.cast(model.transformer.seed_generator.next(), tf.int32) if training else None
        scores = tf.reshape(model.multiple_choice_head(x, at, seed), (rows, choices))
        return loss, _cross_entropy(scores, inputs["mc_labels"]) * weights[1]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)
    counts = labels != IGNORED
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(counts, labels, tf.zeros((), labels.dtype)), logits=wide
    )
    return tf.reduce_sum(each * tf.cast(counts, wide.dtype))


class Trainer:
    """One process of a run in TensorFlow: gradients, AdamW, EMA, and the state in and out.

    Raises: ConfigError, where the recipe freezes everything or nothing that there is, or wants what TensorFlow has not.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, *, rank: int = 0, world_size: int = 1) -> None:
        if recipe.parallel == "fsdp":
            raise ConfigError("parallel is 'fsdp', which TensorFlow does not have; set it to 'ddp', or use PyTorch")
        self.rank, self.world_size, self.recipe, self.model = rank, world_size, recipe, model
        lora = Lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets, recipe.lora_dropout)
        self._lora = lora if recipe.lora_rank else None
        self.about = About(model.config, type(model).__name__.removeprefix("TF"), self._lora, recipe.model)
        self._strategy: Any = tf.distribute.get_strategy()
        self._replicas = max(1, self._strategy.num_replicas_in_sync // world_size)
        self._table: dict[str, Parameter] = {row.name: row for row in model.parameter_table()}
        self._made = attach(model, lora, recipe.seed) if self._lora is not None else {}
        fixed = frozen(list(self._table), recipe.freeze)
        table = self._trained_table()
        self._names = [name for name in table if name not in fixed]
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self._variables = [self._variable(name) for name in self._names]
        self._decays = [table[name].decay for name in self._names]
        self._by_muon = [recipe.optimizer == "muon" and muon.is_for(table[name]) for name in self._names]
        kinds = list(zip(self._variables, self._by_muon, strict=True))
        self._moments = {
            "exp_avg": [self._like(variable) for variable in self._variables],
            "exp_avg_sq": [None if by_muon else self._like(variable) for variable, by_muon in kinds],
        }
        self._ema = [self._like(variable, variable) for variable in self._variables] if recipe.ema_decay else []
        self._held: Any = None
        held = held_by(model)
        drops = held is not None and held.lora.dropout
        self._adapter_seed = tf.Variable([0, 0], dtype=tf.int32, trainable=False) if drops else None
        objective = Objective(model)
        self._objective = objective
        compiled = True if recipe.compile else None
        alone = self._strategy.num_replicas_in_sync == 1
        self._of_gradients = tf.function(self._replica_gradients, jit_compile=compiled)
        self._of_losses = tf.function(self._replica_losses, jit_compile=compiled)
        self._of_sum = tf.function(lambda one, other: [left + right for left, right in zip(one, other, strict=True)])
        self._of_all = tf.function(_summed)
        self._of_norm = tf.function(self._replica_norm)
        # One pass over the numbers of a variable instead of one for each operation on them.
        self._of_update = tf.function(self._replica_update, jit_compile=True if alone else None)

    # -- building --------------------------------------------------------------------------------------------

    def _trained_table(self) -> dict[str, Parameter]:
        """The rows of what a state holds: the model's own, or the adapter's."""
        if self._lora is None:
            return self._table
        return {row.name: row for row in adapter_table(self.model.config, self.model.head, self._lora)}

    def _variable(self, name: str) -> Any:
        """TensorFlow's own variable of a parameter."""
        return self._made[name] if name in self._made else self.model.get_parameter(name)._value

    def _like(self, variable: Any, start: Any = None) -> Any:
        first = tf.zeros(variable.shape, tf.float32) if start is None else tf.cast(start, tf.float32)
        return tf.Variable(first, trainable=False)

    # -- a step ----------------------------------------------------------------------------------------------

    def gradients(self, batch: Batch, weights: tuple[float, float], seed: int, last: bool = True) -> Tensor:
        """Add the gradients of one micro-batch to those held; its weighted loss, on the device."""
        self._seed(seed)
        loss, found = self._strategy.run(
            self._of_gradients, args=(self._inputs(batch), tf.constant(weights, tf.float32))
        )
        self._held = found if self._held is None else self._strategy.run(self._of_sum, args=(self._held, found))
        return tf.add_n(self._strategy.experimental_local_results(loss))

    def _seed(self, seed: int) -> None:
        """A seed of its own for every replica of all processes: each keeps another number in the same variable."""
        first = self.rank * self._replicas
        for at, state in enumerate(self._copies(self.model.transformer.seed_generator.state.value)):
            state.assign([seed, first + at])
        if self._adapter_seed is not None:
            for at, state in enumerate(self._copies(self._adapter_seed)):
                state.assign([seed, first + at + 1])

    def _copies(self, variable: Any) -> Sequence[Any]:
        """The variable as each replica of this process has it."""
        copies: Sequence[Any] = self._strategy.experimental_local_results(variable)
        return copies

    def _inputs(self, batch: Batch) -> Any:
        """The batch as tensors, a part for each replica."""
        given = batch.inputs()
        if batch.targets is not None:
            given["targets"] = batch.targets
            given.pop("labels", None)
        if self._replicas == 1:
            return {name: tf.constant(value) for name, value in given.items()}
        rows = len(batch.input_ids)
        if rows % self._replicas:
            raise InputError(
                f"a micro-batch has {rows} rows, which {self._replicas} replicas cannot share evenly; set batch_size "
                f"to a multiple of {self._replicas * self.world_size}"
            )
        share = rows // self._replicas
        first = self.rank * self._replicas

        def part(context: Any) -> dict[str, Tensor]:
            at = (context.replica_id_in_sync_group - first) * share
            return {name: tf.constant(value[at : at + share]) for name, value in given.items()}

        return self._strategy.experimental_distribute_values_from_function(part)

    def _replica_gradients(self, inputs: Mapping[str, Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        held = held_by(self.model)
        if held is not None:
            held.seed = None if self._adapter_seed is None else tf.identity(self._adapter_seed)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self._variables)
            first, second = self._objective.call(inputs, weights)
            loss = first + second
        found = tape.gradient(loss, self._variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        if held is not None:
            held.seed = None
        return loss, [tf.convert_to_tensor(each) for each in found]

    def update(self, settings: Update) -> float:
        """One update of AdamW, or of Muon and AdamW, and the EMA; the global norm of the gradients before clipping."""
        found, self._held = self._held, None
        if self._strategy.num_replicas_in_sync > 1:
            found = self._strategy.run(self._of_all, args=(found,))
        norms = self._strategy.run(self._of_norm, args=(found,))
        norm = float(self._strategy.experimental_local_results(norms)[0]) / settings.scale
        if math.isfinite(norm):
            shrink = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
            self._strategy.run(self._of_update, args=(found, _numbers(settings, shrink)))
        return norm

    def _replica_norm(self, found: Sequence[Tensor]) -> Tensor:
        return tf.sqrt(tf.add_n([tf.reduce_sum(tf.square(tf.cast(each, tf.float32))) for each in found]))

    def _replica_update(self, found: Sequence[Tensor], numbers: Mapping[str, Tensor]) -> None:
        """AdamW as torch.optim.AdamW means it: decay apart from the gradient, epsilon outside of the square root."""
        for at, (variable, gradient) in enumerate(zip(self._variables, found, strict=True)):
            slope = tf.cast(gradient, tf.float32) * numbers["factor"]
            first, second = self._moments["exp_avg"][at], self._moments["exp_avg_sq"][at]
            value = variable * numbers["kept"] if self._decays[at] else tf.identity(variable)
            if second is None:
                way, m = muon_step(slope, first, numbers["momentum"])
                value -= numbers["lr"] * way
            else:
                m = first + (slope - first) * numbers["one_less_beta1"]
                v = second * numbers["beta2"] + slope * slope * numbers["one_less_beta2"]
                value -= numbers["rate"] * m / (tf.sqrt(v) * numbers["widen"] + numbers["eps"])
                _put(second, v)
            _put(first, m)
            _put(variable, value)
            if self._ema:
                _put(self._ema[at], self._ema[at] + (value - self._ema[at]) * numbers["one_less_ema"])

    def losses(self, batch: Batch) -> tuple[float, float]:
        """The sums of losses of a batch, without dropout, by the EMA if there is one."""
        with self._averaged():
            found = self._strategy.run(self._of_losses, args=(self._inputs(batch),))
        local = [self._strategy.experimental_local_results(each) for each in found]
        first, second = (float(sum(float(one) for one in each)) for each in local)
        return first, second

    def _replica_losses(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._objective.call(inputs, tf.ones((2,)), training=False)

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        share = tf.constant(numbers, tf.float64) / self._replicas
        together = self._strategy.run(self._of_all, args=([share],))
        return [float(each) for each in self._strategy.experimental_local_results(together[0])[0]]

    # -- the state -------------------------------------------------------------------------------------------

    def shapes(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """The names and shapes of each group of a state."""
        table = self._trained_table()
        trained = {name: table[name].shape for name in self._names}
        whole = {row.name: row.shape for row in table.values()}
        kinds = zip(self._names, self._by_muon, strict=True)
        of_adamw = {name: trained[name] for name, by_muon in kinds if not by_muon}
        out = {"model" if self._lora is None else "adapter": whole, "exp_avg": trained, "exp_avg_sq": of_adamw}
        return out | ({"ema": trained} if self._ema else {})

    def export(self) -> Groups:
        """The tensors of the state, float32, each fetched when asked for."""
        weights = {name: _to_file(self._variable(name)) for name in self._trained_table()}
        out = {"model" if self._lora is None else "adapter": weights}
        for group, variables in (*self._moments.items(), ("ema", self._ema)):
            if variables:
                held = zip(self._names, variables, strict=True)
                out[group] = {name: _to_file(each) for name, each in held if each is not None}
        return out

    def restore(self, groups: Groups, updates: int) -> None:
        """Take the tensors of a state, after so many updates: what the moments are corrected by."""
        for name, tensor in groups["model" if self._lora is None else "adapter"].items():
            _fill(self._variable(name), tensor)
        for group, variables in (*self._moments.items(), ("ema", self._ema)):
            for name, variable in zip(self._names, variables, strict=bool(variables)):
                if variable is not None:
                    _fill(variable, groups[group][name])

    def final(self) -> dict[str, FileTensor]:
        """The finished model's parameters by name: of the EMA if there is one, an adapter merged."""
        averaged = dict(zip(self._names, self._ema, strict=True)) if self._ema else {}
        out = {name: _to_file(averaged.get(name, self._variable(name))) for name in self._table}
        if self._lora is not None:
            for layer in layers_of(self._names):
                parts = [averaged.get(each, self._variable(each)) for each in (layer + A, layer + B)]
                out[f"{layer}.weight"] = _merged(self._variable(f"{layer}.weight"), parts, self._lora.scale)
        return out

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The EMA in the place of the weights."""
        if not self._ema:
            yield
            return
        now = [tf.identity(variable) for variable in self._variables]
        for variable, average in zip(self._variables, self._ema, strict=True):
            variable.assign(average)
        try:
            yield
        finally:
            for variable, value in zip(self._variables, now, strict=True):
                variable.assign(value)

    # -- beside training -------------------------------------------------------------------------------------

    def sample(self, ids: Sequence[int], count: int, seed: int) -> list[int]:
        """The ids with up to ``count`` more, drawn from the 40 likeliest; empty where replicas share the work."""
        if self._strategy.num_replicas_in_sync > 1 or not isinstance(self.model, TFGPT2LMHeadModel):
            return []
        room = self.model.config.n_positions - len(ids)
        with self._averaged():
            made = self.model.generate(
                [list(ids)], max_new_tokens=min(count, room), do_sample=True, top_k=40, seed=seed
            )
        return [int(each) for each in made[0]]

    def peak_flops(self, seconds: float = 0.5) -> float:
        """Multiplications and additions a second of this process's large products, measured."""
        size = 8192 if tf.config.list_logical_devices("GPU") else 1024
        kind = keras.DTypePolicy(_POLICIES[self.recipe.dtype]).compute_dtype
        left, right = (tf.cast(tf.random.normal((size, size)), kind) for _ in range(2))
        best, until = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            for _ in range(4):
                product = tf.matmul(left, right)
            product[0, 0].numpy()
            best = max(best, 8 * size**3 / (time.perf_counter() - began))
        return float(best * self._replicas)


def _numbers(settings: Update, shrink: float) -> dict[str, Tensor]:
    """What the update multiplies by, worked out in float64 and rounded once."""
    first, second = 1 - settings.beta1**settings.number, 1 - settings.beta2**settings.number
    numbers = {
        "factor": shrink / settings.scale,
        "one_less_beta1": 1 - settings.beta1,
        "beta2": settings.beta2,
        "one_less_beta2": 1 - settings.beta2,
        "kept": 1 - settings.lr * settings.weight_decay,
        "lr": settings.lr,
        "momentum": settings.momentum,
        "rate": settings.lr / first,
        "widen": 1 / math.sqrt(second),
        "eps": settings.eps,
        "one_less_ema": 1 - settings.ema_decay,
    }
    return {name: tf.constant(number, tf.float32) for name, number in numbers.items()}


def _put(variable: Any, value: Tensor) -> None:
    """Assign on this replica alone: every replica makes the same update of its own copy."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def _summed(found: Sequence[Tensor]) -> Any:
    # Inputs of a function have no device of their own, which is where several workers look for their part.
    here = [tf.identity(each) for each in found]
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)


def _to_file(variable: Any) -> FileTensor:
    def load() -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = np.ascontiguousarray(tf.cast(variable, tf.float32).numpy())
        return array

    return FileTensor("float32", tuple(variable.shape), load)


def _merged(kernel: Any, parts: Sequence[Any], scale: float) -> FileTensor:
    def load() -> np.ndarray[Any, Any]:
        arrays = [_to_file(each).raw() for each in (kernel, *parts)]
        return merged(arrays[0], arrays[1], arrays[2], scale)

    return FileTensor("float32", tuple(kernel.shape), load)


def _fill(variable: Any, saved: FileTensor) -> None:
    variable.assign(tf.cast(np.array(saved.array()), variable.dtype))
    saved.release()


# -- several processes ---------------------------------------------------------------------------------------

_ROLES = ("chief", "worker")


@contextlib.contextmanager
def processes(place: str | None = None) -> Iterator[tuple[int, int, str | None]]:
    """This process's number, how many there are, and its device: as TF_CONFIG says, else alone.

    With several, or with several GPUs, a strategy of tf.distribute is in force for as long as the block runs: models
    and trainers have to be made within.

    Raises: ConfigError, for a TF_CONFIG that cannot be read, or with other roles than chief and worker.
    """
    rank, world_size = _place_in_cluster(os.environ.get("TF_CONFIG") or "{}")
    if world_size > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        with strategy.scope():
            yield rank, world_size, place
    elif place is None and len(tf.config.list_logical_devices("GPU")) > 1:
        with tf.distribute.MirroredStrategy().scope():
            yield 0, 1, place
    else:
        yield 0, 1, place


def _place_in_cluster(text: str) -> tuple[int, int]:
    """This process's number and how many there are, as TF_CONFIG has it: a chief, where there is one, comes first.

    Source: MultiWorkerMirroredStrategy's own order, tensorflow/python/distribute/multi_worker_util.py, id_in_cluster.
    """
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster") or {}, config.get("task") or {}
        sizes = {str(role): len(addresses) for role, addresses in cluster.items()}
        role, index = str(task.get("type", "worker")), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError) as cause:
        raise ConfigError(
            f"TF_CONFIG cannot be read ({cause}), expected as "
            '{"cluster": {"worker": ["a:12345", "b:12345"]}, "task": {"type": "worker", "index": 0}}'
        ) from cause
    for other in (*sizes, role):
        if other not in _ROLES:
            raise ConfigError(
                f"TF_CONFIG has the role {other!r}, expected chief and worker alone: all processes train alike; leave "
                "those of another role out of the cluster"
            )
    if not sizes:
        return 0, 1
    if sizes.get("chief", 0) > 1:
        raise ConfigError(
            f"TF_CONFIG's cluster has {sizes['chief']} chiefs, expected one at most; name the others worker"
        )
    if not 0 <= index < sizes.get(role, 0):
        raise ConfigError(
            f"TF_CONFIG's task is {role} {index}, expected one of its cluster, which has {sizes.get(role, 0)} of them"
        )
    return (index + sizes.get("chief", 0) if role == "worker" else index), sum(sizes.values())
