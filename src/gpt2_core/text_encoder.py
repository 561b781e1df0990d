"""Plain text to ids: cut into pieces, look up the known ones, merge the rest.

Short texts go piece by piece through a dictionary, long ones through `gpt2_core.bulk`. Both give the same ids.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_core.bpe import MergeArrays, MergeRules, merge_piece
from gpt2_core.bulk import CHUNK, chunks, encode_chunk
from gpt2_core.piece_cache import PieceCache
from gpt2_core.pretokenize import split
from gpt2_core.vocabulary import Vocabulary

BARRIER = b"\xff"
LONG = 4000  # characters: where the two ways take the same time (measured: 3,500 to 7,000, by the text)
_KEPT_PIECES = 1 << 16
_VOCABULARIES = 4  # whose tables are kept
_KEPT_LENGTH = 128  # characters; longer pieces hardly ever come twice


class TextEncoder:
    """The ids of plain text, in which no special token is recognised; its memory of pieces is bounded.

    May be used by several threads at once.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._known = _KnownPieces(vocabulary)
        # Caches nobody is using. A list's append and pop are atomic, so each thread has its cache to itself.
        self._idle: list[PieceCache] = []

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which must have no surrogates."""
        return self._encode_short(text) if len(text) < LONG else to_list(self._encode_long(text.encode(), 1))

    def encode_segments(
        self, segments: Sequence[str], between: Sequence[int], threads: int | None = None
    ) -> NDArray[np.int32]:
        """The ids of n + 1 texts, each by itself, with the n integers of `between` where one ends and another begins.

        threads: how many work on it, as many as there are cores if None.
        """
        if sum(map(len, segments)) < LONG:
            rows = map(self._encode_short, segments)
            ids = next(rows)
            for row, integer in zip(rows, between, strict=True):
                ids.append(integer)
                ids += row
            return np.array(ids, np.int32)
        array = self._encode_long(BARRIER.join(text.encode() for text in segments), threads)
        if between:
            array[array == -1] = between
        return array

    def _encode_short(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._known.__getitem__, split(text))))

    def _encode_long(self, data: bytes, threads: int | None) -> NDArray[np.int32]:
        """The ids of UTF-8 text; barrier bytes 0xFF stand between texts and give -1."""
        workers = min(threads or os.cpu_count() or 1, -(-len(data) // CHUNK))
        if workers <= 1:
            return _join(map(self._encode_chunk, chunks(data)))
        from concurrent.futures import ThreadPoolExecutor  # takes as long to import as a short text to encode

        with ThreadPoolExecutor(workers) as pool:
            return _join(pool.map(self._encode_chunk, chunks(data)))

    def _encode_chunk(self, data: bytes) -> NDArray[np.int32]:
        if not data:
            return np.zeros(0, np.int32)
        try:
            cache = self._idle.pop()
        except IndexError:
            cache = known_beforehand(self._vocabulary).copy()
        ids = encode_chunk(data, cache, merge_arrays(self._vocabulary))
        if not cache.is_full:
            self._idle.append(cache)
        return ids


class _KnownPieces(dict[str, tuple[int, ...]]):
    """The ids of each piece, merged when it is first asked for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(merge_piece(piece.encode(), merge_rules(self._vocabulary)))
        if len(piece) <= _KEPT_LENGTH:
            if len(self) >= _KEPT_PIECES:
                self.clear()
            self[piece] = ids
        return ids


# What follows from a vocabulary alone is made once, when it is first needed, for all encoders of that vocabulary.


@functools.lru_cache(maxsize=_VOCABULARIES)
def merge_rules(vocabulary: Vocabulary) -> MergeRules:
    """The merges for single pieces."""
    return MergeRules(vocabulary)


@functools.lru_cache(maxsize=_VOCABULARIES)
def merge_arrays(vocabulary: Vocabulary) -> MergeArrays:
    """The merges for whole arrays."""
    return MergeArrays(vocabulary, merge_rules(vocabulary))


@functools.lru_cache(maxsize=_VOCABULARIES)
def known_beforehand(vocabulary: Vocabulary) -> PieceCache:
    """A cache that knows each of GPT-2's tokens as a piece: its ids are that token alone.

    For GPT-2's vocabulary a test proves it. Of another it need not hold, so there the cache is empty.
    """
    if not vocabulary.is_gpt2:
        return PieceCache([], np.zeros(0, np.int64))
    ids = [index for index in np.flatnonzero(vocabulary.is_piece).tolist() if _is_text(vocabulary.token_bytes[index])]
    return PieceCache([vocabulary.token_bytes[index] for index in ids], np.array(ids))


def _is_text(piece: bytes) -> bool:
    return BARRIER not in piece


_integers = np.zeros(0, object)


def to_list(ids: NDArray[np.int32]) -> list[int]:
    """The array as a list of ints, all places with the same id sharing one int: quicker and smaller than new ones."""
    global _integers
    table = _integers
    if len(ids) and (top := int(ids.max())) >= len(table):
        _integers = table = np.empty(top + 1, object)
        table[:] = range(top + 1)
    found: list[int] = table[ids].tolist() if len(ids) else []
    return found


def _join(parts: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
    arrays = list(parts)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
