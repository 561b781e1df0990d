"""What all models share: building from a seed, loading, saving, tying, resizing, pruning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gpt2_core.checkpoints import Tensor as FileTensor
from gpt2_core.checkpoints import open_checkpoint
from gpt2_core.checkpoints.naming import BUFFERS, LM_HEAD, Matching, names_in_file
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, ConfigError, InputError, nearest
from gpt2_core.initialization import initial_value
from gpt2_core.parameters import PREFIX, Head, Parameter, parameter_table
from gpt2_core.pretrained import Pretrained, open_pretrained, save_pretrained
from gpt2_pt.products import linear as product
from gpt2_pt.products import serves

Model = TypeVar("Model", bound="PreTrainedModel")

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


_PIECE = 1 << 18  # numbers converted at a time while loading


class Linear(nn.Linear):
    """A linear layer without values: they come from the seed or from a checkpoint.

    Drawing values to throw them away costs time for a large head; on the meta device it even costs the import of the
    symbolic shapes and sympy behind it (0.3 s of the 0.4 s that loading a mapped 124M checkpoint took).
    """

    def reset_parameters(self) -> None:
        """Leave the values undefined."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if serves(x.reshape(-1, x.size(-1)), self.weight):
            return product(x, self.weight.t(), self.bias)
        return super().forward(x)


def linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
    """A linear layer (in -> out) without values."""
    return Linear(n_in, n_out, bias=bias)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """What ``dtype`` means; None for the file's own."""
    if dtype is None:
        return torch.get_default_dtype()
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        hint = nearest(str(dtype), list(DTYPES))
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}, or 'auto' for the file's own{hint}")
    return found


def _own_dtype(pretrained: Pretrained) -> torch.dtype:
    """The number format of the file's token table, which the whole model takes under dtype="auto"."""
    row = pretrained.table[0]
    name = pretrained.checkpoint.dtype(pretrained.matching.names[row.name])
    if name not in DTYPES:
        raise CheckpointError(
            f"{pretrained.checkpoint.path} holds {row.name} as {name}, expected one of {', '.join(DTYPES)}; say which "
            "to convert to: dtype='float32'"
        )
    return DTYPES[name]


def _holds(pretrained: Pretrained, dtype: torch.dtype) -> bool:
    """Whether some tensor of the file is of this dtype, so that the model will look into the mapped file itself."""
    return any(DTYPES.get(pretrained.checkpoint.dtype(name)) is dtype for name in pretrained.matching.names.values())


def _reopened(pretrained: Pretrained) -> Pretrained:
    """The same for reading alone: every tensor will be copied, and the pages of each can be given back at once."""
    was = pretrained.checkpoint
    was.close()
    return replace(pretrained, checkpoint=open_checkpoint(was.path, format=was.format))


def _as_torch(bits: np.ndarray[Any, Any], dtype: str) -> Tensor:
    """The numbers that a file of ``dtype`` holds as ``bits``, in the same memory."""
    if dtype == "bfloat16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)


