"""What CTranslate2's converter writes and its program computes, for tests that run without it.

Runs in an environment of its own, which has ctranslate2, transformers and torch (and not this project):

    pip install ctranslate2 transformers torch
    python make_ctranslate2.py make ctranslate2/          # the archives beside this file
    python make_ctranslate2.py answer jobs.json           # for tests/core/test_checkpoints_ctranslate2.py

`make` writes one archive for each of CASES: what the converter made of one small model in that quantization, with
answers.npz: the ids, and the logits that CTranslate2 computed in float32. `answer` takes a list of {"folder", "ids",
"answers"}: a folder that somebody else wrote, ids for it as .npy, and where to put the logits.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import ctranslate2
import numpy as np

CASES = {"plain": None, "int8": "int8", "int16": "int16", "float16": "float16"}
CONFIG = {"vocab_size": 257, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12}


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    generator = ctranslate2.Generator(str(folder), compute_type="float32")
    return np.array(generator.forward_batch(ids.tolist()))


def make(out: Path) -> None:
    import torch
    import transformers
    from ctranslate2.converters import TransformersConverter

    torch.manual_seed(0)
    config = transformers.GPT2Config(**CONFIG, bos_token_id=256, eos_token_id=256, activation_function="gelu")
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.4)
    ids = np.random.default_rng(0).integers(0, 257, (2, 8))
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model.save_pretrained(root / "hub")
        letters = [chr(index) for index in range(256, 512)]
        (root / "hub" / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate([*letters, "<|endoftext|>"])}))
        (root / "hub" / "merges.txt").write_text("#version: 0.2\n")
        transformers.GPT2Tokenizer.from_pretrained(root / "hub").save_pretrained(root / "hub")
        for case, quantization in CASES.items():
            TransformersConverter(str(root / "hub")).convert(str(root / case), quantization=quantization)
            np.savez(root / case / "answers.npz", ids=ids, logits=logits(root / case, ids))
            with zipfile.ZipFile(out / f"{case}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
                for file in sorted((root / case).iterdir()):
                    archive.writestr(zipfile.ZipInfo(file.name, (2026, 1, 1, 0, 0, 0)), file.read_bytes())


def answer(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        np.save(job["answers"], logits(Path(job["folder"]), np.load(job["ids"])))


if __name__ == "__main__":
    {"make": make, "answer": answer}[sys.argv[1]](Path(sys.argv[2]))
