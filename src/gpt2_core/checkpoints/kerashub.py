"""KerasHub's preset of a GPT2: the folder that `save_to_preset` writes and `from_preset` loads.

    config.json                    the backbone: its class, `BACKBONE`, and its sizes (`SIZES`)
    task.json                      the language model on it, `TASK`; not there where the backbone was saved alone
    preprocessor.json              how texts become rows of ids: lengths, whether start and end are added; not read
    tokenizer.json                 the tokenizer's settings; of the same name as the hub's, and nothing alike
    assets/tokenizer/vocabulary.json, assets/tokenizer/merges.txt
    metadata.json                  versions and counts, for people; not read
    model.weights.h5               the variables of the backbone, or
    model.weights.json             an index of them, and model_00000.weights.h5, ...: see `keras_files`

`NAMES` are the paths. Queries, keys and values have a kernel (C, H, D) and a bias (H, D) each, where ours are packed as
c_attn of (C, 3 H D); the kernel behind them is (H, D, C). C is the width of the model, H counts heads of width D.

- GPT2Backbone has the tanh form of GELU, an epsilon of 1e-5 and the token table as its head, and cannot be told
  otherwise; `intermediate_dim` is n_inner, whatever it is. It has one dropout where GPT-2 has three: resid_pdrop's.
- GPT2Tokenizer needs <|endoftext|> and takes it for the start and the end of a text, and id 0 for padding. Tokens that
  were added stand in vocabulary.json as all others, and in `unsplittable_tokens`. It cuts text in a way of its own,
  which is not GPT-2's for every text: two line feeds before a word are one token there, and two in GPT-2.
- `from_preset` converts numbers to Keras's own format (float32 unless it was set); quantized presets are refused.
- config.json and tokenizer.json keep under `OWN` what has no place elsewhere: GPT2Config's dictionary, and which tokens
  are special or have a role. KerasHub ignores that key, and what it says itself has the last word.

TensorFlow, Keras and h5py are not used. Source: KerasHub 0.32 (preset_utils.py, gpt2_backbone.py, gpt2_tokenizer.py,
byte_pair_tokenizer.py, transformer_decoder.py). KerasNLP 0.8 to 0.14 and KerasHub 0.16 have the same paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from gpt2_core.checkpoints import hdf5
from gpt2_core.checkpoints.holds import INSIDE, About, Holds
from gpt2_core.checkpoints.keras_files import (
    INDEX_SUFFIX,
    KERAS,
    SUFFIX,
    Described,
    as_json,
    closing_if_it_fails,
    described,
    description,
    json_object,
    of_sound_weights,
    open_weights,
    policy,
    renamed,
    shard_pattern,
    small_file,
    whole_model,
    write_shards,
    write_weights,
)
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.sharding import describe_folder
from gpt2_core.checkpoints.tensors import Checkpoint, MappedFile, Tensor, as_tensors
from gpt2_core.checkpoints.tokenizers import parts_of
from gpt2_core.config import ALIASES, GPT2Config
from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointFormatError, TokenizerError
from gpt2_core.files import _cache_homes, atomic_folder, atomic_write, file_inside, finish_interrupted_save
from gpt2_core.parameters import Head
from gpt2_core.tokenizer_files import ROLES, AddedToken, TokenizerParts, read_merges_txt
from gpt2_core.vocabulary import ENDOFTEXT

NAME = "kerashub"
RANK = 65
STEM = "model"
FILES = (STEM + SUFFIX, STEM + INDEX_SUFFIX)
SUFFIXES: tuple[str, ...] = ()
HOLDS = Holds(
    heads=frozenset({Head.LM, Head.NONE}),
    config=INSIDE,
    fixed=MappingProxyType(
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "pruned_heads": ({},),
            "tie_word_embeddings": (True,),
        }
    ),
    tokenizer=INSIDE,
    shards=True,
    uniform=True,
)

_BLOCK = "layers/transformer_decoder{_layer}/"
_PACKED = ("query_dense", "key_dense", "value_dense")


def _packed(number: int) -> tuple[str, ...]:
    return tuple(f"{_BLOCK}_self_attention_layer/{part}/vars/{number}" for part in _PACKED)


def _layer(ours: str, theirs: str, layout: str = "") -> Iterator[Rule]:
    """The rows of a layer with a kernel or a gain, and a bias."""
    yield Rule(f"h.{{layer}}.{ours}.weight", f"{_BLOCK}{theirs}/vars/0", layout)
    yield Rule(f"h.{{layer}}.{ours}.bias", f"{_BLOCK}{theirs}/vars/1")


NAMES = Names(
    Rule("wte.weight", "layers/reversible_embedding/vars/0"),
    Rule("wpe.weight", "layers/position_embedding/vars/0"),
    *_layer("ln_1", "_self_attention_layer_norm"),
    Rule("h.{layer}.attn.c_attn.weight", _packed(0), "C (3 H D) -> 3 C H D"),
    Rule("h.{layer}.attn.c_attn.bias", _packed(1), "(3 H D) -> 3 H D"),
    *_layer("attn.c_proj", "_self_attention_layer/output_dense", "(H D) C -> H D C"),
    *_layer("ln_2", "_feedforward_layer_norm"),
    *_layer("mlp.c_fc", "_feedforward_intermediate_dense"),
    *_layer("mlp.c_proj", "_feedforward_output_dense"),
    Rule("ln_f.weight", "layers/layer_normalization/vars/0"),
    Rule("ln_f.bias", "layers/layer_normalization/vars/1"),
)

#: The settings of the backbone -> the fields of GPT2Config that they are.
SIZES: Mapping[str, str] = MappingProxyType(
    {
        "vocabulary_size": "vocab_size",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "hidden_dim": "n_embd",
        "intermediate_dim": "n_inner",
        "max_sequence_length": "n_positions",
    }
)
_DROPOUT, _DROPOUTS = "dropout", ("resid_pdrop", "embd_pdrop", "attn_pdrop")
KERAS_HUB = "0.32.0"
_GPT2 = "keras_hub.src.models.gpt2."
BACKBONE, TASK, TOKENIZER = "keras_hub>GPT2Backbone", "keras_hub>GPT2CausalLM", "keras_hub>GPT2Tokenizer"
_PREPROCESSOR = "keras_hub>GPT2CausalLMPreprocessor"
#: KerasHub was called KerasNLP until 2024.
_FORMER = "keras_nlp>"
CONFIG, TASK_FILE, METADATA = "config.json", "task.json", "metadata.json"
PREPROCESSOR_FILE, TOKENIZER_FILE = "preprocessor.json", "tokenizer.json"
ASSETS = ("assets", "tokenizer")
VOCABULARY, MERGES = "vocabulary.json", "merges.txt"
#: The keys, beside those of KerasHub, in which config.json and tokenizer.json keep what else there is.
OWN = "gpt2_duet"
_SETTINGS: Mapping[str, type] = MappingProxyType(
    {
        **dict.fromkeys(ROLES, str),
        "errors": str,
        "padding_side": str,
        "truncation_side": str,
        "model_max_length": int,
    }
)
_SHARD = shard_pattern(STEM)
_MOST_JSON = 1 << 24  # bytes
_MOST_VOCABULARY = 1 << 28
_BEGINNING = 4096  # bytes of an index that are looked at to tell whose it is


def find(path: Path) -> Path | None:
    """The file of weights to open if `path`, a preset's folder or its file of weights, holds this format, else None."""
    candidates = [path / name for name in FILES] if path.is_dir() else [path]
    return next((each for each in candidates if each.is_file() and _is_ours(each)), None)


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in (*FILES, TASK_FILE, PREPROCESSOR_FILE) or _SHARD.fullmatch(name) is not None


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open the folder of a preset, or its file of weights; tensors are views of the mapped files, but c_attn is copied.

    Raises: UnsafeCheckpointError for what leads elsewhere; CheckpointFormatError for anything damaged, and for presets
    of other models; CheckpointError where there is none.
    """
    path = Path(path)
    if path.is_dir():
        finish_interrupted_save(path)
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(
                f"{path} holds no preset of KerasHub: expected {' or '.join(FILES)} with {CONFIG}, "
                f"found {describe_folder(path)}"
            )
        path = found
    folder = path.parent
    backbone = _described(folder, CONFIG)
    _check_backbone(backbone, folder / CONFIG)
    task = _described(folder, TASK_FILE) if (folder / TASK_FILE).exists() else None
    head = Head.LM if task is not None and _is(task, TASK) else Head.NONE
    weights = open_weights(path, writable=writable)
    with closing_if_it_fails(weights.close):
        config = _config(backbone, head, len(weights.tensors), folder)
        _check_heads(config, weights.tensors, folder)
        with of_sound_weights(path):
            tensors, names_in_file = renamed(NAMES, weights.tensors)
    return Checkpoint(
        tensors,
        format=NAME,
        path=path,
        files=weights.files,
        close=weights.close,
        config=config,
        config_file=folder / CONFIG,
        head=head.value,
        tokenizer=_tokenizer(folder) if (folder.joinpath(*ASSETS) / VOCABULARY).exists() else None,
        names_in_file=names_in_file,
        notes=tuple(_notes(backbone, task)),
    )


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write a preset into the folder `path`; with a tokenizer if `about` has one. One block's c_attn is copied at most.

    Raises: CannotHoldError with all reasons for a model or a tokenizer that KerasHub has no place for;
    CheckpointMismatchError unless the tensors are those of `about`; CheckpointError, WriteError.
    """
    path = Path(path)
    if about is None or metadata:
        raise CheckpointError("kerashub needs about=About(config, head), and takes no metadata")
    given = as_tensors(tensors)
    dtype = whole_model(NAME, HOLDS, given, about)
    beside = _files_beside(about, dtype, sum(tensor.size for tensor in given.values()))
    stored = NAMES.to_file(given, about.config)
    with atomic_folder(path, replaces=owns) as stage:
        stage.joinpath(*(ASSETS if about.tokenizer is not None else ())).mkdir(parents=True, exist_ok=True)
        for name, content in beside.items():
            with atomic_write(stage / name) as file:
                file.write(content)
        if max_shard_bytes is None:
            write_weights(stage / FILES[0], stored, {(): {}})
            written = [*beside, FILES[0]]
        else:
            written = [*beside, *write_shards(stage, STEM, stored, max_shard_bytes)]
    return tuple(path / name for name in written)


