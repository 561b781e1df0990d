"""Keras 3's files of the models of gpt2_tf: what `model.save` and `model.save_weights` write.

    model.keras            a zip archive, nothing in it compressed:
        metadata.json          {"keras_version": ..., "date_saved": ...}; not read
        config.json            the class, by the name it is registered under (`CLASSES`), and GPT2Config's dictionary
        model.weights.h5       the variables
    NAME.weights.h5        the variables alone, or NAME.weights.json and its files: see `keras_files`
    a folder               config.json and model.weights.h5, as `model.save(folder, zipped=False)` leaves them

`NAMES` are the paths of the variables; shapes and numbers are ours. A path has few names of ours in it: it is the way
in which Keras walks through the attributes of the model in alphabetical order, and layers in a list go by their class.
So three heads, each of the class Linear, have one path, layers/linear. Which of them it is tells the class in
config.json, and where there is none the attribute `name` of its group, in which Keras puts what the layer is called;
the table has that name in brackets. The paths of the bare model lack layers/tfgpt2_model/.

- What Keras keeps besides, the variables of an optimizer, is listed and not read.
- Of a policy such as mixed_float16 the variables' own format (float32) is kept, and a note says so.
- Variables alone have no configuration. Those written here keep one in the attribute `OWN` of the root, which Keras
  does not look at; with others it has to stand beside them, or the shapes have to be those of a released model.
- Models of which one of ours is a part, and classes derived from ours, are refused: their description would have to be
  run to be understood. Nothing that is described is ever imported or called.

A .keras file can be loaded once `import gpt2_tf` has made its classes known, and without trusting it (safe_mode=True).
TensorFlow, Keras and h5py are not used. Source: saving_lib.py and serialization_lib.py of Keras 3.6 to 3.15; gpt2_tf.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from gpt2_core.checkpoints import hdf5, zips
from gpt2_core.checkpoints.h5 import MODELS
from gpt2_core.checkpoints.holds import INSIDE, About, Holds
from gpt2_core.checkpoints.keras_files import (
    INDEX_SUFFIX,
    KERAS,
    OPTIMIZER,
    STATE_OF_OPTIMIZER,
    SUFFIX,
    VARIABLES,
    Described,
    Weights,
    arrays_of,
    closing_if_it_fails,
    described,
    description,
    json_object,
    long_text,
    of_sound_weights,
    open_weights,
    policy,
    renamed,
    small_file,
    weights_in,
    whole_model,
    write_weights,
)
from gpt2_core.checkpoints.naming import PREFIX
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.sharding import describe_folder
from gpt2_core.checkpoints.tensors import Checkpoint, MappedFile, Tensor, as_tensors
from gpt2_core.config import ALIASES
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_folder, atomic_write, file_inside, finish_interrupted_save
from gpt2_core.parameters import Head

NAME = "keras"
RANK = 35
ARCHIVE = ".keras"
STEM = "model"
FILES = (STEM + ARCHIVE, STEM + SUFFIX, STEM + INDEX_SUFFIX)
SUFFIXES = (ARCHIVE, ".h5")
HOLDS = Holds(config=INSIDE, uniform=True)

_BODY = "layers/tfgpt2_model/"
_BLOCK = f"{_BODY}h/block{{_layer}}/"
_LINEAR = "layers/linear"
#: What the head is called whose path is layers/linear, by the head of the model.
_LINEARS: Mapping[Head, str] = {
    Head.LM: "lm_head",
    Head.DOUBLE: "lm_head",
    Head.SEQUENCE: "score",
    Head.QA: "qa_outputs",
}


def _layer(ours: str, theirs: str, *variables: str) -> Iterator[Rule]:
    """The rows of a layer's variables, in the order in which it makes them."""
    for number, variable in enumerate(variables):
        yield Rule(f"{ours}.{variable}", f"{theirs}/{VARIABLES}/{number}")


_BOTH = ("weight", "bias")
NAMES = Names(
    *_layer("wte", f"{_BODY}layers/embedding", "weight"),
    *_layer("wpe", f"{_BODY}layers/position_embedding", "weight"),
    *(
        rule
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for rule in _layer(f"h.{{layer}}.{part}", _BLOCK + part.replace(".", "/"), *_BOTH)
    ),
    *_layer("ln_f", f"{_BODY}layers/layer_norm", *_BOTH),
    *_layer("lm_head", f"{_LINEAR}[lm_head]", "weight"),
    *_layer("multiple_choice_head.summary", "layers/multiple_choice_head/summary", *_BOTH),
    *_layer("score", f"{_LINEAR}[score]", "weight"),
    *_layer("classifier", "classifier", *_BOTH),
    *_layer("qa_outputs", f"{_LINEAR}[qa_outputs]", *_BOTH),
)

