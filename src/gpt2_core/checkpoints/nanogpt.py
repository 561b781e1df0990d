"""ckpt.pt: what nanoGPT's train.py saves, a file of torch.save with the state dict nested in it.

    {"model": {name: tensor}, "optimizer": ..., "model_args": {n_layer, n_head, n_embd, block_size, bias, vocab_size,
     dropout}, "iter_num": int, "best_val_loss": number or tensor, "config": {the settings of train.py}}

Names are the hub's, with `_orig_mod.` in front if the model was compiled. Kernels are of torch.nn.Linear, (out, in),
where the hub's are (in, out); `NAMES` turns them. `lm_head.weight` is there although it always is the token table, with
the same memory. Early versions of torch saved each block's causal mask (`attn.bias`) too.

- `bias`: False leaves out every bias of the transformer; they are read as zeros, which is what it means. Absent in
  files of January 2023: True.
- `vocab_size` is 50304 if the model was trained from nothing: 50257 padded to a multiple of 64. The rows beyond belong
  to no token, but they are parameters like the others and are kept; so is the size.
- The activation is not said: GPT-2's GELU (tanh) up to June 2023, the exact one since (pull request 274). Read as the
  exact one, with a note. The epsilon is 1e-5 and everything else as in GPT-2.

What is written has all keys but the optimizer, so sample.py reads it and train.py's `--init_from=resume` does not.
`config` holds one entry, `gpt2`, the configuration as config.json has it: nanoGPT ignores it, and reading takes from it
what model_args does not say.

Source: nanoGPT's train.py, sample.py and model.py, January 2023 to 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints import bin, zips
from gpt2_core.checkpoints.holds import INSIDE, NOWHERE, About, Holds
from gpt2_core.checkpoints.naming import LM_HEAD, PREFIX, TOKENS
from gpt2_core.checkpoints.renaming import Names, Rule
from gpt2_core.checkpoints.tensors import STORAGE, Checkpoint, MappedFile, Tensor, as_tensors
from gpt2_core.config import ALIASES, GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.files import atomic_folder
from gpt2_core.parameters import Head

NAME = "nanogpt"
RANK = 15
FILES = ("ckpt.pt",)
SUFFIXES = (".pt",)
HOLDS = Holds(
    heads=frozenset({Head.LM}),
    config=INSIDE,
    fixed=MappingProxyType(
        {
            "n_inner": (None,),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "pruned_heads": ({},),
            "tie_word_embeddings": (True,),
        }
    ),
    tokenizer=NOWHERE,
)

_KERNEL = "I O -> O I"
_BLOCK = "transformer.h.{layer}."
_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
NAMES = Names(
    Rule("wte.weight", "transformer.wte.weight"),
    Rule("wpe.weight", "transformer.wpe.weight"),
    *(
        rule
        for part in _PARTS
        for rule in (
            Rule(f"h.{{layer}}.{part}.weight", f"{_BLOCK}{part}.weight", "" if part.startswith("ln") else _KERNEL),
            Rule(f"h.{{layer}}.{part}.bias", f"{_BLOCK}{part}.bias"),
        )
    ),
    Rule("ln_f.weight", "transformer.ln_f.weight"),
    Rule("ln_f.bias", "transformer.ln_f.bias"),
)

#: nanoGPT's names of a configuration -> ours.
ARGUMENTS: Mapping[str, str] = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_COMPILED = "_orig_mod."
_IGNORED = {
    "optimizer": "the state of the optimizer",
    "iter_num": "how many steps were made",
    "best_val_loss": "the best loss so far",
    "config": "the settings of the training script",
}
_MARK = b"model_args"
_OWN = "gpt2"


def find(path: Path) -> Path | None:
    """The file to open if `path`, a file or a folder, holds this format, else None."""
    if path.is_dir():
        file = path / FILES[0]
        return file if file.is_file() and _looks_like(file) else None
    return path if path.is_file() and _looks_like(path) else None


def owns(name: str) -> bool:
    """Whether a file of this name in a model's folder belongs to a checkpoint of this format."""
    return name in FILES


def read(path: str | Path, *, writable: bool = False) -> Checkpoint:
    """Open a ckpt.pt or a folder with one; no code in it ever runs.

    Raises: UnsafeCheckpointError naming what the file wanted to run, CheckpointFormatError for anything damaged or of
    another kind, such as a model with parts that GPT-2 does not have.
    """
    path = Path(path)
    file = path / FILES[0] if path.is_dir() else path
    tree, mapped = bin.read_tree(file, writable=writable)
    try:
        return _checkpoint(tree, file, mapped)
    except CheckpointFormatError as cause:
        mapped.close()
        raise CheckpointFormatError(f"{file} is not a checkpoint of nanoGPT: {cause}") from cause


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor | NDArray[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    about: About | None = None,
) -> tuple[Path, ...]:
    """Write a ckpt.pt, to a file that ends in .pt or into a folder. Raises: CheckpointError, WriteError."""
    path = Path(path)
    if about is None or metadata or max_shard_bytes is not None:
        raise CheckpointError("nanogpt needs about=About(config), and takes neither metadata nor shards")
    if path.suffix in SUFFIXES and not path.is_dir():
        bin.write_tree(path, _tree(tensors, about.config))
        return (path,)
    with atomic_folder(path, replaces=owns) as stage:
        bin.write_tree(stage / FILES[0], _tree(tensors, about.config))
    return (path / FILES[0],)


def remarks(about: About) -> tuple[str, ...]:
    """What to know about a model of ours as nanoGPT's: its activation is not always the same."""
    if about.config.activation_function == "gelu":
        return ()
    return (
        "nanoGPT computes the exact GELU since June 2023, and this model GPT-2's approximation: they differ by up to "
        "5e-4 at each activation, as with nanoGPT's own --init_from=gpt2",
    )


