"""model.gguf: llama.cpp's file for one model, with its configuration and its tokenizer inside.

The container is in `gguf_container`, the tokenizer's keys in `gguf_tokenizer`, Q8_0 in `gguf_quantization`. A model of
the architecture "gpt2" has

    general.architecture             "gpt2"; general.type "model" or nothing
    general.name, general.file_type, general.quantization_version, general.size_label          for people and lists
    gpt2.context_length              n_positions              gpt2.block_count               n_layer
    gpt2.embedding_length            n_embd                   gpt2.attention.head_count      n_head
    gpt2.feed_forward_length         4 n_embd, or n_inner     gpt2.attention.layer_norm_epsilon   float32
    gpt2.vocab_size                  the rows of the token table, for files without a tokenizer

and the tensors of `NAMES`, kernels as (out, in) where the hub's are (in, out). The head `output.weight` is left out
where it is the token table; files of llama.cpp's older converters hold it a second time. Activation and attention are
not said: llama.cpp computes GPT-2's own.

Asked for float16, bfloat16 or Q8_0, vectors and the table of positions stay float32, as in llama.cpp's converter: its
kernels ask for that. A row that is no multiple of 32 numbers cannot be Q8_0, and is float16 then, as there.

A key of our own, gpt2_duet.config, keeps config.json whole; llama.cpp ignores it, and the keys above have the last word
where they say otherwise. Models split over several files are read after `llama-gguf-split --merge`.

Source: llama.cpp of 2026: src/models/gpt2.cpp, conversion/gpt2.py and base.py (prepare_tensors), gguf-py constants.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import gguf_container, gguf_quantization, gguf_tokenizer
from gpt2_core.checkpoints.gguf_container import BLOCK, CODES, DTYPES, Q8_0, Header, Value, text_of
from gpt2_core.checkpoints.holds import INSIDE, About, Holds, objections
from gpt2_core.checkpoints.naming import LM_HEAD, PREFIX, TOKENS, same_numbers
from gpt2_core.checkpoints.renaming import Names, Rule, arranged, pattern
from gpt2_core.checkpoints.tensors import Checkpoint, MappedFile, Shape, Tensor, as_tensors, converted, file_tensor
from gpt2_core.config import ALIASES, GPT2Config
from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_folder, atomic_write
from gpt2_core.parameters import Head
from gpt2_core.tokenizer_files import TokenizerParts

NAME = "gguf"
RANK = 50
FILES = ("model.gguf",)
SUFFIXES = (".gguf",)
HOLDS = Holds(
    heads=frozenset({Head.LM}),
    dtypes=("float32", "float16", "bfloat16"),
    quantized=("q8_0",),
    config=INSIDE,
    fixed=MappingProxyType(
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "pruned_heads": ({},),
        }
    ),
    tokenizer=INSIDE,
)

_KERNEL = "I O -> O I"
_TURNED = pattern(_KERNEL)
_PARTS = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NAMES = Names(
    Rule(TOKENS, "token_embd.weight"),
    Rule("wpe.weight", "position_embd.weight"),
    *(
        rule
        for ours, theirs in _PARTS.items()
        for rule in (
            Rule(f"h.{{layer}}.{ours}.weight", f"blk.{{layer}}.{theirs}.weight", "" if "ln" in ours else _KERNEL),
            Rule(f"h.{{layer}}.{ours}.bias", f"blk.{{layer}}.{theirs}.bias"),
        )
    ),
    Rule("ln_f.weight", "output_norm.weight"),
    Rule("ln_f.bias", "output_norm.bias"),
    Rule(LM_HEAD, "output.weight"),
)

ARCHITECTURE = "gpt2"
OWN = "gpt2_duet.config"
#: The keys of a configuration -> the fields of GPT2Config that they are.
SIZES: Mapping[str, str] = {
    "gpt2.context_length": "n_positions",
    "gpt2.embedding_length": "n_embd",
    "gpt2.block_count": "n_layer",
    "gpt2.attention.head_count": "n_head",
}
_INNER, _EPSILON, _ROWS = "gpt2.feed_forward_length", "gpt2.attention.layer_norm_epsilon", "gpt2.vocab_size"
_KEY_HEADS, _SPLIT, _NAME = "gpt2.attention.head_count_kv", "split.count", "general.name"
_ROLES = {
    "bos_token_id": gguf_tokenizer.ROLE_IDS["bos_token"],
    "eos_token_id": gguf_tokenizer.ROLE_IDS["eos_token"],
    "pad_token_id": gguf_tokenizer.ROLE_IDS["pad_token"],
}
_KNOWN = {
    *SIZES, _INNER, _EPSILON, _ROWS, _KEY_HEADS, OWN, gguf_tokenizer.OWN, *gguf_tokenizer.ROLE_IDS.values(),
    *gguf_tokenizer.ADDS, gguf_tokenizer.SPACE, gguf_tokenizer.MODEL, gguf_tokenizer.PRE, gguf_tokenizer.TOKENS,
    gguf_tokenizer.TYPES, gguf_tokenizer.MERGES, gguf_tokenizer.PREFIX + "scores", "split.no", _SPLIT,
    "split.tensors.count",
}  # fmt: skip
# What general.* says of the file rather than of the model; the rest is passed on as metadata.
_OF_THE_FILE = {"architecture", "type", "name", "size_label", "file_type", "quantization_version", "alignment"}
#: general.file_type, by the number format of the tables and kernels: llama.cpp, include/llama.h, llama_ftype.
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
_QUANTIZATION_VERSION = 2  # ggml.h, GGML_QNT_VERSION


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, holds this format, else None.

    A folder's only .gguf file will do whatever its name is.
    """
    if path.is_dir():
        if (path / FILES[0]).is_file():
            return path / FILES[0]
        found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
        return found[0] if len(found) == 1 and found[0].is_file() and _looks_like(found[0]) else None
    return path if path.is_file() and _looks_like(path) else None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in FILES


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a .gguf file or a folder with one; tensors are views of the mapped file, those of Q8_0 are made float32.

    Raises: CheckpointFormatError for anything damaged, for another architecture, and for quantizations that are not
    read, by name.
    """
    path = Path(path)
    found = find(path) if path.is_dir() else path
    if found is None:
        raise CheckpointError(f"{path} holds no {FILES[0]}, and not one other .gguf file; give the file itself")
    file = MappedFile(found, writable=writable)
    try:
        return _checkpoint(file, found)
    except CheckpointFormatError as cause:
        file.close()
        raise CheckpointFormatError(f"{found} is not a GGUF file of a GPT-2 that can be read: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write a GGUF file, to a file that ends in .gguf or into a folder, one tensor in memory at a time.

    `metadata` are texts by key, such as general.author. `about.dtype` is the number format of tables and kernels.
    Raises: CannotHoldError for a model that llama.cpp could not run; CheckpointError for tensors that cannot be stored;
    WriteError. Either way the path is as it was.
    """
    path = Path(path)
    if about is None or max_shard_bytes is not None:
        raise CheckpointError("gguf needs about=About(config), and is not split into shards")
    laid_out, dtypes = _laid_out(as_tensors(tensors), about)
    header = gguf_container.header_bytes(
        _values(about, dtypes, laid_out, metadata or {}),
        {name: (tensor.shape, CODES[dtypes[name]]) for name, tensor in laid_out.items()},
    )
    if path.suffix in SUFFIXES and not path.is_dir():
        _write_file(path, header, laid_out, dtypes)
        return (path,)
    with atomic_folder(path, replaces=owns) as stage:
        _write_file(stage / FILES[0], header, laid_out, dtypes)
    return (path / FILES[0],)


