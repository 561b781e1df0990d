"""Texts to token shards: read in blocks, tokenised by as many processes as wanted, written in order, placed at once.

    files -> blocks of a few MiB that can be tokenised alone -> ids (worker processes) -> shards and their hashes

Each document begins with the end-of-text token, so between two there is one. A text file is one document, unless
``<|endoftext|>`` stands in it; in .jsonl every line is one. Memory is that of a few blocks, whatever the size of the
files; only text without any place to cut it, such as a line of a gigabyte without spaces, is held whole.

The result is a folder with ``manifest.json`` (what there is, with the sha256 of every file) and shards of bare
little-endian uint16, which nanoGPT's loader reads too. It appears by one rename when all of it is written; a run that
is killed leaves what was there before.
"""

from __future__ import annotations

import bz2
import copy
import errno
import gzip
import hashlib
import json
import lzma
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt2_core._version import __version__
from gpt2_core.data_order import Order
from gpt2_core.data_shards import FORMAT, LABELLED, MANIFEST, TRAIN, VAL
from gpt2_core.errors import InputError, TokenizerError, WriteError, nearest
from gpt2_core.files import atomic_folder, existing, make_folder, refuse_lfs_pointer
from gpt2_core.uniforms import uniforms

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer

SHARD_TOKENS = 100_000_000  # 200 MB; as the shards of llm.c's and build-nanogpt's data
BLOCK = 1 << 22  # bytes read at a time
_LINES = (".jsonl", ".ndjson")
_PACKED: Mapping[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_OURS = re.compile(r"(?:train|val)_\d{5,}(?:\.labelled)?\.bin|manifest\.json")
_BETWEEN = b"<|endoftext|>"
_TAIL = 1 << 10  # bytes looked at first for a place to cut
_CUT = re.compile(rb"[^\x00-\x20](?=[ \n])")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fields:
    """Which keys of a JSON object hold the text: ``text``, or ``prompt`` and ``response`` of an instruction pair."""

    text: str = "text"
    prompt: str | None = None
    response: str | None = None

    @property
    def pairs(self) -> bool:
        """Whether lines hold pairs, of which the responses are to be learnt."""
        return self.prompt is not None

    def names(self) -> list[str]:
        """All keys that a line must have."""
        return [self.text] if self.prompt is None or self.response is None else [self.prompt, self.response]


@dataclass(frozen=True)
class Block:
    """Some of a file: part of a text, or whole lines of JSON.

    ``part`` is what it is for, None where each line is drawn by itself; ``first`` says whether a document begins with
    it; ``number`` that of its first line, or byte; ``position`` how many bytes of all files are read with it.
    """

    file: str
    index: int
    data: bytes
    lines: bool
    part: str | None
    first: bool
    number: int
    position: int


@dataclass(frozen=True)
class Encoded:
    """The ids of a block for one part; ``labelled`` (0 or 1 for each) where not all are to be learnt."""

    part: str
    ids: NDArray[np.integer]
    text_bytes: int
    labelled: NDArray[np.uint8] | None = None


# ---- the door --------------------------------------------------------------------------------------------------


def write_data(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    tokenizer: GPT2Tokenizer,
    shard_tokens: int = SHARD_TOKENS,
    val_fraction: float = 0.0,
    text_key: str = "text",
    prompt_key: str | None = None,
    response_key: str | None = None,
    workers: int | None = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise a text, a .jsonl file or a folder of such files into shards; returns the manifest.

    Args:
        source: a file, a folder (all files in it and below it, by name; those that begin with a dot are left out), or
            several of them. .gz, .xz and .bz2 are unpacked on the way.
        folder: where the shards go.
        tokenizer: whose ids; it must have an end-of-text token.
        shard_tokens: how many a file holds at most.
        val_fraction: this share goes to a part of its own, "val": of the lines of .jsonl, of the files of a folder of
            texts (at least one), or the end of a single text.
        text_key: where the text is in a line of .jsonl.
        prompt_key, response_key: both, for instruction pairs: prompts are then masked, so that they are not learnt.
        workers: processes that tokenise; None for as many as there are cores. More than one are started as new
            processes: a script that asks for them needs ``if __name__ == "__main__":``.
        overwrite: whether shards that are there may be replaced.
        progress: called with (bytes read, bytes in all).

    Raises: InputError for text that is empty, binary or not UTF-8, for lines that are no such JSON, and for a part that
    would be empty; TokenizerError for a tokenizer without an end-of-text token; WriteError, where something is in the
    way or the disk is full: what was there is untouched then.
    """
    fields = _fields(text_key, prompt_key, response_key)
    if isinstance(shard_tokens, bool) or not isinstance(shard_tokens, int) or shard_tokens < 1:
        raise InputError(f"shard_tokens is {shard_tokens!r}, expected a number of tokens, at least 1")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction!r}, expected a share from 0 to below 1")
    if tokenizer.eos_token_id is None:
        raise TokenizerError('the tokenizer has no end-of-text token; set one: tokenizer.eos_token = "<|endoftext|>"')
    files = _files(source)
    _check_target(Path(folder), files, overwrite=overwrite)
    plan = Plan(tuple(files), val_fraction, fields, _can_be_cut(tokenizer))
    with atomic_folder(folder, replaces=lambda name: bool(_OURS.fullmatch(name))) as stage:
        writer = _Writer(stage, tokenizer, shard_tokens, masked=fields.pairs)
        number = workers or os.cpu_count() or 1
        for block, encoded in _encode_all(plan, tokenizer, number):
            for part in encoded:
                writer.add(part, first=block.first or block.lines)
            if progress is not None:
                progress(block.position, plan.size)
        manifest = writer.finish(plan)
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _fields(text_key: str, prompt_key: str | None, response_key: str | None) -> Fields:
    if (prompt_key is None) != (response_key is None):
        raise InputError(
            f"prompt_key is {prompt_key!r} and response_key is {response_key!r}; expected both, or neither"
        )
    return Fields(text_key, prompt_key, response_key)


def _check_target(folder: Path, files: Iterable[Path], *, overwrite: bool) -> None:
    there = (
        sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")) if folder.is_dir() else []
    )
    if there and not overwrite:
        what = "shards" if MANIFEST in there else f"other files ({', '.join(there[:3])})"
        raise WriteError(
            errno.EEXIST,
            f"{folder} holds {what} already; nothing was changed there; name another folder, or replace shards with "
            f"overwrite",
            str(folder),
        )
    make_folder(folder.parent)
    for file in files:
        if folder.resolve() == file.resolve() or folder.resolve() in file.resolve().parents:
            raise InputError(f"{file} is in {folder}, where the shards would go; name a folder of their own")


def _files(source: Any) -> list[Path]:
    """All files to read, in their order. Raises: InputError, where there are none."""
    several = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    files: list[Path] = []
    for each in several:
        path = existing(each)
        if path is None:
            raise InputError(f"{each} is not there; expected a text file, a .jsonl file, or a folder of them")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file())
            files += [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        else:
            files.append(path)
    if not files:
        raise InputError(f"{source} holds no files; expected a text file, a .jsonl file, or a folder of them")
    return files


def _can_be_cut(tokenizer: GPT2Tokenizer) -> bool:
    """Whether no token holds a space as such: pieces write theirs as Ġ, added tokens may not."""
    shown = "".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    return not any(char.isspace() for char in set(shown))


# ---- files to blocks -------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is read, and for which part."""

    files: tuple[Path, ...]
    val_fraction: float
    fields: Fields
    can_be_cut: bool
    size: int = field(init=False)
    empty: list[str] = field(default_factory=list)  # files without text, which are left out

    def __post_init__(self) -> None:
        self.size = sum(file.stat().st_size for file in self.files)
        texts = [index for index, file in enumerate(self.files) if not _has_lines(file)]
        self._val: set[int] = set()
        self._tail = False
        if self.val_fraction and len(texts) > 1:
            count = min(max(round(self.val_fraction * len(texts)), 1), len(texts) - 1)
            self._val = {texts[place] for place in Order(len(texts), 0, 0)(np.arange(count)).tolist()}
        elif self.val_fraction and len(self.files) == 1 and texts:
            self._tail = True

    def blocks(self) -> Iterator[Block]:
        """All blocks, in the order of the files. Raises: InputError."""
        before = 0
        for index, file in enumerate(self.files):
            some = False
            part = None if _has_lines(file) and self.val_fraction else VAL if index in self._val else TRAIN
            for block in self._of_file(index, file, part, before):
                some = True
                yield block
            if not some:
                self.empty.append(str(file))
            before += file.stat().st_size

    def _of_file(self, index: int, file: Path, part: str | None, before: int) -> Iterator[Block]:
        lines = _has_lines(file)
        cut = _line_cut if lines else _text_cut if self.can_be_cut else (lambda data: None)
        turn = self._turn(file) if self._tail else None
        done = number = 0
        first = True
        for data, position in _cut_up(file, cut):
            block = Block(str(file), index, data, lines, part, first, number, before + position)
            first = False
            number += data.count(b"\n") if lines else len(data)
            place = None if turn is None else _turning_place(data, turn - done)
            done += len(data)
            if place is None:
                yield block
                continue
            turn, part = None, VAL  # from here on
            head, rest = data[:place], data[place:]
            if head:
                yield replace(block, data=head)
            if rest:
                yield replace(block, data=rest, part=VAL, first=True, number=block.number + place)
            else:
                first = True

    def _turn(self, file: Path) -> int:
        """After how many bytes of text the rest is for validation."""
        size = file.stat().st_size
        if file.suffix in _PACKED:
            size = sum(len(data) for data, _ in _read(file))
        return size - max(1, round(self.val_fraction * size))


def _has_lines(file: Path) -> bool:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in _LINES


def _read(file: Path) -> Iterator[tuple[bytes, int]]:
    """The bytes of a file, unpacked, a block at a time, and how many of the file itself are read by then."""
    try:
        with file.open("rb") as raw:
            unpack = _PACKED.get(file.suffix.lower())
            stream: BinaryIO = raw if unpack is None else unpack(raw)
            while data := stream.read(BLOCK):
                yield data, raw.tell()
    except (OSError, EOFError, lzma.LZMAError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise InputError(f"{file} cannot be read: {reason}; check that the file is whole and may be read") from cause


def _cut_up(file: Path, cut: Callable[[bytes], int | None]) -> Iterator[tuple[bytes, int]]:
    """The file in blocks, cut where ``cut`` says: the place before which a block may end, or None."""
    waiting: list[bytes] = []
    position = 0
    for data, place_in_file in _read(file):
        if not position:
            refuse_lfs_pointer(file, data[:64], InputError)
        elif (place := cut(waiting[-1])) is not None:  # only now is it known not to be the last, which is not cut
            yield b"".join([*waiting[:-1], waiting[-1][:place]]), position
            waiting = [waiting[-1][place:]]
        waiting.append(data)
        position = place_in_file
    if rest := b"".join(waiting):
        yield rest, position


def _line_cut(data: bytes) -> int | None:
    return data.rfind(b"\n") + 1 or None


def _text_cut(data: bytes) -> int | None:
    """The last place where a text may be cut in two that have the same ids as the whole.

    Before a space or line feed that follows something else a piece of GPT-2's pattern always ends, and the pattern
    never looks back.
    """
    for start in dict.fromkeys((max(0, len(data) - _TAIL), max(0, len(data) - 64 * _TAIL), 0)):
        for match in reversed(list(_CUT.finditer(data, start))):
            # Some spaces are several bytes: what stands before must be no end of one.
            if not data[max(0, match.end() - 4) : match.end()].decode("utf-8", "ignore")[-1:].isspace():
                return match.end()
    return None


def _turning_place(data: bytes, turn: int) -> int | None:
    """Where validation begins in this block, if it does: at a document, else at a line, else where ids allow it."""
    if turn >= len(data):
        return None
    turn = max(turn, 0)
    place = data.find(_BETWEEN, turn)
    if place >= 0:
        return place
    place = data.find(b"\n", turn) + 1
    if 0 < place < len(data):
        return place
    match = _CUT.search(data, turn)
    return match.end() if match else len(data)


# ---- blocks to ids ---------------------------------------------------------------------------------------------


class _Encoder:
    """Turns blocks into ids; one in each process."""

    def __init__(self, tokenizer: GPT2Tokenizer, fields: Fields, val_fraction: float) -> None:
        self._whole, self._fields, self._val = tokenizer, fields, val_fraction
        self._rest = copy.copy(tokenizer)  # for what goes on in the middle of a text
        self._rest.add_prefix_space = False
        end = tokenizer.eos_token or ""
        self._joins = tokenizer.encode(f"a{end}a") == [
            *tokenizer.encode("a"),
            tokenizer.eos_token_id,
            *tokenizer.encode("a"),
        ]
        self._dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32

    def encode(self, block: Block) -> list[Encoded]:
        """The ids of a block, for each part that it has some for. Raises: InputError."""
        if b"\0" in block.data:
            raise InputError(
                f"{block.file} is not text: it has zero bytes; leave it out of the folder, or convert it to UTF-8"
            )
        try:
            text = block.data.decode("utf-8")
        except UnicodeDecodeError as cause:
            at = block.number + cause.start
            where = f"after line {block.number}" if block.lines else f"at {at}"
            raise InputError(
                f"{block.file} is not UTF-8: byte 0x{block.data[cause.start]:02x} {where}; convert it to UTF-8 first, "
                f"for example with iconv, or leave it out"
            ) from cause
        if not block.lines:
            ids = (self._whole if block.first else self._rest).encode_array(text)
            return [Encoded(block.part or TRAIN, ids.astype(self._dtype), len(block.data))]
        return list(self._lines(block, text))

    def _lines(self, block: Block, text: str) -> Iterator[Encoded]:
        from gpt2_core.data_examples import json_object

        names = self._fields.names()
        parts: dict[str, list[list[str]]] = {}
        for number, line in enumerate(text.split("\n"), block.number + 1):
            if not line.strip():
                continue
            value = json_object(block.file, number, line, names)
            found = [value[name] for name in names]
            if not all(isinstance(each, str) for each in found):
                raise InputError(
                    f"{block.file}, line {number}: {' and '.join(map(repr, names))} is {type(found[-1]).__name__}, "
                    f"expected a string{nearest('text', list(value))}"
                )
            if found[-1]:
                parts.setdefault(block.part or self._drawn(block.index, number), []).append(found)
        for part, rows in parts.items():
            size = sum(len(each.encode("utf-8", "replace")) for row in rows for each in row)
            if self._fields.pairs:
                yield self._pairs(part, rows, size)
            else:
                yield Encoded(part, self._documents([row[0] for row in rows]), size)

    def _drawn(self, file: int, line: int) -> str:
        return VAL if uniforms(0, [file], [line])[0, 0] < self._val else TRAIN

    def _documents(self, texts: list[str]) -> NDArray[np.integer]:
        """The ids of all texts, with the end-of-text token between them."""
        end = self._whole.eos_token_id
        if self._joins:
            if self._whole.add_prefix_space:
                texts = [text if text.startswith(" ") else f" {text}" for text in texts]
            return self._rest.encode_array((self._whole.eos_token or "").join(texts)).astype(self._dtype)
        rows = [index for ids in self._whole.encode_batch(texts, threads=1) for index in (end, *ids)]
        return np.array(rows[1:], self._dtype)

    def _pairs(self, part: str, rows: list[list[str]], size: int) -> Encoded:
        """Prompts that are not learnt, and responses and the tokens that end them, which are."""
        end = self._whole.eos_token_id
        prompts = self._whole.encode_batch([row[0] for row in rows], threads=1)
        responses = self._rest.encode_batch([row[1] for row in rows], threads=1)
        ids: list[Any] = []
        mask: list[int] = []
        for prompt, response in zip(prompts, responses, strict=True):
            ids += [end, *prompt, *response]
            mask += [1, *[0] * len(prompt), *[1] * len(response)]
        return Encoded(part, np.array(ids[1:], self._dtype), size, np.array(mask[1:], np.uint8))


_encoder: _Encoder | None = None  # of a worker process


def _start_worker(tokenizer: GPT2Tokenizer, fields: Fields, val_fraction: float) -> None:
    """Runs first in a worker: it ends with its parent, however that ends, and leaves Ctrl-C to it."""
    import multiprocessing
    import signal
    import threading

    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _encoder = _Encoder(tokenizer, fields, val_fraction)


def _encode_block(block: Block) -> list[Encoded]:
    if _encoder is None:
        raise RuntimeError("the worker was not started by _start_worker")
    return _encoder.encode(block)


def _encode_all(plan: Plan, tokenizer: GPT2Tokenizer, workers: int) -> Iterator[tuple[Block, list[Encoded]]]:
    """The ids of all blocks, in their order, with a few blocks under way at a time."""
    settings = (tokenizer, plan.fields, plan.val_fraction)
    if workers <= 1:
        encoder = _Encoder(*settings)
        for block in plan.blocks():
            yield replace(block, data=b""), encoder.encode(block)
        return
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # New processes rather than forks: a fork of a process with threads, as PyTorch and TensorFlow have, may hang.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Block, Future[list[Encoded]]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=settings)
    try:
        for block in plan.blocks():
            waiting.append((replace(block, data=b""), pool.submit(_encode_block, block)))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as cause:
        raise InputError(
            f"one of {workers} worker processes ended before its work did (out of memory, or killed); nothing was "
            f"written; try fewer workers"
        ) from cause
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---- ids to shards ---------------------------------------------------------------------------------------------


class _Writer:
    """Writes what is added into shards, part by part, hashing as it goes."""

    def __init__(self, folder: Path, tokenizer: GPT2Tokenizer, shard_tokens: int, *, masked: bool) -> None:
        self._folder, self._tokenizer, self._most, self._masked = folder, tokenizer, shard_tokens, masked
        self._dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
        self._end = int(tokenizer.eos_token_id or 0)
        self._parts: dict[str, _Part] = {}

    def add(self, encoded: Encoded, *, first: bool) -> None:
        """Write some ids; ``first`` says that a document begins with them."""
        if not len(encoded.ids):
            return
        part = self._parts.get(encoded.part)
        if part is None:
            settings = (self._dtype, self._end, self._most, self._masked)
            part = self._parts[encoded.part] = _Part(self._folder, encoded.part, *settings)
        part.text_bytes += encoded.text_bytes
        if first and part.last != self._end and encoded.ids[0] != self._end:
            part.write(np.array([self._end]), None)
        part.write(encoded.ids, encoded.labelled)

    def finish(self, plan: Plan) -> dict[str, Any]:
        """Close the files; the manifest. Raises: InputError, where a part is empty."""
        for part in self._parts.values():
            part.close()
        if not self._parts:
            names = ", ".join(map(str, plan.files[:3]))
            raise InputError(f"{names} {'are' if len(plan.files) > 1 else 'is'} empty; expected some text")
        for name in (TRAIN, VAL) if plan.val_fraction else (TRAIN,):
            if name not in self._parts:
                raise InputError(
                    f"no document falls into the {name!r} part with val_fraction {plan.val_fraction}; give more "
                    f"documents or another share"
                )
        tokenizer = self._tokenizer
        return {
            "format": FORMAT,
            "made_by": f"gpt2-duet {__version__}",
            "dtype": "uint16" if self._dtype == "<u2" else "uint32",
            "tokenizer": {
                "vocab_size": len(tokenizer),
                "end_of_text": self._end,
                "sha256": hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest(),
            },
            "source": {
                "files": len(plan.files),
                "bytes": plan.size,
                "empty": plan.empty,
                "val_fraction": plan.val_fraction,
                "keys": plan.fields.names(),
            },
            "splits": {name: part.row() for name, part in sorted(self._parts.items())},
        }


class _Part:
    """The shards of one part."""

    def __init__(self, folder: Path, name: str, dtype: str, end: int, most: int, masked: bool) -> None:
        self._folder, self._name, self._dtype, self._end = folder, name, dtype, end
        self._most, self._masked = most, masked
        self._open: list[_ShardFile] = []  # that of ids, and that of the mask
        self.shards: list[dict[str, Any]] = []
        self.masks: list[dict[str, Any]] = []
        self.last = -1
        self.text_bytes = 0
        self._ends = 0  # tokens that begin a document

    def write(self, ids: NDArray[Any], labelled: NDArray[np.uint8] | None) -> None:
        """Append ids, in as many shards as it takes."""
        mask = np.ones(len(ids), np.uint8) if labelled is None else labelled
        done = 0
        while done < len(ids):
            if not self._open:
                stem = f"{self._name}_{len(self.shards):05d}"
                self._open = [_ShardFile(self._folder / f"{stem}.bin", self._dtype)]
                if self._masked:
                    self._open.append(_ShardFile(self._folder / f"{stem}.{LABELLED}.bin", "u1"))
            count = min(len(ids) - done, self._most - self._open[0].size)
            for file, values in zip(self._open, (ids, mask), strict=False):
                file.write(values[done : done + count])
            done += count
            if self._open[0].size == self._most:
                self.close()
        self.last = int(ids[-1])
        self._ends += int((ids == self._end).sum())

    def close(self) -> None:
        """End the shard that is being written, if there is one."""
        for file, rows in zip(self._open, (self.shards, self.masks), strict=False):
            rows.append(file.close())
        self._open = []

    def row(self) -> dict[str, Any]:
        """What the manifest says of this part."""
        row: dict[str, Any] = {
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "documents": self._ends - (self.last == self._end),
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }
        return row | ({LABELLED: self.masks} if self._masked else {})


class _ShardFile:
    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self._dtype = path, dtype
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.size += len(values)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"file": self._path.name, "tokens": self.size, "sha256": self._digest.hexdigest()}
