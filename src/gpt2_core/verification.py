"""Whether two sets of tensors are the same model: bit by bit, and by what they compute on a fixed text.

Both hold one tensor at a time in memory, and of the two tables a piece, so that a model of any size can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core import reference_heads
from gpt2_core.checkpoints.naming import PREFIX
from gpt2_core.checkpoints.tensors import STORAGE, Tensor, even_pieces, widen_bfloat16
from gpt2_core.config import GPT2Config
from gpt2_core.errors import VerificationError
from gpt2_core.outputs import BaseOutput
from gpt2_core.parameters import Head
from gpt2_core.reference import block, layer_norm, visible

Array = NDArray[np.float64]
Progress = Callable[[int], None]

#: "The quick brown fox jumps over the lazy dog. In 1969, 400 thousand people watched it." in GPT-2's own vocabulary:
#: what both sides read. A smaller vocabulary takes each id modulo its size.
FIXED_IDS: Sequence[int] = (
    464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13, 554, 16450, 11, 7337, 7319, 661, 7342, 340, 13,
)  # fmt: skip
_ROWS = 4096  # of the token table at a time
#: Two float64 sums of the same numbers in another order differ by less, relative to their size.
SAME = 1e-9


@dataclass(frozen=True)
class Verification:
    """What was found: `kind` is "tensors" or "logits".

    `not_finite`: names of tensors that hold NaN or infinite numbers, as in the source, and how many of each.
    `difference`: the largest difference of any output, in float64, and `scale`, the largest output; None for "tensors".
    `agreement`: the share of positions at which both sides rank the same token first, for language models.
    """

    kind: str
    tensors: int
    bytes: int
    not_finite: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    difference: float | None = None
    scale: float | None = None
    agreement: float | None = None


def check_tensors(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], on_bytes: Progress = lambda count: None
) -> Verification:
    """Compare two sets of tensors bit by bit.

    Raises: VerificationError listing what is missing, too many, of another kind, or different.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} should not be there" for name in found if name not in expected]
    not_finite: dict[str, tuple[int, int]] = {}
    for name, want in expected.items():
        if name not in found:
            continue
        got = found[name]
        if (got.dtype, got.shape) != (want.dtype, want.shape):
            problems.append(f"{name} is {got.dtype} {got.shape}, expected {want.dtype} {want.shape}")
            continue
        different, counts = _compare(want, got, on_bytes)
        if different:
            problems.append(f"{different} of the {want.size} numbers of {name} differ")
        if any(counts):
            not_finite[name] = counts
    if problems:
        more = f" ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise VerificationError(
            f"what was written is not what was meant: {'; '.join(problems[:20])}{more}. Nothing was left behind; "
            f"please report this, with the two formats"
        )
    return Verification("tensors", len(expected), sum(t.nbytes for t in expected.values()), not_finite)


def _compare(want: Tensor, got: Tensor, on_bytes: Progress) -> tuple[int, tuple[int, int]]:
    """How many numbers differ, and how many of those found are NaN and infinite."""
    kind = np.dtype(f"<u{STORAGE[want.dtype].itemsize}")
    different = nan = infinite = 0
    for left, right in zip(even_pieces(want), even_pieces(got), strict=True):
        different += int(np.count_nonzero(left.view(kind) != right.view(kind)))
        if want.dtype == "bfloat16" or STORAGE[want.dtype].kind == "f":
            numbers = widen_bfloat16(right) if want.dtype == "bfloat16" else right
            if not np.isfinite(numbers).all():
                nan += int(np.count_nonzero(np.isnan(numbers)))
                infinite += int(np.count_nonzero(np.isinf(numbers)))
        on_bytes(left.nbytes)
    want.release()
    got.release()
    return different, (nan, infinite)


