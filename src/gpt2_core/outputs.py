"""What the models return: small typed tuples, the same fields in the same order in every framework.

``out.logits``, ``out["logits"]`` and ``loss, logits, *_ = out`` all work; fields that are None are skipped when an
output is unpacked, indexed by number, or counted, as users of the field expect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any


@dataclass
class Output:
    """The base of all outputs: fields by name, by key, or in order without those that are None."""

    @property
    def past_key_values(self) -> Any:
        """Newer name of ``past``."""
        return getattr(self, "past")  # noqa: B009 - every output has the field, each at its own place

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are not None, in order."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def values(self) -> tuple[Any, ...]:
        """Values of the fields that are not None, in order."""
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Pairs of name and value of the fields that are not None, in order."""
        return tuple((name, getattr(self, name)) for name in self.keys())

    def to_tuple(self) -> tuple[Any, ...]:
        """A plain tuple of the fields that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"{type(self).__name__} has no {key!r} here; it has {', '.join(self.keys())}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class BaseOutput(Output):
    """What the bare transformer returns.

    last_hidden_state (B, T, C), after the final layer norm; past: n_layer pairs (key, value), each (B, H, S, D);
    hidden_states: n_layer + 1 of (B, T, C): the embeddings, then each block's output, the last after the final
    layer norm; attentions: n_layer of (B, H, T, S).
    """

    last_hidden_state: Any = None
    past: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class LMOutput(Output):
    """What the language model returns: loss (scalar, with labels), logits (B, T, V), and the rest as BaseOutput."""

    loss: Any = None
    logits: Any = None
    past: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class DoubleHeadsOutput(Output):
    """What the double-heads model returns.

    loss: the sum of lm_loss and mc_loss, of those that have labels; logits (B, choices, T, V);
    mc_logits (B, choices); past, hidden_states and attentions as BaseOutput, with batch and choices folded
    into one axis.
    """

    loss: Any = None
    logits: Any = None
    mc_logits: Any = None
    past: Any = None
    hidden_states: Any = None
    attentions: Any = None
    lm_loss: Any = None
    mc_loss: Any = None


@dataclass
class ClassifierOutput(Output):
    """loss (scalar, with labels); logits (B, num_labels) for a sequence, (B, T, num_labels) for tokens."""

    loss: Any = None
    logits: Any = None
    past: Any = None
    hidden_states: Any = None
    attentions: Any = None


@dataclass
class QuestionAnsweringOutput(Output):
    """loss (scalar, with positions); start_logits and end_logits (B, T)."""

    loss: Any = None
    start_logits: Any = None
    end_logits: Any = None
    past: Any = None
    hidden_states: Any = None
    attentions: Any = None
