"""tf_model.h5: what the TensorFlow classes of transformers 2.0 to 4.57 saved, an HDF5 file as Keras 2 lays it out.

    /                                  attributes layer_names (the groups below, in order), backend, keras_version
    /transformer                       attribute weight_names (what is below it, in order)
    /transformer/MODEL/transformer/wte/weight:0, .../h_._0/attn/c_attn/weight:0, ...
    /multiple_choice_head              a head is a layer and a group of its own
    /multiple_choice_head/MODEL/multiple_choice_head/summary/kernel:0

MODEL is the name of the Keras model: its class in lower case (tfgp_t2lm_head_model in the files of the hub,
tfgpt2lm_head_model from later Keras), with a number if it was not the first; transformers ignores it, and so do we.
Files that were made outside of `save_pretrained` may lack it, or `transformer/`, or have the names of several models
there: one such beginning is found for the whole file, the one under which most names are known. Early versions call the
token table `wte/weight:0`, later ones `wte/embeddings:0`, and read both. Large models of 4.x are several files and an
index, which are laid out otherwise:

    tf_model-00001-of-00002.h5         /transformer/wte/embeddings:0; all paths in the root's layer_names
    tf_model.h5.index.json             {"weight_map": {"MODEL/transformer/wte/embeddings:0": file name}}

`NAMES` has every name. Numbers stand as they are but for two kinds: biases of c_attn, c_proj and c_fc are rows of shape
(1, n), and kernels of heads, which are Keras Dense layers, are (in, out) where ours are (out, in).

What a file holds beyond the table is presented under its own name, never dropped. The names in the table get
`transformer.` in front, but for a file of the bare model (tfgpt2_model), whose names have none. The classes of
transformers always tie the language-model head to `wte`; an untied one is stored as a layer lm_head with a kernel,
which they report as not used. Writing takes GPT-2's parameters only; dtypes are kept (bfloat16 too: see
`gpt2_core.checkpoints.hdf5`, which is the container), except bool, which would be an enumeration.

Source: modeling_tf_utils.py and modeling_tf_gpt2.py of transformers 2.0 and 4.57; hdf5_format.py of tf-keras 2.21;
for the hub's own files, the names by which public programs read them. tests/peers has files that transformers 4.57
wrote, and the script that made them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gpt2_core.checkpoints import hdf5
from gpt2_core.checkpoints.renaming import LAYER, Names, Rule, arranged, pattern
from gpt2_core.checkpoints.sharding import Layout, read_layout, shard_names, split, write_layout
from gpt2_core.checkpoints.tensors import Checkpoint, MappedFile, Tensor, as_tensors, file_tensor
from gpt2_core.errors import CheckpointError, CheckpointFormatError, UnsafeCheckpointError
from gpt2_core.files import atomic_write, finish_interrupted_save
from gpt2_core.parameters import Head

NAME = "h5"
RANK = 30
LAYOUT = Layout(NAME, stem="tf_model", suffix=".h5", suffixes=(".h5", ".hdf5"))
FILES = (LAYOUT.single, LAYOUT.index)

PREFIX = "transformer."
_BODY = "transformer/"
_BLOCK = f"{_BODY}h_._{LAYER}/"
_BIAS = "N -> 1 N"
_KERNEL = "O I -> I O"

#: Below the model's name, without the ``:0`` that ends each.
NAMES = Names(
    Rule("wte.weight", f"{_BODY}wte/weight"),
    Rule("wpe.weight", f"{_BODY}wpe/embeddings"),
    Rule("h.{layer}.ln_1.weight", f"{_BLOCK}ln_1/gamma"),
    Rule("h.{layer}.ln_1.bias", f"{_BLOCK}ln_1/beta"),
    Rule("h.{layer}.attn.c_attn.weight", f"{_BLOCK}attn/c_attn/weight"),
    Rule("h.{layer}.attn.c_attn.bias", f"{_BLOCK}attn/c_attn/bias", _BIAS),
    Rule("h.{layer}.attn.c_proj.weight", f"{_BLOCK}attn/c_proj/weight"),
    Rule("h.{layer}.attn.c_proj.bias", f"{_BLOCK}attn/c_proj/bias", _BIAS),
    Rule("h.{layer}.ln_2.weight", f"{_BLOCK}ln_2/gamma"),
    Rule("h.{layer}.ln_2.bias", f"{_BLOCK}ln_2/beta"),
    Rule("h.{layer}.mlp.c_fc.weight", f"{_BLOCK}mlp/c_fc/weight"),
    Rule("h.{layer}.mlp.c_fc.bias", f"{_BLOCK}mlp/c_fc/bias", _BIAS),
    Rule("h.{layer}.mlp.c_proj.weight", f"{_BLOCK}mlp/c_proj/weight"),
    Rule("h.{layer}.mlp.c_proj.bias", f"{_BLOCK}mlp/c_proj/bias", _BIAS),
    Rule("ln_f.weight", f"{_BODY}ln_f/gamma"),
    Rule("ln_f.bias", f"{_BODY}ln_f/beta"),
    Rule("lm_head.weight", "lm_head/kernel", _KERNEL),
    Rule("multiple_choice_head.summary.weight", "multiple_choice_head/summary/kernel", _KERNEL),
    Rule("multiple_choice_head.summary.bias", "multiple_choice_head/summary/bias"),
    Rule("score.weight", "score/kernel", _KERNEL),
    Rule("classifier.weight", "classifier/kernel", _KERNEL),
    Rule("classifier.bias", "classifier/bias"),
    Rule("qa_outputs.weight", "qa_outputs/kernel", _KERNEL),
    Rule("qa_outputs.bias", "qa_outputs/bias"),
)
_WTE = f"{_BODY}wte/weight"
_LATER_WTE = f"{_BODY}wte/embeddings"  # in later single files, and in all shards
_RULES = {str(rule.theirs) for rule in NAMES.rules} | {_LATER_WTE}
_NUMBER = re.compile(rf"(?<=^{_BODY}h_\._)(0|[1-9][0-9]*)(?=/)")
_RULE_OF = {rule.ours: rule for rule in NAMES.rules}
_OUR_NUMBER = re.compile(r"(?<=^h\.)(0|[1-9][0-9]*)(?=\.)")

#: What Keras calls each model; transformers has the first four, the others are called as it would call ours.
MODELS: Mapping[Head, str] = {
    Head.NONE: "tfgpt2_model",
    Head.LM: "tfgpt2lm_head_model",
    Head.DOUBLE: "tfgpt2_double_heads_model",
    Head.SEQUENCE: "tfgpt2_for_sequence_classification",
    Head.TOKEN: "tfgpt2_for_token_classification",
    Head.QA: "tfgpt2_for_question_answering",
}
#: Early Keras put an underscore before the T2 and none after it.
_EARLY = {name.replace("tfgpt2", "tfgp_t2").replace("t2_", "t2"): head for head, name in MODELS.items()}
_HEADS = {name: head for head, name in MODELS.items()} | _EARLY
_FURTHER = re.compile(r"_[0-9]+$")  # what Keras puts behind the name of a second model of a kind
#: Layers that tell the head, and all layers in the order in which the classes of transformers make them.
_TELLING = {
    "multiple_choice_head": Head.DOUBLE,
    "score": Head.SEQUENCE,
    "classifier": Head.TOKEN,
    "qa_outputs": Head.QA,
}
_LAYERS = ("score", "transformer", "lm_head", "multiple_choice_head", "classifier", "qa_outputs")
_LISTS = ("layer_names", "layer_names0")
_SUBLISTS = ("weight_names", "weight_names0")
_KERAS = "2"  # whose layout this is: Keras looks for 1 only, which turned its kernels
_MOST_NESTED = 4


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, looks like this format, else None."""
    if path.is_dir():
        return LAYOUT.find(path)
    if not path.is_file():
        return None
    named = LAYOUT.owns(path.name) or path.name.endswith(".h5.index.json")
    return path if named or _looks_like(path) else None


