"""llm.c's model files: a header of 256 int32, and the parameters one after the other without names.

    header    20240326, version, n_positions, vocab_size, n_layer, n_head, n_embd, the padded vocab_size, zeros
    numbers   wte, wpe, then each field, for all layers before the next field:
              versions 1 3 5    ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb
              versions 2 4      qkvw qkvb attprojw attprojb fcw fcb fcprojw fcprojb ln1w ln1b ln2w ln2b lnfw lnfb

Kernels are (out, in), where the hub's are (in, out). From version 3 on wte has rows of zeros after the last token, up
to a multiple of 128; they belong to no token and are left out.

    1  float32                                    5  bfloat16, padded
    2  float32; or bfloat16 with float32 norms    4  bfloat16 with float32 norms, padded
    3  float32, padded; for some days of April 2024, without the padded size, bfloat16 with float32 norms

Where a version has two meanings the size of the file tells which. 3 and 5 are written: the program reads no others.
The model is GPT-2's: GELU by tanh, epsilon 1e-5, four times n_embd in between, a tied head.

gpt2_tokenizer.bin beside it: a header of 256 int32 (20240328; version 1 or 2; tokens; from version 2 on the end of
text), then for each token a byte of length and its bytes. There are no merges, so text cannot be encoded from it: it is
read as GPT-2's own vocabulary if that is what it holds, and not otherwise.

Source: llm.c, March to September 2024: train_gpt2.py (write_model, write_tokenizer), dev/eval/export_hf.py, and
train_gpt2.cu (gpt2_write_to_checkpoint, and the comment "5 = bf16, padded vocab, layernorms also in bf16", from which
version 4 is understood: no program that writes it was found).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from numpy.typing import NDArray

from gpt2_core.checkpoints.holds import INSIDE, OWN, About, Holds
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.tensors import STORAGE, Checkpoint, MappedFile, Tensor, as_tensors, file_tensor
from gpt2_core.checkpoints.tokenizers import gpt2_parts
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError, TokenizerError
from gpt2_core.files import atomic_folder, atomic_write
from gpt2_core.parameters import Head
from gpt2_core.tokenizer_files import TokenizerParts
from gpt2_core.vocabulary import ENDOFTEXT

NAME = "llmc"
RANK = 70
FILES = ("llmc_model.bin",)
SUFFIXES = (".bin",)
TOKENIZER = "gpt2_tokenizer.bin"
HOLDS = Holds(
    heads=frozenset({Head.LM}),
    dtypes=("float32", "bfloat16"),
    config=INSIDE,
    config_keys=frozenset({"vocab_size", "n_positions", "n_layer", "n_head", "n_embd"}),
    fixed=MappingProxyType(
        {
            "n_inner": (None,),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "pruned_heads": ({},),
            "tie_word_embeddings": (True,),
        }
    ),
    tokenizer=OWN,
    uniform=True,
)

_KERNEL = "I O -> O I"
NAMES = Names(
    Rule("wte.weight", "wte"),
    Rule("wpe.weight", "wpe"),
    Rule("h.{layer}.ln_1.weight", "ln1w[{layer}]"),
    Rule("h.{layer}.ln_1.bias", "ln1b[{layer}]"),
    Rule("h.{layer}.attn.c_attn.weight", "qkvw[{layer}]", _KERNEL),
    Rule("h.{layer}.attn.c_attn.bias", "qkvb[{layer}]"),
    Rule("h.{layer}.attn.c_proj.weight", "attprojw[{layer}]", _KERNEL),
    Rule("h.{layer}.attn.c_proj.bias", "attprojb[{layer}]"),
    Rule("h.{layer}.ln_2.weight", "ln2w[{layer}]"),
    Rule("h.{layer}.ln_2.bias", "ln2b[{layer}]"),
    Rule("h.{layer}.mlp.c_fc.weight", "fcw[{layer}]", _KERNEL),
    Rule("h.{layer}.mlp.c_fc.bias", "fcb[{layer}]"),
    Rule("h.{layer}.mlp.c_proj.weight", "fcprojw[{layer}]", _KERNEL),
    Rule("h.{layer}.mlp.c_proj.bias", "fcprojb[{layer}]"),
    Rule("ln_f.weight", "lnfw"),
    Rule("ln_f.bias", "lnfb"),
)

#: What llm.c's own scripts call their files: looked for, never written or removed.
_THEIRS = tuple(f"gpt2_{size}{kind}.bin" for size in ("124M", "355M", "774M", "1558M") for kind in ("", "_bf16"))
_MAGIC, _TOKENIZER_MAGIC = 20240326, 20240328
_HEADER = struct.Struct("<256i")
_MULTIPLE = 128  # rows that the token table is padded to
_NORMS = ("ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")
_INLINE = ("ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
           "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb")  # fmt: skip
_LAST = tuple(field for field in _INLINE if field not in _NORMS) + _NORMS
_MOST_TOKEN = 255


@dataclass(frozen=True)
class Kind:
    """One way in which a file may be laid out: number formats, the order of fields, whether wte is padded."""

    dtype: str
    norms: str
    fields: tuple[str, ...]
    padded: bool


_FLOAT, _LATER_FLOAT = Kind("float32", "float32", _INLINE, False), Kind("float32", "float32", _LAST, False)
_MIXED = Kind("bfloat16", "float32", _LAST, False)
KINDS: Mapping[int, tuple[Kind, ...]] = {
    1: (_FLOAT,),
    2: (_LATER_FLOAT, _MIXED),
    3: (Kind("float32", "float32", _INLINE, True), _MIXED),
    4: (Kind("bfloat16", "float32", _LAST, True),),
    5: (Kind("bfloat16", "bfloat16", _INLINE, True),),
}
_WRITTEN = {"float32": 3, "bfloat16": 5}


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, holds this format, else None."""
    if path.is_dir():
        here = [path / name for name in (*FILES, *_THEIRS) if (path / name).is_file()]
        return next((file for file in here if _looks_like(file)), None)
    return path if path.is_file() and _looks_like(path) else None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in (FILES[0], TOKENIZER)


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a model file or a folder with one, of any version. Raises: CheckpointFormatError."""
    path = Path(path)
    found = find(path) if path.is_dir() else path
    if found is None:
        raise CheckpointError(
            f"{path} holds no model of llm.c: expected {FILES[0]}, or {_THEIRS[0]} and the like; give the file itself"
        )
    file = MappedFile(found, writable=writable)
    try:
        return _checkpoint(file, found)
    except CheckpointFormatError as cause:
        file.close()
        raise CheckpointFormatError(f"{found} is not a sound model of llm.c: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write a model file of version 3 (float32) or 5 (bfloat16), to a file that ends in .bin or into a folder.

    A folder gets the tokenizer too, as gpt2_tokenizer.bin, if there is one. Raises: CheckpointError for what cannot be
    stored, WriteError; either way the path is as it was.
    """
    path, given = Path(path), as_tensors(tensors)
    if about is None or metadata or max_shard_bytes is not None:
        raise CheckpointError("llmc needs about=About(config), and takes neither metadata nor shards")
    if path.suffix in SUFFIXES and not path.is_dir():
        _write_file(path, given, about.config)
        return (path,)
    names = [FILES[0]]
    with atomic_folder(path, replaces=owns) as stage:
        _write_file(stage / FILES[0], given, about.config)
        if about.tokenizer is not None:
            with atomic_write(stage / TOKENIZER) as file:
                file.write(tokenizer_bytes(about.tokenizer))
            names.append(TOKENIZER)
    return tuple(path / name for name in names)


