"""The original release: what OpenAI's code for GPT-2 reads, a checkpoint of TensorFlow 1 and three files beside it.

    checkpoint                            which checkpoint is meant: model_checkpoint_path: "model.ckpt"
    model.ckpt.index                      names, shapes, where the numbers stand: see `tensor_bundle`
    model.ckpt.data-00000-of-00001        the numbers
    model.ckpt.meta                       the graph that they were trained in; not read
    hparams.json                          {"n_vocab": ..., "n_ctx": ..., "n_embd": ..., "n_head": ..., "n_layer": ...}
    encoder.json, vocab.bpe               the tokenizer: what elsewhere is vocab.json and merges.txt

Names are `NAMES`: `model/wte`, `model/h0/attn/c_attn/w`, ... Kernels are those of a convolution of width one, of shape
(1, in, out); everything else stands as here. The head is the token table. gpt-2-simple and other trainers made from
that code write `model-1000.index` and so on, and name it in `checkpoint`; the state of an optimizer, which some keep,
is listed and not read (`SLOTS`).

- The code has GPT-2's own GELU (tanh), an epsilon of 1e-5, feed-forward layers of four times the width, and float32. It
  cannot be told otherwise, so a model that differs is refused on writing. Other float formats are read.
- The code refuses names in hparams.json that it does not know, and so do we, but for the dropouts that OpenAI's next
  code has there. All five of its own have to be there.
- An absolute path in `checkpoint` is where the folder stood when it was trained: its last part is looked for here. Any
  other path with folders in it is refused. Where the file is missing that it names, or where it is missing itself,
  model.ckpt.index is read, or else the only index there is.
- The .meta that is written is a graph of nothing (2 bytes). `Saver.restore` and `latest_checkpoint` need none, since
  the graph is in the code; but gpt-2-simple counts the seven files of the release, and takes a folder for one that has
  not been downloaded if one is missing.

TensorFlow is not used. Source: openai/gpt-2, src/{model,sample,interactive_conditional_samples,encoder}.py and
download_model.py (2019); openai/lm-human-preferences (2019); minimaxir/gpt-2-simple (2019); TensorFlow's
training/saver.py, checkpoint_state.proto and the optimizers of tf.compat.v1.train.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from gpt2_core.checkpoints import tensor_bundle
from gpt2_core.checkpoints.holds import INSIDE, About, Holds, objections
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.tensor_bundle import INDEX, Bundle
from gpt2_core.checkpoints.tensors import Checkpoint, Tensor, as_tensors
from gpt2_core.checkpoints.tokenizers import OPENAI_FILES, openai_files
from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_folder, atomic_write, file_inside, finish_interrupted_save, read_small_file
from gpt2_core.parameters import Head
from gpt2_core.tokenizer_files import TokenizerParts, read_pair_of_files

NAME = "openai"
RANK = 60
STEM = "model.ckpt"
STATE = "checkpoint"
HPARAMS = "hparams.json"
FILES = (STEM + INDEX, STATE)
SUFFIXES: tuple[str, ...] = ()

#: The names in hparams.json -> ours.
HYPERPARAMETERS: Mapping[str, str] = MappingProxyType(
    {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
)
#: What openai/lm-human-preferences may have there besides -> ours; its further heads are no GPT-2's.
DROPOUTS: Mapping[str, str | None] = MappingProxyType(
    {"resid_pdrop": "resid_pdrop", "embd_pdrop": "embd_pdrop", "attn_pdrop": "attn_pdrop", "head_pdrop": None}
)

HOLDS = Holds(
    heads=frozenset({Head.LM}),
    dtypes=("float32",),
    config=INSIDE,
    config_keys=frozenset(HYPERPARAMETERS.values()),
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
    tokenizer=INSIDE,
)

_KERNEL = "I O -> 1 I O"
_BLOCK = "model/h{layer}/"
NAMES = Names(
    Rule("wte.weight", "model/wte"),
    Rule("wpe.weight", "model/wpe"),
    Rule("h.{layer}.ln_1.weight", f"{_BLOCK}ln_1/g"),
    Rule("h.{layer}.ln_1.bias", f"{_BLOCK}ln_1/b"),
    Rule("h.{layer}.attn.c_attn.weight", f"{_BLOCK}attn/c_attn/w", _KERNEL),
    Rule("h.{layer}.attn.c_attn.bias", f"{_BLOCK}attn/c_attn/b"),
    Rule("h.{layer}.attn.c_proj.weight", f"{_BLOCK}attn/c_proj/w", _KERNEL),
    Rule("h.{layer}.attn.c_proj.bias", f"{_BLOCK}attn/c_proj/b"),
    Rule("h.{layer}.ln_2.weight", f"{_BLOCK}ln_2/g"),
    Rule("h.{layer}.ln_2.bias", f"{_BLOCK}ln_2/b"),
    Rule("h.{layer}.mlp.c_fc.weight", f"{_BLOCK}mlp/c_fc/w", _KERNEL),
    Rule("h.{layer}.mlp.c_fc.bias", f"{_BLOCK}mlp/c_fc/b"),
    Rule("h.{layer}.mlp.c_proj.weight", f"{_BLOCK}mlp/c_proj/w", _KERNEL),
    Rule("h.{layer}.mlp.c_proj.bias", f"{_BLOCK}mlp/c_proj/b"),
    Rule("ln_f.weight", "model/ln_f/g"),
    Rule("ln_f.bias", "model/ln_f/b"),
)

_STATE_OF_OPTIMIZER = "the state of the optimizer"
_OPTIMIZERS = {"Adam": 2, "Momentum": 1, "RMSProp": 3, "Adagrad": 1, "Adadelta": 2, "Ftrl": 2}
#: What TensorFlow 1 puts behind a parameter's name -> what it is. A second slot of an optimizer ends in _1.
SLOTS: Mapping[str, str] = MappingProxyType(
    {
        f"{name}_{slot}".removesuffix("_0"): _STATE_OF_OPTIMIZER
        for name, slots in _OPTIMIZERS.items()
        for slot in range(slots)
    }
    | {"ExponentialMovingAverage": "a moving average of the parameter"}
)
#: What has no parameter's name and is no part of the model.
OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "global_step": "how many steps were made",
        "beta1_power": _STATE_OF_OPTIMIZER,
        "beta2_power": _STATE_OF_OPTIMIZER,
        "save_counter/.ATTRIBUTES/VARIABLE_VALUE": "how often it was saved",
        "_CHECKPOINTABLE_OBJECT_GRAPH": "the names of Python's objects, which TensorFlow 2 keeps",
    }
)

_META_SUFFIX = ".meta"
_META = b"\x12\x00"  # a MetaGraphDef with an empty graph_def
_MOST_TEXT = 1 << 20  # bytes of `checkpoint` and of hparams.json
_MOST_TOKENIZER = 1 << 28  # bytes
_MOST_LAYERS = 10_000
_OBJECTS = "/.ATTRIBUTES/VARIABLE_VALUE"
_DATA = re.compile(r"(.+)\.data-\d{5}-of-\d{5}")
_OWN_DATA = re.compile(rf"{re.escape(STEM)}\.data-\d{{5}}-of-\d{{5}}")
_STATE_BEGINS = re.compile(rb"\s*model_checkpoint_path\s*:")
_STATE_PATH = re.compile(rb"""^\s*model_checkpoint_path\s*:\s*(["'])((?:[^"'\\\n]|\\.)*)\1\s*$""", re.MULTILINE)
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|x[0-9A-Fa-f]{1,2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"t": b"\t", b"r": b"\r"}


def find(path: Path) -> Path | None:
    """The file to open if `path`, a folder, a file, or what all names begin with, holds this format, else None."""
    if not path.is_dir():
        index = path if _is_state(path) else _index_of(path)
        return index if index is not None and (_is_state(index) or _is_index(index)) else None
    if _is_state(path / STATE) and _says_where(path / STATE):
        return path / STATE
    return _lone_index(path)


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in (STEM + INDEX, STEM + _META_SUFFIX, HPARAMS) or _OWN_DATA.fullmatch(name) is not None


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a folder of the original release or of a trainer made from it, its `checkpoint`, or a .index in it.

    Raises: CheckpointError for what is not there; UnsafeCheckpointError for names and links that leave the folder;
    CheckpointFormatError for anything damaged, and for what is no checkpoint of this kind.
    """
    index, notes = _locate(Path(path))
    config, more = _config(index.parent)
    bundle = Bundle(index.with_name(index.name.removesuffix(INDEX)), writable=writable)
    try:
        return _checkpoint(bundle, config, [*notes, *more])
    except CheckpointFormatError as cause:
        bundle.close()
        raise CheckpointFormatError(f"{index} is not a checkpoint of OpenAI's code: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write the files of the release into the folder `path`; those of the tokenizer if `about` has one.

    Raises: CannotHoldError with all reasons for a model that OpenAI's code would compute otherwise; CheckpointError,
    WriteError.
    """
    path = Path(path)
    if about is None or metadata or max_shard_bytes is not None:
        raise CheckpointError("openai needs about=About(config), and takes neither metadata nor shards")
    given = as_tensors(tensors)
    reasons = objections(NAME, HOLDS, about.config, about.head, {tensor.dtype for tensor in given.values()})
    if reasons:
        raise CannotHoldError(f"the model cannot be written as openai: {'; '.join(reasons)}")
    beside = _files_beside(about)
    stored = NAMES.to_file(given, about.config)
    with atomic_folder(path, replaces=owns) as stage:
        for name, content in beside.items():
            with atomic_write(stage / name) as file:
                file.write(content)
        tensor_bundle.write(stage / STEM, stored)
        written = sorted(file.name for file in stage.iterdir())
    return tuple(path / name for name in written)


# Which file ----------------------------------------------------------------------------------------------------------


def _index_of(path: Path) -> Path | None:
    """The .index that goes with any file of a checkpoint, or with what the names of all begin with."""
    if path.name.endswith(INDEX):
        return path
    data = _DATA.fullmatch(path.name)
    if data is not None or path.name.endswith(_META_SUFFIX):
        return path.with_name((data[1] if data else path.name.removesuffix(_META_SUFFIX)) + INDEX)
    return None if path.exists() else path.with_name(path.name + INDEX)


def _is_state(path: Path) -> bool:
    """Whether this is a file `checkpoint` as TensorFlow writes it."""
    if path.name != STATE or not path.is_file():
        return False
    with path.open("rb") as file:
        return _STATE_BEGINS.match(file.read(256)) is not None


def _says_where(state: Path) -> bool:
    """Whether a file `checkpoint` names a checkpoint beside it, or is at fault, which is said when it is opened."""
    try:
        return _named_by(state)[0].is_file()
    except CheckpointError:
        return True


def _lone_index(folder: Path) -> Path | None:
    """model.ckpt.index, or the only index in a folder."""
    own = folder / (STEM + INDEX)
    found = [own] if own.is_file() else list(folder.glob("*" + INDEX))
    return found[0] if len(found) == 1 and _is_index(found[0]) else None


def _is_index(path: Path) -> bool:
    return path.is_file() and tensor_bundle.is_index(path)


def _locate(path: Path) -> tuple[Path, list[str]]:
    """The .index to read, and what a person should know about how it was found."""
    if path.is_dir():
        finish_interrupted_save(path)
        entry = find(path) or (path / STATE if _is_state(path / STATE) else path / (STEM + INDEX))
    else:
        entry = path
    if not _is_state(entry):
        found = _index_of(entry)
        if found is None:
            raise CheckpointFormatError(
                f"{entry} is no part of a TensorFlow checkpoint; expected a folder, or a .index"
            )
        return found, []
    index, note = _named_by(entry)
    if not index.exists():
        raise CheckpointError(
            f"{entry} names {index.name.removesuffix(INDEX)!r}, but {index} is not there; put the files of that "
            f"checkpoint into the folder, or give the .index that is meant"
        )
    return index, [note] if note else []


def _named_by(state: Path) -> tuple[Path, str]:
    """The .index that a file `checkpoint` names, and a note if it names it by where it was.

    Raises: UnsafeCheckpointError for a path that leaves the folder; CheckpointFormatError for a damaged file.
    """
    lines = _STATE_PATH.findall(_small_file(state))
    if len(lines) != 1:
        raise CheckpointFormatError(
            f"{state} names {len(lines)} checkpoints as the last one; expected one line model_checkpoint_path: "
            f'"{STEM}"; correct it, or give the .index that is meant'
        )
    try:
        named = _ESCAPE.sub(_unescaped, lines[0][1]).decode()
    except UnicodeDecodeError as cause:
        raise CheckpointFormatError(f"{state} names a checkpoint by bytes that are not UTF-8; correct it") from cause
    name, note = named, ""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(named).is_absolute():
            name = kind(named).name
            note = f"{state} says that the checkpoint stands at {named!r}; {name!r} beside it was read"
    return file_inside(state.parent, name + INDEX, what=str(state)), note


def _unescaped(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code[0] in b"01234567":
        return bytes([int(code, 8) & 255])
    return bytes([int(code[1:], 16)]) if len(code) > 1 else _ESCAPED.get(code, code)


def _small_file(path: Path) -> bytes:
    """The content of one of the small files of a folder. Raises: CheckpointFormatError."""
    try:
        if path.stat().st_size > _MOST_TEXT:
            raise CheckpointFormatError(f"{path} has {path.stat().st_size} bytes; expected at most {_MOST_TEXT}")
        return read_small_file(path, CheckpointFormatError)
    except FileNotFoundError as cause:
        raise CheckpointFormatError(f"{path} is not there any more; expected a small file") from cause
    except OSError as cause:
        raise CheckpointFormatError(f"{path} cannot be looked at: {cause.strerror}; check its permissions") from cause


# What it holds -------------------------------------------------------------------------------------------------------


def _checkpoint(bundle: Bundle, config: Mapping[str, int | float] | None, notes: list[str]) -> Checkpoint:
    n_layer = NAMES.layers_in(bundle.entries)
    ignored = _ignorable(bundle.entries, n_layer)
    names = [name for name in bundle.entries if name not in ignored]
    _refuse_objects(names)
    there = {name: bundle.tensor(name) for name in names}
    _check_kernels(there, n_layer)
    found = NAMES.from_file(there)
    folder = bundle.index.parent
    return Checkpoint(
        found.tensors,
        format=NAME,
        path=bundle.index,
        files=bundle.files,
        close=bundle.close,
        config=config,
        config_file=folder / HPARAMS if config is not None else None,
        head=Head.LM.value,
        tokenizer=_tokenizer(folder) if any((folder / name).exists() for name in OPENAI_FILES) else None,
        names_in_file=found.names_in_file,
        ignored=ignored,
        notes=notes,
    )


def _ignorable(names: Iterable[str], n_layer: int) -> dict[str, str]:
    """The names there that are no parameters, but are known -> what they are."""
    parameters = {name for row in NAMES.rows(n_layer) for name in row.theirs}
    found = {name: OTHERS[name] for name in names if name in OTHERS}
    for name in names:
        parameter, _, slot = name.rpartition("/")
        if parameter in parameters and slot in SLOTS:
            found[name] = SLOTS[slot]
    return found


def _refuse_objects(names: Iterable[str]) -> None:
    objects = [name for name in names if name.endswith(_OBJECTS)]
    if objects:
        raise CheckpointFormatError(
            f"its names are those of Python's objects ({', '.join(map(repr, objects[:3]))} ...), as Keras and "
            f"tf.train.Checkpoint write them, where OpenAI's code has model/wte, model/h0/attn/c_attn/w; save the "
            f"model in Keras's own format"
        )


def _check_kernels(tensors: Mapping[str, Tensor], n_layer: int) -> None:
    """Raise CheckpointFormatError unless all kernels have the shape (1, in, out): without the 1 it might be turned."""
    kernels = [row.theirs[0] for row in NAMES.rows(n_layer) if row.pattern is not None]
    shapes = {name: tensors[name].shape for name in kernels if name in tensors}
    odd = [f"{name} is {shape}" for name, shape in shapes.items() if len(shape) != 3 or shape[0] != 1]
    if odd:
        raise CheckpointFormatError(f"its kernels are not of the shape (1, in, out): {', '.join(odd[:10])}")


def _tokenizer(folder: Path) -> Callable[[], TokenizerParts]:
    def parts() -> TokenizerParts:
        vocabulary, merges = (file_inside(folder, name, what="the folder") for name in OPENAI_FILES)
        for file in (vocabulary, merges):
            if file.exists() and file.stat().st_size > _MOST_TOKENIZER:
                raise CheckpointFormatError(
                    f"{file} has {file.stat().st_size} bytes; expected at most {_MOST_TOKENIZER}"
                )
        return read_pair_of_files(vocabulary, merges)

    return parts


def _config(folder: Path) -> tuple[dict[str, int | float] | None, list[str]]:
    """What hparams.json says, under our names, and notes; None if there is no such file."""
    if not (folder / HPARAMS).exists():
        return None, []
    file = file_inside(folder, HPARAMS, what="the folder")
    try:
        given = json.loads(_small_file(file))
    except (ValueError, RecursionError) as cause:
        raise CheckpointFormatError(f"{file} is not JSON: {str(cause)[:200]}; fetch it again") from cause
    known = {*HYPERPARAMETERS, *DROPOUTS}
    if not isinstance(given, dict) or not set(HYPERPARAMETERS) <= set(given) <= known:
        raise CheckpointFormatError(
            f"{file} holds {repr(given)[:300]}; expected {', '.join(HYPERPARAMETERS)} and nothing else: OpenAI's code "
            f"refuses other names. Remove those that do not change the model"
        )
    sizes = {ours: given[theirs] for theirs, ours in HYPERPARAMETERS.items()}
    chances = {name: given[name] for name in DROPOUTS if name in given}
    good = all(type(size) is int and 0 < size < 1 << 31 for size in sizes.values())
    if not good or sizes["n_layer"] > _MOST_LAYERS:
        raise CheckpointFormatError(
            f"{file} holds {repr(given)[:300]}; expected sizes above zero, and up to {_MOST_LAYERS} layers; correct it"
        )
    if not all(type(chance) in (int, float) and 0 <= chance <= 1 for chance in chances.values()):
        raise CheckpointFormatError(f"{file} holds {repr(given)[:300]}; expected dropouts from 0 to 1; correct it")
    lost = [
        f"{HPARAMS} says {name}={chance}, which belongs to another head"
        for name, chance in chances.items()
        if DROPOUTS[name] is None
    ]
    return sizes | {ours: chances[name] for name, ours in DROPOUTS.items() if ours and name in chances}, lost


# Writing -------------------------------------------------------------------------------------------------------------


def _files_beside(about: About) -> dict[str, bytes]:
    """Every file but the checkpoint's own two."""
    sizes = {theirs: getattr(about.config, ours) for theirs, ours in HYPERPARAMETERS.items()}
    files = {} if about.tokenizer is None else dict(openai_files(about.tokenizer, NAME))
    return files | {
        HPARAMS: (json.dumps(sizes, indent=2) + "\n").encode(),
        STATE: f'model_checkpoint_path: "{STEM}"\nall_model_checkpoint_paths: "{STEM}"\n'.encode(),
        STEM + _META_SUFFIX: _META,
    }