def owns(name: str) -> bool:
    """Whether a file of this name, in a model's folder, belongs to a checkpoint of this format."""
    return LAYOUT.owns(name)


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a tf_model.h5, an index of shards, or a folder with either; names and shapes are the released ones.

    Tensors are views of the mapped file; kernels of heads are copies, since they stand there turned. What the table
    does not know is presented under the file's name for it. Neither TensorFlow nor h5py is used.
    Raises: UnsafeCheckpointError for what leads to another file, CheckpointFormatError for anything damaged or beyond
    the plain arrays that Keras writes.
    """
    path = Path(path)
    if path.is_dir():
        finish_interrupted_save(path)
    entry = LAYOUT.find(path) if path.is_dir() else path
    model = _model_in(entry) if entry is not None and entry.suffix == ".json" else ""
    opened = read_layout(LAYOUT, path, partial(_read_file, model=model), writable=writable)
    try:
        return _translated(opened)
    except CheckpointFormatError as cause:
        opened.close()
        raise CheckpointFormatError(f"{opened.path} is not a tf_model.h5 of a GPT-2: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Write GPT-2's parameters as transformers' TensorFlow classes would, one in memory at a time; give the files.

    `path` is a file (.h5, .hdf5) or a folder, which gets tf_model.h5, or shards of at most `max_shard_bytes` and their
    index; an earlier one in it is replaced. Names are the released ones, with or without ``transformer.``.
    Raises: CheckpointError for anything that is no parameter of a GPT-2, for shapes that a parameter does not have,
    bool, and metadata; WriteError; either way the path is as it was.
    """
    if metadata:
        raise CheckpointError(f"h5 has no place for metadata ({', '.join(metadata)}); leave it out or use safetensors")
    given = as_tensors(tensors)
    sharded = len(split(given, max_shard_bytes)) > 1
    write_file = _write_shard if sharded else _write_single
    stored = _stored(given, sharded)
    return write_layout(LAYOUT, Path(path), stored, write_file, metadata=None, max_shard_bytes=max_shard_bytes)


