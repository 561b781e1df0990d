"""The vocabulary of a byte-level BPE: which bytes each id stands for, and which pairs of ids merge, in order.

GPT-2's own vocabulary is embedded. Its ids follow from its merges alone, as in the released files: first the 256
single bytes in the order of `BYTES_IN_ORDER`, then the result of each merge in order, then ``<|endoftext|>``.
So 50,000 pairs of ids are all that is stored (``assets/gpt2-merges.zlib``: all left ids, then all right ids,
little-endian uint16), and both released files can be written again from them, bit for bit.

Vocabulary files show bytes as characters. Printable Latin-1 characters stand for themselves; the other 68 bytes
become the characters from U+0100 on, so a space is "Ġ" and a newline is "Ċ".
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt2_core.errors import TokenizerError

ENDOFTEXT = "<|endoftext|>"
GPT2_MERGES = 50_000  # openai/gpt-2, vocab.bpe: one line of version, then this many merges
VOCABULARY_LIMIT = 1 << 21  # ids; two of them have to fit in one 64-bit key with room to spare

# The bytes that stand for themselves come first, then the others: openai/gpt-2, src/encoder.py, bytes_to_unicode.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_IN_ORDER: tuple[int, ...] = (*_PRINTABLE, *(byte for byte in range(256) if byte not in set(_PRINTABLE)))
BYTE_TO_CHAR: Mapping[int, str] = {
    byte: chr(byte if place < len(_PRINTABLE) else 256 + place - len(_PRINTABLE))
    for place, byte in enumerate(BYTES_IN_ORDER)
}
CHAR_TO_BYTE: Mapping[str, int] = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_SHOW_TABLE = str.maketrans({chr(byte): char for byte, char in BYTE_TO_CHAR.items()})


def show_bytes(data: bytes) -> str:
    """The bytes as vocabulary files write them: ``b" the"`` is ``"Ġthe"``."""
    return data.decode("latin-1").translate(_SHOW_TABLE)


def read_bytes(shown: str) -> bytes:
    """The inverse of `show_bytes`; raises KeyError for a character that stands for no byte."""
    return bytes([CHAR_TO_BYTE[char] for char in shown])


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What each id stands for, and the merges.

    token_bytes: the bytes of each id, ids from 0 without holes.
    is_piece: for each id, whether it is a byte or the result of a merge (special tokens are not).
    byte_ids: the id of each of the 256 single bytes.
    merge_pairs: (merges, 2) ids; the earlier a pair stands, the sooner it merges.
    merge_ids: (merges,) the id that each pair becomes.
    is_gpt2: whether this is GPT-2's own vocabulary, for which more is known (see `gpt2_core.bpe`).
    """

    token_bytes: Sequence[bytes]
    is_piece: NDArray[np.bool_]
    byte_ids: NDArray[np.int64]
    merge_pairs: NDArray[np.int64]
    merge_ids: NDArray[np.int64]
    is_gpt2: bool = False

    def __len__(self) -> int:
        return len(self.token_bytes)

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Each id as vocabulary files write it."""
        return [
            show_bytes(data) if piece else data.decode("utf-8", "replace")
            for data, piece in zip(self.token_bytes, self.is_piece.tolist(), strict=True)
        ]

    @functools.cached_property
    def token_ids(self) -> dict[str, int]:
        """The id of each token as vocabulary files write it."""
        return {token: index for index, token in enumerate(self.tokens)}

    def merges(self) -> list[str]:
        """The merges as ``merges.txt`` writes them: two tokens with a space between."""
        tokens = self.tokens
        return [f"{tokens[left]} {tokens[right]}" for left, right in self.merge_pairs.tolist()]

    def to_vocab_json(self) -> bytes:
        """The content of ``vocab.json``; for GPT-2's vocabulary the released ``encoder.json``, bit for bit."""
        return json.dumps(self.token_ids).encode("ascii")

    def to_merges_txt(self) -> bytes:
        """The content of ``merges.txt``; for GPT-2's vocabulary the released ``vocab.bpe``, bit for bit."""
        return "\n".join(["#version: 0.2", *self.merges(), ""]).encode("utf-8")


