"""OpenAI's GPT-2 as a graph of TensorFlow 1, made again from its specification; for tests, and for tests/peers.

The names of variables are what counts: with them a Saver reads the released checkpoints. The specification is
openai/gpt-2, src/model.py: blocks h0, h1, ... with ln_1, attn (c_attn, c_proj), ln_2, mlp (c_fc, c_proj), then ln_f; a
dense layer is a convolution of width one, whose kernel has the shape (1, in, out); the head is the token table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
Hyperparameters = Mapping[str, int]


def variable(name: str, shape: list[int], dtype: Any = tf.float32) -> Any:
    return v1.get_variable(name, shape, dtype, v1.random_normal_initializer(mean=0.1, stddev=0.4))


def dense(x: Any, name: str, width: int) -> Any:
    with v1.variable_scope(name):
        w = variable("w", [1, int(x.shape[-1]), width])
        return x @ w[0] + variable("b", [width])


def normalized(x: Any, name: str) -> Any:
    with v1.variable_scope(name):
        g, b = variable("g", [int(x.shape[-1])]), variable("b", [int(x.shape[-1])])
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * g + b


def attention(x: Any, n_head: int) -> Any:
    rows, length, width = (int(size) for size in x.shape)
    with v1.variable_scope("attn"):
        parts = tf.split(dense(x, "c_attn", 3 * width), 3, axis=-1)
        q, k, v = (tf.transpose(tf.reshape(p, [rows, length, n_head, -1]), [0, 2, 1, 3]) for p in parts)
        scores = tf.matmul(q, k, transpose_b=True) / math.sqrt(width // n_head)
        seen = tf.constant(np.tri(length), scores.dtype)
        mixed = tf.nn.softmax(scores * seen - 1e10 * (1 - seen)) @ v
        return dense(tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [rows, length, width]), "c_proj", width)


def mlp(x: Any) -> Any:
    width = int(x.shape[-1])
    with v1.variable_scope("mlp"):
        h = dense(x, "c_fc", 4 * width)
        h = 0.5 * h * (1 + tf.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        return dense(h, "c_proj", width)


def model(hparams: Hyperparameters, ids: np.ndarray) -> Any:
    """The logits for `ids` (rows, length), as a node of the graph; variables are made on the way."""
    with v1.variable_scope("model"):
        wpe = variable("wpe", [hparams["n_ctx"], hparams["n_embd"]])
        wte = variable("wte", [hparams["n_vocab"], hparams["n_embd"]])
        x = tf.gather(wte, ids) + wpe[: ids.shape[1]]
        for layer in range(hparams["n_layer"]):
            with v1.variable_scope(f"h{layer}"):
                x = x + attention(normalized(x, "ln_1"), hparams["n_head"])
                x = x + mlp(normalized(x, "ln_2"))
        return tf.einsum("btc,vc->btv", normalized(x, "ln_f"), wte)


def loss(logits: Any, ids: np.ndarray) -> Any:
    """What training makes small: the next token's surprise."""
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=ids[:, 1:], logits=logits[:, :-1])
    return tf.reduce_mean(each)


def session() -> Any:
    """A session with one thread."""
    return v1.Session(config=v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1))
