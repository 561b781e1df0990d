"""The table of parameters: every name, shape, initial distribution and decay rule, derived from a config.

Building, loading, converting, initialising, decay groups and counting all walk this table; nothing else in the
project writes a parameter's name or computes its shape.

Layouts are the released ones. The four kernels of a block (``c_attn``, ``c_proj``, ``c_fc``, ``c_proj``) are
``(in, out)``; the linear layers of heads (``lm_head``, ``summary``, ``score``, ``classifier``, ``qa_outputs``) are
``(out, in)``, as the checkpoints of the field store them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from gpt2_core.config import GPT2Config
from gpt2_core.errors import ConfigError, nearest

PREFIX = "transformer."


class Head(str, Enum):
    """What stands on top of the transformer."""

    NONE = "none"
    LM = "lm"
    DOUBLE = "double"
    SEQUENCE = "sequence"
    TOKEN = "token"
    QA = "qa"

    @classmethod
    def _missing_(cls, value: object) -> Head:
        known = [head.value for head in cls]
        raise ConfigError(f"head is {value!r}, expected one of {', '.join(known)}{nearest(str(value), known)}")


@dataclass(frozen=True)
class Parameter:
    """One row: ``init`` is "normal" (mean 0, standard deviation ``std``), "zeros" or "ones"."""

    name: str
    shape: tuple[int, ...]
    init: str
    std: float
    decay: bool

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def parameter_table(config: GPT2Config, head: Head | str = Head.LM) -> tuple[Parameter, ...]:
    """Every parameter of a model, in the order of the forward pass.

    A tied language-model head is no parameter of its own and has no row. ``Head.NONE`` gives the bare
    transformer, whose names carry no ``transformer.`` prefix, as in the released files.

    Initial values: weights are normal with ``initializer_range``, those that project back into the residual
    stream scaled by 1/sqrt(2 * n_layer) (Radford et al. 2019, section 2.3: N residual layers, two a block).
    Weight decay falls on all weights but not on biases and gains (Radford et al. 2018, section 4.1).
    """
    head = Head(head)
    body = _body(config)
    if head is Head.NONE:
        return body
    prefixed = tuple(Parameter(PREFIX + row.name, row.shape, row.init, row.std, row.decay) for row in body)
    return prefixed + _head(config, head)


def count_parameters(config: GPT2Config, head: Head | str = Head.LM) -> int:
    """How many numbers the model holds; a tied head counts once."""
    return sum(row.size for row in parameter_table(config, head))


def _body(config: GPT2Config) -> tuple[Parameter, ...]:
    std = config.initializer_range
    residual_std = std / math.sqrt(2 * config.n_layer)
    width, inner = config.n_embd, config.inner_dim

    def weight(name: str, shape: tuple[int, ...], std: float = std) -> Parameter:
        return Parameter(name, shape, "normal", std, True)

    def bias(name: str, size: int) -> Parameter:
        return Parameter(name, (size,), "zeros", 0.0, False)

    def norm(name: str) -> list[Parameter]:
        return [Parameter(f"{name}.weight", (width,), "ones", 0.0, False), bias(f"{name}.bias", width)]

    rows = [
        weight("wte.weight", (config.vocab_size, width)),
        weight("wpe.weight", (config.n_positions, width)),
    ]
    for layer in range(config.n_layer):
        h = f"h.{layer}"
        attended = config.heads_of(layer) * config.head_dim
        rows += norm(f"{h}.ln_1")
        rows += [
            weight(f"{h}.attn.c_attn.weight", (width, 3 * attended)),
            bias(f"{h}.attn.c_attn.bias", 3 * attended),
        ]
        rows += [
            weight(f"{h}.attn.c_proj.weight", (attended, width), residual_std),
            bias(f"{h}.attn.c_proj.bias", width),
        ]
        rows += norm(f"{h}.ln_2")
        rows += [weight(f"{h}.mlp.c_fc.weight", (width, inner)), bias(f"{h}.mlp.c_fc.bias", inner)]
        rows += [
            weight(f"{h}.mlp.c_proj.weight", (inner, width), residual_std),
            bias(f"{h}.mlp.c_proj.bias", width),
        ]
    return (*rows, *norm("ln_f"))


def summary_width(config: GPT2Config) -> int:
    """How many numbers the multiple-choice summary gives per choice."""
    if not config.summary_use_proj:
        return config.n_embd
    # One score a choice: the double-heads model reads the summary as a single logit.
    return 1 if config.summary_proj_to_labels else config.n_embd


def _head(config: GPT2Config, head: Head) -> tuple[Parameter, ...]:
    std, width = config.initializer_range, config.n_embd

    def linear(name: str, out: int, bias: bool = True) -> list[Parameter]:
        rows = [Parameter(f"{name}.weight", (out, width), "normal", std, True)]
        return [*rows, Parameter(f"{name}.bias", (out,), "zeros", 0.0, False)] if bias else rows

    lm = [] if config.tie_word_embeddings else linear("lm_head", config.vocab_size, bias=False)
    if head is Head.LM:
        return tuple(lm)
    if head is Head.DOUBLE:
        if summary_width(config) != 1:
            raise ConfigError(
                "the double-heads model needs one score per choice, but summary_use_proj="
                f"{config.summary_use_proj} and summary_proj_to_labels={config.summary_proj_to_labels} give "
                f"{summary_width(config)} numbers; set both to true"
            )
        return (*lm, *linear("multiple_choice_head.summary", 1))
    if head is Head.SEQUENCE:
        return tuple(linear("score", config.num_labels, bias=False))
    if head is Head.TOKEN:
        return tuple(linear("classifier", config.num_labels))
    return tuple(linear("qa_outputs", 2))