@functools.cache
def gpt2_vocabulary() -> Vocabulary:
    """GPT-2's own vocabulary of 50,257 tokens, from the data that ship with the package."""
    packed = (Path(__file__).parent / "assets" / "gpt2-merges.zlib").read_bytes()
    pairs = np.frombuffer(zlib.decompress(packed), "<u2").reshape(2, GPT2_MERGES)
    token_bytes = [bytes([byte]) for byte in BYTES_IN_ORDER]
    for left, right in zip(pairs[0].tolist(), pairs[1].tolist(), strict=True):
        token_bytes.append(token_bytes[left] + token_bytes[right])
    token_bytes.append(ENDOFTEXT.encode())
    is_piece = np.ones(len(token_bytes), bool)
    is_piece[-1] = False
    return Vocabulary(
        token_bytes=token_bytes,
        is_piece=is_piece,
        byte_ids=np.argsort(np.array(BYTES_IN_ORDER)),
        merge_pairs=pairs.T.astype(np.int64),
        merge_ids=np.arange(256, 256 + GPT2_MERGES),
        is_gpt2=True,
    )


def build_vocabulary(ids: Mapping[str, int], merges: Iterable[Sequence[str]], *, source: str) -> Vocabulary:
    """The vocabulary of a file's tokens and merges, checked; `source` names the file in errors.

    Raises: TokenizerError for ids that repeat, leave holes or are no integers, for missing byte tokens, and for
    merges that name unknown tokens, make unknown tokens or repeat.
    """
    tokens = _by_id(ids, source)
    missing = [char for char in CHAR_TO_BYTE if char not in ids]
    if missing:
        raise TokenizerError(
            f"{source} has no token for {len(missing)} of the 256 bytes (the first is {missing[0]!r}, byte "
            f"0x{CHAR_TO_BYTE[missing[0]]:02x}); expected a byte-level BPE vocabulary like GPT-2's, which has all; "
            f"use the files of a GPT-2 model"
        )
    pairs, merged = _check_merges(ids, merges, source)
    is_piece = np.zeros(len(tokens), bool)
    byte_ids = np.array([ids[BYTE_TO_CHAR[byte]] for byte in range(256)], np.int64)
    is_piece[byte_ids] = True
    is_piece[merged] = True
    token_bytes = [
        read_bytes(token) if piece else token.encode("utf-8", "replace")
        for token, piece in zip(tokens, is_piece.tolist(), strict=True)
    ]
    known = gpt2_vocabulary()
    is_gpt2 = token_bytes == known.token_bytes and np.array_equal(pairs, known.merge_pairs)
    return known if is_gpt2 else Vocabulary(token_bytes, is_piece, byte_ids, pairs, merged)


def check_integers(ids: Mapping[str, object], source: str) -> None:
    """Raise TokenizerError for an id that is no integer; `source` names the file."""
    for token, index in ids.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise TokenizerError(f"{source} gives {token!r} the id {index!r}; expected an integer; repair the file")


def _by_id(ids: Mapping[str, int], source: str) -> list[str]:
    if len(ids) > VOCABULARY_LIMIT:
        raise TokenizerError(f"{source} has {len(ids)} tokens; at most {VOCABULARY_LIMIT} are supported")
    check_integers(ids, source)
    tokens: list[str | None] = [None] * len(ids)
    for token, index in ids.items():
        if not 0 <= index < len(ids):
            raise TokenizerError(
                f"{source} gives {token!r} the id {index} but has {len(ids)} tokens; expected the ids 0 to "
                f"{len(ids) - 1} without holes; repair the file, or take it from the model's source again"
            )
        if tokens[index] is not None:
            raise TokenizerError(
                f"{source} gives the id {index} to {tokens[index]!r} and to {token!r}; expected each id once; "
                f"repair the file, or take it from the model's source again"
            )
        tokens[index] = token
    return [token for token in tokens if token is not None]


def _check_merges(
    ids: Mapping[str, int], merges: Iterable[Sequence[str]], source: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs: dict[tuple[int, int], int] = {}
    for number, (left, right) in enumerate(merges, 1):
        for token in (left, right, left + right):
            if token not in ids or not all(char in CHAR_TO_BYTE for char in token):
                raise TokenizerError(
                    f"merge {number} of {source}, {left!r} with {right!r}, needs the token {token!r}, which is not "
                    f"in the vocabulary; the vocabulary and the merges must be files of the same model"
                )
        pair = (ids[left], ids[right])
        if pair in pairs:
            raise TokenizerError(
                f"merge {number} of {source}, {left!r} with {right!r}, stands there twice; expected each merge once; "
                f"repair the file, or take it from the model's source again"
            )
        pairs[pair] = ids[left + right]
    return (
        np.array(list(pairs), np.int64).reshape(len(pairs), 2),
        np.array(list(pairs.values()), np.int64),
    )
