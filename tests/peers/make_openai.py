"""What TensorFlow's Saver writes of a model with OpenAI's names, for tests that run without TensorFlow.

    pip install tensorflow && python tests/peers/make_openai.py        # writes openai/trained.zip

It is a folder as gpt-2-simple and its kin leave one: hparams.json, encoder.json, vocab.bpe, `counter`, and a checkpoint
model-3 after three steps of Adam, with the state of the optimizer in it. answers.npz has `ids`, and the `logits` that
TensorFlow computed. (The graph itself, model-3.meta, is left out: it is large, and nobody reads it.)
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

import openai_graph
from gpt2_core.vocabulary import gpt2_vocabulary
from openai_graph import tf, v1

HPARAMS = {"n_vocab": 259, "n_ctx": 8, "n_embd": 4, "n_head": 2, "n_layer": 2}
IDS = np.array([[72, 258, 0, 257, 130]])


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """The first two merges of GPT-2's, and all that a vocabulary needs."""
    whole = gpt2_vocabulary()
    tokens = [token for token, _ in sorted(whole.token_ids.items(), key=lambda item: item[1])][:258]
    return {token: number for number, token in enumerate([*tokens, "<|endoftext|>"])}, list(whole.merges())[:2]


def train(folder: Path) -> None:
    """Three steps, and what the model says then."""
    with tf.Graph().as_default(), openai_graph.session() as session:
        v1.set_random_seed(4)
        logits = openai_graph.model(HPARAMS, IDS)
        steps = v1.train.get_or_create_global_step()
        step = v1.train.AdamOptimizer(1e-2).minimize(openai_graph.loss(logits, IDS), global_step=steps)
        session.run(v1.global_variables_initializer())
        for _ in range(3):
            session.run(step)
        v1.train.Saver(save_relative_paths=True).save(
            session, str(folder / "model"), global_step=steps, write_meta_graph=False
        )
        np.savez_compressed(folder / "answers.npz", ids=IDS, logits=session.run(logits))


def main() -> None:
    ids, merges = vocabulary()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(folder)
        (folder / "hparams.json").write_text(json.dumps(HPARAMS, indent=2))
        (folder / "encoder.json").write_text(json.dumps(ids))
        (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (folder / "counter").write_text("3\n")
        with zipfile.ZipFile(Path(__file__).parent / "openai" / "trained.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.iterdir()):
                archive.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
