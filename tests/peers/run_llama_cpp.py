"""What llama.cpp makes of GGUF files, for tests/core/test_checkpoints_gguf.py.

Runs in an environment of its own, which has llama-cpp-python and numpy (and not this project):

    pip install llama-cpp-python
    python run_llama_cpp.py jobs.json

jobs.json is a list of {"model": a .gguf file, "texts": [...], "ids": [[...], ...], "prompts": [[...], ...], "count":
the tokens to generate, "answers": the .npz to write}. The answers: `tokens.N`, the ids of text N with special tokens
recognised; `plain.N`, with special tokens read as text; `bytes.N`, those of tokens.N put back together; `logits.N`, of
ids N; `greedy.N`, the likeliest continuation of prompt N; `roles`, the ids of bos and eos and whether bos is put before
texts. Everything is computed with float32 keys and values, without flash attention, on one thread.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def answer(job: dict) -> dict[str, np.ndarray]:
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=0,  # as the model says
        n_batch=64,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    found = {"roles": np.array([model.token_bos(), model.token_eos(), llama_cpp.llama_vocab_get_add_bos(vocab(model))])}
    for number, text in enumerate(job.get("texts", [])):
        tokens = model.tokenize(text.encode(), add_bos=False, special=True)
        found[f"tokens.{number}"] = np.array(tokens, np.int64)
        found[f"plain.{number}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=False), np.int64)
        found[f"bytes.{number}"] = np.frombuffer(model.detokenize(tokens, special=True), np.uint8)
    for number, ids in enumerate(job.get("ids", [])):
        found[f"logits.{number}"] = logits(model, ids)
    for number, prompt in enumerate(job.get("prompts", [])):
        ids = list(prompt)
        for _ in range(job["count"]):
            ids.append(int(logits(model, ids)[-1].argmax()))
        found[f"greedy.{number}"] = np.array(ids[len(prompt) :], np.int64)
    return found


def logits(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)], np.float32)


def vocab(model: llama_cpp.Llama) -> object:
    return llama_cpp.llama_model_get_vocab(model._model.model)


for each in json.loads(Path(sys.argv[1]).read_text()):
    np.savez(each["answers"], **answer(each))
