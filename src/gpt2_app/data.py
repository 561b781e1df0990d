"""`gpt2 data`: texts to token shards for training, and a look into shards that are there."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_app import terminal
from gpt2_app.vocabularies import load_tokenizer
from gpt2_core.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from gpt2_core.data import TokenData

OPTIONS = {
    "val_fraction": ("--val-fraction",),
    "shard_tokens": ("--shard-size",),
    "prompt_key": ("--prompt-key",),
    "response_key": ("--response-key",),
    "with overwrite": ("with --overwrite",),
    "name the key that the file uses": ("name the key with --jsonl-key",),
    "save in smaller shards (max_shard_bytes)": ("write smaller shards with --shard-size",),
    "try fewer workers": ("try fewer --workers",),
}
_EACH = 64 << 20  # bytes of source that are worth a process of their own: it takes as long to start as these to encode


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A text, a .jsonl file, or a folder of them; .gz, .xz, .bz2 are unpacked."),
    ],
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="DST", help="The folder for the shards. Without it, SRC are shards: show what they hold."
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", "-t", metavar="NAME|FOLDER", help="Whose vocabulary.")
    ] = "gpt2",
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="SHARE", help="This share goes to a validation part.")
    ] = 0.0,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The largest file, such as 200MB or 64MiB.")
    ] = "200MB",
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes. Default: the cores, where there is enough text.")
    ] = None,
    jsonl_key: Annotated[str, typer.Option(metavar="KEY", help="Where the text is in a line of .jsonl.")] = "text",
    prompt_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="For instruction pairs: what is read, and not learnt.")
    ] = None,
    response_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="For instruction pairs: what is learnt.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the shards back and compare their hashes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards that are at DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Turn a text, a .jsonl file or a folder of them into token shards, or show what shards hold.

    The shards are uint16 files with a manifest and hashes; they appear in one step at the end, or not at all. Between
    documents stands the end-of-text token: a text file is one document unless <|endoftext|> stands in it, a line of
    .jsonl is one. nanoGPT's train.bin and llm.c's shards can be shown too, and trained on as they are.
    """
    if target is None:
        _show(source, verify=verify, as_json=as_json)
        return
    from gpt2_core.data import verify_data, write_data

    read = load_tokenizer(tokenizer)
    number = workers if workers is not None else _workers(Path(source))
    started = time.perf_counter()
    with _progress("tokens", quiet=as_json) as progress:
        manifest = write_data(
            source,
            target,
            tokenizer=read,
            shard_tokens=_shard_tokens(shard_size, len(read)),
            val_fraction=val_fraction,
            text_key=jsonl_key,
            prompt_key=prompt_key,
            response_key=response_key,
            workers=number,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    if verify:
        with _progress("verify", quiet=as_json) as progress:
            verify_data(target, progress=progress)
    if as_json:
        terminal.write_json({**manifest, "verified": verify, "seconds": round(seconds, 3)})
    else:
        _report(target, manifest, seconds, verified=verify)


def _workers(source: Path) -> int:
    import os

    with contextlib.suppress(OSError):
        files = source.rglob("*") if source.is_dir() else [source]
        size = sum(file.stat().st_size for file in files if file.is_file())
        return max(1, min(os.cpu_count() or 1, size // _EACH))
    return 1


def _shard_tokens(text: str, vocab_size: int) -> int:
    from gpt2_core.files import size_in_bytes

    try:
        size = size_in_bytes("--shard-size", text) or 0
    except CheckpointError as cause:
        raise InputError(f"--shard-size is {text!r}, expected a size such as 200MB, 64MiB or 1000000") from cause
    return max(1, size // (2 if vocab_size <= 1 << 16 else 4))


@contextlib.contextmanager
def _progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes on stderr, where a person looks at it."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal.console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


# For people -----------------------------------------------------------------------------------------------------------


def _lines(lines: list[tuple[str, str]]) -> None:
    from rich.text import Text

    out = terminal.console()
    for name, value in lines:
        out.print(Text.assemble((f"{name:<12}", "cyan"), terminal.harmless(value)), soft_wrap=True)


def _report(target: Path, manifest: dict[str, Any], seconds: float, *, verified: bool) -> None:
    from gpt2_app.info_view import size

    source = manifest["source"]
    read = f"{_count(source['files'], 'file')}, {size(source['bytes'])}"
    if seconds > 2:  # before that it is the start of the program that takes the time
        read += f", {size(source['bytes'] / seconds)}/s"
    rows = [("read", read)]
    for name, part in manifest["splits"].items():
        rows.append((name, f"{part['tokens']:,} tokens, {_count(part['documents'], 'document')}, {_ratio(part)}"))
    files = sum(len(part["shards"]) + len(part.get("labelled") or ()) for part in manifest["splits"].values())
    rows.append(("written", f"{target}: {_count(files, 'file')} and the manifest"))
    if verified:
        rows.append(("checked", "every file read back, every hash as it should be"))
    _lines(rows)
    if source["empty"]:
        names = ", ".join(source["empty"][:3])
        terminal.note(f"left out: {_count(len(source['empty']), 'empty file')}, {names}", "yellow")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _ratio(part: dict[str, Any]) -> str:
    return f"{part['text_bytes'] / max(part['tokens'], 1):.2f} bytes a token"


def _show(source: str, *, verify: bool, as_json: bool) -> None:
    from gpt2_core.data import MANIFEST, open_data, verify_data
    from gpt2_core.errors import Gpt2Error

    parts: dict[str, TokenData] = {}
    first = open_data(source)
    parts[first.split or "all"] = first
    for name in ("val", "test"):
        with contextlib.suppress(Gpt2Error):
            parts.setdefault(name, open_data(source, name))
    hashed = (Path(source) / MANIFEST).is_file()
    if verify:
        if not hashed:
            raise InputError(f"{source} has no {MANIFEST}, so there are no hashes to compare; leave out --verify")
        with _progress("verify", quiet=as_json) as progress:
            verify_data(source, progress=progress)
    values: dict[str, dict[str, Any]] = {
        name: {
            "tokens": len(data),
            "documents": None if data.end_of_text is None else len(data.documents),
            "files": len(data.tokens.shards),
            "masked": data.labelled is not None,
        }
        for name, data in parts.items()
    }
    if as_json:
        terminal.write_json({"source": source, "vocab_size": first.vocab_size, "splits": values, "verified": verify})
        return
    rows = [("shards", source), ("vocabulary", f"{first.vocab_size:,} tokens")]
    for name, value in values.items():
        documents = "" if value["documents"] is None else f", {_count(value['documents'], 'document')}"
        mask = ", with a mask of what is learnt" if value["masked"] else ""
        rows.append((name, f"{value['tokens']:,} tokens{documents}, in {_count(value['files'], 'file')}{mask}"))
    if verify:
        rows.append(("checked", "every hash as it should be"))
    _lines(rows)