def remarks(about: About) -> tuple[str, ...]:
    """What to know about a model of ours in KerasHub: where a text ends, and its dropout."""
    config, found = about.config, []
    if len({getattr(config, name) for name in _DROPOUTS}) > 1:
        found.append(f"KerasHub has one dropout for all: it will train with {config.resid_pdrop}, which is resid_pdrop")
    if len(config.eos_token_ids) > 1:
        found.append(f"KerasHub stops at {ENDOFTEXT} only, not at all of {config.eos_token_ids}")
    return tuple(found)


def _is(found: Described, name: str) -> bool:
    """Whether an object is of a class, registered by KerasHub or under its former name."""
    return found.name in (name, _FORMER + name.partition(">")[2])


def _is_ours(path: Path) -> bool:
    """Whether a file of weights is a backbone's; its preset may be of another model that has the same layers."""
    if path.name.endswith(INDEX_SUFFIX):
        with path.open("rb") as opened:
            return b'"/layers/reversible_embedding/' in opened.read(_BEGINNING)
    with path.open("rb") as opened:
        if opened.read(len(hdf5.SIGNATURE)) != hdf5.SIGNATURE:
            return False
    try:
        file = MappedFile(path)
        try:
            return "reversible_embedding" in hdf5.members(file, ("layers",))
        finally:
            file.close()
    except CheckpointError:
        return path.name == FILES[0] and (path.parent / TASK_FILE).is_file()


