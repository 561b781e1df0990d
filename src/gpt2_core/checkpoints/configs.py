"""The configuration that goes with an open checkpoint: beside it, inside it, or told from its shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_core.checkpoints.naming import HEADS, LM_HEAD, PREFIX, TOKENS, same_numbers
from gpt2_core.checkpoints.tensors import Checkpoint
from gpt2_core.config import PRESETS, GPT2Config
from gpt2_core.errors import ConfigError
from gpt2_core.parameters import Head

#: The classes that ``architectures`` of a config.json names -> what stands on top of the transformer.
ARCHITECTURES: Mapping[str, Head] = {
    "GPT2Model": Head.NONE,
    "GPT2LMHeadModel": Head.LM,
    "GPT2DoubleHeadsModel": Head.DOUBLE,
    "GPT2ForSequenceClassification": Head.SEQUENCE,
    "GPT2ForTokenClassification": Head.TOKEN,
    "GPT2ForQuestionAnswering": Head.QA,
}
_HEAD_KINDS: Mapping[str, Head] = {
    "double heads": Head.DOUBLE,
    "sequence classification": Head.SEQUENCE,
    "token classification": Head.TOKEN,
    "question answering": Head.QA,
}
_BLOCK = re.compile(r"(?:transformer\.)?h\.(\d{1,5})\..*")
_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "gpt2-tales")
_RELEASED = {(PRESETS[name].n_layer, PRESETS[name].n_embd): name for name in _NAMES}


@dataclass(frozen=True)
class Known:
    """A configuration, where it is from in words, and what a person should know about it."""

    config: GPT2Config
    source: str
    notes: tuple[str, ...] = ()


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint's files, for a path to either."""
    return path if path.is_dir() else path.parent


def config_of(checkpoint: Checkpoint, *, beside: bool = True, infer: bool = False) -> Known:
    """The configuration of an open checkpoint: config.json if its format keeps that `beside`, else its own, else,
    with `infer`, what the shapes say.

    Raises: ConfigError, where there is none that can be used.
    """
    file = folder_of(checkpoint.path) / "config.json"
    if beside and file.exists():  # a folder of that name is told of where it is read
        return Known(GPT2Config.from_json_file(file), str(file))
    if checkpoint.config is not None:
        try:
            found = GPT2Config.from_dict(_with_possible_ids(checkpoint.config))
        except ConfigError as error:
            raise ConfigError(f"the configuration {_place(checkpoint)}: {error}") from error
        return Known(found, _place(checkpoint) if checkpoint.config_file is None else str(checkpoint.config_file))
    if infer:
        return _inferred(checkpoint)
    raise ConfigError(
        f"{file} does not exist, and {checkpoint.path} has no configuration inside; expected either. If the weights "
        f"have none, say what they are: config=GPT2Config(...), or one of the presets {', '.join(PRESETS)}"
    )


def _place(checkpoint: Checkpoint) -> str:
    return f"inside {checkpoint.path}" if checkpoint.config_file is None else f"in {checkpoint.config_file}"


def head_of(checkpoint: Checkpoint, config: GPT2Config) -> Head:
    """What stands on top of the transformer: the head whose parameters are there, else what the file or config says.

    A file with none and no word about it is a language model if its head may be the token table.
    """
    for kind, head in _HEAD_KINDS.items():
        if any(name in checkpoint for name in HEADS[kind]):
            return head
    if LM_HEAD in checkpoint:
        return Head.LM
    if checkpoint.head is not None:
        return Head(checkpoint.head)
    named = config.extra.get("architectures")
    first = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    by_name = ARCHITECTURES.get(first.removeprefix("TF").removeprefix("Flax"))
    return by_name or (Head.LM if config.tie_word_embeddings else Head.NONE)


def _with_possible_ids(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values`; the ids of GPT-2's own tokens are no default where the vocabulary is too small to have them."""
    size = values.get("vocab_size")
    small = isinstance(size, int) and size <= GPT2Config.vocab_size - 1
    return {**({"bos_token_id": None, "eos_token_id": None} if small else {}), **values}


def _inferred(checkpoint: Checkpoint) -> Known:
    """What shapes tell; what they do not (heads, activation, epsilon) is that of the released model of this size."""

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        found = next((checkpoint.shape(n) for n in (PREFIX + name, name) if n in checkpoint), ())
        if len(found) != dimensions:
            raise ConfigError(
                f"there is no config.json beside {checkpoint.path}, and its shapes do not tell one: {name} is "
                f"{f'of shape {found}' if found else 'missing'}; give the configuration (--config FILE or a preset)"
            )
        return found

    (vocab_size, width), (n_positions, _) = shape(TOKENS, 2), shape("wpe.weight", 2)
    blocks = {int(found[1]) for name in checkpoint for found in [_BLOCK.fullmatch(name)] if found}
    preset = _RELEASED.get((max(blocks, default=-1) + 1, width))
    if preset is None:
        raise ConfigError(
            f"there is no config.json beside {checkpoint.path}; its shapes tell {max(blocks, default=-1) + 1} layers "
            f"{width} wide, but not the number of heads, and no released model is of that size; give the configuration "
            f"(--config FILE or a preset)"
        )
    values: dict[str, Any] = {"vocab_size": vocab_size, "n_positions": n_positions}
    inner = shape("h.0.mlp.c_fc.bias", 1)[0]
    values["n_inner"] = None if inner == 4 * width else inner
    if LM_HEAD in checkpoint:
        tokens = TOKENS if TOKENS in checkpoint else PREFIX + TOKENS
        values["tie_word_embeddings"] = same_numbers(checkpoint[LM_HEAD], checkpoint[tokens])
    for name in ("score.weight", "classifier.weight"):
        if name in checkpoint and checkpoint.shape(name):
            values["num_labels"] = checkpoint.shape(name)[0]
    taken = PRESETS[preset]
    note = (
        f"no configuration was found: the shapes are those of {preset}, so n_head={taken.n_head}, "
        f"activation_function={taken.activation_function!r} and layer_norm_epsilon={taken.layer_norm_epsilon} are "
        f"taken from there; give --config if they are others"
    )
    return Known(taken.replace(**values), f"the shapes, as of {preset}", (note,))