# Names ---------------------------------------------------------------------------------------------------------------


def _is_known(name: str) -> bool:
    """Whether `name`, below the model's name and without ``:0``, has a row in the table."""
    return _NUMBER.sub(LAYER, name) in _RULES


def _beginnings(names: Iterable[str]) -> list[str]:
    """What may stand in front of all names: nothing, or the models that most of them begin with."""
    split_up = [name.split("/") for name in names]
    found = [""]
    for depth in range(1, _MOST_NESTED + 1):
        counts = Counter("/".join(parts[:depth]) for parts in split_up if len(parts) > depth)
        found += [f"{beginning}/" for beginning, _ in counts.most_common(1)]
    return found


def _below(name: str, beginning: str, missing: str) -> str | None:
    """The name below the model's, as the table has it; None if it has not. `missing` is put before the body's."""
    if not name.startswith(beginning):
        return None
    rest = name[len(beginning) :].removesuffix(":0")
    candidates = (missing + rest, "" if rest.startswith(_BODY) else rest) if missing else (rest,)
    return next((candidate for candidate in candidates if _is_known(candidate)), None)


def _below_all(names: Sequence[str]) -> tuple[str, str, dict[str, str]]:
    """How all names begin, what they lack after it, and the table's name of each that has one: the most that can be."""
    best: tuple[str, str, dict[str, str]] = ("", "", {})
    for missing in ("", _BODY):
        for beginning in _beginnings(names):
            found = {name: _below(name, beginning, missing) for name in names}
            known = {name: below for name, below in found.items() if below is not None}
            if len(known) > len(best[2]):
                best = (beginning, missing, known)
            if len(known) == len(names):
                return best
    return best


def _translated(opened: Checkpoint) -> Checkpoint:
    """The same checkpoint under our names and in our shapes, still in the order of the file."""
    beginning, missing, below = _below_all(opened.names())
    head = _HEADS.get(_FURTHER.sub("", beginning.strip("/").rpartition("/")[2]))
    known: dict[str, str] = {}
    for name, plain in below.items():
        known.setdefault(_WTE if plain == _LATER_WTE else plain, name)
    renamed = NAMES.from_file({plain: opened[name] for plain, name in known.items()})
    ours = {known[there]: here for here, there in renamed.names_in_file.items()}
    bare = bool(missing) or head is Head.NONE
    tensors, names_in_file = {}, {}
    for name in opened:
        here = ours.get(name)
        if here is None:
            tensors[name if "/" in name else f"/{name}"] = opened[name]
        else:
            shown = here.removeprefix(PREFIX) if bare else here
            tensors[shown], names_in_file[shown] = renamed.tensors[here], name
    return Checkpoint(
        tensors,
        format=NAME,
        path=opened.path,
        files=opened.files,
        close=opened.close,
        head=None if head is None else head.value,
        names_in_file=names_in_file,
    )


# Reading -------------------------------------------------------------------------------------------------------------


def _looks_like(path: Path) -> bool:
    """Whether a file is HDF5 and, if that much can be read, has the attribute that Keras 1 and 2 wrote."""
    with path.open("rb") as opened:
        if opened.read(len(hdf5.SIGNATURE)) != hdf5.SIGNATURE:
            return False
    try:
        file = MappedFile(path)
        try:
            return not hdf5.root_attributes(file).isdisjoint(_LISTS)
        finally:
            file.close()
    except CheckpointError:
        return not path.name.endswith(".weights.h5")  # damaged: Keras 3 calls its own so


def _model_in(index: Path) -> str:
    """The model's name that an index of shards puts in front of the names in the shards, with its slash."""
    first = next(iter(shard_names(index).values()))[0]
    model, _, rest = first.partition("/")
    return f"{model}/" if rest and model not in _LAYERS else ""


def _read_file(path: Path, writable: bool, *, model: str) -> Checkpoint:
    """One file, under the names that transformers has for its tensors."""
    file = MappedFile(path, writable=writable)
    try:
        tensors = _tensors(file, model)
    except UnsafeCheckpointError as cause:
        file.close()
        raise UnsafeCheckpointError(f"{path} is not safe to read: {cause}") from cause
    except CheckpointFormatError as cause:
        file.close()
        raise CheckpointFormatError(f"{path} is not a sound tf_model.h5: {cause}") from cause
    return Checkpoint(tensors, format=NAME, path=path, close=file.close)


