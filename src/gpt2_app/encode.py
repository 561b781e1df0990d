"""`gpt2 encode`: text to ids, as text, JSON, a table of pieces, or an array file; long files a piece at a time."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from gpt2_app.sources import can_be_cut, check_argument, one_source, open_source, texts
from gpt2_app.vocabularies import DEFAULT_MODEL, TokenizerOption, check_special, id_dtype, load_tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpt2_app.terminal import Bytes
    from gpt2_core.tokenizer import GPT2Tokenizer

_MANY = 1 << 16  # ids, from where on a table of spelt numbers pays
_MOST_ROWS = 2000  # a table any longer than this is laid out slowly and read by nobody: plain lines then


def command(
    text: Annotated[str | None, typer.Argument(help="The text; without it, --file or standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the text from a file.")
    ] = None,
    model: TokenizerOption = DEFAULT_MODEL,
    special: Annotated[
        str,
        typer.Option(
            metavar="allow|forbid|text",
            help="What <|endoftext|> in the text is: the special token, an error, or just text.",
            callback=check_special,
        ),
    ] = "allow",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write there: .npy is a numpy array, .bin its bare numbers (uint16, or uint32 for large "
            "vocabularies), anything else the line of ids.",
        ),
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Show each token with its id and the characters it covers.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Print only how many tokens there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Turn text into ids: one line of them, separated by spaces. The text is taken as it is, last line feed included.

    Files of any size are read a piece at a time. No framework is loaded.
    """
    one_source(text, file, "TEXT")
    if output is not None and (tokens or count or as_json):
        raise typer.BadParameter("--output writes ids alone; leave out --tokens, --count and --json")
    if count and tokens:
        raise typer.BadParameter("got both --count and --tokens; give one of them")
    if output is not None and output.suffix == ".npz":
        raise typer.BadParameter(f"--output {output} would be an archive of arrays; a single one is a .npy")
    tokenizer = load_tokenizer(model)
    with _pieces(tokenizer, text, file, whole=tokens or special == "forbid") as pieces:
        if tokens:
            _show_tokens(tokenizer, "".join(pieces), special, as_json=as_json)
            return
        ids = _ids(tokenizer, pieces, special)
        if count:
            number = sum(map(len, ids))
            _print({"count": number} if as_json else str(number))
        elif as_json:
            every = [index for some in ids for index in some]
            _print({"count": len(every), "ids": every})
        elif output is not None:
            _to_file(output, ids, id_dtype(len(tokenizer)))
        else:
            from gpt2_app.terminal import binary_stdout

            write_line(binary_stdout(), ids)


@contextlib.contextmanager
def _pieces(tokenizer: GPT2Tokenizer, text: str | None, file: Path | None, *, whole: bool) -> Iterator[Iterable[str]]:
    if text is not None:
        yield [check_argument(text, "TEXT")]
        return
    with open_source(file) as (stream, name):
        yield texts(stream, name, whole=whole or not can_be_cut(tokenizer))


def _ids(tokenizer: GPT2Tokenizer, pieces: Iterable[str], special: str) -> Iterator[list[int]]:
    """The ids of each piece; only the first can be given a space in front."""
    prefix_space = None
    for piece in pieces:
        yield tokenizer.encode(piece, special=special, add_prefix_space=prefix_space)
        prefix_space = False


def _print(value: Any) -> None:
    from gpt2_app.terminal import write, write_json

    if isinstance(value, str):
        write(value + "\n")
    else:
        write_json(value)


def write_line(out: Bytes, ids: Iterable[list[int]]) -> None:
    """All ids on one line, separated by spaces."""
    first = True
    for some in ids:
        if some:
            out.write((b"" if first else b" ") + in_digits(some))
            first = False
    out.write(b"\n")
    out.flush()


