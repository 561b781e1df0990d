"""Moving a GPT-2 from any checkpoint format to any other, with proof that nothing changed.

    with open_source("gpt2") as source:                      # a name, a folder or a file, of whatever format
        plan = plan_conversion(source, "out", "gguf", dtype="float16")
        print(plan.rows)                                     # every tensor: its name there, its name here, shape, bytes
        report = carry_out(plan)                             # written, read back, compared; then put in place

Everything that can be refused is refused by the plan, all reasons together, before anything is written. What is
written is read back from its staging place and appears under its name by a rename, so that a kill at any moment leaves
what was there before. Tensors pass through one at a time.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from gpt2_core.checkpoints import (
    Checkpoint,
    Format,
    detect,
    formats,
    is_weight_file,
    named_format,
    open_checkpoint,
    write_with,
)
from gpt2_core.checkpoints.configs import ARCHITECTURES, Known, config_of, folder_of, head_of
from gpt2_core.checkpoints.holds import (
    BESIDE,
    INSIDE,
    NOWHERE,
    OWN,
    QUANTIZED_BYTES,
    About,
    Holds,
    effective,
    holds_of,
    lost,
    objections,
)
from gpt2_core.checkpoints.naming import HEADS, LM_HEAD, PREFIX, Matching, match
from gpt2_core.checkpoints.tensors import STORAGE, Shape, Tensor, ahead, converted, watched
from gpt2_core.checkpoints.tokenizers import HUB_FILES, OPENAI_FILES, gpt2_parts, hub_files, parts_beside
from gpt2_core.config import GPT2Config
from gpt2_core.errors import (
    CannotHoldError,
    CheckpointError,
    CheckpointMismatchError,
    HubError,
    InputError,
    TokenizerError,
    VerificationError,
    WriteError,
)
from gpt2_core.files import atomic_folder, existing, file_inside, finish_interrupted_save, staged_file
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.tokenizer_files import TokenizerParts
from gpt2_core.verification import Verification, check_tensors, compare_outputs

VERIFY = ("none", "tensors", "logits")
#: Models up to this size are verified by what they compute unless something else is asked for: seconds, not minutes.
LOGITS_UP_TO = 1_000_000_000
GENERATION_CONFIG = "generation_config.json"
_MOST_TOKENIZER = 1 << 28  # bytes of one file; GPT-2's largest has 2 MB
# What belongs to a model in a folder beside its weights: replaced with them, so that no folder describes two models.
_COMPANIONS = frozenset({"config.json", GENERATION_CONFIG, *HUB_FILES, *OPENAI_FILES})

#: Called with what is being done ("write", "verify"), how many bytes of it are done, and how many there are.
Progress = Callable[[str, int, int], None]


# What is there ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer that was found: `what` in words, `files` that may be copied as they are, `read` for other uses."""

    what: str
    read: Callable[[], TokenizerParts]
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """A model to be converted: an open checkpoint, its configuration and head, and how both go together.

    `others`: formats that its folder holds too, and that were not chosen by name.
    """

    name: str
    checkpoint: Checkpoint
    known: Known
    head: Head
    matching: Matching
    tokenizer: TokenizerSource | None
    others: tuple[str, ...] = ()

    @property
    def config(self) -> GPT2Config:
        """The configuration."""
        return self.known.config

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return folder_of(self.checkpoint.path)

    def tensors(self) -> dict[str, Tensor]:
        """The parameters, in the order and under the names of the parameter table."""
        return {name: self.checkpoint[theirs] for name, theirs in self.matching.names.items()}

    def name_there(self, name: str) -> str:
        """What the file itself calls a parameter."""
        here = self.matching.names[name]
        return self.checkpoint.names_in_file.get(here, here)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.checkpoint.close()