# What is there --------------------------------------------------------------------------------------------------------


def _described(folder: Path, name: str) -> Described:
    """The object that a file of the preset describes. Raises: CheckpointFormatError."""
    file = file_inside(folder, name, what="the folder")
    found = described(json_object(small_file(file, _MOST_JSON), str(file)))
    if found is None:
        raise CheckpointFormatError(
            f'{file} describes no object of Keras: expected {{"registered_name": ..., "config": {{...}}}}, as '
            f"save_to_preset writes it"
        )
    return found


def _check_backbone(backbone: Described, file: Path) -> None:
    if not _is(backbone, BACKBONE):
        raise CheckpointFormatError(
            f"{file} describes {backbone.name[:100]!r}; expected {BACKBONE!r}: no other model of KerasHub is read here"
        )
    name = backbone.policy
    if name and not name.removeprefix("mixed_").startswith(("float16", "float32", "float64", "bfloat16")):
        raise CheckpointFormatError(
            f"{file} describes a model that is quantized ({name}); expected one of floats: save it as it was before"
        )


def _config(backbone: Described, head: Head, count: int, folder: Path) -> dict[str, Any]:
    """The configuration: what was kept whole if it was, with what KerasHub itself says in any case."""
    file = folder / CONFIG
    own = _own(backbone).get("config")
    kept = dict(own) if isinstance(own, dict) else {}
    sizes = {ours: _size(backbone, theirs, file) for theirs, ours in SIZES.items()}
    if sizes["n_layer"] > max(count, 1):
        raise CheckpointFormatError(f"{file} claims {sizes['n_layer']} blocks, and there are {count} tensors")
    if sizes["n_inner"] == 4 * sizes["n_embd"] and kept.get("n_inner") is None:
        sizes["n_inner"] = None
    for alias in [alias for alias, name in ALIASES.items() if name in {*sizes, *HOLDS.fixed}]:
        kept.pop(alias, None)
    fixed = {key: values[0] for key, values in HOLDS.fixed.items() if kept.get(key) not in values}
    if head is Head.NONE and isinstance(kept.get("tie_word_embeddings"), bool):
        fixed.pop("tie_word_embeddings", None)
    ids = {} if "bos_token_id" in kept or "eos_token_id" in kept else _ends(folder)
    return kept | ids | sizes | fixed | _dropouts(backbone, kept, file)