def _tensors(file: MappedFile, model: str) -> dict[str, Tensor]:
    found = hdf5.contents(file)
    if found.attributes.get((), frozenset()).isdisjoint(_LISTS):
        raise CheckpointFormatError(
            "it is HDF5, but has no attribute layer_names, as what transformers' save_pretrained and Keras 2's "
            "save_weights wrote has (a .weights.h5 of Keras 3 is another format)"
        )
    tensors: dict[str, Tensor] = {}
    for array in found.arrays:
        name = _weight_name(found, array.path, model)
        if name in tensors:
            name = "/".join(array.path)
        if name in tensors:
            raise CheckpointFormatError(f"two of its arrays are called {name[:200]!r}")
        tensors[name] = file_tensor(file, array.dtype, array.shape, array.offset)
    return tensors


def _weight_name(found: hdf5.Contents, path: hdf5.Names, model: str) -> str:
    """Below a layer's group, which lists its weights, names are complete; in a shard the model's name is left out."""
    below = not found.attributes.get(path[:1], frozenset()).isdisjoint(_SUBLISTS)
    return "/".join(path[1:]) if below else model + "/".join(path)


# Writing -------------------------------------------------------------------------------------------------------------


def _rule(name: str) -> tuple[Rule, str] | None:
    """The row of a parameter, by our name for it, and the number of its block."""
    plain = name.removeprefix(PREFIX)
    rule = _RULE_OF.get(_OUR_NUMBER.sub(LAYER, plain))
    number = _OUR_NUMBER.search(plain)
    if rule is None or (plain != name and not _is_body(rule)):
        return None
    return rule, number[0] if number else ""


def _is_body(rule: Rule) -> bool:
    return str(rule.theirs).startswith(_BODY)


def _stored(tensors: Mapping[str, Tensor], sharded: bool) -> dict[str, Tensor]:
    """What goes into the file, by the names that transformers gives it, the model's name in front."""
    found = {name: _rule(name) for name in tensors}
    rules = {name: rule for name, rule in found.items() if rule is not None}
    if len(rules) < len(found):
        unknown = [name for name in found if name not in rules]
        raise CheckpointError(
            f"h5 holds the parameters of a GPT-2 and nothing else, but {len(unknown)} of these names are none: "
            f"{', '.join(unknown[:10])}; leave them out (h.0.attn.bias, a mask, is not needed), or use safetensors"
        )
    prefixed = {name.startswith(PREFIX) for name, (rule, _) in rules.items() if _is_body(rule)}
    if len(prefixed) > 1:
        raise CheckpointError(f"some of the names begin with {PREFIX} and some do not; expected all or none")
    layers = {str(rule.theirs).partition("/")[0] for rule, _ in rules.values()}
    plain = Head.NONE if prefixed == {False} and "lm_head" not in layers else Head.LM
    model = MODELS[next((head for layer, head in _TELLING.items() if layer in layers), plain)]
    stored = {}
    for name, (rule, number) in rules.items():
        theirs = str(rule.theirs).replace(LAYER, number)
        theirs = _LATER_WTE if sharded and theirs == _WTE else theirs
        stored[f"{model}/{theirs}:0"] = _laid_out(name, tensors[name], rule)
    return stored


def _laid_out(name: str, tensor: Tensor, rule: Rule) -> Tensor:
    if not rule.layout:
        return tensor
    found = arranged(tensor, pattern(rule.layout), {})
    if found is None:
        raise CheckpointError(f"{name} has the shape {tensor.shape}, which is not {rule.layout.partition(' ->')[0]}")
    return found


def _write_single(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    layers: dict[str, list[str]] = {}
    for name in tensors:
        layers.setdefault(name.split("/")[1], []).append(name)
    order = sorted(layers, key=_LAYERS.index)
    arrays = {(name.split("/")[1], *name.split("/")): tensor for name, tensor in tensors.items()}
    root: dict[str, hdf5.Attribute] = {"layer_names": order, "backend": "tensorflow", "keras_version": _KERAS}
    attributes: dict[hdf5.Names, Mapping[str, hdf5.Attribute]] = {(): root}
    attributes |= {(layer,): hdf5.split_names("weight_names", names) for layer, names in layers.items()}
    with atomic_write(path) as file:
        hdf5.write(file, arrays, attributes)


def _write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    names = {name.partition("/")[2]: tensor for name, tensor in tensors.items()}
    arrays = {tuple(name.split("/")): tensor for name, tensor in names.items()}
    with atomic_write(path) as file:
        hdf5.write(file, arrays, {(): hdf5.split_names("layer_names", sorted(names))})
