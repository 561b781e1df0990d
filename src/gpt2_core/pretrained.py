"""A trained model as a whole, config and weights together: found, matched and opened; written in one piece.

    pretrained = open_pretrained("gpt2-tales", Head.LM)     # a name, a folder, or a checkpoint file
    for row, tensor in pretrained.tensors(): ...            # rows of the parameter table and what the file holds
    save_pretrained(folder, config, Head.LM, tensors, architecture="GPT2LMHeadModel")

What a framework adds is turning the arrays into its own tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpt2_core.checkpoints import Checkpoint, Tensor, is_weight_file, named_format, open_checkpoint, write_with
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.checkpoints.holds import BESIDE, About, holds_of, objections
from gpt2_core.checkpoints.naming import Matching, match
from gpt2_core.config import GPT2Config, check_config
from gpt2_core.errors import CannotHoldError, CheckpointError
from gpt2_core.files import atomic_folder, existing, finish_interrupted_save, size_in_bytes
from gpt2_core.initialization import initial_value
from gpt2_core.parameters import Head, Parameter, parameter_table


@dataclass(frozen=True)
class Pretrained:
    """A config, an open checkpoint, and how the file's names go with the model's."""

    config: GPT2Config
    head: Head
    checkpoint: Checkpoint
    matching: Matching
    table: tuple[Parameter, ...]

    def tensors(self, seed: int = 0) -> Iterator[tuple[Parameter, Tensor]]:
        """Each row of the parameter table with its tensor; heads that the file lacks start from ``seed``."""
        for row in self.table:
            name = self.matching.names.get(row.name)
            yield row, (Tensor.of(initial_value(row, seed)) if name is None else self.checkpoint[name])


def open_pretrained(
    name_or_path: str | Path,
    head: Head | str,
    *,
    config: GPT2Config | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    writable: bool = False,
) -> Pretrained:
    """Find a trained model by name, folder or file, and match it to a model with ``head``.

    With ``writable`` the arrays are copy-on-write views of the file: they may be changed, the file never is.

    Raises: HubError, where the name cannot be resolved; ConfigError, where there is no usable config; CheckpointError
    and its kinds, where the file is damaged, unsafe, or does not fit.
    """
    if config is not None:
        check_config(config)
    path = existing(name_or_path)
    if path is None:
        from gpt2_core.hub import resolve

        path = resolve(
            name_or_path,
            kind="model",
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    # Before the config is read: a save that was killed may still have to put its files in place.
    finish_interrupted_save(path if path.is_dir() else path.parent)
    head = Head(head)
    checkpoint = open_checkpoint(path, writable=writable)
    try:
        if config is None:
            beside = holds_of(named_format(checkpoint.format)).config == BESIDE
            config = config_of(checkpoint, beside=beside or checkpoint.config is None).config
        table = parameter_table(config, head)
        tied = config.tie_word_embeddings and head in (Head.LM, Head.DOUBLE)
        matching = match(checkpoint, table, n_layer=config.n_layer, tied=tied)
    except BaseException:
        checkpoint.close()
        raise
    return Pretrained(config, head, checkpoint, matching, table)


def save_pretrained(
    folder: str | Path,
    config: GPT2Config,
    head: Head | str,
    tensors: Mapping[str, Tensor],
    *,
    architecture: str,
    format: str = "safetensors",
    max_shard_bytes: int | str | None = None,
) -> Path:
    """Write config.json and weights into ``folder`` as one: killed at any moment, the folder is old or new.

    A format that keeps the configuration inside gets no config.json beside it.

    ``tensors`` are named as in the parameter table and all of one dtype, which the config records. Weights of any
    format that were there before are replaced. ``max_shard_bytes`` splits them into files of at most so many bytes; it
    may also be written with a unit, as in "5GB". Returns the folder.

    Raises: CheckpointError for tensors that do not fit the config or an unknown format; CannotHoldError for a model
    that the format has no place for; WriteError where the system refuses.
    """
    folder, chosen = Path(folder), named_format(format)
    most = size_in_bytes("max_shard_bytes", max_shard_bytes)
    expected = {row.name: row.shape for row in parameter_table(config, head)}
    wrong = [
        name
        for name in expected.keys() | tensors.keys()
        if expected.get(name) != getattr(tensors.get(name), "shape", None)
    ]
    if wrong:
        raise CheckpointError(
            f"these tensors do not fit the configuration that would be saved: {', '.join(sorted(wrong))}"
        )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    extra = dict(config.extra) | {"architectures": [architecture]}
    extra.pop("torch_dtype", None)
    if len(dtypes) == 1:
        extra["dtype"] = dtypes.pop()
    holds = holds_of(chosen)
    reasons = objections(format, holds, config, Head(head), {tensor.dtype for tensor in tensors.values()})
    if reasons:
        raise CannotHoldError(f"this model cannot be saved as {format}: " + "; ".join(reasons))
    with atomic_folder(folder, replaces=is_weight_file) as stage:
        if holds.config == BESIDE:
            config.replace(extra=extra).save_pretrained(stage)
        write_with(chosen, stage, tensors, max_shard_bytes=most, about=About(config, Head(head)))
    return folder
