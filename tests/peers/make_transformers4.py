"""What transformers 4's TensorFlow classes write and compute, for tests that run without them.

Runs in an environment of its own, which has transformers 4.57, tensorflow and tf-keras (and not this project):

    pip install "transformers==4.57.*" tensorflow tf-keras
    TF_USE_LEGACY_KERAS=1 python make_transformers4.py make transformers4/       # the archives beside this file
    TF_USE_LEGACY_KERAS=1 python make_transformers4.py answer jobs.json          # for tests/core/test_checkpoints_h5.py

`make` writes one archive for each of CASES: tf_model.h5 (or shards and their index), config.json, and answers.npz,
which holds inputs as ``in.NAME`` and what the model returned as ``out.NAME``. Weights come from a seed, far from
initial values, so that gains, biases and transposes all show.

`answer` loads folders that somebody else wrote. jobs.json is a list of {"folder", "class", "inputs" (an .npz),
"answers" (the .npz to write), "save" (a folder to save the loaded model into, or null), "shard" (the most bytes of a
shard, or null)}; beside each .npz of answers a .json says what from_pretrained did not find, did not know, or found
misshapen.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
import tf_keras
import transformers

transformers.logging.set_verbosity_error()

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
#: Case: class, the most bytes of a shard, and how the model is made where it is not made the usual way.
CASES = {
    "none": ("TFGPT2Model", None, ""),
    "lm": ("TFGPT2LMHeadModel", None, ""),
    "lm-sharded": ("TFGPT2LMHeadModel", 700, ""),
    "lm-unnamed": ("TFGPT2LMHeadModel", None, "built outside of its name scope, so that the model's name is missing"),
    "lm-nested": ("TFGPT2LMHeadModel", None, "a part of another Keras model, so that there are two names"),
    "double": ("TFGPT2DoubleHeadsModel", None, ""),
    "double-sharded": ("TFGPT2DoubleHeadsModel", 700, ""),
    "sequence": ("TFGPT2ForSequenceClassification", None, ""),
}


class Outer(tf_keras.Model):
    """A model of a user's own that has a GPT-2 in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, ids):
        return self.inner(ids).logits


def build(case):
    name, _, odd = CASES[case]
    model = getattr(transformers, name)(transformers.GPT2Config(**CONFIG))
    if case == "lm-nested":
        Outer(model)(tf.constant([[1, 2]]))
    elif odd:
        model.build()
    else:
        model.build_in_name_scope()
    chance = np.random.default_rng(len(case))
    model.set_weights([chance.normal(0.1, 0.4, weight.shape).astype(np.float32) for weight in model.weights])
    return model


def inputs_for(model, seed=0):
    """Inputs of every kind that the class takes; the last row is padded on the right."""
    chance = np.random.default_rng(seed)
    kind, vocab = type(model).__name__, model.config.vocab_size
    shape = (2, 3, 6) if "Double" in kind else (3, 6)
    ids = chance.integers(1, vocab, shape)
    given = {"input_ids": ids}
    if "Double" in kind:
        given["mc_token_ids"] = chance.integers(0, 6, shape[:2])
        return given
    mask = np.ones(shape, np.int64)
    if "Sequence" in kind:
        ids[1, 4:] = 0
        mask[1, 4:] = 0
        given["labels"] = np.array([2, 0, 1])
        return given | {"attention_mask": mask}
    given["token_type_ids"] = chance.integers(0, vocab, shape)
    if "LM" in kind:
        given["labels"] = np.where(ids % 3 == 0, -100, ids)
    return given


def answers_of(model, given):
    """All that the model returns for these inputs; for causal models also the last four tokens with a past."""
    feed = {name: tf.constant(value, tf.int32) for name, value in given.items()}
    more = {"output_attentions": True, "output_hidden_states": True, "use_cache": True, "return_dict": True}
    out = model(**feed, **more, training=False)
    found = {}
    for name, value in out.items():
        if name == "loss":
            found["loss"] = np.mean(value.numpy())  # their classifier gives one for each row
        elif isinstance(value, tuple | list):
            found |= {f"{name}.{index}": each.numpy() for index, each in enumerate(value)}
        else:
            found[name] = value.numpy()
    if "token_type_ids" in given:
        first, rest = ({name: feed[name][:, part] for name in ("input_ids", "token_type_ids")} for part in HALVES)
        past = model(**first, use_cache=True, return_dict=True).past_key_values
        found["continued"] = model(**rest, past_key_values=past, return_dict=True)[0].numpy()
    return found


HALVES = (slice(None, 2), slice(2, None))


def pack(given, found):
    named = {f"in.{name}": value for name, value in given.items()} | {f"out.{name}": v for name, v in found.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **named)
    return content.getvalue()


def make(target):
    target.mkdir(parents=True, exist_ok=True)
    for case, (_, shard, _) in CASES.items():
        model = build(case)
        given = inputs_for(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, safe_serialization=False, max_shard_size=shard or "10GB")
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        files.pop("generation_config.json", None)
        files["answers.npz"] = pack(given, answers_of(model, given))
        with zipfile.ZipFile(target / f"{case}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)


def answer(jobs):
    for job in json.loads(jobs.read_text()):
        cls = getattr(transformers, job["class"])
        model, report = cls.from_pretrained(job["folder"], output_loading_info=True)
        with np.load(job["inputs"]) as given:
            np.savez(job["answers"], **answers_of(model, dict(given)))
        said = {name: sorted(map(str, keys)) for name, keys in report.items()}
        if (Path(job["folder"]) / "tf_model.h5").exists():
            again = cls(model.config)
            again.build_in_name_scope()
            again.load_weights(Path(job["folder"]) / "tf_model.h5")  # by order, not by name
            pairs = zip(model.get_weights(), again.get_weights(), strict=True)
            said["load_weights_differs"] = [] if all(np.array_equal(*pair) for pair in pairs) else ["yes"]
        Path(job["answers"]).with_suffix(".json").write_text(json.dumps(said))
        if job["save"]:
            model.save_pretrained(job["save"], safe_serialization=False, max_shard_size=job["shard"] or "10GB")


if __name__ == "__main__":
    {"make": make, "answer": answer}[sys.argv[1]](Path(sys.argv[2]))
