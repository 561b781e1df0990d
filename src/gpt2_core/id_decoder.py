"""Ids to bytes: the bytes of each token, one after the other."""

from __future__ import annotations

import functools
import struct
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_core.errors import TokenizerError
from gpt2_core.piece_cache import spread
from gpt2_core.vocabulary import Vocabulary

_WIDTH = 8
_FILL = b"\xff"
_COUNT_BITS = 16
_COUNT = (1 << _COUNT_BITS) - 1
_SHORT = 100  # ids; below, joining the tokens' bytes is quicker than numpy
_BLOCK = 1 << 16  # ids: keeps the arrays in the processor's cache


class IdDecoder:
    """The bytes of sequences of ids. `skipped` are ids that stand for nothing.

    Long sequences: each token is one or more rows of 8 bytes, filled up with 0xFF. The rows of all ids are gathered,
    and the 0xFF taken out again. So tokens in which 0xFF occurs, which are not in UTF-8, go the short way.
    """

    def __init__(self, token_bytes: Sequence[bytes], skipped: Collection[int] = ()) -> None:
        self._tokens = list(token_bytes)
        for index in skipped:
            self._tokens[index] = b""
        self._rows: NDArray[np.void] | None = None  # made when first needed
        self._where = np.zeros(0, np.int64)  # of each id: its first row << _COUNT_BITS | how many it has

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """The bytes of one sequence of ids.

        Raises: TokenizerError for an id that is not there; TypeError for what is no integer.
        """
        if len(ids) < _SHORT:
            return self._join(ids)
        blocks = (ids[start : start + _BLOCK] for start in range(0, len(ids), _BLOCK))
        return b"".join([self._decode_block(block) for block in blocks])

    def _join(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        tokens = self._tokens
        size = len(tokens)
        for place, index in enumerate(ids):
            if not 0 <= index < size:
                raise TokenizerError(
                    f"the id {index} at place {place} is not in the vocabulary; expected 0 to {size - 1}; "
                    f"check that model and tokenizer belong together (a model's vocab_size may be padded)"
                )
        return b"".join([tokens[index] for index in ids])

    def _decode_block(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        rows = self._make_rows() if self._rows is None else self._rows
        if isinstance(ids, np.ndarray):
            array = ids
        else:
            try:  # twice as quick as np.array, and refuses what is no integer
                array = np.frombuffer(struct.pack(f"{len(ids)}i", *ids), np.int32)
            except struct.error:
                return self._join(ids)
        if array.min() < 0 or array.max() >= len(self._tokens):
            return self._join(ids)
        where = self._where.take(array)
        count = where & _COUNT
        if not count.all():
            return self._join(ids)
        places = where >> _COUNT_BITS
        if count.max() > 1:
            places = spread(places, count)
        return rows.take(places).tobytes().translate(None, _FILL)

    def _make_rows(self) -> NDArray[np.void]:
        sizes = np.fromiter(map(len, self._tokens), np.int64, len(self._tokens))
        count = np.maximum(-(-sizes // _WIDTH), 1)
        first = np.cumsum(count) - count
        rows = np.full(int(count.sum()) * _WIDTH, _FILL[0], np.uint8)
        data = np.frombuffer(b"".join(self._tokens), np.uint8)
        places = spread(first * _WIDTH, sizes)
        rows[places] = data
        count[np.searchsorted(first, places[data == _FILL[0]] // _WIDTH, side="right") - 1] = 0
        if count.max() > _COUNT:  # no token of a real vocabulary is longer than half a megabyte
            count[count > _COUNT] = 0
        self._where = first << _COUNT_BITS | count
        self._rows = rows.view(f"V{_WIDTH}")
        return self._rows


@functools.lru_cache(maxsize=4)
def vocabulary_decoder(vocabulary: Vocabulary) -> IdDecoder:
    """The decoder of a vocabulary's ids, made once for all tokenizers of that vocabulary."""
    return IdDecoder(vocabulary.token_bytes)
