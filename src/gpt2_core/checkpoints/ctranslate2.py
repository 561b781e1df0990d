"""A folder of CTranslate2: model.bin, with config.json and vocabulary.json beside it.

    uint32 version                         6; 4 and 5 are read too, whose model.bin is the same
    text, uint32                           the kind of model, "TransformerDecoderSpec", and its revision
    uint32 count, then each variable:      text name, uint8 rank, uint32 sizes, uint8 dtype, uint32 bytes, the numbers
    uint32 count, then each alias:         text name, text of the variable that it is

A text is a uint16 length, the bytes, and a zero that the length counts. Dtypes are `DTYPES`; numbers stand row by row,
little-endian, and variables in the order of their names. Variables that are equal are stored once and aliased: the tied
head always, and whatever else happens to be equal, such as biases of zero.

Names are `NAMES`, kernels (out, in) where the hub's are (in, out). Single numbers are the settings of the program:
`decoder/num_heads` and `decoder/activation` (`ACTIVATIONS`) belong to the configuration, those of `GPT2` have the one
value that makes the model a GPT-2, those of `ANY` do not change it. All others are refused by name.

Quantized variables have a `weight_scale` beside them, one number for each row (int8) or for all (int16): a number is
the one that is stored, divided by it. They are read as float32 and not written.

config.json has the names of special tokens and layer_norm_epsilon (null: 1e-5); ours also keeps GPT2Config's dictionary
under `OWN`, which CTranslate2 passes over. vocabulary.json is the list of all tokens, as many as the token table has
rows; there are no merges, so it is read as GPT-2's own tokenizer if that is what it holds. The hub's files, which are
written beside it, are read first.

Source: CTranslate2 4.8: python/ctranslate2/specs/{model,transformer,common}_spec.py, converters/transformers.py
(GPT2Loader); what its converter wrote in each of its quantizations.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints.holds import INSIDE, OWN, About, Holds
from gpt2_core.checkpoints.keras_files import whole_model
from gpt2_core.checkpoints.naming import LM_HEAD
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.tensors import (
    STORAGE,
    Checkpoint,
    MappedFile,
    Shape,
    Tensor,
    as_tensors,
    check_shape,
    file_tensor,
    widen_bfloat16,
)
from gpt2_core.checkpoints.tokenizers import HUB_FILES, gpt2_parts, hub_files
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointFormatError, TokenizerError
from gpt2_core.files import MOST_CONFIG, MOST_SMALL, atomic_folder, atomic_write, file_inside, read_small_file
from gpt2_core.parameters import Head
from gpt2_core.tokenizer_files import TokenizerParts
from gpt2_core.vocabulary import ENDOFTEXT

NAME = "ctranslate2"
RANK = 75
FILES = ("model.bin",)
SUFFIXES: tuple[str, ...] = ()
CONFIG, VOCABULARY = "config.json", "vocabulary.json"
KEPT = "gpt2_duet"
HOLDS = Holds(
    heads=frozenset({Head.LM}),
    dtypes=("float32", "float16", "bfloat16"),
    config=INSIDE,
    fixed=MappingProxyType(
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "pruned_heads": ({},)}
    ),
    tokenizer=OWN,
    uniform=True,
)

_KERNEL = "I O -> O I"
_BLOCK = "decoder/layer_{layer}/"
_PARTS = {
    "attn.c_attn": "self_attention/linear_0",
    "attn.c_proj": "self_attention/linear_1",
    "mlp.c_fc": "ffn/linear_0",
    "mlp.c_proj": "ffn/linear_1",
}
_NORMS = {"ln_1": "self_attention/layer_norm", "ln_2": "ffn/layer_norm"}
_HEAD = "decoder/projection/weight"
_TOKENS = "decoder/embeddings/weight"
NAMES = Names(
    Rule("wte.weight", _TOKENS),
    Rule("wpe.weight", "decoder/position_encodings/encodings"),
    *(Rule(f"h.{{layer}}.{ours}.weight", f"{_BLOCK}{theirs}/gamma") for ours, theirs in _NORMS.items()),
    *(Rule(f"h.{{layer}}.{ours}.bias", f"{_BLOCK}{theirs}/beta") for ours, theirs in _NORMS.items()),
    *(Rule(f"h.{{layer}}.{ours}.weight", f"{_BLOCK}{theirs}/weight", _KERNEL) for ours, theirs in _PARTS.items()),
    *(Rule(f"h.{{layer}}.{ours}.bias", f"{_BLOCK}{theirs}/bias") for ours, theirs in _PARTS.items()),
    Rule("ln_f.weight", "decoder/layer_norm/gamma"),
    Rule("ln_f.bias", "decoder/layer_norm/beta"),
    Rule(LM_HEAD, _HEAD),
)

DTYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
#: activation_function -> the number in the file; the first name of a number is what is read from it.
ACTIVATIONS: Mapping[str, int] = MappingProxyType(
    {
        "relu": 0,
        "gelu_new": 1,
        "gelu_pytorch_tanh": 1,
        "gelu_fast": 1,
        "silu": 2,
        "swish": 2,
        "gelu": 3,
        "quick_gelu": 4,
        "tanh": 5,
    }
)
_HEADS, _ACTIVATION, _SCALE = "decoder/num_heads", "decoder/activation", "_scale"
#: Settings that have to have this value.
GPT2: Mapping[str, int] = MappingProxyType(
    {
        "decoder/pre_norm": 1,
        "decoder/alibi": 0,
        "decoder/scale_embeddings": 0,
        "decoder/start_from_zero_embedding": 0,
        "decoder/embeddings/multiply_by_sqrt_depth": 0,
    }
)
#: Settings that do not change what a GPT-2 computes, and the values that are written.
ANY: Mapping[str, int] = MappingProxyType(
    {
        "decoder/alibi_use_positive_positions": 0,
        "decoder/alignment_heads": 1,
        "decoder/alignment_layer": -1,
        "decoder/scale_alibi": 0,
    }
)
_WIDE = (_HEADS, "decoder/alignment_heads", "decoder/alignment_layer")  # int16 rather than int8
_LATER = "decoder/embeddings/multiply_by_sqrt_depth"  # of former files, not written

_KIND, _REVISION, _VERSION = "TransformerDecoderSpec", 8, 6
_VERSIONS = (4, 5, 6)
_MOST_BYTES = 2**32 - 1
_MOST_NAME, _MOST_VARIABLES = 1000, 1_000_000


def find(path: Path) -> Path | None:
    """The model.bin to open if `path`, a folder or that file, holds this format, else None."""
    file = path / FILES[0] if path.is_dir() else path
    return file if file.is_file() and _looks_like(file) else None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in (*FILES, VOCABULARY)


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a folder of CTranslate2, or its model.bin; tensors are views of the mapped file unless they are quantized.

    Raises: CheckpointFormatError for anything damaged, and for models that are no GPT-2.
    """
    path = Path(path)
    path = path / FILES[0] if path.is_dir() else path
    file = MappedFile(path, writable=writable)
    try:
        return _checkpoint(file, path)
    except CheckpointFormatError as cause:
        file.close()
        raise CheckpointFormatError(f"{path} is not a GPT-2 of CTranslate2: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write the files into the folder `path`; those of the tokenizer if `about` has one.

    Raises: CannotHoldError with all reasons; CheckpointMismatchError unless the tensors are those of `about`;
    CheckpointError, WriteError. Either way the folder is as it was.
    """
    path, given = Path(path), as_tensors(tensors)
    if about is None or metadata or max_shard_bytes is not None:
        raise CheckpointError("ctranslate2 needs about=About(config), and takes neither metadata nor shards")
    whole_model(NAME, HOLDS, given, about)
    beside = dict(_files_beside(about))
    stored = NAMES.to_file(given, about.config)
    large = [name for name, tensor in stored.items() if tensor.nbytes > _MOST_BYTES]
    if large:
        raise CannotHoldError(f"ctranslate2 holds at most {_MOST_BYTES} bytes of one tensor; too large: {large}")
    with atomic_folder(path, replaces=owns) as stage:
        with atomic_write(stage / FILES[0]) as file:
            _write(file, stored, about.config)
        for name, content in beside.items():
            with atomic_write(stage / name) as small:
                small.write(content)
    return (path / FILES[0], *(path / name for name in beside))


def remarks(about: About) -> tuple[str, ...]:
    """What to know about a model of ours in CTranslate2."""
    ends = about.config.eos_token_ids
    return (f"CTranslate2 stops at one token only: {ends[0]}, the first of {ends}",) if len(ends) > 1 else ()


def _looks_like(path: Path) -> bool:
    kind = _text(_KIND)
    with path.open("rb") as file:
        start = file.read(4 + len(kind))
    return len(start) == 4 + len(kind) and int.from_bytes(start[:4], "little") < 100 and start[4:] == kind


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variable:
    """Where a variable stands: its dtype, shape and offset."""

    dtype: str
    shape: Shape
    offset: int


class _Reader:
    """What model.bin holds before and between the numbers, checked against its size as it is read."""

    def __init__(self, file: MappedFile) -> None:
        self.file, self.at = file, 0

    def number(self, size: int) -> int:
        data = self.file.bytes(self.at, size)
        if len(data) != size:
            raise CheckpointFormatError(f"it ends at byte {self.at + len(data)}; it is truncated")
        self.at += size
        return int.from_bytes(data, "little")

    def text(self) -> str:
        size = self.number(2)
        data = self.file.bytes(self.at, size)
        self.at += size
        if not 0 < size <= _MOST_NAME or len(data) != size or data[-1]:
            raise CheckpointFormatError(f"the name at byte {self.at - size} is damaged or truncated")
        try:
            return data[:-1].decode()
        except UnicodeDecodeError as cause:
            raise CheckpointFormatError(f"the name at byte {self.at - size} is not UTF-8") from cause

    def count(self) -> int:
        count = self.number(4)
        if count > min(_MOST_VARIABLES, self.file.size):
            raise CheckpointFormatError(f"it claims {count} variables or aliases, which its size does not allow")
        return count

    def variable(self, name: str) -> Variable:
        sizes = [self.number(4) for _ in range(self.number(1))]
        code, size = self.number(1), self.number(4)
        if code >= len(DTYPES):
            raise CheckpointFormatError(f"{name[:200]} is of the dtype {code}; expected 0 to {len(DTYPES) - 1}")
        shape = check_shape(sizes, DTYPES[code], name[:200])
        expected = prod(shape) * STORAGE[DTYPES[code]].itemsize
        if size != expected or self.at + size > self.file.size:
            raise CheckpointFormatError(
                f"{name[:200]} of {DTYPES[code]} {shape} has {size} bytes at byte {self.at}; expected {expected}, "
                f"within the file of {self.file.size}"
            )
        self.at += size
        return Variable(DTYPES[code], shape, self.at - size)


def _contents(file: MappedFile) -> tuple[dict[str, Variable], dict[str, str]]:
    """All variables, and the aliases of some."""
    reader = _Reader(file)
    version = reader.number(4)
    if version not in _VERSIONS:
        raise CheckpointFormatError(f"its version is {version}; expected one of {', '.join(map(str, _VERSIONS))}")
    kind = reader.text()
    if kind != _KIND:
        raise CheckpointFormatError(f"it holds a {kind[:80]!r}; expected a {_KIND!r}")
    reader.number(4)
    variables: dict[str, Variable] = {}
    aliases: dict[str, str] = {}
    for _ in range(reader.count()):
        name = reader.text()
        if name in variables:
            raise CheckpointFormatError(f"{name[:200]} stands there twice")
        variables[name] = reader.variable(name)
    for _ in range(reader.count()):
        name, meant = reader.text(), reader.text()
        if name in variables or name in aliases or meant not in variables:
            raise CheckpointFormatError(f"the alias {name[:200]} of {meant[:200]} stands there twice, or means nothing")
        aliases[name] = meant
    if reader.at != file.size:
        raise CheckpointFormatError(f"it has {file.size} bytes, and describes {reader.at}")
    return variables, aliases


def _checkpoint(file: MappedFile, path: Path) -> Checkpoint:
    variables, aliases = _contents(file)
    settings = {name: _setting(file, each) for name, each in variables.items() if not each.shape and _whole(each)}
    _check_settings(settings)
    tied = aliases.get(_HEAD) == _TOKENS or _HEAD not in {*variables, *aliases}
    scales = {name for name in variables if name.endswith(_SCALE) and name.removesuffix(_SCALE) in variables}
    there = {
        name: _tensor(file, variables, meant)
        for name, meant in [(name, name) for name in variables] + list(aliases.items())
        if name not in settings and name not in scales and not (tied and name == _HEAD)
    }
    found = NAMES.from_file(there)
    quantized = sum(not name.startswith("float") and name != "bfloat16" for name in _dtypes(variables, there))
    return Checkpoint(
        found.tensors,
        format=NAME,
        path=path,
        files=[path],
        close=file.close,
        config=_config(path.parent, settings, there, tied=tied),
        config_file=path.parent / CONFIG,
        head=Head.LM.value,
        tokenizer=_tokenizer(path.parent),
        names_in_file=found.names_in_file,
        ignored={name: "a setting of CTranslate2 that does not change a GPT-2" for name in settings if name in ANY},
        notes=[f"{quantized} variables are quantized; they are read as float32"] if quantized else [],
    )


def _dtypes(variables: Mapping[str, Variable], there: Mapping[str, Tensor]) -> Iterator[str]:
    return (each.dtype for name, each in variables.items() if name in there)


def _whole(variable: Variable) -> bool:
    return variable.dtype.startswith("int")


def _setting(file: MappedFile, variable: Variable) -> int:
    return int(file.view(variable.offset, STORAGE[variable.dtype], 1)[0])


def _check_settings(settings: Mapping[str, int]) -> None:
    known = {_HEADS, _ACTIVATION, *ANY, *GPT2}
    wrong = [
        f"{name}={value}" for name, value in settings.items() if name not in known or GPT2.get(name, value) != value
    ]
    missing = [name for name in (_HEADS, _ACTIVATION) if name not in settings]
    if wrong or missing or not ({"decoder/scale_embeddings", _LATER} & set(settings)):
        raise CheckpointFormatError(
            f"it has the settings {', '.join(wrong)[:500] or 'of a GPT-2'} and lacks {', '.join(missing) or 'none'}; "
            f"expected those that GPT-2 is converted with, scale_embeddings=0 among them"
        )


def _tensor(file: MappedFile, variables: Mapping[str, Variable], name: str) -> Tensor:
    """A variable; if it is quantized, the float32 numbers that it stands for."""
    it, scale = variables[name], variables.get(name + _SCALE)
    plain = file_tensor(file, it.dtype, it.shape, it.offset)
    if scale is None:
        if _whole(it):
            raise CheckpointFormatError(
                f"{name[:200]} is {it.dtype} without a scale; expected numbers or {name}{_SCALE}"
            )
        return plain
    per_row = (*it.shape[:1], *[1] * (len(it.shape) - 1))
    if it.dtype not in ("int8", "int16") or scale.shape not in ((), it.shape[:1]) or _whole(scale) or not it.shape:
        raise CheckpointFormatError(
            f"{name[:200]} is {it.dtype} {it.shape} with a scale of {scale.dtype} {scale.shape}; expected int8 or "
            f"int16, with one for each row or for all"
        )

    def load() -> NDArray[Any]:
        bits = file.view(scale.offset, STORAGE[scale.dtype], prod(scale.shape))
        by = (widen_bfloat16(bits) if scale.dtype == "bfloat16" else bits).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):  # a scale of a damaged file may be zero
            return plain.view().astype(np.float32) / (by.reshape(per_row) if scale.shape else by[0])

    return Tensor("float32", it.shape, load, plain.release)


def _config(folder: Path, settings: Mapping[str, int], there: Mapping[str, Tensor], *, tied: bool) -> dict[str, Any]:
    """The configuration: what was kept whole if it was, with what the model itself says in any case."""
    said: dict[str, Any] = _json_of(folder / CONFIG, dict) if (folder / CONFIG).exists() else {}
    kept = said.get(KEPT)
    own: dict[str, Any] = kept if isinstance(kept, dict) else {}
    shapes = {name: there[theirs].shape for name, theirs in _SIZES.items() if theirs in there}
    if set(shapes) != set(_SIZES) or any(len(shape) != 2 for shape in shapes.values()):
        raise CheckpointFormatError(f"it lacks {', '.join(_SIZES.values())}, or they are no tables")
    (vocab_size, width), n_positions = shapes["tokens"], shapes["positions"][0]
    names = [name for name, number in ACTIVATIONS.items() if number == settings[_ACTIVATION]]
    if not names or settings[_HEADS] < 1:
        raise CheckpointFormatError(
            f"its {_ACTIVATION} is {settings[_ACTIVATION]}, its {_HEADS} {settings[_HEADS]}; expected those of a GPT-2"
        )
    inner = shapes["inner"][0]
    config: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_positions": n_positions,
        "n_embd": width,
        "n_layer": NAMES.layers_in(there),
        "n_head": settings[_HEADS],
        "n_inner": own.get("n_inner") if inner == 4 * width and own.get("n_inner") in (None, inner) else inner,
        "activation_function": own["activation_function"] if own.get("activation_function") in names else names[0],
        "tie_word_embeddings": tied,
    }
    epsilon = said.get("layer_norm_epsilon")
    if epsilon is not None or not own:
        config["layer_norm_epsilon"] = 1e-5 if epsilon is None else epsilon
    if not own and (folder / VOCABULARY).exists():
        tokens = _json_of(folder / VOCABULARY, list)
        for role in ("bos", "eos"):
            name = said.get(f"{role}_token")
            config[f"{role}_token_id"] = tokens.index(name) if name in tokens else None
    return own | config


_SIZES = {
    "tokens": _TOKENS,
    "positions": "decoder/position_encodings/encodings",
    "inner": "decoder/layer_0/ffn/linear_0/weight",
}


def _json_of(path: Path, kind: type[Any]) -> Any:
    """The list or mapping in a small file beside the model. Raises: CheckpointFormatError."""
    try:
        file = file_inside(path.parent, path.name, what="the folder")
        most = MOST_CONFIG if kind is dict else MOST_SMALL
        value = json.loads(read_small_file(file, CheckpointFormatError, most))
    except (OSError, ValueError, RecursionError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointFormatError(f"{path} is not JSON: {str(cause)[:200]}; fetch it again") from cause
    if not isinstance(value, kind):
        raise CheckpointFormatError(f"{path} holds no {kind.__name__}; fetch it again")
    return value


def _tokenizer(folder: Path) -> Any:
    """A function that reads the tokenizer from vocabulary.json; None where there is none, or the hub's files are."""
    if any((folder / name).is_file() for name in HUB_FILES[:2]) or not (folder / VOCABULARY).exists():
        return None

    def parts() -> TokenizerParts:
        found = gpt2_parts()
        if _json_of(folder / VOCABULARY, list) != _tokens(found):
            raise TokenizerError(
                f"{folder / VOCABULARY} holds tokens that are not GPT-2's, and CTranslate2 does not store merges, so "
                f"text cannot be encoded with it; put the tokenizer's own files into the folder"
            )
        return found

    return parts


# Writing --------------------------------------------------------------------------------------------------------------


def _tokens(parts: TokenizerParts) -> list[str]:
    """All tokens in the order of their ids, as vocabulary files write them."""
    ids: dict[str, int] = json.loads(parts.vocabulary.to_vocab_json())
    ids |= {token.content: token.id for token in parts.added}
    return sorted(ids, key=ids.__getitem__)


def _files_beside(about: About) -> Iterator[tuple[str, bytes]]:
    """config.json, and the tokenizer's files if there is one."""
    config, parts = about.config, about.tokenizer
    epsilon = config.layer_norm_epsilon
    tokens = [] if parts is None else _tokens(parts)
    if len(tokens) > config.vocab_size:
        raise CannotHoldError(
            f"the tokenizer has {len(tokens)} tokens, and the model a table of {config.vocab_size}, which is how many "
            f"CTranslate2 expects; leave the tokenizer out (--no-tokenizer)"
        )
    first = config.eos_token_ids[0] if config.eos_token_ids else None
    names = {
        f"{role}_token": tokens[index] if index is not None and index < len(tokens) else ENDOFTEXT
        for role, index in (("bos", config.bos_token_id), ("eos", first), ("unk", first))
    }
    said = names | {
        "layer_norm_epsilon": None if epsilon == GPT2Config.layer_norm_epsilon else epsilon,
        "multi_query_attention": True,  # what the converter says of every GPT-2
        KEPT: config.to_dict(),
    }
    yield CONFIG, (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()
    if parts is not None:
        tokens += [f"<|unused{index}|>" for index in range(len(tokens), config.vocab_size)]
        yield VOCABULARY, json.dumps(tokens, indent=2).encode()
        yield from hub_files(parts)


def _text(text: str) -> bytes:
    return struct.pack("<H", len(text.encode()) + 1) + text.encode() + b"\0"


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], config: GPT2Config) -> None:
    """model.bin: settings and tensors in the order of their names, and the tied head as an alias."""
    settings = {**GPT2, **ANY, _HEADS: config.n_head, _ACTIVATION: ACTIVATIONS[config.activation_function]}
    del settings[_LATER]
    file.write(struct.pack("<I", _VERSION) + _text(_KIND) + struct.pack("<II", _REVISION, len(settings) + len(tensors)))
    for name in sorted({*settings, *tensors}):
        if name in settings:
            bits = np.array(settings[name], "<i2" if name in _WIDE else "i1").tobytes()
            file.write(_text(name) + struct.pack("<BBI", 0, DTYPES.index(f"int{8 * len(bits)}"), len(bits)) + bits)
            continue
        tensor = tensors[name]
        sizes = struct.pack(f"<B{len(tensor.shape)}I", len(tensor.shape), *tensor.shape)
        file.write(_text(name) + sizes + struct.pack("<BI", DTYPES.index(tensor.dtype), tensor.nbytes))
        for chunk in tensor.chunks():
            file.write(chunk)
        tensor.release()
    file.write(struct.pack("<I", _HEAD not in tensors) + (b"" if _HEAD in tensors else _text(_HEAD) + _text(_TOKENS)))
