"""`gpt2 decode`: ids to the exact bytes they stand for, from arguments, text, JSON, or array files of any size."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from gpt2_app.sources import open_source, read_bytes
from gpt2_app.vocabularies import DEFAULT_MODEL, TokenizerOption, id_dtype, load_tokenizer
from gpt2_core.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer

CHUNK = 1 << 20  # bytes of text, or ids of an array, at a time
_SEPARATORS = b" ,\t\r\n\f\v[]"
# How files begin, whatever their names: numpy.save's and numpy.savez's.
_KINDS = {b"\x93NUM": ".npy", b"PK\x03\x04": ".zip"}
_BLANKS = bytes.maketrans(b",[]", b"   ")


def command(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[IDS]...", help="The ids; without them, --file or standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Read ids from a file: a .npy or .bin that `gpt2 encode --output` wrote, or text.",
        ),
    ] = None,
    model: TokenizerOption = DEFAULT_MODEL,
    skip_special: Annotated[bool, typer.Option("--skip-special", help="Leave out special tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Turn ids back into the bytes they came from, exactly: nothing is added, and nothing is repaired.

    Ids are separated by spaces, commas or line feeds; brackets are passed over, so that a JSON list will do.
    """
    if ids and file is not None:
        raise typer.BadParameter(f"got both IDS and --file {file}; give one of them")
    tokenizer = load_tokenizer(model)
    found = _ids(ids, file, id_dtype(len(tokenizer)))
    if as_json:
        _as_json(tokenizer, found, skip_special)
    else:
        _to_stdout(tokenizer, found, skip_special)


def _ids(arguments: list[str] | None, file: Path | None, dtype: str) -> Iterator[list[int]]:
    if arguments:
        yield parse(" ".join(arguments).encode("utf-8", "surrogateescape"), "IDS")
        return
    with open_source(file) as (stream, name):
        kind = "" if file is None or str(file) == "-" else _kind(file, stream)
        if file is not None and kind in (".npy", ".bin"):
            yield from _of_array(file, kind, dtype)
        elif kind == ".zip":
            raise InputError(
                f"{file} is an archive; expected one array of ids, or text: save the array that you mean with "
                f"numpy.save, or with `gpt2 encode --output`"
            )
        else:
            yield from of_text(stream, name)


def _kind(file: Path, stream: BinaryIO) -> str:
    """What a file holds, by how it begins, else by its name; bare numbers may begin with anything."""
    if file.suffix == ".bin" or not isinstance(stream, io.BufferedReader):
        return file.suffix
    with contextlib.suppress(OSError):  # of a folder, which reading it reports
        return _KINDS.get(stream.peek(4)[:4], file.suffix)
    return ""


def of_text(stream: BinaryIO, name: str) -> Iterator[list[int]]:
    """The ids written in a stream, some at a time. Raises: InputError for what is no id."""
    rest = b""
    for data in read_bytes(stream, name, CHUNK):
        cut = max(data.rfind(separator) for separator in (b" ", b",", b"\n"))
        if cut < 0:
            rest += data
            continue
        yield parse(rest + data[:cut], name)
        rest = data[cut:]
    yield parse(rest, name)


def parse(data: bytes, name: str) -> list[int]:
    """The ids in `data`. Raises: InputError naming the first that is none."""
    import numpy as np

    spaced = data.translate(_BLANKS).strip()
    if not spaced:
        return []
    if not spaced.translate(None, _SEPARATORS + b"0123456789"):
        array = np.fromstring(spaced.decode("ascii"), np.int64, sep=" ")
        if array.max() < np.iinfo(np.int64).max:  # what numpy makes of a number that is too long
            found: list[int] = array.tolist()
            return found
    wrong = next(word for word in spaced.split() if re.fullmatch(rb"[0-9]{1,18}", word) is None)
    raise InputError(
        f"{name} holds {wrong[:40].decode('utf-8', 'backslashreplace')!r} where an id should be; expected whole "
        f"numbers separated by spaces or commas"
    )


def _of_array(file: Path, kind: str, dtype: str) -> Iterator[list[int]]:
    import numpy as np

    try:
        if kind == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        elif file.stat().st_size == 0:
            return
        else:
            array = np.memmap(file, dtype, "r")
    except (OSError, ValueError, EOFError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise InputError(f"cannot read {file}: {reason}; expected ids that `gpt2 encode --output` wrote") from cause
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{file} holds an array of shape {array.shape} and dtype {array.dtype}; expected ids: whole numbers along "
            f"one axis"
        )
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK].tolist()


def _decoded(tokenizer: GPT2Tokenizer, ids: Iterable[list[int]], skip_special: bool) -> Iterator[tuple[int, bytes]]:
    """How many ids, and their bytes, some at a time."""
    done = 0
    for some in ids:
        try:
            yield len(some), tokenizer.decode_bytes(some, skip_special)
        except TokenizerError as error:
            raise TokenizerError(
                f"{error} (places count from id {done:,} of the input)" if done else str(error)
            ) from error
        done += len(some)


def _to_stdout(tokenizer: GPT2Tokenizer, ids: Iterable[list[int]], skip_special: bool) -> None:
    from gpt2_app.terminal import binary_stdout

    out = binary_stdout()
    last = b"\n"
    for _, data in _decoded(tokenizer, ids, skip_special):
        out.write(data)
        last = data[-1:] or last
    if sys.stdout.isatty() and last != b"\n":
        out.write(b"\n")
    out.flush()


def _as_json(tokenizer: GPT2Tokenizer, ids: Iterable[list[int]], skip_special: bool) -> None:
    import base64

    from gpt2_app.terminal import write_json

    count, parts = 0, []
    for number, data in _decoded(tokenizer, ids, skip_special):
        count += number
        parts.append(data)
    data = b"".join(parts)
    text = data.decode("utf-8", "replace")
    whole = text.encode("utf-8") == data
    extra = {} if whole else {"base64": base64.b64encode(data).decode("ascii")}
    write_json({"count": count, "text": text, "utf8": whole, **extra})