def _check_heads(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise CheckpointFormatError where kernels are of other heads than the configuration: packed, they look alike."""
    heads, width = config["n_head"], config["n_embd"] // config["n_head"]
    kernels = [row.theirs for row in NAMES.rows(NAMES.layers_in(tensors)) if row.split]
    for name in (name for names in kernels for name in names if name in tensors):
        shape = tensors[name].shape[-2:]
        if len(tensors[name].shape) > 1 and shape != (heads, width):
            raise CheckpointFormatError(
                f"{folder / CONFIG} says that there are {heads} heads of width {width}, but {name} has "
                f"{shape[0]} of {shape[1]}; the files do not belong together"
            )


def _own(found: Described) -> Mapping[str, Any]:
    """What `write` added to the description."""
    own = found.whole.get(OWN)
    return own if isinstance(own, dict) else {}


def _size(backbone: Described, key: str, file: Path) -> Any:
    value = backbone.config.get(key)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise CheckpointFormatError(
            f"{file} has {key} {'missing' if value is None else repr(value)[:50]}; expected a size; save it again"
        )
    return value


def _dropouts(backbone: Described, kept: Mapping[str, Any], file: Path) -> dict[str, float]:
    value = backbone.config.get(_DROPOUT, 0.1)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise CheckpointFormatError(f"{file} has {_DROPOUT} {repr(value)[:50]}; expected a share from 0 to 1")
    return {} if kept.get(_DROPOUTS[0]) == value else dict.fromkeys(_DROPOUTS, float(value))


def _ends(folder: Path) -> dict[str, int]:
    """The id of the token that KerasHub begins and ends a text with, where there is a vocabulary that says it."""
    if not (folder.joinpath(*ASSETS) / VOCABULARY).exists():
        return {}
    index = _vocabulary(folder).get(ENDOFTEXT)
    return {"bos_token_id": index, "eos_token_id": index} if type(index) is int else {}


def _notes(backbone: Described, task: Described | None) -> Iterator[str]:
    if backbone.policy.startswith("mixed_"):
        yield f"the policy {backbone.policy} is not kept, only the number format of the parameters"
    if task is not None and not _is(task, TASK):
        yield f"{TASK_FILE} describes {task.name[:100]!r}, which is not read; this is the backbone alone"


# The tokenizer --------------------------------------------------------------------------------------------------------


def _asset(folder: Path, name: str) -> Path:
    """A file of the tokenizer, which has to be within the folder. Raises: UnsafeCheckpointError."""
    place = folder
    for part in ASSETS:
        place = file_inside(place, part, what="the folder")
    file = place / name
    homes = [folder.resolve(), *_cache_homes(folder.absolute())]
    if not any(file.resolve().is_relative_to(home) for home in homes):
        file_inside(place, name, what="the folder")  # which refuses it
    return file


def _vocabulary(folder: Path) -> dict[str, Any]:
    file = _asset(folder, VOCABULARY)
    return json_object(small_file(file, _MOST_VOCABULARY), str(file))


def _tokenizer(folder: Path) -> Callable[[], TokenizerParts]:
    def parts() -> TokenizerParts:
        source = str(folder.joinpath(*ASSETS))
        config: Mapping[str, Any] = {}
        own: Mapping[str, Any] = {}
        if (folder / TOKENIZER_FILE).exists():
            found = _described(folder, TOKENIZER_FILE)
            config, own = found.config, _own(found)
            if not _is(found, TOKENIZER):
                raise TokenizerError(f"{folder / TOKENIZER_FILE} describes {found.name[:100]!r}; expected {TOKENIZER}")
        small_file(_asset(folder, MERGES), _MOST_VOCABULARY)  # refused where it is too large
        ids, merges = _vocabulary(folder), read_merges_txt(_asset(folder, MERGES))
        added = _added(config, own, ids, source)
        for token in _beyond(added, ids):
            del ids[token]
        settings = {key: own[key] for key, kind in _SETTINGS.items() if key in own and _fits(own[key], kind, key)}
        settings["add_prefix_space"] = config.get("add_prefix_space") is True
        return parts_of(ids, merges, source=source, added=added, settings=settings)

    return parts


def _fits(value: object, kind: type, key: str) -> bool:
    return (value is None and key in ROLES) or type(value) is kind


def _added(config: Mapping[str, Any], own: Mapping[str, Any], ids: Mapping[str, Any], source: str) -> list[AddedToken]:
    """The tokens that are never split. All of them are special, unless it was kept that they are not."""
    listed = config.get("unsplittable_tokens")
    tokens = [ENDOFTEXT] if listed is None else listed
    plain = own.get("plain_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TokenizerError(f"{source}: unsplittable_tokens is {repr(tokens)[:100]}; expected a list of tokens")
    unknown = [token for token in tokens if type(ids.get(token)) is not int]
    if unknown:
        raise TokenizerError(
            f"{source} has no id for the unsplittable tokens {', '.join(map(repr, unknown[:5]))}; expected all of them "
            f"in {VOCABULARY}; save the preset again"
        )
    return [
        AddedToken(token, ids[token], special=not isinstance(plain, list) or token not in plain)
        for token in dict.fromkeys(tokens)
    ]


def _beyond(added: list[AddedToken], ids: Mapping[str, Any]) -> list[str]:
    """The added tokens that follow the vocabulary. Its own last token, ``<|endoftext|>``, is none of them."""
    at = {token.id: token.content for token in added}
    end = len(ids)
    while end and end - 1 in at:
        end -= 1
    end += at.get(end) == ENDOFTEXT
    return [token.content for token in added if token.id >= end]


def _tokenizer_files(parts: TokenizerParts) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The two assets, and the description of the tokenizer. Raises: CannotHoldError."""
    ids = dict(parts.vocabulary.token_ids)
    if len(ids) < len(parts.vocabulary) or any(
        ids.setdefault(each.content, each.id) != each.id for each in parts.added
    ):
        raise CannotHoldError("the tokenizer has two tokens of one spelling; kerashub has a place for one")
    if ENDOFTEXT not in ids:
        raise CannotHoldError(
            f"the tokenizer has no {ENDOFTEXT}, without which KerasHub's GPT2Tokenizer cannot be made; leave the "
            f"tokenizer out (--no-tokenizer), or add that token"
        )
    unsplittable = list(dict.fromkeys([ENDOFTEXT, *(token.content for token in parts.added)]))
    settings = {key: value for key, value in parts.settings.items() if key in _SETTINGS}
    plain = [token.content for token in parts.added if not token.special]
    config = {
        "name": "gpt2_tokenizer",
        "trainable": True,
        "dtype": policy("int32"),
        "config_file": TOKENIZER_FILE,
        "sequence_length": None,
        "add_prefix_space": bool(parts.settings.get("add_prefix_space")),
        "unsplittable_tokens": unsplittable,
    }
    folder = "/".join(ASSETS)
    assets = {
        f"{folder}/{VOCABULARY}": json.dumps(ids).encode(),
        f"{folder}/{MERGES}": parts.vocabulary.to_merges_txt(),
    }
    own = {OWN: settings | {"plain_tokens": plain}}
    return assets, description(f"{_GPT2}gpt2_tokenizer", TOKENIZER, config) | own


# Writing --------------------------------------------------------------------------------------------------------------


def _files_beside(about: About, dtype: str, count: int) -> dict[str, bytes]:
    """Every file but the weights."""
    config = about.config
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()} | {"intermediate_dim": config.inner_dim}
    common = {"trainable": True, "dtype": policy(dtype)}
    settings = {"name": "gpt2_backbone", **common, **sizes, _DROPOUT: config.resid_pdrop}
    backbone = description(f"{_GPT2}gpt2_backbone", BACKBONE, settings)
    files: dict[str, bytes] = {}
    preprocessor = None
    if about.tokenizer is not None:
        files, tokenizer = _tokenizer_files(about.tokenizer)
        preprocessor = _preprocessor(config, tokenizer)
        files[TOKENIZER_FILE] = as_json(tokenizer)
        files[PREPROCESSOR_FILE] = as_json(preprocessor)
    if about.head is Head.LM:
        task = {"backbone": backbone, "preprocessor": preprocessor, "name": "gpt2_causal_lm"}
        files[TASK_FILE] = as_json(description(f"{_GPT2}gpt2_causal_lm", TASK, task))
    own = {OWN: {"config": config.to_dict()}}
    versions = {"keras_version": KERAS, "keras_hub_version": KERAS_HUB}
    files[METADATA] = as_json({**versions, "parameter_count": count, "tasks": ["CausalLM"]})
    return files | {CONFIG: as_json(backbone | own)}


def _preprocessor(config: GPT2Config, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in tokenizer.items() if key != OWN}
    settings = {
        "name": "gpt2_causal_lm_preprocessor",
        "trainable": True,
        "dtype": policy("float32"),
        "tokenizer": plain,
        "config_file": PREPROCESSOR_FILE,
        "sequence_length": config.n_positions,
        "add_start_token": True,
        "add_end_token": True,
    }
    return description(f"{_GPT2}gpt2_causal_lm_preprocessor", _PREPROCESSOR, settings)