def _looks_like(path: Path) -> bool:
    """Whether the pickle in a file of torch.save speaks of model_args."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return False
    mapped = MappedFile(path)
    try:
        entries = zips.entries(mapped)
        programs = [entry for name, entry in entries.items() if name.endswith("/data.pkl")]
        return any(_MARK in mapped.bytes(entry.offset, min(entry.size, 1 << 24)) for entry in programs)
    except CheckpointError:
        return False  # damaged: bin says how
    finally:
        mapped.close()


def _checkpoint(tree: Any, path: Path, mapped: MappedFile) -> Checkpoint:
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or "model_args" not in tree:
        raise CheckpointFormatError("expected a dict with a state dict as model, and with model_args")
    state = _state(tree["model"])
    config, bias, notes = _config(tree["model_args"], tree.get("config"))
    if config["n_layer"] > len(state):
        raise CheckpointFormatError(f"its model_args speak of {config['n_layer']} layers, its model has fewer tensors")
    found = NAMES.from_file(state)
    if not bias:
        found.tensors |= _zero_biases(found.tensors, config)
        notes.append("model_args says bias=False, so every bias is zero in the result")
    own = bool(_own_config(tree.get("config")))
    others = [name for name in tree if name not in ("model", "model_args") and not (own and name == "config")]
    return Checkpoint(
        found.tensors,
        format=NAME,
        path=path,
        close=mapped.close,
        config=config,
        head=Head.LM.value,
        names_in_file=found.names_in_file,
        ignored={str(name): _IGNORED.get(str(name), "not a part of the model") for name in others},
        notes=notes,
    )


def _state(given: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The state dict without the prefix of compiled models, which all names have or none."""
    others = [
        str(name)[:60] for name, value in given.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        raise CheckpointFormatError(f"its model holds more than tensors by name: {', '.join(others[:8])}")
    prefixed = [name.startswith(_COMPILED) for name in given]
    if any(prefixed) and not all(prefixed):
        raise CheckpointFormatError(f"some of its names begin with {_COMPILED} and some do not; expected all or none")
    return {name.removeprefix(_COMPILED): tensor for name, tensor in given.items()}


def _config(arguments: Any, settings: Any) -> tuple[dict[str, Any], bool, list[str]]:
    """The configuration, whether there are biases, and what was taken for granted."""
    if not isinstance(arguments, dict):
        raise CheckpointFormatError("its model_args are not a dict")
    known = {*ARGUMENTS, "bias", "dropout"}
    missing, strange = sorted(set(ARGUMENTS) - set(arguments)), sorted(map(str, set(arguments) - known))
    if missing or strange:
        raise CheckpointFormatError(
            f"its model_args lack {', '.join(missing) or 'nothing'} and have {', '.join(strange)[:200] or 'nothing'} "
            f"beyond nanoGPT's; a model with other parts is not a GPT-2"
        )
    bias = arguments.get("bias", True)
    sizes = [arguments[name] for name in ARGUMENTS]
    if type(bias) is not bool or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise CheckpointFormatError(
            f"its model_args are {str(arguments)[:300]}; expected sizes, and bias true or false"
        )
    config = _own_config(settings)
    notes = []
    if "activation_function" not in config:
        config["activation_function"] = "gelu"
        notes.append(
            "nanoGPT does not say its activation: the exact GELU is taken, as it computes since June 2023; if this "
            "model is older, or was made from GPT-2, give a configuration that says gelu_new (--config)"
        )
    if "dropout" in arguments and not any(name in config for name in _DROPOUTS):
        config |= dict.fromkeys(_DROPOUTS, arguments["dropout"])
    config |= {ours: arguments[theirs] for theirs, ours in ARGUMENTS.items()}
    return config, bias, notes


def _own_config(settings: Any) -> dict[str, Any]:
    """What `write` kept of a configuration; nothing for files of others."""
    own = settings.get(_OWN) if isinstance(settings, dict) else None
    if not isinstance(own, dict):
        return {}
    sizes = {*ARGUMENTS.values(), *(alias for alias, name in ALIASES.items() if name in ARGUMENTS.values())}
    return {str(key): value for key, value in own.items() if key not in sizes}


def _zero_biases(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The biases that a file without any stands for; shapes follow from the weights that are there."""
    zeros = {}
    for row in NAMES.rows(config["n_layer"]):
        weight = tensors.get(PREFIX + row.ours.removesuffix("bias") + "weight")
        name = PREFIX + row.ours
        if row.ours.endswith(".bias") and weight is not None and weight.shape:
            if name in tensors:
                raise CheckpointFormatError(f"model_args says bias=False, but it holds {name}")
            shape, dtype = weight.shape[-1:], weight.dtype
            zeros[name] = Tensor(dtype, shape, lambda s=shape, d=dtype: np.zeros(s, STORAGE[d]))  # type: ignore[misc]
    return zeros


def _tree(tensors: Mapping[str, Tensor | NDArray[Any]], config: GPT2Config) -> dict[str, Any]:
    """What torch.load is to give."""
    state = NAMES.to_file(as_tensors(tensors), config)
    tokens = state.get(PREFIX + TOKENS)
    if tokens is not None:
        state[LM_HEAD] = tokens
    arguments: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in ARGUMENTS.items()}
    return {
        "model": state,
        "model_args": arguments | {"bias": True, "dropout": float(config.resid_pdrop)},
        "iter_num": 0,
        "best_val_loss": 1e9,  # as train.py begins
        "config": {_OWN: config.to_dict()},
    }
