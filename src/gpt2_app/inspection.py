"""What `gpt2 info` knows about a model, as plain values: gathered here, shown by `gpt2_app.info_view`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gpt2_app.failures import reading_a_model
from gpt2_core.checkpoints import Checkpoint, named_format, open_checkpoint
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.checkpoints.holds import BESIDE, holds_of
from gpt2_core.checkpoints.naming import BUFFERS, HEADS, LM_HEAD, TOKENS, Matching, match, same_numbers
from gpt2_core.config import PRESETS, GPT2Config
from gpt2_core.errors import CheckpointError, HubError
from gpt2_core.files import existing
from gpt2_core.parameters import Head, parameter_table

# The parts that parameters are counted by, the first that matches; of names as the parameter table writes them.
PARTS = (
    ("token embeddings", r"wte\."),
    ("position embeddings", r"wpe\."),
    ("attention", r"\.attn\."),
    ("feed-forward", r"\.mlp\."),
    ("layer norms", r"ln_"),
    ("head", r""),
)
_HEAD_KINDS = {
    "double heads": Head.DOUBLE,
    "sequence classification": Head.SEQUENCE,
    "token classification": Head.TOKEN,
    "question answering": Head.QA,
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass
class Place:
    """Where a model was found: the file or folder of its weights, if any, and its configuration, if any."""

    weights: Path | None
    config: GPT2Config | None
    config_source: str | None
    notes: list[str]

    @property
    def folder(self) -> Path | None:
        """The folder of the model's files, if there is one."""
        if self.weights is None:
            return None
        return self.weights if self.weights.is_dir() else self.weights.parent


def inspect(name: str, *, offline: bool = False, tensors: bool = False) -> dict[str, Any]:
    """Everything about the model called `name`, or in that folder or file, as values that JSON can hold.

    Raises: HubError for a name that is not found, Failure with exit code 3 for files that cannot be read.
    """
    with reading_a_model():
        place = _find(name, offline)
        found: dict[str, Any] = {
            "name": name,
            "folder": str(place.folder) if place.folder else None,
            "config_source": place.config_source,
            "config": place.config.to_dict() if place.config else None,
            "parameters": _parameters(place.config, Head.LM) if place.config else None,
            "checkpoint": None,
            "tokenizer": _tokenizer(name, place.folder),
            "notes": place.notes,
        }
        if place.weights is not None:
            with open_checkpoint(place.weights) as checkpoint:
                _add_checkpoint(found, checkpoint, place.config, tensors=tensors)
        return found


# -- where it is ---------------------------------------------------------------------------------------------


def _find(name: str, offline: bool) -> Place:
    path = existing(name)
    if path is not None and not path.is_dir():
        if path.name == "config.json":
            note = "this is a configuration alone; give its folder to see the weights beside it"
            return Place(None, GPT2Config.from_json_file(path), str(path), [note])
        return _on_disk(path, path.parent)
    from gpt2_core.hub import resolve

    try:
        folder = resolve(name, kind="model", local_files_only=True)
    except HubError:
        # Not here as a whole. A name may still have a configuration: a preset's, or one from the hub.
        if path is not None or name not in PRESETS:
            folder = resolve(name, kind="config", local_files_only=offline)
            config_file = folder / "config.json"
            note = "the weights are not on this machine; what follows comes from the configuration alone"
            return Place(None, GPT2Config.from_json_file(config_file), str(config_file), [note])
        note = (
            f"the weights are not on this machine; what follows comes from the configuration that is known for {name}; "
            f"`gpt2 generate --model {name}` fetches them"
        )
        return Place(None, PRESETS[name], "preset", [note])
    return _on_disk(folder, folder)


def _on_disk(weights: Path, folder: Path) -> Place:
    """A checkpoint that is here, and its configuration: config.json, unless its format keeps another one."""
    with open_checkpoint(weights) as checkpoint:
        if checkpoint.config is None and not (folder / "config.json").exists():
            note = f"there is no config.json in {folder}, so whether the tensors fit together cannot be told"
            return Place(weights, None, None, [note])
        beside = checkpoint.config is None or holds_of(named_format(checkpoint.format)).config == BESIDE
        found = config_of(checkpoint, beside=beside)
        return Place(weights, found.config, found.source, [])


