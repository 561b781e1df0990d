"""One contestant of benchmarks/train.py, in its own Python: trains GPT-2 from random weights, answers with seconds.

    python train_worker.py CONTESTANT ROWS TOKENS STEPS THREADS

The peers' packages need other versions than ours, so each has an environment and a process of its own. No dropout, no
accumulation, AdamW with clipping where the contestant's own loop clips.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTESTANT, ROWS, TOKENS, STEPS, THREADS = sys.argv[1], *map(int, sys.argv[2:6])
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if THREADS:
    os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(THREADS)
if CONTESTANT == "transformers 4, TensorFlow":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np  # noqa: E402

VOCABULARY = 50257
_random = np.random.default_rng(0)


def rows() -> Any:
    return _random.integers(0, VOCABULARY, (ROWS, TOKENS + 1))


def ours(framework: str) -> Callable[[], Any]:
    """The backend of `gpt2 train`, as its loop calls it."""
    import importlib

    from gpt2_core.config import GPT2Config
    from gpt2_core.data_batches import Batch
    from gpt2_core.recipe import Recipe
    from gpt2_core.training import Update

    module = importlib.import_module(f"gpt2_{framework}.training")
    recipe = Recipe(model="gpt2", from_scratch=True, dropout=0.0, batch_size=ROWS)
    config = GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    trainer = module.Trainer(module.build_model(recipe, config), recipe)
    count = iter(range(1, 10**6))

    def step() -> float:
        ids = rows()
        loss = trainer.gradients(Batch(ids[:, :-1], ids[:, :-1], ids[:, 1:]), (1 / (ROWS * TOKENS), 1.0), 0, True)
        trainer.update(Update(next(count), 6e-4, 0.9, 0.95, 1e-8, 0.1, 1.0, 1.0, 0.0))
        return float(loss)

    return step


def plain_pytorch() -> Callable[[], Any]:
    """GPT-2 as nanoGPT is described: nn.Linear, the fused attention, all logits at once, AdamW, clipping at 1."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:
            B, T, C = x.shape
            q, k, v = (part.view(B, T, 12, 64).transpose(1, 2) for part in self.qkv(self.one(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(B, T, C))
            return x + self.down(F.gelu(self.up(self.two(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(VOCABULARY, 768), nn.Embedding(1024, 768)
            self.layers, self.norm = nn.ModuleList(Layer(768) for _ in range(12)), nn.LayerNorm(768)
            self.head = nn.Linear(768, VOCABULARY, bias=False)
            self.head.weight = self.wte.weight
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, ids: Any, targets: Any) -> Any:
            x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
            for layer in self.layers:
                x = layer(x)
            return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    model = Model()
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))

    def step() -> float:
        ids = torch.from_numpy(rows())
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def transformers_pytorch() -> Callable[[], Any]:
    """transformers' model in the loop that its documentation shows."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1)

    def step() -> float:
        ids = torch.from_numpy(rows()[:, :-1])
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def keras_hub() -> Callable[[], Any]:
    """KerasHub's GPT2CausalLM, a step of its fit."""
    import keras
    import keras_hub as hub

    backbone = hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY, num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072, dropout=0.0,
        max_sequence_length=1024,
    )  # fmt: skip
    model = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        keras.optimizers.AdamW(6e-4, weight_decay=0.1, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def step() -> float:
        ids = rows()
        x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
        return float(model.train_on_batch(x, ids[:, 1:], return_dict=True)["loss"])

    return step


def transformers_tensorflow() -> Callable[[], Any]:
    """transformers 4's TensorFlow model, a compiled step of its own loss."""
    import tensorflow as tf
    import tf_keras
    from transformers import GPT2Config, TFGPT2LMHeadModel

    model = TFGPT2LMHeadModel(GPT2Config(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    model(np.zeros((1, 2), np.int32))
    optimizer = tf_keras.optimizers.AdamW(6e-4, weight_decay=0.1, global_clipnorm=1.0)
    variables = model.trainable_variables
    optimizer.build(variables)

    @tf.function
    def train(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(ids, labels=ids, use_cache=False, training=True).loss)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return lambda: float(train(tf.constant(rows()[:, :-1])))


CONTESTANTS: dict[str, Callable[[], Callable[[], Any]]] = {
    "gpt2_pt": lambda: ours("pt"),
    "plain PyTorch, as nanoGPT": plain_pytorch,
    "transformers, PyTorch": transformers_pytorch,
    "gpt2_tf": lambda: ours("tf"),
    "KerasHub, fit": keras_hub,
    "transformers 4, TensorFlow": transformers_tensorflow,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what the packages print goes elsewhere
    os.dup2(2, 1)
    if THREADS and ("PyTorch" in CONTESTANT or CONTESTANT == "gpt2_pt"):
        import torch

        torch.set_num_threads(THREADS)
    step = CONTESTANTS[CONTESTANT]()
    seconds, processor, losses = [], [], []
    for _ in range(STEPS + 1):  # the first makes graphs, buffers and moments ready
        began, used = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    peak = int(found.group(1)) / 1000 if found else 0.0
    answers.write(
        json.dumps({"seconds": seconds[1:], "processor": processor[1:], "losses": losses, "peak_mb": peak}) + "\n"
    )


if __name__ == "__main__":
    main()
