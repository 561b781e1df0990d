"""Which tensor of a file is which parameter of a model: a table, computed from the model's own, and a strict match.

Released files write the transformer's names with or without ``transformer.`` in front, and with some things that are
no parameters. What may differ is listed here, in full; anything else is missing or unexpected, and all of it is
reported together. Shapes are compared as they are: nothing is transposed, squeezed or cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints.tensors import STORAGE, Checkpoint, Shape, Tensor, even_pieces, widen_bfloat16
from gpt2_core.errors import CheckpointError, CheckpointMismatchError

PREFIX = "transformer."
TOKENS = "wte.weight"
LM_HEAD = "lm_head.weight"

#: Heads by the model they make, and all names that a file may hold of each.
HEADS: Mapping[str, tuple[str, ...]] = {
    "language model": (LM_HEAD,),
    "double heads": ("multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"),
    "sequence classification": ("score.weight",),
    "token classification": ("classifier.weight", "classifier.bias"),
    "question answering": ("qa_outputs.weight", "qa_outputs.bias"),
}
_HEAD_OF = {name: kind for kind, names in HEADS.items() for name in names}

#: What may be absent from a file: heads that fine-tuning starts afresh. A language-model head may not.
FRESH = frozenset(_HEAD_OF) - {LM_HEAD}

#: Buffers that early releases saved with each block's attention, and why they are not needed.
BUFFERS: Mapping[str, str] = {
    "attn.bias": "the causal mask, which the model makes itself",
    "attn.masked_bias": "the constant that masked scores were set to, no longer used",
}

_PIECE = 1 << 20  # numbers compared at a time


class Row(Protocol):
    """What is asked of a row of the table of parameters."""

    @property
    def name(self) -> str:
        """The parameter's name in the model."""

    @property
    def shape(self) -> Shape:
        """The parameter's shape in the model."""


@dataclass(frozen=True)
class Matching:
    """How a file and a model go together.

    `names`: the model's name -> the file's. `ignored`: the file's names that nothing is read from -> why.
    `newly_initialised`: parameters that the file may lack and lacks. `missing`, `unexpected`, `misshaped` (name in
    the model, shape in the file, shape in the model): what does not fit; all empty unless `match` was not strict.
    """

    source: str
    names: Mapping[str, str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    newly_initialised: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[tuple[str, Shape, Shape], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing is missing, unexpected or misshaped."""
        return not (self.missing or self.unexpected or self.misshaped)


def match(
    checkpoint: Checkpoint,
    table: Sequence[Row],
    *,
    n_layer: int,
    tied: bool,
    optional: frozenset[str] = FRESH,
    strict: bool = True,
) -> Matching:
    """Match a checkpoint's names and shapes to the parameters in `table`.

    `tied`: the model has a language-model head that is its token table, so `table` has no row for it.
    `optional`: parameters that start afresh where the file lacks them, by default all heads but the language model's.
    Heads of the file that the model does not have are ignored, and listed as such.

    Raises: CheckpointMismatchError with everything that does not fit, if `strict`; CheckpointError for a tied model
    if the file's language-model head differs from its token table.
    """
    inside = names_in_file(checkpoint, table)
    expected = {inside[row.name]: row for row in table}
    absent = [row for name, row in expected.items() if name not in checkpoint]
    extra = [name for name in checkpoint if name not in expected]
    ignored = _ignorable(checkpoint, extra, n_layer=n_layer, tied=tied)
    found = Matching(
        source=str(checkpoint.path),
        names={row.name: name for name, row in expected.items() if name in checkpoint},
        ignored=ignored,
        newly_initialised=tuple(row.name for row in absent if row.name in optional),
        missing=tuple(row.name for row in absent if row.name not in optional),
        unexpected=tuple(name for name in extra if name not in ignored),
        misshaped=tuple(
            (row.name, checkpoint.shape(name), tuple(row.shape))
            for name, row in expected.items()
            if name in checkpoint and checkpoint.shape(name) != tuple(row.shape)
        ),
    )
    if strict and not found.fits:
        raise CheckpointMismatchError(
            found.source, found.missing, found.unexpected, found.misshaped, remedy=_remedy(found, checkpoint)
        )
    return found


def names_in_file(checkpoint: Mapping[str, Tensor], table: Sequence[Row]) -> dict[str, str]:
    """The name that each parameter of `table` has in this file: its own, with or without ``transformer.``.

    One token table decides for the whole file; a bijection, whatever the file holds.
    """
    prefix = "" if TOKENS in checkpoint and PREFIX + TOKENS not in checkpoint else PREFIX
    return {row.name: row.name if row.name in _HEAD_OF else prefix + row.name.removeprefix(PREFIX) for row in table}


def _ignorable(checkpoint: Checkpoint, extra: Sequence[str], *, n_layer: int, tied: bool) -> dict[str, str]:
    """The names nothing is read from, with the reason for each."""
    reasons = {
        f"{prefix}h.{layer}.{buffer}": why
        for prefix in ("", PREFIX)
        for layer in range(n_layer)
        for buffer, why in BUFFERS.items()
    }
    reasons |= {name: f"the {kind} head, which this model does not have" for name, kind in _HEAD_OF.items()}
    if tied and LM_HEAD in extra:
        _check_tied(checkpoint)
        reasons[LM_HEAD] = "equal to the token table, which serves as this model's head"
    return {name: reasons[name] for name in extra if name in reasons}


def _check_tied(checkpoint: Checkpoint) -> None:
    tokens = TOKENS if TOKENS in checkpoint else PREFIX + TOKENS
    if tokens in checkpoint and not same_numbers(checkpoint[LM_HEAD], checkpoint[tokens]):
        raise CheckpointError(
            f"{checkpoint.path} holds a {LM_HEAD} that differs from {tokens}, but the configuration ties them; "
            f"set tie_word_embeddings=False to use both, or remove {LM_HEAD} from the file to use {tokens} alone"
        )


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and the same numbers; bit by bit if their dtypes are the same."""
    if one.shape != other.shape:
        return False
    alike = one.dtype == other.dtype
    same = all(
        np.array_equal(_comparable(left, one.dtype, alike), _comparable(right, other.dtype, alike))
        for left, right in zip(even_pieces(one, _PIECE), even_pieces(other, _PIECE), strict=True)
    )
    one.release()
    other.release()
    return same


def _comparable(piece: NDArray[Any], dtype: str, alike: bool) -> NDArray[Any]:
    """Bits where both sides have the same format, else numbers."""
    if alike:
        return piece.view(f"<u{STORAGE[dtype].itemsize}")
    return widen_bfloat16(piece) if dtype == "bfloat16" else piece


def _remedy(found: Matching, checkpoint: Checkpoint) -> str:
    if found.missing == (LM_HEAD,) and not found.unexpected and not found.misshaped:
        return f"the file has no {LM_HEAD}: set tie_word_embeddings=True to use the token table as the head"
    if found.misshaped and all(name in FRESH for name, _, _ in found.misshaped) and not found.missing:
        return "the head of the file is of another size: set num_labels to that of the file"
    if not found.names:
        some = ", ".join(checkpoint.names()[:3])
        return f"none of its names is a GPT-2's (it holds {some} ...): check that this is a GPT-2 checkpoint"
    return "check that the checkpoint and the configuration (n_layer, n_embd, vocab_size ...) belong together"