def _tokenizer(name: str, folder: Path | None) -> dict[str, Any] | None:
    from gpt2_core.tokenizer import EMBEDDED_NAMES

    if name in EMBEDDED_NAMES:
        return {"source": "the vocabulary of GPT-2, which ships with the package", "files": []}
    files = [file for file in _TOKENIZER_FILES if folder is not None and (folder / file).is_file()]
    return {"source": str(folder), "files": files} if files else None


# -- what it holds -------------------------------------------------------------------------------------------


def _parameters(config: GPT2Config, head: Head) -> dict[str, Any]:
    table = parameter_table(config, head)
    return {
        "head": head.value,
        "total": sum(row.size for row in table),
        "parts": _by_part((row.name, row.size) for row in table),
    }


def _by_part(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    parts = dict.fromkeys((part for part, _ in PARTS), 0)
    for name, size in sizes:
        parts[next(part for part, pattern in PARTS if re.search(pattern, name))] += size
    return {part: size for part, size in parts.items() if size}


def _add_checkpoint(found: dict[str, Any], checkpoint: Checkpoint, config: GPT2Config | None, *, tensors: bool) -> None:
    head = _head_of(checkpoint)
    described = _describe(checkpoint)
    if config is None:
        buffers = tuple(f".{buffer}" for buffer in BUFFERS)
        own = [name for name in checkpoint if not name.endswith(buffers)]
        sizes = [(name, prod(checkpoint.shape(name))) for name in own]
        found["parameters"] = {
            "head": head.value,
            "total": sum(size for _, size in sizes),
            "parts": _by_part(sizes),
        }
        described |= {"fits": None}
    else:
        found["parameters"] = _parameters(config, head)
        described |= _fit(checkpoint, config, head)
    described["tying"] = _tying(checkpoint, config, head)
    if tensors:
        described["tensors"] = [
            {"name": name, "shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}
            for name, tensor in checkpoint.items()
        ]
    found["checkpoint"] = described


def _head_of(checkpoint: Checkpoint) -> Head:
    """The head whose parameters the file holds; a language model where it holds none of the others'."""
    for kind, head in _HEAD_KINDS.items():
        if any(name in checkpoint for name in HEADS[kind]):
            return head
    return Head.LM


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for tensor in checkpoint.values():
        count[tensor.dtype] += 1
        size[tensor.dtype] += tensor.nbytes
    return {
        "format": checkpoint.format,
        "files": [{"path": str(file), "bytes": file.stat().st_size} for file in checkpoint.files],
        "tensor_count": len(checkpoint),
        "bytes": checkpoint.bytes_total,
        "dtypes": {dtype: {"tensors": count[dtype], "bytes": size[dtype]} for dtype in count},
        "metadata": dict(checkpoint.metadata),
    }


def _fit(checkpoint: Checkpoint, config: GPT2Config, head: Head) -> dict[str, Any]:
    table = parameter_table(config, head)
    tied = config.tie_word_embeddings and head in (Head.LM, Head.DOUBLE)
    try:
        matching = match(checkpoint, table, n_layer=config.n_layer, tied=tied, strict=False)
    except CheckpointError as error:  # a tied head that differs from its table
        return {"fits": False, "reason": str(error)}
    return {"fits": matching.fits, **_listed(matching)}


def _listed(matching: Matching) -> dict[str, Any]:
    return {
        "missing": list(matching.missing),
        "unexpected": list(matching.unexpected),
        "misshaped": [
            {"name": name, "in_file": list(got), "expected": list(expected)}
            for name, got, expected in matching.misshaped
        ],
        "newly_initialised": list(matching.newly_initialised),
        "ignored": dict(matching.ignored),
    }


def _tying(checkpoint: Checkpoint, config: GPT2Config | None, head: Head) -> str:
    """In words: whether the language-model head and the token table are one, in the file and by configuration."""
    if head not in (Head.LM, Head.DOUBLE):
        return "no language-model head"
    file = _tying_in_file(checkpoint)
    if config is None:
        return file
    return f"{'tied' if config.tie_word_embeddings else 'untied'} by configuration; {file}"


def _tying_in_file(checkpoint: Mapping[str, Any]) -> str:
    if LM_HEAD not in checkpoint:
        return f"the file holds no {LM_HEAD}"
    tokens = next((name for name in (TOKENS, f"transformer.{TOKENS}") if name in checkpoint), None)
    if tokens is None:
        return f"the file holds {LM_HEAD} but no token table"
    same = same_numbers(checkpoint[LM_HEAD], checkpoint[tokens])
    return f"the file holds {LM_HEAD}, {'equal to' if same else 'different from'} {tokens}"