def _looks_like(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == _MAGIC.to_bytes(4, "little")


# Reading --------------------------------------------------------------------------------------------------------------


def _checkpoint(file: MappedFile, path: Path) -> Checkpoint:
    if file.size < _HEADER.size:
        raise CheckpointFormatError(f"it has {file.size} bytes, and the header alone {_HEADER.size}; it is truncated")
    magic, version, *numbers = _HEADER.unpack(file.bytes(0, _HEADER.size))
    if magic != _MAGIC or version not in KINDS:
        raise CheckpointFormatError(
            f"its first numbers are {magic} and {version}; expected {_MAGIC} and a version from 1 to 5"
        )
    config, padded = _config(numbers)
    shapes = _shapes(config)
    candidates = [kind for kind in KINDS[version] if kind.padded == (padded > 0)]
    sizes = [_size(kind, shapes, config, padded) for kind in candidates]
    if file.size not in sizes:
        expected = " or ".join(map(str, sizes)) or "a padded size that goes with its version"
        raise CheckpointFormatError(
            f"it has {file.size} bytes; its header (version {version}, {config}) asks for {expected}: it is "
            f"truncated, or of another kind"
        )
    kind = candidates[sizes.index(file.size)]
    there = {
        name: file_tensor(file, dtype, shape, at) for name, dtype, shape, at in _places(kind, shapes, config, padded)
    }
    renamed = NAMES.from_file(there)
    extra = padded - config["vocab_size"] if kind.padded else 0
    return Checkpoint(
        renamed.tensors,
        format=NAME,
        path=path,
        close=file.close,
        config=config,
        head=Head.LM.value,
        tokenizer=_tokenizer_beside(path),
        names_in_file=renamed.names_in_file,
        ignored={f"the last {extra} rows of wte": f"padding to a multiple of {_MULTIPLE}"} if extra else {},
    )


def _config(numbers: list[int]) -> tuple[dict[str, Any], int]:
    """The configuration in the header, and the rows of the token table, 0 if it does not say."""
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    config: dict[str, Any] = dict(zip(names, numbers, strict=False))
    padded = numbers[len(names)]
    if min(config.values()) < 1 or config["n_embd"] % config["n_head"] or (padded and padded < config["vocab_size"]):
        raise CheckpointFormatError(f"its header says {config} and a padded vocabulary of {padded}; it is damaged")
    return config, padded


def _shapes(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of each field in the file, for one layer."""
    width = config["n_embd"]
    vectors = dict.fromkeys((*_NORMS, "attprojb", "fcprojb"), (width,))
    return {
        **vectors,
        "wte": (config["vocab_size"], width),
        "wpe": (config["n_positions"], width),
        "qkvw": (3 * width, width),
        "qkvb": (3 * width,),
        "attprojw": (width, width),
        "fcw": (4 * width, width),
        "fcb": (4 * width,),
        "fcprojw": (width, 4 * width),
    }


def _dtype(kind: Kind, field: str) -> str:
    return kind.norms if field in _NORMS else kind.dtype


def _size(kind: Kind, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, int], padded: int) -> int:
    """The bytes of a whole file; arithmetic alone, whatever the header claims."""
    rows = padded if kind.padded else config["vocab_size"]
    total = _HEADER.size + (rows + config["n_positions"]) * config["n_embd"] * STORAGE[kind.dtype].itemsize
    for field in kind.fields:
        times = 1 if field.startswith("lnf") else config["n_layer"]
        total += times * prod(shapes[field]) * STORAGE[_dtype(kind, field)].itemsize
    return total


def _places(
    kind: Kind, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, int], padded: int
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and offset of everything in the file, in its order."""
    at, width = _HEADER.size, STORAGE[kind.dtype].itemsize
    yield "wte", kind.dtype, shapes["wte"], at
    at += (padded if kind.padded else config["vocab_size"]) * config["n_embd"] * width
    yield "wpe", kind.dtype, shapes["wpe"], at
    at += prod(shapes["wpe"]) * width
    for field in kind.fields:
        dtype, once = _dtype(kind, field), field.startswith("lnf")
        for layer in range(1 if once else config["n_layer"]):
            yield field if once else f"{field}[{layer}]", dtype, shapes[field], at
            at += prod(shapes[field]) * STORAGE[dtype].itemsize


# Writing --------------------------------------------------------------------------------------------------------------


def _write_file(path: Path, tensors: Mapping[str, Tensor], config: GPT2Config) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(_WRITTEN):
        raise CheckpointError(f"llmc holds float32 or bfloat16 alone, not {', '.join(sorted(dtypes))}; convert them")
    (dtype,) = dtypes
    sizes = {key: getattr(config, key) for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")}
    padded = -(-config.vocab_size // _MULTIPLE) * _MULTIPLE
    there, kind = NAMES.to_file(tensors, config), KINDS[_WRITTEN[dtype]][0]
    places = list(_places(kind, _shapes(sizes), sizes, padded))
    wrong = [name for name, _, shape, _ in places if name not in there or there[name].shape != shape]
    if wrong or len(places) != len(there):
        raise CheckpointError(
            f"these tensors are not those of the configuration: {', '.join(wrong[:20]) or 'some are too many'}; "
            f"llmc holds a whole language model and nothing else"
        )
    numbers = [_MAGIC, _WRITTEN[dtype], *sizes.values(), padded]
    with atomic_write(path) as file:
        file.write(_HEADER.pack(*numbers, *[0] * (256 - len(numbers))))
        for name, _, _, _ in places:
            _write_tensor(file, there[name])
            if name == "wte":
                _write_zeros(file, (padded - config.vocab_size) * config.n_embd * STORAGE[dtype].itemsize)


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    for chunk in tensor.chunks():
        file.write(chunk)
    tensor.release()


def _write_zeros(file: BinaryIO, count: int) -> None:
    file.write(bytes(count))


# The tokenizer --------------------------------------------------------------------------------------------------------


def _tokenizer_beside(path: Path) -> Any:
    """A function that reads the tokenizer beside a model, or None if there is none."""
    file = path.parent / TOKENIZER
    return (lambda: read_tokenizer(file)) if file.is_file() else None


def read_tokenizer(path: Path) -> TokenizerParts:
    """The tokenizer of a gpt2_tokenizer.bin.

    Raises: CheckpointFormatError for a damaged file, TokenizerError for a vocabulary that is not GPT-2's.
    """
    with_size = MappedFile(path)
    tokens = _tokens(with_size.bytes(0, min(with_size.size, 1 << 26)), path)
    with_size.close()
    parts = gpt2_parts()
    if tokens != list(parts.vocabulary.token_bytes):
        raise TokenizerError(
            f"{path} holds {len(tokens)} tokens that are not GPT-2's, and llm.c does not store merges, so text cannot "
            f"be encoded with it; copy the tokenizer's own files yourself"
        )
    return parts


def _tokens(data: bytes, path: Path) -> list[bytes]:
    if len(data) < _HEADER.size:
        raise CheckpointFormatError(f"{path} has {len(data)} bytes; expected a header of {_HEADER.size}")
    magic, version, count, *_ = _HEADER.unpack_from(data)
    if magic != _TOKENIZER_MAGIC or version not in (1, 2) or not 0 < count <= len(data):
        raise CheckpointFormatError(
            f"{path} begins with {magic}, {version}, {count}; expected {_TOKENIZER_MAGIC}, version 1 or 2, and tokens"
        )
    tokens, at = [], _HEADER.size
    for _ in range(count):
        length = data[at] if at < len(data) else 0
        tokens.append(data[at + 1 : at + 1 + length])
        at += 1 + length
    if at != len(data):
        raise CheckpointFormatError(f"{path} has {len(data)} bytes, and its {count} tokens need {at}; fetch it again")
    return tokens


def tokenizer_bytes(parts: TokenizerParts) -> bytes:
    """The content of a gpt2_tokenizer.bin. Raises: CheckpointError for a token of more than 255 bytes."""
    tokens = list(parts.vocabulary.token_bytes)
    tokens += [token.content.encode() for token in parts.added if token.id >= len(tokens)]
    longest = max(map(len, tokens))
    if longest > _MOST_TOKEN:
        raise CheckpointError(
            f"one of the tokens has {longest} bytes, and llm.c holds {_MOST_TOKEN} at most; leave the tokenizer out "
            f"(--no-tokenizer)"
        )
    ids = {token.content: token.id for token in parts.added} | parts.vocabulary.token_ids
    end = ids.get(parts.settings.get("eos_token") or ENDOFTEXT)
    numbers = [_TOKENIZER_MAGIC, 1, len(tokens)] if end is None else [_TOKENIZER_MAGIC, 2, len(tokens), end]
    header = _HEADER.pack(*numbers, *[0] * (256 - len(numbers)))
    return header + b"".join(bytes([len(token)]) + token for token in tokens)