#: The classes of gpt2_tf by the names they are registered under -> what stands on top of the transformer.
CLASSES: Mapping[str, Head] = MappingProxyType(
    {
        "gpt2_tf>TFGPT2Model": Head.NONE,
        "gpt2_tf>TFGPT2LMHeadModel": Head.LM,
        "gpt2_tf>TFGPT2DoubleHeadsModel": Head.DOUBLE,
        "gpt2_tf>TFGPT2ForSequenceClassification": Head.SEQUENCE,
        "gpt2_tf>TFGPT2ForTokenClassification": Head.TOKEN,
        "gpt2_tf>TFGPT2ForQuestionAnswering": Head.QA,
    }
)
#: The attribute of the root in which files of variables that were written here keep GPT2Config's own dictionary.
OWN = "gpt2_duet.config"
CONFIG, METADATA = "config.json", "metadata.json"
_WEIGHTS, _WEIGHTS_OF_NUMPY = STEM + SUFFIX, STEM + ".weights.npz"
_KERAS_HUB = ("keras_hub>", "keras_nlp>")
_MOST_CONFIG = 1 << 24  # bytes
_ZIP = b"PK\3\4"
_BEGINNING = 4096  # bytes of an index that are looked at to tell whose it is


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, holds this format, else None.

    In a folder an only .keras or .weights.h5 will do whatever its name is.
    """
    if not path.is_dir():
        return path if path.is_file() and _is_ours(path) else None
    for suffix in (ARCHIVE, SUFFIX, INDEX_SUFFIX):
        own = path / (STEM + suffix)
        found = [own] if own.is_file() else [each for each in path.iterdir() if each.name.endswith(suffix)]
        if len(found) == 1 and found[0].is_file() and _is_ours(found[0]):
            return found[0]
    return None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in FILES


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a .keras, a .weights.h5, a .weights.json, or a folder with one; tensors are views of the mapped file.

    Raises: UnsafeCheckpointError for compressed archives and for what leads elsewhere; CheckpointFormatError for
    anything damaged, and for models of other classes than `CLASSES`.
    """
    path = Path(path)
    if path.is_dir():
        finish_interrupted_save(path)
        found = find(path)
        if found is None:
            raise CheckpointError(
                f"{path} holds no model of Keras: expected {' or '.join(FILES)}, found {describe_folder(path)}"
            )
        path = found
    if path.name.endswith(INDEX_SUFFIX):
        weights = open_weights(path, writable=writable)
    else:
        file = MappedFile(path, writable=writable)
        if path.name.endswith(ARCHIVE) or file.bytes(0, len(_ZIP)) == _ZIP:
            return _read_archive(file)
        weights = weights_in(file, hdf5.Window(file, 0, file.size))
    with closing_if_it_fails(weights.close):
        model = _described_beside(path)
        own = _own_config(weights, path) if model is None else None
        return _checkpoint(weights, path, model, own)


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write a .keras file, a .weights.h5, or a folder with model.keras, one tensor in memory at a time.

    Raises: CannotHoldError for tensors of several number formats; CheckpointMismatchError unless they are those of
    `about`; CheckpointError for other names of files; WriteError. Either way the path is as it was.
    """
    path = Path(path)
    if about is None or metadata or max_shard_bytes is not None:
        raise CheckpointError("keras needs about=About(config, head), and takes neither metadata nor shards")
    given = as_tensors(tensors)
    dtype = whole_model(NAME, HOLDS, given, about)
    stored, attributes = _stored(given, about)
    if path.suffix not in SUFFIXES or path.is_dir():
        with atomic_folder(path, replaces=owns) as stage:
            _write_archive(stage / FILES[0], stored, attributes, _description(about, dtype))
        return (path / FILES[0],)
    if path.suffix == ARCHIVE:
        _write_archive(path, stored, attributes, _description(about, dtype))
    elif path.name.endswith(SUFFIX):
        config = json.dumps(about.config.to_dict())
        write_weights(path, stored, {**attributes, (): long_text(OWN, config)})
    else:
        raise CheckpointError(f"{path} would be no file that Keras loads weights from: expected a name with {SUFFIX}")
    return (path,)


# What is there --------------------------------------------------------------------------------------------------------


def _is_ours(path: Path) -> bool:
    """Whether a file is one of Keras's with a model of gpt2_tf, or is called so and damaged."""
    if path.name.endswith(ARCHIVE):
        return True
    if path.name.endswith(INDEX_SUFFIX):
        with path.open("rb") as opened:
            beginning = opened.read(_BEGINNING)
        return b'"/' + _BODY.encode() in beginning or b'"/h/block/' in beginning
    with path.open("rb") as opened:
        start = opened.read(len(hdf5.SIGNATURE))
    if start != hdf5.SIGNATURE:
        return zips.first_name(path) in (METADATA, CONFIG)
    try:
        file = MappedFile(path)
        try:
            inner = hdf5.members(file, ("layers",))
            return "tfgpt2_model" in inner or ("embedding" in inner and "block" in hdf5.members(file, ("h",)))
        finally:
            file.close()
    except CheckpointError:
        return path.name.endswith(SUFFIX)


