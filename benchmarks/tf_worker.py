"""One contestant of benchmarks/tf_models.py, in its own Python: reads a task a line, answers with seconds.

    python tf_worker.py CONTESTANT FOLDER

The peers' packages need other versions of Keras than ours, so each has an environment and a process of its own. This
file therefore imports nothing of the project but what its contestant is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
CONTESTANT, FOLDER = sys.argv[1:3]
if CONTESTANT == "transformers 4":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np  # noqa: E402

VOCABULARY, FORWARD, TRAIN = 50257, 512, 256
_random = np.random.default_rng(0)


class Ours:
    """gpt2_tf, from safetensors."""

    def __init__(self) -> None:
        import gpt2_tf

        self.model = gpt2_tf.TFGPT2LMHeadModel.from_pretrained(FOLDER)

    def forward(self, ids: Any) -> Any:
        return self.model(ids, use_cache=False).logits

    def loss(self, ids: Any) -> Any:
        return self.model(ids, labels=ids, use_cache=False, training=True).loss

    def optimizer(self) -> Any:
        import keras

        return keras.optimizers.AdamW(1e-5)


class Transformers4:
    """transformers 4's TensorFlow classes with tf-keras, from tf_model.h5 as they wrote it."""

    def __init__(self) -> None:
        from transformers import TFGPT2LMHeadModel

        self.model = TFGPT2LMHeadModel.from_pretrained(FOLDER)

    @staticmethod
    def prepare() -> None:
        from transformers import GPT2Config, TFGPT2LMHeadModel

        model = TFGPT2LMHeadModel(GPT2Config())
        model(np.zeros((1, 2), np.int32))
        model.save_pretrained(FOLDER)

    def forward(self, ids: Any) -> Any:
        return self.model(ids, use_cache=False).logits

    def loss(self, ids: Any) -> Any:
        import tensorflow as tf

        return tf.reduce_mean(self.model(ids, labels=ids, use_cache=False, training=True).loss)

    def optimizer(self) -> Any:
        import tf_keras

        return tf_keras.optimizers.AdamW(1e-5)


class KerasHub:
    """KerasHub's GPT2CausalLM, from a preset folder as it saved it."""

    def __init__(self) -> None:
        import keras_hub

        self.model = keras_hub.models.GPT2CausalLM.from_preset(FOLDER, preprocessor=None)

    @staticmethod
    def prepare() -> None:
        import keras_hub

        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=VOCABULARY, num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072,
            max_sequence_length=1024,
        )  # fmt: skip
        keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None).save_to_preset(FOLDER)

    def _inputs(self, ids: Any) -> Any:
        import tensorflow as tf

        return {"token_ids": ids, "padding_mask": tf.ones_like(ids)}

    def forward(self, ids: Any) -> Any:
        return self.model(self._inputs(ids))

    def loss(self, ids: Any) -> Any:
        import tensorflow as tf

        logits = self.model(self._inputs(ids), training=True)
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=ids[:, 1:], logits=logits[:, :-1])
        return tf.reduce_mean(each)

    def optimizer(self) -> Any:
        import keras

        return keras.optimizers.AdamW(1e-5)


CONTESTANTS = {"gpt2_tf": Ours, "transformers 4": Transformers4, "KerasHub": KerasHub}


def main() -> None:
    kind = CONTESTANTS[CONTESTANT]
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what the packages print goes elsewhere
    os.dup2(2, 1)
    if sys.argv[3:] == ["prepare"]:
        kind.prepare()
        return
    if sys.argv[3:] == ["load"]:
        kind()
        return
    contestant = kind()
    import tensorflow as tf

    text = tf.constant(_random.integers(0, VOCABULARY, (1, FORWARD)), tf.int32)
    batch = tf.constant(_random.integers(0, VOCABULARY, (1, TRAIN)), tf.int32)
    made: dict[str, Any] = {}

    def forward(mode: str) -> Any:
        run = contestant.forward
        return run if mode == "eager" else tf.function(run, jit_compile=mode == "XLA")

    def train(mode: str) -> Any:
        optimizer = contestant.optimizer()
        variables = contestant.model.trainable_variables
        optimizer.build(variables)

        def step(ids: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = contestant.loss(ids)
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
            return loss

        return step if mode == "eager" else tf.function(step, jit_compile=mode == "XLA")

    for line in sys.stdin:
        task = json.loads(line)
        kind_of, mode = task["task"], task["mode"]
        if kind_of == "forget":
            made.clear()
            answers.write("0\n")
            continue
        key = f"{kind_of} {mode}"
        try:
            if key not in made:
                made[key] = {"forward": forward, "train": train}[kind_of](mode)
            began = time.perf_counter()
            result = made[key]({"forward": text, "train": batch}[kind_of])
            result.numpy()
            answers.write(f"{time.perf_counter() - began}\n")
        except Exception as error:  # whatever a peer cannot do is an answer
            answers.write(json.dumps(str(error).splitlines()[0][:200]) + "\n")


if __name__ == "__main__":
    main()