def _to_torch(tensor: FileTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor of a file: in the mapped file itself where it needs no conversion, else copied a piece at a time."""
    bits = tensor.raw()
    if DTYPES.get(tensor.dtype) is dtype and device.type == "cpu" and bits.flags.writeable:
        return _as_torch(bits, tensor.dtype)
    value = torch.empty(tensor.shape, dtype=dtype, device=device)
    pieces, flat = torch.split(value.view(-1), _PIECE), bits.reshape(-1)
    for at, piece in enumerate(pieces):
        piece.copy_(_as_torch(flat[at * _PIECE : (at + 1) * _PIECE].copy(), tensor.dtype))
        tensor.release()
    return value


def _to_file(parameter: Tensor) -> FileTensor:
    """The tensor as a writer wants it, fetched from the device only when its turn comes."""
    name = str(parameter.dtype).removeprefix("torch.")

    def load() -> np.ndarray[Any, Any]:
        value = parameter.detach().contiguous().cpu()
        if name == "bfloat16":
            return value.view(torch.int16).numpy().view(np.uint16)
        return value.numpy()

    return FileTensor(name, tuple(parameter.shape), load)


def _like(old: Tensor, value: Tensor) -> nn.Parameter:
    """A parameter of its own memory with these numbers, frozen if ``old`` is."""
    return nn.Parameter(value.clone(), old.requires_grad)


def _accept_hub_names(
    module: PreTrainedModel,
    state: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Let ``load_state_dict`` take the hub's files: names without ``transformer.``, old buffers, a tied head.

    A head that differs from the token table is reported: a tied model cannot hold both.
    """
    have = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    for ours, theirs in names_in_file(have, module.parameter_table()).items():
        if ours != theirs and theirs in have:
            state[prefix + ours] = state.pop(prefix + theirs)
    for layer in range(module.config.n_layer):
        for buffer in BUFFERS:
            for body in ("", PREFIX):
                state.pop(f"{prefix}{body}h.{layer}.{buffer}", None)
    tokens = f"{prefix}{PREFIX}wte.weight"
    if module.get_output_embeddings() is not None and module.config.tie_word_embeddings and tokens in state:
        head = state.setdefault(prefix + LM_HEAD, state[tokens])
        if head is not state[tokens] and not _same(head, state[tokens]):
            errors.append(
                f"{prefix}{LM_HEAD} differs from {tokens}, but the configuration ties them; set "
                f"tie_word_embeddings=False to use both, or remove {prefix}{LM_HEAD} to use {tokens} alone"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; those without numbers are taken to."""
    if one.is_meta or other.is_meta or one.data_ptr() == other.data_ptr():
        return True
    return one.shape == other.shape and torch.equal(one.to(other.device), other)


def _tie_again(module: PreTrainedModel, incompatible: Any) -> None:
    """After ``load_state_dict(assign=True)``, which puts new parameters in the place of the shared one."""
    module.tie_weights()


class PreTrainedModel(nn.Module):
    """The base of every model: a config, parameters as the table says, and the ways in and out of files."""

    head: Head
    config: GPT2Config
    #: How the file that this model was loaded from went with it: what was ignored and why, what started afresh.
    loaded: Matching | None = None

    def __init__(self, config: GPT2Config, seed: int | None = 0) -> None:
        """Build from ``config`` with the initial values of ``seed``; None leaves the values undefined.

        Raises: ConfigError, where ``config`` is no GPT2Config.
        """
        super().__init__()
        if not isinstance(config, GPT2Config):
            raise ConfigError(
                f"the model needs a GPT2Config, got {type(config).__name__}; "
                f"for trained weights use {type(self).__name__}.from_pretrained(name_or_folder)"
            )
        self.config = config
        self._build(config)
        self.register_load_state_dict_pre_hook(_accept_hub_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]
        if seed is not None:
            self._initialise(seed)

    def _build(self, config: GPT2Config) -> None:
        raise NotImplementedError

    # -- files -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_folder: str | Path,
        *,
        config: GPT2Config | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        seed: int = 0,
    ) -> Model:
        """A trained model by name, folder or file, in any format that can be read, in evaluation mode.

        Args:
            name_or_folder: "gpt2-tales", a hub name such as "openai-community/gpt2", a folder, or a checkpoint file.
            config: instead of the config.json found there.
            dtype: number format of the parameters; None is PyTorch's default (float32), "auto" is that of the file's
                token table.
            device: where they go; None is PyTorch's default.
            revision, cache_dir, local_files_only: as the hub takes them.
            seed: initial values of a classification head that the file does not have.

        Weights that need no conversion are not copied: they are copy-on-write views of the mapped file, so loading
        costs little, and changing them leaves the file as it is.

        Raises: HubError, ConfigError, or CheckpointError and its kinds.
        """
        asked = _dtype(dtype)
        place = torch.device(device) if device is not None else torch.get_default_device()
        pretrained = open_pretrained(
            name_or_folder,
            cls.head,
            config=config,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            writable=True,
        )
        target = asked or _own_dtype(pretrained)
        if place.type != "cpu" or not _holds(pretrained, target):
            pretrained = _reopened(pretrained)
        with pretrained.checkpoint, torch.device("meta"):
            model = cls(pretrained.config, seed=None)
            for row, tensor in pretrained.tensors(seed):
                value = _to_torch(tensor, target, place)
                owner, _, leaf = row.name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
        model.tie_weights()
        model.loaded = pretrained.matching
        return model.eval()

    def save_pretrained(
        self, folder: str | Path, format: str = "safetensors", max_shard_bytes: int | str | None = None
    ) -> Path:
        """Write config.json and weights into ``folder``: all of it or, whatever happens, none of it.

        Args:
            format: "safetensors", "bin", or any other that is written: see docs/formats.md.
            max_shard_bytes: files of at most so many bytes, 5_000_000_000 or "5GB", with an index.

        Raises: CheckpointError for an unknown format, WriteError where the system refuses; InputError, while an adapter
        is held, which the file would lack.
        """
        self._refuse_adapter()
        return save_pretrained(
            folder,
            self.config,
            self.head,
            {row.name: _to_file(self.get_parameter(row.name)) for row in self.parameter_table()},
            architecture=type(self).__name__,
            format=format,
            max_shard_bytes=max_shard_bytes,
        )

    def _refuse_adapter(self) -> None:
        """Raise InputError where an adapter is held: a file of the model would not have what it has learnt."""
        if any(one.__dict__.get("_lora") is not None for one in (self, self._body)):
            raise InputError(
                "the model holds a LoRA adapter, which a file of the model does not have; put it into the kernels with "
                "merge(model), or save it alone with save_adapter(model, folder), both of gpt2_pt.adapters"
            )

    # -- parameters ------------------------------------------------------------------------------------------

    def parameter_table(self) -> tuple[Parameter, ...]:
        """The rows of core's table for this model, in the order of the forward pass."""
        return parameter_table(self.config, self.head)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for row in self.parameter_table():
            parameter = self.get_parameter(row.name)
            if not parameter.is_meta:
                parameter.copy_(torch.from_numpy(initial_value(row, seed)))

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the model holds; a tied head counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' number format."""
        return next(self.parameters()).dtype

    @property
    def _body(self) -> Any:
        """The transformer: this model itself, or what its head stands on."""
        return self if self.head is Head.NONE else self.transformer

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table, (V, C)."""
        table: nn.Embedding = self._body.wte
        return table

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the token table; the config's vocab_size and a tied head follow.

        Raises: InputError, where the width is not n_embd, or the rows do not match a head of its own.
        """
        if not isinstance(table, nn.Embedding):
            raise InputError(f"the new token table is a {type(table).__name__}, expected a torch.nn.Embedding")
        rows, width = table.weight.shape
        if width != self.config.n_embd:
            raise InputError(f"the new token table is {width} wide, expected n_embd={self.config.n_embd}")
        head = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings and rows != head.out_features:
            raise InputError(
                f"the new token table has {rows} rows, expected {head.out_features} as the language-model head has, "
                "which is not tied to it; call resize_token_embeddings first"
            )
        own = self._body.wte
        own.weight, own.num_embeddings = table.weight, rows
        self._set_config(vocab_size=rows)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The language-model head, or None where the model has none."""
        return getattr(self, "lm_head", None)

    def tie_weights(self) -> None:
        """Make the language-model head the token table itself, where the config says they are one."""
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self._body.wte.weight
            head.out_features = head.weight.shape[0]

    def _apply(self, fn: Any, recurse: bool = True) -> PreTrainedModel:
        # ``to_empty`` and conversions that cannot be done in place make new parameters, one for each name.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie_weights()
        return self

    def _set_config(self, **changes: Any) -> None:
        self.config = self.config.replace(**changes)
        self._body.config = self.config

    @torch.no_grad()
    def resize_token_embeddings(self, size: int) -> nn.Embedding:
        """Grow or cut the vocabulary to ``size`` tokens; new rows start at the mean of the old ones.

        The mean keeps the chance of the new tokens near that of an average one, instead of far above it.

        Raises: InputError, for a size below 1.
        """
        if not isinstance(size, int) or size < 1:
            raise InputError(f"the new vocabulary size is {size!r}, expected a whole number of at least 1")

        def resized(old: Tensor) -> nn.Parameter:
            rows = old[:size]
            if size > old.size(0):
                mean = old.mean(
                    dim=0, keepdim=True, dtype=torch.float64 if old.dtype == torch.float64 else torch.float32
                )
                rows = torch.cat((rows, mean.to(old.dtype).expand(size - old.size(0), -1)))
            return _like(old, rows)

        table = self._body.wte
        table.weight, table.num_embeddings = resized(table.weight), size
        head = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings:
            head.weight, head.out_features = resized(head.weight), size
        self._set_config(vocab_size=size)
        self.tie_weights()
        return self.get_input_embeddings()

    @torch.no_grad()
    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove attention heads for good: ``{layer: [heads]}``, numbered as in the unpruned model.

        Heads already removed are skipped. The config remembers, so a saved model loads as it is.

        Raises: ConfigError, for layers or heads that do not exist, or where a layer would keep none.
        """
        before = self.config
        merged = {layer: set(heads) for layer, heads in before.pruned_heads.items()}
        # Read as a config reads it, so that a layer named "0" is layer 0, and what cannot be read is a ConfigError.
        for layer, heads in before.replace(pruned_heads=heads_to_prune).pruned_heads.items():
            merged.setdefault(layer, set()).update(heads)
        after = before.replace(pruned_heads={layer: tuple(heads) for layer, heads in merged.items()})
        D = before.head_dim
        for layer in after.pruned_heads:
            alive = [h for h in range(before.n_head) if h not in before.pruned_heads.get(layer, ())]
            kept = [i for i, h in enumerate(alive) if h not in after.pruned_heads[layer]]
            attn = self._body.h[layer].attn
            index = (torch.tensor(kept).unsqueeze(1) * D + torch.arange(D)).flatten().to(attn.c_proj.weight.device)
            width = len(alive) * D
            packed = torch.cat([index + part * width for part in range(3)])
            attn.c_attn.weight = _like(attn.c_attn.weight, attn.c_attn.weight[:, packed])
            attn.c_attn.bias = _like(attn.c_attn.bias, attn.c_attn.bias[packed])
            attn.c_proj.weight = _like(attn.c_proj.weight, attn.c_proj.weight[index])
            attn.n_head = len(kept)
        self._set_config(pruned_heads=after.pruned_heads)

    def gradient_checkpointing_enable(self) -> None:
        """In training, recompute each block in the backward pass instead of keeping its activations."""
        self._body.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._body.gradient_checkpointing = False