def _described_beside(path: Path) -> Described | None:
    """The model that Keras's config.json in the folder describes; None if there is none, or it is not Keras's."""
    if not path.name.startswith(STEM + ".") or not (path.parent / CONFIG).exists():
        return None
    file = file_inside(path.parent, CONFIG, what="the folder")
    try:
        found = described(json_object(small_file(file, _MOST_CONFIG), str(file)))
    except CheckpointFormatError:
        return None  # whoever needs it says so
    if found is not None:
        _check_class(found, str(file))
    return found


def _own_config(weights: Weights, path: Path) -> dict[str, Any] | None:
    text = weights.root_text(OWN)
    return None if text is None else json_object(text.encode(), f"the attribute {OWN} of {path}")


def _read_archive(file: MappedFile) -> Checkpoint:
    with closing_if_it_fails(file.close):
        with of_sound_weights(file.path):
            entries = zips.entries(file)
            model = _described_in(file, entries)
            held = entries.get(_WEIGHTS)
            if held is None:
                kind = "its variables in numpy's format" if _WEIGHTS_OF_NUMPY in entries else "no variables"
                raise CheckpointFormatError(f"it has {kind}; expected {_WEIGHTS}, as model.save makes it by default")
        weights = weights_in(file, hdf5.Window(file, held.offset, held.size))
        others = set(entries) - {CONFIG, METADATA, _WEIGHTS}
        return _checkpoint(
            weights, file.path, model, None, dict.fromkeys(sorted(others), "no part of a model of gpt2_tf")
        )


def _described_in(file: MappedFile, entries: Mapping[str, zips.Entry]) -> Described:
    """The model that an archive's config.json describes. Raises: CheckpointFormatError unless it is one of ours."""
    entry = entries.get(CONFIG)
    if entry is None or entry.size > _MOST_CONFIG:
        raise CheckpointFormatError(f"it has {'a huge' if entry else 'no'} {CONFIG}; it is no archive of Keras")
    content = file.bytes(entry.offset, entry.size)
    if zlib.crc32(content) != entry.crc:
        raise CheckpointFormatError(f"the checksum of its {CONFIG} is wrong; it is damaged: fetch it again")
    model = described(json_object(content, f"its {CONFIG}"))
    if model is None:
        raise CheckpointFormatError(f"its {CONFIG} describes no object of Keras; fetch it again")
    _check_class(model, f"its {CONFIG}")
    return model


def _check_class(model: Described, what: str) -> None:
    if model.name not in CLASSES:
        remedy = "save the part of it that is one of these, or save its weights and give the configuration"
        if model.name.startswith(_KERAS_HUB):
            remedy = "save it with save_to_preset, and give that folder"
        raise CheckpointFormatError(
            f"{what} describes {model.name[:100]!r}; expected one of {', '.join(CLASSES)}; {remedy}"
        )


def _checkpoint(
    weights: Weights,
    path: Path,
    model: Described | None,
    own: Mapping[str, Any] | None,
    ignored: Mapping[str, str] = MappingProxyType({}),
) -> Checkpoint:
    config = own if model is None else model.config.get("config")
    if (model is not None or config is not None) and not isinstance(config, Mapping):
        raise CheckpointFormatError(f"{path} describes a model without its configuration; save it again")
    if config is not None:
        _check_layers(config, len(weights.tensors), path)
    state = {name: STATE_OF_OPTIMIZER for name in weights.tensors if name.startswith(OPTIMIZER)}
    there = {name: tensor for name, tensor in weights.tensors.items() if name not in state}
    bare = not any(name.startswith(_BODY) for name in there) and any(name.startswith("h/") for name in there)
    paths = {_row_name(name, weights, model, bare): name for name in there}
    tensors, rows = renamed(NAMES, {row: there[name] for row, name in paths.items()})
    shown = {name: _shown(name, rows, paths, bare) for name in tensors}
    return Checkpoint(
        {shown[name]: tensor for name, tensor in tensors.items()},
        format=NAME,
        path=path,
        files=weights.files,
        close=weights.close,
        config=config,
        head=_head(there, rows, model, bare),
        names_in_file={shown[name]: paths[row] for name, row in rows.items()},
        ignored={**ignored, **state},
        notes=tuple(_notes(model)),
    )


