"""What KerasHub writes and computes, for tests that run without it.

Runs in an environment of its own, which has keras-hub 0.32 and tensorflow (and not this project):

    pip install keras-hub==0.32.0 tensorflow
    python make_keras_hub.py make keras_hub/            # the archives beside this file
    python make_keras_hub.py answer jobs.json           # for tests/core/test_checkpoints_kerashub.py

`make` writes one archive for each of CASES: the folder of a preset as `save_to_preset` leaves it, and answers.npz,
which holds inputs as ``in.NAME`` and what the model returned as ``out.NAME``. Weights come from a seed, far from
initial values, so that gains, biases and layouts all show.

`answer` loads presets that somebody else wrote. jobs.json is a list of {"preset", "inputs" (an .npz with token_ids and
padding_mask), "answers" (the .npz to write), "save" (a folder to save the loaded model into, or null), "shard" (the
most bytes of a file, or null), "texts" (to be made ids of, and back)}.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import numpy as np

CONFIG = {
    "vocabulary_size": 270,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 6,
    "intermediate_dim": 7,
    "dropout": 0.2,
    "max_sequence_length": 8,
}
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "r e"]
#: Case: the number format, whether it is a language model with a tokenizer, and the most bytes of a file.
CASES = {
    "lm": ("float32", True, None),
    "lm-sharded": ("float32", True, 7000),
    "backbone-bfloat16": ("bfloat16", False, None),
    "backbone-mixed": ("mixed_bfloat16", False, None),
}
GIGABYTE = 1024**3


def vocabulary():
    """The 256 bytes as vocabularies write them, what merges make, the end, and a token that is never split."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    names += [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>", "<user>"]
    return {name: index for index, name in enumerate(names)}


def build(case):
    dtype, is_task, _ = CASES[case]
    backbone = keras_hub.models.GPT2Backbone(**CONFIG, dtype=dtype)
    chance = np.random.default_rng(len(case))
    for variable in backbone.weights:
        variable.assign(chance.normal(0.1, 0.4, variable.shape))
    if not is_task:
        return backbone
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary(), MERGES, unsplittable_tokens=["<|endoftext|>", "<user>"])
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


def inputs():
    """Ids, and a last row that is padded on the right."""
    ids = np.random.default_rng(0).integers(0, CONFIG["vocabulary_size"], (3, 6))
    mask = np.ones((3, 6), np.int64)
    mask[2, 4:] = 0
    return {"token_ids": ids, "padding_mask": mask}


def answers_of(model, given):
    feed = {name: keras.ops.convert_to_tensor(value, "int32") for name, value in given.items()}
    backbone = getattr(model, "backbone", model)
    hidden = backbone(feed)
    logits = backbone.token_embedding(hidden, reverse=True)
    return {name: np.asarray(value, np.float32) for name, value in (("hidden", hidden), ("logits", logits))}


def save(model, folder, most):
    model.save_to_preset(folder, **({} if most is None else {"max_shard_size": most / GIGABYTE}))


def make(folder):
    for case, (_, _, most) in CASES.items():
        model = build(case)
        given = inputs()
        found = {f"in.{name}": value for name, value in given.items()}
        answers = answers_of(model, given)
        found |= {"out.hidden": answers["hidden"], "out.last_logits": answers["logits"][:, -1]}
        with tempfile.TemporaryDirectory() as place:
            save(model, place, most)
            stream = io.BytesIO()
            np.savez_compressed(stream, **found)
            Path(place, "answers.npz").write_bytes(stream.getvalue())
            with zipfile.ZipFile(Path(folder, f"{case}.zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for path in sorted(Path(place).rglob("*")):
                    if path.is_file():
                        name = zipfile.ZipInfo(path.relative_to(place).as_posix(), (2026, 1, 1, 0, 0, 0))
                        archive.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


def answer(jobs):
    for job in json.loads(Path(jobs).read_text()):
        folder = job["preset"]
        with np.load(job["inputs"]) as file:
            given = dict(file)
        backbone = keras_hub.models.GPT2Backbone.from_preset(folder)
        found = {f"backbone.{name}": value for name, value in answers_of(backbone, given).items()}
        has_task = Path(folder, "task.json").exists()
        task = keras_hub.models.GPT2CausalLM.from_preset(folder, **({} if has_task else {"preprocessor": None}))
        task_logits = task({name: keras.ops.convert_to_tensor(value, "int32") for name, value in given.items()})
        found["task.logits"] = np.asarray(task_logits, np.float32)
        texts = job.get("texts", [])
        if texts:
            tokenizer = task.preprocessor.tokenizer
            for number, text in enumerate(texts):
                ids = np.asarray(tokenizer(text))
                found[f"ids.{number}"] = ids
                found[f"text.{number}"] = np.frombuffer(str(tokenizer.detokenize(ids)).encode(), np.uint8)
            found["roles"] = np.array([tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id])
            task.compile(sampler="greedy")
            found["generated"] = np.frombuffer(task.generate(texts[0], max_length=8).encode(), np.uint8)
        np.savez(job["answers"], **found)
        if job.get("save"):
            save(task if has_task else backbone, job["save"], job.get("shard"))


if __name__ == "__main__":
    {"make": make, "answer": answer}[sys.argv[1]](sys.argv[2])
