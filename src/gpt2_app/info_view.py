"""`gpt2 info` for people: the values that `gpt2_app.inspection` gathers, as tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2_app.terminal import console, write

# The fields of a configuration that say what is computed; the others are shown where they differ from the default.
_SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
_HIDDEN = ("model_type", "n_ctx", "architectures", "transformers_version", "dtype", "torch_dtype")
_MOST_LISTED = 12
_HEAD_NAMES = {
    "none": "none: the bare transformer",
    "lm": "language model",
    "double": "language model and multiple choice",
    "sequence": "sequence classification",
    "token": "token classification",
    "qa": "question answering",
}


def show(found: Mapping[str, Any]) -> None:
    """Print everything, in sections."""
    out = console()
    out.print(Text(found["name"], "bold"), soft_wrap=True)
    for note in found["notes"]:
        out.print(Text(f"note: {note}", "yellow"))
    if found["config"] is not None:
        _configuration(out, found["config"], found["config_source"])
    if found["parameters"] is not None:
        _parameters(out, found["parameters"], found["config"])
    if found["checkpoint"] is not None:
        _checkpoint(out, found["checkpoint"])
    _tokenizer(out, found["tokenizer"])
    if found["checkpoint"] is not None and "tensors" in found["checkpoint"]:
        _tensors(out, found["checkpoint"]["tensors"])


def _grid(out: Console, title: str, rows: list[tuple[str, str | Text]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    out.print()
    out.print(Text(title, "bold"))
    out.print(table)


def _configuration(out: Console, config: Mapping[str, Any], source: str) -> None:
    from gpt2_core.config import GPT2Config

    default = GPT2Config().to_dict()
    rows = [(name, f"{config[name]:,}") for name in _SHAPE]
    rows.append(("n_inner", str(config["n_inner"] or f"{4 * config['n_embd']:,} (4 x n_embd)")))
    rows.append(("activation_function", str(config["activation_function"])))
    rows += [
        (name, str(value))
        for name, value in config.items()
        if name not in (*_SHAPE, *_HIDDEN, "n_inner", "activation_function", "task_specific_params")
        and default.get(name) != value
    ]
    where = "known for this name" if source == "preset" else source
    _grid(out, f"Configuration ({where})", list(rows))


def _parameters(out: Console, parameters: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
    total = parameters["total"]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=True, padding=(0, 1))
    table.add_column("part", style="cyan")
    table.add_column("parameters", justify="right")
    table.add_column("share", justify="right")
    for part, size in parameters["parts"].items():
        layers = f" ({config['n_layer']} layers)" if config and part in ("attention", "feed-forward") else ""
        table.add_row(part + layers, f"{size:,}", f"{100 * size / total:.1f} %" if total else "")
    table.add_row("all", Text(f"{total:,}", "bold"), "")
    out.print()
    out.print(Text(f"Parameters (head: {_HEAD_NAMES[parameters['head']]})", "bold"))
    out.print(table)


def _checkpoint(out: Console, checkpoint: Mapping[str, Any]) -> None:
    files = checkpoint["files"]
    rows: list[tuple[str, str | Text]] = [("format", checkpoint["format"])]
    shown = [f"{Path(file['path']).name}  {size(file['bytes'])}" for file in files[:_MOST_LISTED]]
    if len(files) > _MOST_LISTED:
        shown.append(f"... and {len(files) - _MOST_LISTED} more")
    rows.append(("files" if len(files) > 1 else "file", "\n".join(shown)))
    rows.append(("tensors", f"{checkpoint['tensor_count']:,}, {size(checkpoint['bytes'])}"))
    rows.append(
        (
            "number formats",
            "\n".join(
                f"{name}: {entry['tensors']} tensors, {size(entry['bytes'])}"
                for name, entry in checkpoint["dtypes"].items()
            )
            or "none",
        )
    )
    rows.append(("head and table", checkpoint["tying"]))
    rows += _fit(checkpoint)
    if checkpoint["metadata"]:
        rows.append(("metadata", "\n".join(f"{name}: {value}" for name, value in checkpoint["metadata"].items())))
    _grid(out, "Checkpoint", rows)


def _fit(checkpoint: Mapping[str, Any]) -> list[tuple[str, str | Text]]:
    fits = checkpoint["fits"]
    if fits is None:
        return [("fits", Text("unknown: there is no configuration", "yellow"))]
    rows: list[tuple[str, str | Text]] = [
        ("fits", Text("yes", "green") if fits else Text("no", "bold red")),
    ]
    if "reason" in checkpoint:
        rows.append(("", Text(checkpoint["reason"], "red")))
        return rows
    misshaped = [
        f"{row['name']}: {_shape(row['in_file'])} in the file, expected {_shape(row['expected'])}"
        for row in checkpoint["misshaped"]
    ]
    for title, names in (
        ("missing", checkpoint["missing"]),
        ("unexpected", checkpoint["unexpected"]),
        ("misshaped", misshaped),
    ):
        if names:
            rows.append((title, Text(_some(names), "red")))
    if checkpoint["newly_initialised"]:
        rows.append(("not in the file", _some(checkpoint["newly_initialised"])))
    if checkpoint["ignored"]:
        rows.append(("ignored", _by_reason(checkpoint["ignored"])))
    return rows


def _by_reason(ignored: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        groups.setdefault(reason, []).append(name)
    return "\n".join(
        f"{names[0]}{f' and {len(names) - 1} like it' if len(names) > 1 else ''}: {reason}"
        for reason, names in groups.items()
    )


def _tokenizer(out: Console, tokenizer: Mapping[str, Any] | None) -> None:
    if tokenizer is None:
        _grid(out, "Tokenizer", [("files", "none in this folder; use --tokenizer gpt2 for GPT-2's own vocabulary")])
    elif tokenizer["files"]:
        _grid(out, "Tokenizer", [("files", ", ".join(tokenizer["files"]))])
    else:
        _grid(out, "Tokenizer", [("source", tokenizer["source"])])


def _tensors(out: Console, tensors: list[Mapping[str, Any]]) -> None:
    out.print()
    out.print(Text(f"Tensors ({len(tensors):,})", "bold"))
    if not out.is_terminal:  # one tensor a line, whatever its length
        for row in tensors:
            columns = (row["name"], _shape(row["shape"]), row["dtype"], str(row["bytes"]))
            write("\t".join(columns) + "\n")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=True, padding=(0, 1))
    table.add_column("name", style="cyan", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("dtype")
    table.add_column("size", justify="right", no_wrap=True)
    for row in tensors:
        table.add_row(row["name"], _shape(row["shape"]), row["dtype"], size(row["bytes"]))
    out.print(table)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _some(names: list[str]) -> str:
    more = f"\n... and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return "\n".join(names[:_MOST_LISTED]) + more


def size(count: int) -> str:
    """Bytes for people, in powers of 1000, as disks are sold."""
    if count < 1000:
        return f"{count} B"
    value, unit = float(count), "B"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007
        value /= 1000
        if value < 999.5:
            break
    return f"{value:.3g} {unit}"