def outputs(config: GPT2Config, head: Head, weights: Mapping[str, Tensor]) -> dict[str, Array]:
    """What a model computes on `FIXED_IDS`, in float64, by name of the output; one block's weights in memory at a time.

    `weights` are named as in the parameter table.
    """
    prefix = "" if head is Head.NONE else PREFIX
    ids = np.array(FIXED_IDS)[: config.n_positions] % config.vocab_size
    tokens, places = weights[f"{prefix}wte.weight"], weights[f"{prefix}wpe.weight"]
    x = (_rows(tokens, ids) + _rows(places, np.arange(len(ids))))[None]
    mask = visible(len(ids), len(ids))
    for layer in range(config.n_layer):
        own = f"{prefix}h.{layer}."
        w = {name[len(own) :]: _wide(weights[name]) for name in weights if name.startswith(own)}
        x, _, _ = block(x, w, config, layer, mask, 1.0, None)
    last = {name: _wide(weights[f"{prefix}{name}"]) for name in ("ln_f.weight", "ln_f.bias")}
    x = layer_norm(x, last, "ln_f", config.layer_norm_epsilon)
    return _head_outputs(config, head, weights, x)


def _head_outputs(config: GPT2Config, head: Head, weights: Mapping[str, Tensor], x: Array) -> dict[str, Array]:
    if head is Head.NONE:
        return {"last_hidden_state": x}
    found = {}
    if head in (Head.LM, Head.DOUBLE):
        table = weights[f"{PREFIX}wte.weight" if config.tie_word_embeddings else "lm_head.weight"]
        found["logits"] = np.concatenate([x @ piece.T for piece in _table_pieces(table)], axis=-1)
    small = {name: _wide(tensor) for name, tensor in weights.items() if not name.startswith((PREFIX, "lm_head"))}
    out = BaseOutput(last_hidden_state=x, past=None, hidden_states=None, attentions=None)
    if head is Head.DOUBLE:
        summary = x[0] @ small["multiple_choice_head.summary.weight"].T + small["multiple_choice_head.summary.bias"]
        found["mc_logits"] = summary
    elif head is Head.SEQUENCE:
        found["logits"] = x @ small["score.weight"].T
    elif head is Head.TOKEN:
        found["logits"] = reference_heads.token_classifier(small, out, None).logits
    elif head is Head.QA:
        answer = reference_heads.question_answering(small, out, None, None)
        found |= {"start_logits": answer.start_logits, "end_logits": answer.end_logits}
    return found


def compare_outputs(
    config: GPT2Config, head: Head, source: Mapping[str, Tensor], result: Mapping[str, Tensor], *, lossless: bool
) -> tuple[float, float, float | None]:
    """The largest difference of any output, the largest output, and how often both rank the same token first.

    Outputs of the source that are not finite are left aside: the tensors that make them so are told of by name.
    Raises: VerificationError if `lossless` and they differ, or if the result's are not finite where the source's are.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # numbers that are not finite are told of, by name
        ours, theirs = outputs(config, head, source), outputs(config, head, result)
        pairs = [(value, theirs[name], np.isfinite(value)) for name, value in ours.items()]
        scale = max(float(np.abs(mine[finite]).max(initial=0)) for mine, _, finite in pairs)
        difference = max(float(np.abs(mine - other)[finite].max(initial=0)) for mine, other, finite in pairs)
    if not np.isfinite(difference):
        raise VerificationError(
            "the converted model computes numbers that are not finite where those of the given one are"
        )
    if lossless and not difference <= SAME * max(scale, 1.0):
        raise VerificationError(
            f"the converted model computes other numbers: they differ by up to {difference:.3g}, where none should"
        )
    agreement = None
    if head in (Head.LM, Head.DOUBLE):
        agreement = float(np.mean(ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)))
    return difference, scale, agreement


def _wide(tensor: Tensor) -> Array:
    value = tensor.array().astype(np.float64)
    tensor.release()
    return value


def _rows(tensor: Tensor, ids: NDArray[Any]) -> Array:
    bits = tensor.view()[ids]
    return (widen_bfloat16(bits) if tensor.dtype == "bfloat16" else bits).astype(np.float64)


def _table_pieces(table: Tensor) -> Any:
    bits = table.view()
    for start in range(0, table.shape[0], _ROWS):
        piece = bits[start : start + _ROWS]
        yield (widen_bfloat16(piece) if table.dtype == "bfloat16" else piece).astype(np.float64)
