"""What Keras writes of the models of gpt2_tf, and what they compute, for tests that run without TensorFlow.

Runs where this project is installed with TensorFlow (the archives were made with Keras 3.15):

    python make_keras.py keras/            # the archives beside this file

One archive for each of CASES: the files as `model.save` or `model.save_weights` leaves them; config.json, where they
have no configuration themselves; and answers.npz, which holds the inputs as ``in.NAME``, what the model returned as
``out.NAME``, and its parameters as ``value.NAME``.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import gpt2_tf

CONFIG = {
    "vocab_size": 13,
    "n_positions": 8,
    "n_embd": 6,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 7,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "num_labels": 3,
}
#: Case: class, number format or policy, what differs in the configuration, and how it is saved.
CASES = {
    "none": ("TFGPT2Model", "float32", {}, "weights"),
    "lm": ("TFGPT2LMHeadModel", "float32", {}, "weights"),
    "lm-odd": (
        "TFGPT2LMHeadModel", "bfloat16", {"tie_word_embeddings": False, "pruned_heads": {1: [0]}}, "archive",
    ),
    "lm-untied": ("TFGPT2LMHeadModel", "float64", {"tie_word_embeddings": False}, "weights"),
    "double-trained": ("TFGPT2DoubleHeadsModel", "mixed_float16", {}, "trained"),
    "sequence": ("TFGPT2ForSequenceClassification", "float16", {}, "weights"),
    "token": ("TFGPT2ForTokenClassification", "float32", {}, "folder"),
    "qa-sharded": ("TFGPT2ForQuestionAnswering", "float32", {}, "shards"),
}  # fmt: skip


def build(case):
    name, dtype, changes, _ = CASES[case]
    model = getattr(gpt2_tf, name)(gpt2_tf.GPT2Config(**(CONFIG | changes)), dtype=dtype)
    chance = np.random.default_rng(len(case))
    for row in model.parameter_table():
        model.get_parameter(row.name).assign(chance.normal(0.1, 0.4, row.shape))
    return model


def inputs_for(model):
    shape = (2, 3, 6) if "Double" in type(model).__name__ else (3, 6)
    return np.random.default_rng(0).integers(1, model.config.vocab_size, shape)


def save(model, place, how):
    if how == "archive":
        model.save(place / "my.keras")
    elif how == "folder":
        model.save(str(place), zipped=False)
    elif how == "trained":
        ids = inputs_for(model)
        model.compile(keras.optimizers.AdamW(0.001), run_eagerly=True)
        model.fit({"input_ids": ids, "labels": ids, "mc_labels": np.array([0, 1])}, verbose=0)
        model.save(place / "model.keras")
    else:
        model.config.save_pretrained(place)
        if how == "weights":
            model.save_weights(place / "model.weights.h5")
        else:
            model.save_weights(place / "model.weights.json", max_shard_size=700 / 1024**3)


def answers_of(model):
    ids = inputs_for(model)
    out = model(ids)
    kinds = ("logits", "mc_logits", "start_logits", "end_logits", "last_hidden_state")
    there = set(out.keys())
    found = {f"out.{kind}": np.asarray(out[kind], np.float32) for kind in kinds if kind in there}
    for row in model.parameter_table():
        value = model.get_parameter(row.name)
        wide = np.float64 if value.dtype == "float64" else np.float32
        found[f"value.{row.name}"] = np.asarray(value.numpy()).astype(wide)
    return found | {"in.input_ids": ids}


def main(folder):
    for case, (_, _, _, how) in CASES.items():
        model = build(case)
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            save(model, place, how)
            stream = io.BytesIO()
            np.savez_compressed(stream, **answers_of(model))
            (place / "answers.npz").write_bytes(stream.getvalue())
            with zipfile.ZipFile(Path(folder, f"{case}.zip"), "w") as archive:
                for path in sorted(place.rglob("*")):
                    if path.is_file():
                        entry = zipfile.ZipInfo(path.relative_to(place).as_posix(), (2026, 1, 1, 0, 0, 0))
                        archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main(sys.argv[1])