def open_source(
    name_or_path: str | Path,
    *,
    format: str | None = None,
    config: GPT2Config | None = None,
    head: Head | str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Source:
    """Find a model by name, folder or file, of whatever format unless `format` names it, and check that it is whole.

    `config` replaces what is found; without either it is told from the shapes, if they are those of a released model.
    `head` replaces what the tensors say; parameters of other heads are then left out, and listed.

    Raises: HubError for a name that is not found; ConfigError where no configuration can be used;
    CheckpointMismatchError for missing, unexpected and misshaped tensors, all together; CheckpointError and its other
    kinds for files that cannot be read.
    """
    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    path = existing(name_or_path) or _beginning_of_names(name_or_path)
    local = path is not None
    if path is None:
        _refuse_missing_file(str(name_or_path))
        from gpt2_core.hub import resolve

        path = resolve(str(name_or_path), kind="model", **options)  # type: ignore[arg-type]
    finish_interrupted_save(folder_of(path))
    checkpoint = open_checkpoint(path, format=format)
    try:
        known = Known(config, "given") if config is not None else _config_of(checkpoint)
        stands = Head(head) if head is not None else head_of(checkpoint, known.config)
        matching = _match(checkpoint, known.config, stands, chosen=head is not None)
        tokenizer = _find_tokenizer(None if local else str(name_or_path), checkpoint, known.config, options)
    except BaseException:
        checkpoint.close()
        raise
    others = _others_in(path, checkpoint) if format is None else ()
    return Source(str(name_or_path), checkpoint, known, stands, matching, tokenizer, others)


def _beginning_of_names(given: str | Path) -> Path | None:
    """What a format finds that several files begin with the name of, as those of model.ckpt do; None if nothing."""
    try:
        return detect(Path(given).expanduser())[1]
    except (CheckpointError, ValueError, RuntimeError):  # no file; what no path can be; no home folder
        return None


def _refuse_missing_file(name: str) -> None:
    """Raise HubError for what is a file's name rather than a model's, so that nobody asks the hub for it."""
    ends = {suffix for each in formats().values() for suffix in suffixes_of(each)}
    owner, slash, _ = name.rpartition("/")
    if any(name.endswith(suffix) for suffix in ends) and (not slash or Path(owner).expanduser().is_dir()):
        raise HubError(
            f"{name} does not exist; expected a checkpoint file, a folder, or a model's name such as 'gpt2' or "
            f"'owner/name'; the current folder is {Path.cwd()}"
        )


def _others_in(path: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The formats that a folder holds beside the one that was opened."""
    if not path.is_dir():
        return ()
    with suppress(OSError):
        return tuple(
            name for name, each in formats().items() if name != checkpoint.format and each.find(path) is not None
        )
    return ()


def _config_of(checkpoint: Checkpoint) -> Known:
    beside = holds_of(named_format(checkpoint.format)).config == BESIDE
    return config_of(checkpoint, beside=beside or checkpoint.config is None, infer=True)


def _match(checkpoint: Checkpoint, config: GPT2Config, head: Head, *, chosen: bool) -> Matching:
    """Every parameter there is, and nothing else but what may be ignored; a head nobody chose to leave out may not."""
    table = parameter_table(config, head)
    tied = config.tie_word_embeddings and head in (Head.LM, Head.DOUBLE)
    found = match(checkpoint, table, n_layer=config.n_layer, tied=tied, optional=frozenset())
    heads = {name for names in HEADS.values() for name in names}
    others = [name for name in found.ignored if name in heads and not (tied and name == LM_HEAD)]
    if others and not chosen:
        raise CheckpointMismatchError(
            found.source,
            unexpected=others,
            remedy=f"the file holds more than one head; say which one is meant (--head {head.value} leaves them out)",
        )
    return found


def _find_tokenizer(
    name: str | None, checkpoint: Checkpoint, config: GPT2Config, options: Mapping[str, Any]
) -> TokenizerSource | None:
    """The tokenizer inside the checkpoint or beside it; for a `name` of the hub also there, or the embedded one."""
    from gpt2_core.tokenizer import EMBEDDED_NAMES

    if checkpoint.tokenizer is not None:
        apart = checkpoint.config_file is not None or holds_of(named_format(checkpoint.format)).tokenizer == OWN
        where = f"the files of {folder_of(checkpoint.path)}" if apart else f"inside {checkpoint.path}"
        return TokenizerSource(where, checkpoint.tokenizer)
    folder = folder_of(checkpoint.path)
    here = [file for file in (*HUB_FILES, *OPENAI_FILES) if (folder / file).is_file()]
    if not here and name is not None and name not in EMBEDDED_NAMES:
        folder, here = _tokenizer_of_the_hub(name, options)
    if here:
        files = tuple(file_inside(folder, file, what="the folder") for file in here if file in HUB_FILES)
        return TokenizerSource(f"the files of {folder}", lambda: _parts_beside(folder), files)
    if name in EMBEDDED_NAMES:
        return TokenizerSource("GPT-2's own, which ships with the package", lambda: gpt2_parts(config.n_positions))
    return None


def _tokenizer_of_the_hub(name: str, options: Mapping[str, Any]) -> tuple[Path, list[str]]:
    from gpt2_core.hub import resolve

    try:
        folder = resolve(name, kind="tokenizer", **options)
    except HubError:  # a model without one; that is said later
        return Path(), []
    return folder, [file for file in HUB_FILES if (folder / file).is_file()]


def _parts_beside(folder: Path) -> TokenizerParts:
    found = parts_beside(folder)
    if found is None:
        raise TokenizerError(f"{folder} holds no vocabulary; expected tokenizer.json, or vocab.json with merges.txt")
    return found


# What is to be done ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One tensor: its name here, in the source's file and in the result's, its number formats, and its bytes there."""

    name: str
    source_name: str
    target_name: str
    shape: Shape
    source_dtype: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A conversion that can be carried out; `notes` are what a person should read, `lost` is what has no place."""

    source: Source
    target: Path
    format: str
    rows: tuple[Row, ...]
    dtype: str | None
    max_shard_bytes: int | None
    verify: str
    overwrite: bool
    tokenizer: TokenizerSource | None
    notes: tuple[str, ...]
    lost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> Format:
        """The format that is written."""
        return named_format(self.format)

    @property
    def holds(self) -> Holds:
        """What that format can hold."""
        return holds_of(self.module)

    @property
    def bytes(self) -> int:
        """The bytes of all tensors as they will be stored."""
        return sum(row.bytes for row in self.rows)

    @property
    def into_file(self) -> bool:
        """Whether the target is one file rather than a folder."""
        return self.target.suffix in suffixes_of(self.module) and not self.target.is_dir()

    @property
    def lossless(self) -> bool:
        """Whether every number stays what it is: no conversion, or one to a format that holds all values."""
        return all(row.source_dtype == row.dtype or (row.source_dtype, row.dtype) in _WIDER for row in self.rows)

    def expected(self) -> dict[str, Tensor]:
        """The tensors as they will be read back."""
        tensors = self.source.tensors()
        return {row.name: _expected(self.module, row, tensors[row.name]) for row in self.rows}

    def written(self) -> dict[str, Tensor]:
        """The tensors as they go to the writer."""
        tensors = self.source.tensors()
        return {row.name: _written(row, tensors[row.name]) for row in self.rows}


_WIDER = {
    ("float16", "float32"),
    ("bfloat16", "float32"),
    ("float16", "float64"),
    ("bfloat16", "float64"),
    ("float32", "float64"),
}


def suffixes_of(format: Format) -> tuple[str, ...]:
    """The ends of file names that make a target one file of this format; none if it is always a folder."""
    found: tuple[str, ...] | None = getattr(format, "SUFFIXES", None)
    if found is None:
        layout = getattr(format, "LAYOUT", None)
        found = layout.suffixes if layout is not None else (Path(format.FILES[0]).suffix,)
    return found


def plan_conversion(
    source: Source,
    target: str | Path,
    format: str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    verify: str | None = None,
    tokenizer: bool = True,
    overwrite: bool = False,
) -> Plan:
    """What a conversion would do. `target` is a file if it ends as files of the format do, else a folder.

    `dtype` None keeps each tensor's; `verify` None is "logits" for models up to 1 GB, "tensors" for larger ones;
    `tokenizer` False leaves the tokenizer out.

    Raises: InputError for settings that make no sense; CannotHoldError for a model that the format has no place for,
    with all reasons; WriteError where something is in the way and may not be overwritten.
    """
    module, target = named_format(format), Path(target).expanduser()
    holds = holds_of(module)
    _check_settings(holds, format, target, dtype, max_shard_bytes, verify)
    rows = tuple(_rows(source, module, dtype))
    reasons = objections(format, holds, source.config, source.head, {row.dtype for row in rows})
    if reasons:
        raise CannotHoldError(f"{source.name} cannot be converted to {format}: " + "; ".join(reasons))
    total = sum(row.bytes for row in rows)
    plan = Plan(
        source=source,
        target=target,
        format=format,
        rows=rows,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        verify=verify or ("logits" if total <= LOGITS_UP_TO else "tensors"),
        overwrite=overwrite,
        tokenizer=source.tokenizer if tokenizer else None,
        notes=(),
        lost=lost(holds, source.config),
    )
    if plan.into_file and max_shard_bytes is not None:
        raise InputError(f"{target} is one file; give a folder to have shards, or leave the shard size out")
    _check_place(plan)
    return replace(plan, notes=tuple(_notes(plan, tokenizer)))


def _check_settings(
    holds: Holds, format: str, target: Path, dtype: str | None, max_shard_bytes: int | None, verify: str | None
) -> None:
    known = (*holds.dtypes, *holds.quantized)
    if dtype is not None and dtype not in known:
        raise InputError(f"{format} does not hold {dtype}; expected one of {', '.join(known)}")
    if verify is not None and verify not in VERIFY:
        raise InputError(f"verify is {verify!r}; expected one of {', '.join(VERIFY)}")
    if max_shard_bytes is not None and not holds.shards:
        raise InputError(f"{format} is not split into shards; leave the shard size out, or use safetensors or bin")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise InputError(f"the shard size is {max_shard_bytes}; expected at least 1 byte")


def _rows(source: Source, module: Format, dtype: str | None) -> Iterator[Row]:
    """A row for each tensor, in the order of the parameter table."""
    stored_dtype = getattr(module, "stored_dtype", lambda name, shape, asked: asked)
    names = getattr(module, "NAMES", None)
    theirs = {row.ours: ", ".join(row.theirs) for row in names.rows(source.config.n_layer)} if names else {}
    for name, tensor in source.tensors().items():
        stored = stored_dtype(name, tensor.shape, dtype or tensor.dtype)
        yield Row(
            name=name,
            source_name=source.name_there(name),
            target_name=theirs.get(name.removeprefix(PREFIX), name),
            shape=tensor.shape,
            source_dtype=tensor.dtype,
            dtype=stored,
            bytes=_bytes(tensor, stored),
        )


def _bytes(tensor: Tensor, dtype: str) -> int:
    if dtype in STORAGE:
        return tensor.size * STORAGE[dtype].itemsize
    size, count = QUANTIZED_BYTES[dtype]
    return tensor.size * size // count


def _written(row: Row, tensor: Tensor) -> Tensor:
    """What the writer gets: quantizing is the format's own business."""
    return converted(tensor, row.dtype) if row.dtype in STORAGE else tensor


def _expected(module: Format, row: Row, tensor: Tensor) -> Tensor:
    """What the reader will find."""
    if row.dtype in STORAGE:
        return converted(tensor, row.dtype)
    rounded: Callable[[str, Tensor, str], Tensor] = module.rounded  # type: ignore[attr-defined]
    return rounded(row.name, tensor, row.dtype)


def _check_place(plan: Plan) -> None:
    """Refuse to write over something unless asked to, and a folder that is called as another format's file."""
    target, suffixes = plan.target, suffixes_of(plan.module)
    wrong = [name for name, each in formats().items() if target.suffix and target.name.endswith(suffixes_of(each))]
    if wrong and not plan.into_file and not target.exists():
        file = f" that ends in {' or '.join(suffixes)}, or one" if suffixes else ""
        raise InputError(
            f"{target} ends as a file of {' or '.join(wrong)}, and {plan.format} would be written to a folder of that "
            f"name; say --to {wrong[0]}, or choose a name{file} for a folder"
        )
    if target.exists() and not plan.overwrite and (not target.is_dir() or any(target.iterdir())):
        what = "is there already" if not target.is_dir() else "is a folder that holds something"
        raise WriteError(17, f"{target} {what}; choose another name, or overwrite it (--overwrite)", str(target))
    if target.exists() and not target.is_dir() and not plan.into_file:
        raise WriteError(
            20,
            f"{target} is a file, and {plan.format} would be written to a folder"
            + (f" (its files end in {' or '.join(suffixes)})" if suffixes else "")
            + "; choose another name",
            str(target),
        )


def _notes(plan: Plan, wants_tokenizer: bool) -> Iterator[str]:
    """What a person should know before or after."""
    source, holds = plan.source, plan.holds
    if source.others:
        yield (
            f"the folder also holds {', '.join(source.others)}; {source.checkpoint.format} was read (--from reads "
            f"another)"
        )
    yield from source.known.notes
    yield from source.checkpoint.notes
    remarks: Callable[[About], Sequence[str]] | None = getattr(plan.module, "remarks", None)
    if remarks is not None:
        yield from remarks(About(source.config, source.head, None, plan.dtype))
    for name, value in plan.lost.items():
        yield f"{plan.format} has no place for {name}={value!r} of the configuration; it is not in the result"
    most = plan.max_shard_bytes
    large = [row.name for row in plan.rows if most is not None and row.bytes > most]
    if large:
        yield f"larger than the shard size, and so with files of their own: {', '.join(large[:5])}" + (
            f" and {len(large) - 5} more" if len(large) > 5 else ""
        )
    metadata = {key: value for key, value in source.checkpoint.metadata.items() if key != "format"}
    if metadata and not _keeps_metadata(plan):
        yield f"the metadata of the source is not in the result: {', '.join(sorted(metadata))}"
    if plan.into_file and holds.config == BESIDE:
        yield "the result is one file, so config.json is not written; give a folder to have it"
    if not wants_tokenizer:
        return
    if plan.tokenizer is None:
        yield "no tokenizer was found with the weights, so none is in the result"
    elif holds.tokenizer == NOWHERE:
        yield f"{plan.format} has no place for a tokenizer; it is not in the result"
    elif holds.tokenizer in (BESIDE, OWN) and plan.into_file:
        yield "the result is one file, so the tokenizer's files are not written; give a folder to have them"


def _keeps_metadata(plan: Plan) -> bool:
    return plan.format == "safetensors"


# Doing it -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was done: the plan, the files that are there now, what was found about them, and how long it took."""

    plan: Plan
    files: tuple[Path, ...]
    verification: Verification | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that JSON can hold."""
        plan, source = self.plan, self.plan.source
        return {
            "source": {
                "name": source.name,
                "format": source.checkpoint.format,
                "files": [str(file) for file in source.checkpoint.files],
                "config_source": source.known.source,
                "head": source.head.value,
                "ignored": {**source.matching.ignored, **source.checkpoint.ignored},
            },
            "target": {
                "path": str(plan.target),
                "format": plan.format,
                "files": [{"path": str(file), "bytes": file.stat().st_size} for file in self.files],
                "dtype": plan.dtype,
                "tokenizer": plan.tokenizer.what if plan.tokenizer else None,
            },
            "config": source.config.to_dict(),
            "tensors": [vars(row) | {"shape": list(row.shape)} for row in plan.rows],
            "bytes": plan.bytes,
            "lossless": plan.lossless,
            "lost": dict(plan.lost),
            "notes": list(plan.notes),
            "verification": None if self.verification is None else _plain(self.verification),
            "seconds": self.seconds,
        }


def _plain(verification: Verification) -> dict[str, Any]:
    not_finite = {name: {"nan": nan, "infinite": infinite} for name, (nan, infinite) in verification.not_finite.items()}
    return vars(verification) | {"not_finite": not_finite}


def carry_out(plan: Plan, progress: Progress = lambda what, done, total: None) -> Report:
    """Write, read back, compare, and put in place.

    Raises: VerificationError if the result is not what it should be; CheckpointError where numbers cannot be read or
    converted; WriteError where the system refuses. Whatever is raised, the target is as it was.
    """
    started = time.perf_counter()
    with _stage(plan) as place:
        names = _write(plan, place, _counter(progress, "write", plan.bytes))
        verification = None if plan.verify == "none" else _verify(plan, place, progress)
    folder = plan.target.parent if plan.into_file else plan.target
    return Report(plan, tuple(folder / name for name in names), verification, time.perf_counter() - started)


@contextmanager
def _stage(plan: Plan) -> Iterator[Path]:
    """Where to write: a file or a folder that becomes the target by a rename when the block ends well."""
    if plan.into_file:
        with staged_file(plan.target) as place:
            yield place
        return
    with atomic_folder(plan.target, replaces=lambda name: is_weight_file(name) or name in _COMPANIONS) as stage:
        yield stage


def _write(plan: Plan, place: Path, on_bytes: Callable[[int], None]) -> list[Path]:
    """Everything that belongs to the result; the names of its files, relative to its folder."""
    folder = place.parent if plan.into_file else place
    tensors = {name: watched(ahead(tensor), on_bytes) for name, tensor in plan.written().items()}
    metadata = plan.source.checkpoint.metadata if _keeps_metadata(plan) and plan.source.checkpoint.metadata else None
    files = [*write_with(
        plan.module, place, tensors, metadata=metadata, max_shard_bytes=plan.max_shard_bytes, about=_about(plan)
    )]  # fmt: skip
    if not plan.into_file:
        if plan.holds.config == BESIDE:
            files += _write_config(plan, place)
        if plan.holds.tokenizer == BESIDE and plan.tokenizer is not None:
            files += _write_tokenizer(plan.tokenizer, place)
    return [file.relative_to(folder) for file in files]


def _about(plan: Plan) -> About:
    parts = None
    inside = plan.holds.tokenizer == INSIDE or (plan.holds.tokenizer == OWN and not plan.into_file)
    if inside and plan.tokenizer is not None:
        try:
            parts = plan.tokenizer.read()
        except TokenizerError as error:
            raise TokenizerError(f"{error}. To convert without the tokenizer give --no-tokenizer") from error
    return About(plan.source.config, plan.source.head, parts, plan.dtype)


def _write_config(plan: Plan, place: Path) -> list[Path]:
    """config.json, with the class and the number format as they are now; and how to generate, if that was there."""
    config, head = plan.source.config, plan.source.head
    extra = {key: value for key, value in config.extra.items() if key not in ("torch_dtype", "dtype")}
    named = extra.get("architectures")
    known = [name for name in named if ARCHITECTURES.get(name) is head] if isinstance(named, list) else []
    extra["architectures"] = known or [next(name for name, kind in ARCHITECTURES.items() if kind is head)]
    dtypes = {row.dtype for row in plan.rows}
    if len(dtypes) == 1:
        extra["dtype"] = dtypes.pop()
    files = [config.replace(extra=extra).save_pretrained(place)]
    generation = plan.source.folder / GENERATION_CONFIG
    if generation.is_file():
        files += _copied([file_inside(plan.source.folder, GENERATION_CONFIG, what="the folder")], place)
    return files


def _write_tokenizer(tokenizer: TokenizerSource, place: Path) -> list[Path]:
    """The hub's files of a tokenizer: copied as they are where they are that already, else translated."""
    if tokenizer.files:
        return _copied(tokenizer.files, place)
    written = []
    for name, content in hub_files(tokenizer.read()):
        (place / name).write_bytes(content)
        written.append(place / name)
    return written


def _copied(files: Sequence[Path], place: Path) -> list[Path]:
    copies = []
    for file in files:
        if file.stat().st_size > _MOST_TOKENIZER:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; expected at most {_MOST_TOKENIZER}")
        shutil.copyfile(file, place / file.name)
        copies.append(place / file.name)
    return copies


def _verify(plan: Plan, place: Path, progress: Progress) -> Verification:
    """Read the staged result as a stranger would, and compare it with what was meant."""
    source, expected = plan.source, plan.expected()
    with plan.module.read(place) as result:
        _check_config(plan, result)
        matching = _match(result, source.config, source.head, chosen=False)
        found = {name: result[theirs] for name, theirs in matching.names.items()}
        total = sum(tensor.nbytes for tensor in expected.values())
        verification = check_tensors(expected, found, _counter(progress, "verify", total))
        if plan.verify == "tensors":
            return verification
        difference, scale, agreement = compare_outputs(
            source.config, source.head, source.tensors(), found, lossless=plan.lossless
        )
    return replace(verification, kind="logits", difference=difference, scale=scale, agreement=agreement)


def _check_config(plan: Plan, result: Checkpoint) -> None:
    """A configuration inside the result has to say what the source's says, in all that it can say."""
    if plan.holds.config != INSIDE:
        return
    known, meant = config_of(result, beside=False).config, plan.source.config
    wrong = []
    for key in sorted((plan.holds.config_keys | set(plan.holds.fixed)) - {"extra"}):
        got, want = effective(known, key), effective(meant, key)
        alike = plan.holds.fixed.get(key, ())
        if got != want and not (got in alike and want in alike):
            wrong.append(f"{key} is {got!r}, expected {want!r}")
    if wrong:
        raise VerificationError(f"the configuration in the result is not what was meant: {'; '.join(wrong)}")


def _counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(what, min(done, total), total)

    return count