def stored_dtype(name: str, shape: Shape, dtype: str) -> str:
    """The number format of a parameter where `dtype` was asked for: see the module."""
    if dtype not in ("float16", "bfloat16", "q8_0"):
        return dtype
    if len(shape) < 2 or name.removeprefix(PREFIX) == "wpe.weight":
        return "float32"
    row = shape[0] if _is_kernel(name) else shape[-1]
    return "float16" if dtype == "q8_0" and row % BLOCK else dtype


def rounded(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The tensor as it is read back after being written as `dtype`, which is "q8_0": float32."""
    if dtype != "q8_0":
        raise CheckpointError(f"dtype is {dtype!r}; expected 'q8_0', the one quantized format here")
    if not _is_kernel(name):
        return gguf_quantization.rounded(tensor)
    there = arranged(tensor, _TURNED, {})
    back = None if there is None else arranged(gguf_quantization.rounded(there), _TURNED, {})
    return gguf_quantization.rounded(tensor) if back is None else back


def remarks(about: About) -> tuple[str, ...]:
    """What to know about a model of ours in llama.cpp: where a text ends, and what Q8_0 does not fit."""
    config, found = about.config, []
    if not config.eos_token_ids:
        found.append(
            "the configuration has no eos_token_id; if the tokenizer names none either, llama.cpp stops at token 11"
        )
    if len(config.eos_token_ids) > 1:
        found.append(f"llama.cpp stops at one id only: {config.eos_token_ids[0]}, the first of {config.eos_token_ids}")
    if about.dtype == "q8_0" and (config.n_embd % BLOCK or config.inner_dim % BLOCK):
        found.append(f"tensors whose rows are no multiple of {BLOCK} numbers cannot be q8_0, and are float16")
    return tuple(found)


def _looks_like(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == gguf_container.MAGIC


def _is_kernel(name: str) -> bool:
    return re.sub(r"^h\.\d+\.", "h.{layer}.", name.removeprefix(PREFIX)) in _KERNELS


_KERNELS = frozenset(rule.ours for rule in NAMES.rules if rule.layout)


# Reading --------------------------------------------------------------------------------------------------------------


def _checkpoint(file: MappedFile, path: Path) -> Checkpoint:
    header = gguf_container.read_header(file)
    _check_model(header.values)
    there = {
        entry.name: gguf_quantization.file_tensor(file, entry.shape, entry.offset)
        if entry.code == Q8_0
        else file_tensor(file, DTYPES[entry.code], entry.shape, entry.offset)
        for entry in header.entries
    }
    config = _config(header, there)
    found = NAMES.from_file(there)
    return Checkpoint(
        found.tensors,
        format=NAME,
        path=path,
        metadata=_metadata(header.values),
        close=file.close,
        config=config,
        head=Head.LM.value,
        tokenizer=_tokenizer(header.values, path),
        names_in_file=found.names_in_file,
        notes=tuple(_notes(header, file.size)),
    )


def _check_model(values: Mapping[str, Value]) -> None:
    architecture, kind = text_of(values, "general.architecture"), text_of(values, "general.type", "model")
    if architecture != ARCHITECTURE or kind != "model":
        raise CheckpointFormatError(
            f"it holds a {kind[:40]} of the architecture {architecture[:40]!r}; expected a model of "
            f"{ARCHITECTURE!r}, no other is read here"
        )
    parts = values.get(_SPLIT, 0)
    if type(parts) is not int or parts > 1:
        raise CheckpointFormatError(
            f"it is one of {str(parts)[:20]} parts of a model; put them together with `llama-gguf-split --merge`"
        )


def _config(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The configuration: what was kept whole if it was, with what llama.cpp's keys say in any case."""
    values = header.values
    config: dict[str, Any] = {ours: _size(values, key) for key, ours in SIZES.items()}
    if _KEY_HEADS in values and _size(values, _KEY_HEADS) != config["n_head"]:
        raise CheckpointFormatError(f"its {_KEY_HEADS} is {str(values[_KEY_HEADS])[:50]}; expected its head_count")
    if config["n_layer"] > max(len(tensors), 1):
        raise CheckpointFormatError(f"it claims {config['n_layer']} blocks, and holds {len(tensors)} tensors")
    table = tensors.get("token_embd.weight")
    if table is not None and len(table.shape) == 2:
        config["vocab_size"] = table.shape[0]
    elif _ROWS in values:
        config["vocab_size"] = _size(values, _ROWS)
    own = _own_config(values.get(OWN))
    if _INNER in values:
        config["n_inner"] = _inner(_size(values, _INNER), config["n_embd"], own)
    config["layer_norm_epsilon"] = _epsilon(values.get(_EPSILON), own.get("layer_norm_epsilon"))
    for ours, key in _ROLES.items():
        if key in values and not _same_role(own.get(ours), values[key]) and own.get(ours, 0) is not None:
            config[ours] = _size(values, key, least=0)
    if not own and text_of(values, _NAME):
        config["_name_or_path"] = text_of(values, _NAME)
    return own | config | {"tie_word_embeddings": _is_tied(tensors, own)}


def _size(values: Mapping[str, Value], key: str, least: int = 1) -> int:
    value = values.get(key)
    if type(value) is not int or not least <= value < 1 << 31:
        raise CheckpointFormatError(f"its {key} is {'missing' if value is None else str(value)[:50]}; expected a size")
    return value


def _inner(size: int, width: int, own: Mapping[str, Any]) -> int | None:
    return None if size == 4 * width and own.get("n_inner") is None else size


def _epsilon(value: Value | None, own: object) -> float:
    """The epsilon, whose key has 32 bits: our own where it is that, rounded; else the shortest number that is."""
    if not isinstance(value, float):
        raise CheckpointFormatError(f"its {_EPSILON} is {'missing' if value is None else str(value)[:50]}")
    if isinstance(own, float) and np.float32(own) == np.float32(value):
        return own
    return float(str(np.float32(value)))


def _same_role(own: object, value: Value) -> bool:
    """Whether the id of a key is the one that `write` makes of what was kept: of several the first."""
    first = own[0] if isinstance(own, list) and own else own
    return type(first) is type(value) and first == value


def _is_tied(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> bool:
    """Whether the head is the token table: it is missing, or, in files of others, there a second time."""
    head, table = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if head is None or table is None:
        return head is None
    if isinstance(own.get("tie_word_embeddings"), bool):
        return bool(own["tie_word_embeddings"])
    return same_numbers(table, head)


def _own_config(text: Value | None) -> dict[str, Any]:
    """What `write` kept; nothing for files of others, or where it cannot be read."""
    try:
        own = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        own = {}
    own = own if isinstance(own, dict) else {}
    sizes = {*SIZES.values(), "vocab_size"}
    aliases = {alias for alias, name in ALIASES.items() if name in sizes}
    return {key: value for key, value in own.items() if key not in sizes | aliases}


def _tokenizer(values: Mapping[str, Value], path: Path) -> Callable[[], TokenizerParts] | None:
    if text_of(values, gguf_tokenizer.MODEL) in ("", *gguf_tokenizer.NO_VOCABULARY):
        return None
    kept = {key: value for key, value in values.items() if key.startswith(gguf_tokenizer.PREFIX)}
    own = {key: values[key] for key in (gguf_tokenizer.OWN,) if key in values}
    return lambda: gguf_tokenizer.parts_from(kept | own, str(path))


def _metadata(values: Mapping[str, Value]) -> dict[str, str]:
    general = {key: value for key, value in values.items() if key.startswith("general.") and isinstance(value, str)}
    return {key: value for key, value in general.items() if key.removeprefix("general.") not in _OF_THE_FILE}


def _notes(header: Header, size: int) -> Iterator[str]:
    quantized = [entry.name for entry in header.entries if entry.code == Q8_0]
    if quantized:
        yield f"{len(quantized)} tensors are stored as Q8_0; they are read as float32, which holds all its values"
    unread = [key for key in header.values if key not in _KNOWN and not key.startswith("general.")]
    if unread:
        yield f"these keys are not read: {', '.join(key[:80] for key in unread[:20])}"
    if text_of(header.values, gguf_tokenizer.MODEL) == "gpt2" and gguf_tokenizer.PRE not in header.values:
        yield "the file does not say how text is cut before merging; GPT-2's way is taken"
    if size - header.end >= gguf_container.ALIGNMENT:
        yield f"the last {size - header.end} bytes belong to no tensor"


# Writing --------------------------------------------------------------------------------------------------------------


def _laid_out(given: Mapping[str, Tensor], about: About) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as the file has them, and the number format of each."""
    given = _without_tied_head(given, about.config)
    wanted = {name: stored_dtype(name, tensor.shape, about.dtype or tensor.dtype) for name, tensor in given.items()}
    reasons = objections(NAME, HOLDS, about.config, about.head, wanted.values())
    if reasons:
        raise CannotHoldError(f"this model cannot be written as gguf: {'; '.join(reasons)}")
    rows = {row.ours: row.theirs[0] for row in NAMES.rows(about.config.n_layer)}
    laid_out = NAMES.to_file(given, about.config)
    dtypes = {rows[name.removeprefix(PREFIX)]: dtype for name, dtype in wanted.items()}
    ready = {
        name: tensor if dtypes[name] == "q8_0" else converted(tensor, dtypes[name]) for name, tensor in laid_out.items()
    }
    return ready, dtypes


def _without_tied_head(given: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """The tensors without a head that is the token table; llama.cpp takes the table where there is no head."""
    kept = dict(given)
    table = next((kept[name] for name in (TOKENS, PREFIX + TOKENS) if name in kept), None)
    head = kept.pop(LM_HEAD, None) if config.tie_word_embeddings else None
    if head is not None and table is not None and not same_numbers(head, table):
        raise CheckpointError(
            f"{LM_HEAD} differs from {TOKENS}, but the configuration ties them; expected the same numbers: set "
            f"tie_word_embeddings=False to store both"
        )
    return kept


def _values(
    about: About, dtypes: Mapping[str, str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Value | list[str]]:
    config = about.config
    values: dict[str, Value | list[str]] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        _NAME: _name(config),
        "general.size_label": _size_label(sum(tensor.size for tensor in tensors.values())),
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    tables = {dtypes[name] for name in tensors if dtypes[name] != "float32"} or {"float32"}
    if len(tables) == 1:
        values["general.file_type"] = _FILE_TYPES[tables.pop()]
    values |= {key: getattr(config, ours) for key, ours in SIZES.items()}
    values |= {_ROWS: config.vocab_size, _INNER: config.inner_dim, _EPSILON: float(config.layer_norm_epsilon)}
    strange = [key for key in metadata if (key in values and key != _NAME) or not key.startswith("general.")]
    if strange or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(
            f"metadata for gguf are texts under keys that begin with 'general.' and say nothing that the model says; "
            f"got {', '.join(map(str, strange)) or 'other values'}"
        )
    values |= dict(metadata)
    values[OWN] = json.dumps(config.to_dict())
    if about.tokenizer is None:
        return values | {gguf_tokenizer.MODEL: gguf_tokenizer.NO_VOCABULARY[0]}
    return values | gguf_tokenizer.tokenizer_values(about.tokenizer, config)


def _name(config: GPT2Config) -> str:
    """What the configuration calls the model, without the folders before it."""
    given = config.extra.get("_name_or_path")
    last = re.split(r"[/\\]", given.rstrip("/\\"))[-1] if isinstance(given, str) else ""
    return last or "GPT-2"


def _size_label(count: int) -> str:
    """How many numbers, as llama.cpp's converter says it: 124M."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 10 * unit else 1}f}{name}"
    return f"{count / 1000:.{0 if count >= 10_000 else 1}f}K"


def _write_file(path: Path, header: bytes, tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> None:
    with atomic_write(path) as file:
        file.write(header)
        for name, tensor in tensors.items():
            written = 0
            for piece in _stored(tensor, dtypes[name]):
                file.write(piece)
                written += len(piece)
            file.write(bytes(gguf_container.padding(written)))
            tensor.release()


def _stored(tensor: Tensor, dtype: str) -> Iterable[memoryview]:
    if dtype != "q8_0":
        return tensor.chunks()
    return (blocks.view(np.uint8).data for blocks in gguf_quantization.quantized_pieces(tensor))