def in_digits(ids: list[int]) -> bytes:
    """Ids in decimal, separated by spaces; many of them by a table of all numbers up to the highest, in numpy."""
    if len(ids) < _MANY:
        return " ".join(map(str, ids)).encode("ascii")
    import numpy as np

    array = np.array(ids)
    table = _digits(1 << int(array.max()).bit_length())
    spelt = table[array].view(np.uint8)
    joined: bytes = spelt[spelt != 0].tobytes()
    return joined[:-1]


@functools.cache
def _digits(size: int) -> NDArray[np.bytes_]:
    """The numbers below `size`, each with a space behind it; numpy fills up with zero bytes."""
    import numpy as np

    return np.array([b"%d " % number for number in range(size)])


def _to_file(path: Path, ids: Iterable[list[int]], dtype: str) -> None:
    from gpt2_core.files import atomic_write

    with atomic_write(path) as out:
        if path.suffix == ".npy":
            _write_npy(out, ids, dtype)
        elif path.suffix == ".bin":
            _write_numbers(out, ids, dtype)
        else:
            write_line(out, ids)


def _write_numbers(out: BinaryIO, ids: Iterable[list[int]], dtype: str) -> int:
    import numpy as np

    count = 0
    for some in ids:
        out.write(np.array(some, dtype).tobytes())
        count += len(some)
    return count


def _write_npy(out: BinaryIO, ids: Iterable[list[int]], dtype: str) -> None:
    """A .npy file written in one go: a header of fixed size, filled in when the number of ids is known.

    Source: numpy.lib.format, version 1.0.
    """

    def header(count: int) -> bytes:
        text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({count},), }}"
        return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode("ascii") + b"\n"

    out.write(header(0))
    count = _write_numbers(out, ids, dtype)
    out.seek(0)
    out.write(header(count))


def _show_tokens(tokenizer: GPT2Tokenizer, text: str, special: str, *, as_json: bool) -> None:
    found = tokenizer(text, special=special, return_offsets_mapping=True)
    # Machines get tokens as vocabulary files write them ("Ġthe"), which is exact; people get their text.
    write = tokenizer.convert_ids_to_tokens if as_json else functools.partial(shown, tokenizer)
    rows = [
        {"id": index, "token": write(index), "start": start, "end": end}
        for index, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]
    if as_json:
        _print({"count": len(rows), "ids": found["input_ids"], "tokens": rows})
    elif sys.stdout.isatty() and len(rows) <= _MOST_ROWS:
        _table(rows)
    else:
        lines = [
            "id\tstart\tend\ttoken",
            *(f"{row['id']}\t{row['start']}\t{row['end']}\t{row['token']}" for row in rows),
        ]
        _print("\n".join(lines))


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    from gpt2_app.terminal import console

    table = Table(box=SIMPLE, title=f"{len(rows):,} tokens", title_justify="left", pad_edge=False)
    table.add_column("id", justify="right", style="cyan")
    table.add_column("characters", justify="right", style="dim")
    table.add_column("token", overflow="fold")
    for row in rows:
        token = Text(str(row["token"]))
        token.highlight_regex(r"\\.[0-9a-f]*", "magenta")
        table.add_row(str(row["id"]), f"{row['start']}-{row['end']}", token)
    console().print(table)


def shown(tokenizer: GPT2Tokenizer, index: int) -> str:
    r"""The text of one token in quotes, on one line: ``" the"``, ``"\n"``, and ``"\xe2"`` for part of a character."""
    data = tokenizer.decode_bytes([index])
    try:
        text = data.decode("utf-8").replace("\\", r"\\").replace('"', r"\"")
    except UnicodeDecodeError:
        text = data.replace(b"\\", rb"\\").replace(b'"', rb"\"").decode("utf-8", "backslashreplace")
    return '"' + "".join(char if char.isprintable() else _escaped(char) for char in text) + '"'


def _escaped(char: str) -> str:
    # \x80 and above stand for bytes here, so characters from there on are written longer.
    code = ord(char)
    return char.encode("unicode_escape").decode("ascii") if code < 0x80 or code > 0xFF else f"\\u{code:04x}"
