"""What a format can hold, and what goes into a file beside tensors.

A format module says it in `HOLDS`; one that says nothing is the hub's kind: every head and float dtype, config.json and
the tokenizer's files beside the weights. What a format cannot hold is refused with the reason, before anything is
written: see `objections`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gpt2_core.config import FIELDS, GPT2Config
from gpt2_core.parameters import Head

if TYPE_CHECKING:
    from gpt2_core.tokenizer_files import TokenizerParts

BESIDE, INSIDE, OWN, NOWHERE = "beside", "inside", "own", "nowhere"
FLOATS = ("float32", "float16", "bfloat16", "float64")
ALL_HEADS = frozenset(Head)

#: Extra keys of a config.json that describe its file rather than the model: no loss where the file is another.
_OF_THE_FILE = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"})

#: Bytes and the numbers they hold, of number formats that are no dtype: GGUF's Q8_0 is 32 int8 and a float16 scale.
QUANTIZED_BYTES: Mapping[str, tuple[int, int]] = MappingProxyType({"q8_0": (34, 32)})


@dataclass(frozen=True)
class Holds:
    """What the files of one format can hold.

    heads: the heads there is a place for. A tied language-model head is no tensor of its own: `Head.LM` with
        ``tie_word_embeddings`` needs no more than the transformer.
    dtypes: number formats of parameters, the best for unknown readers first; `quantized`: those that lose more than
        rounding and are made by the format itself, such as "q8_0".
    config: "beside" (config.json), "inside" (the format's own, under names of its own), "nowhere".
    config_keys: the fields of GPT2Config that an inside config keeps; the others come back as defaults.
    fixed: fields of GPT2Config whose value every reader of the format takes for granted -> the values it may have.
        "n_inner" counts as None where it is four times n_embd; "pruned_heads" is {} where there are none.
    tokenizer: "beside" (the hub's files), "inside" (in the file of the weights), "own" (files of the format's own kind
        beside the weights, which a single file does not bring), "nowhere".
    shards: whether the weights may be split over several files.
    uniform: whether all tensors have to be of one dtype.
    """

    heads: frozenset[Head] = ALL_HEADS
    dtypes: tuple[str, ...] = FLOATS
    quantized: tuple[str, ...] = ()
    config: str = BESIDE
    config_keys: frozenset[str] = frozenset(FIELDS)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: MappingProxyType({}))
    tokenizer: str = BESIDE
    shards: bool = False
    uniform: bool = False

    @property
    def wants_about(self) -> bool:
        """Whether `write` takes ``about``: it does where more than tensors goes inside."""
        return self.config == INSIDE or self.tokenizer in (INSIDE, OWN)


@dataclass(frozen=True)
class About:
    """What a model is beside its tensors, for formats that keep it inside.

    `dtype` is the number format that was asked for by name, which a quantized one needs; None: as the tensors are.
    """

    config: GPT2Config
    head: Head = Head.LM
    tokenizer: TokenizerParts | None = None
    dtype: str | None = None


def holds_of(format: object) -> Holds:
    """What a format module says it can hold, or the default."""
    found: Holds = getattr(format, "HOLDS", _HUB)
    return found


_HUB = Holds(shards=True)


def objections(name: str, holds: Holds, config: GPT2Config, head: Head, dtypes: Iterable[str]) -> list[str]:
    """Why a model does not fit the format called `name`: one sentence for each reason, none if it does."""
    reasons = []
    if head not in holds.heads:
        known = ", ".join(sorted(each.value for each in holds.heads))
        reasons.append(f"{name} has no place for the head {head.value!r}; expected one of {known}")
    for key, allowed in holds.fixed.items():
        value = effective(config, key)
        if key == "tie_word_embeddings" and head not in (Head.LM, Head.DOUBLE):
            continue
        if not any(value == each for each in allowed):
            expected = " or ".join(repr(each) for each in allowed)
            reasons.append(f"{name} cannot say {key}={value!r}: its readers take {expected} for granted")
    dtypes, best = set(dtypes), holds.dtypes[0]
    if holds.uniform and len(dtypes) > 1:
        reasons.append(f"{name} holds one dtype, and there are {', '.join(sorted(dtypes))}: give --dtype {best}")
    strange = sorted({dtype for dtype in dtypes if dtype not in (*holds.dtypes, *holds.quantized)})
    if strange:
        known = ", ".join((*holds.dtypes, *holds.quantized))
        reasons.append(f"{name} cannot hold {', '.join(strange)}; expected one of {known}: give --dtype {best}")
    return reasons


def effective(config: GPT2Config, key: str) -> Any:
    """The value of a field, so that two values that mean the same are equal."""
    value = getattr(config, key)
    if key == "n_inner" and config.inner_dim == 4 * config.n_embd:
        return None
    return dict(value) if isinstance(value, Mapping) else value


def lost(holds: Holds, config: GPT2Config) -> dict[str, Any]:
    """The fields of `config`, and its extra keys, that an inside config does not keep and that are not the default."""
    if holds.config == BESIDE:
        return {}
    plain = GPT2Config(vocab_size=config.vocab_size)
    kept = holds.config_keys if holds.config == INSIDE else frozenset()
    gone = [key for key in FIELDS if key not in kept and key != "extra" and key not in holds.fixed]
    values = {key: effective(config, key) for key in gone if effective(config, key) != effective(plain, key)}
    extra = {} if "extra" in kept else {key: value for key, value in config.extra.items() if key not in _OF_THE_FILE}
    return values | extra