def _shown(name: str, rows: Mapping[str, str], paths: Mapping[str, str], bare: bool) -> str:
    """Our name of a tensor, without ``transformer.`` in the bare model; or its path, of what is in no row."""
    if name not in rows:
        return "/" + paths[name.removeprefix("/")]
    return name.removeprefix(PREFIX) if bare else name


def _check_layers(config: Mapping[str, Any], count: int, path: Path) -> None:
    said = [value for key, value in config.items() if ALIASES.get(key, key) == "n_layer" and isinstance(value, int)]
    layers = max(said, default=0)
    if layers > max(count, 1):
        raise CheckpointFormatError(f"{path} claims {layers} blocks, and holds {count} tensors; it is damaged")


def _row_name(name: str, weights: Weights, model: Described | None, bare: bool) -> str:
    """The name in the table of the variable at a path, or one that is not in the table."""
    if name.startswith(_LINEAR + "["):
        return "?" + name
    if name.startswith(_LINEAR + "/"):
        called = weights.name_of(_LINEAR) if model is None else _LINEARS.get(CLASSES[model.name])
        return f"{_LINEAR}[{called}]{name.removeprefix(_LINEAR)}"
    return _BODY + name if bare else name


def _head(names: Mapping[str, Tensor], ours: Mapping[str, str], model: Described | None, bare: bool) -> str | None:
    """What stands on top: the class says it, else the layers that are there; a tied head is none of them."""
    if model is not None:
        return CLASSES[model.name].value
    if bare:
        return Head.NONE.value
    only_body = all(name.startswith(_BODY) for name in names)
    return Head.LM.value if only_body and ours else None


def _notes(model: Described | None) -> Iterator[str]:
    if model is None:
        return
    if model.policy.startswith("mixed_"):
        yield f"the model computes under the policy {model.policy}, of which only the format of its parameters is kept"
    compiled = model.whole.get("compile_config")
    if isinstance(compiled, dict) and compiled.get("optimizer"):
        optimizer = described(compiled["optimizer"])
        name = "an optimizer" if optimizer is None else optimizer.name[:50]
        yield f"the model was compiled with {name}; how it was compiled is not kept"


# Writing --------------------------------------------------------------------------------------------------------------


def _stored(
    given: Mapping[str, Tensor], about: About
) -> tuple[dict[str, Tensor], dict[hdf5.Names, Mapping[str, hdf5.Attribute]]]:
    """The variables by their paths, and the attribute that tells which head it is."""
    stored: dict[str, Tensor] = {}
    attributes: dict[hdf5.Names, Mapping[str, hdf5.Attribute]] = {}
    for row, tensor in NAMES.to_file(given, about.config).items():
        name = row.removeprefix(_BODY) if about.head is Head.NONE else row
        if row.startswith(_LINEAR + "["):
            called, _, rest = row.removeprefix(_LINEAR + "[").partition("]")
            attributes[(*_LINEAR.split("/"), VARIABLES)] = {"name": called}
            name = _LINEAR + rest
        stored[name] = tensor
    return stored, attributes


def _description(about: About, dtype: str) -> bytes:
    """config.json, as Keras writes it for a model that was not compiled."""
    name = next(name for name, head in CLASSES.items() if head is about.head)
    config = {
        "config": about.config.to_dict(),
        "name": MODELS[about.head],
        "dtype": policy(dtype),
        "trainable": True,
    }
    module = "gpt2_tf.model" if about.head is Head.NONE else "gpt2_tf.heads"
    return json.dumps(description(module, name, config) | {"compile_config": {}}).encode()


def _write_archive(
    path: Path,
    stored: Mapping[str, Tensor],
    attributes: Mapping[hdf5.Names, Mapping[str, hdf5.Attribute]],
    config: bytes,
) -> None:
    size, pieces = hdf5.pieces(arrays_of(stored), attributes)
    metadata = json.dumps({"keras_version": KERAS}).encode()
    with atomic_write(path) as file:
        archive = zips.Writer(file)
        archive.add(METADATA, len(metadata), [metadata])
        archive.add(CONFIG, len(config), [config])
        archive.add(_WEIGHTS, size, pieces)
        archive.finish()
