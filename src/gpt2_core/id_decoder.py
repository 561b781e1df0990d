"""Ids to bytes: the bytes of each token, one after the other."""

from __future__ import annotations

import functools
import operator
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
    """The bytes of sequences of ids; `skipped` are ids that stand for nothing.

    Long sequences: each token is one or more rows of 8 bytes, filled up with 0xFF. The rows of all ids are gathered,
    and the 0xFF taken out again. That beats joining the tokens' bytes, which lie all over the memory (measured: by 1.1
    to 1.4). Tokens in which 0xFF occurs, which are in no text, go the short way.
    """

    def __init__(self, token_bytes: Sequence[bytes], skipped: Collection[int] = ()) -> None:
        self._tokens = list(token_bytes)
        for index in skipped:
            self._tokens[index] = b""

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """The bytes of one sequence of ids.

        Raises: TokenizerError for an id that is not there; TypeError for what is no integer.
        """
        if len(ids) < _SHORT:
            return self._join(ids)
        if len(ids) <= _BLOCK:
            return self._gather(ids)
        return b"".join([self._gather(ids[start : start + _BLOCK], start) for start in range(0, len(ids), _BLOCK)])

    def _join(self, ids: Sequence[int] | NDArray[np.integer], before: int = 0) -> bytes:
        tokens = self._tokens
        for place, index in enumerate(ids, before):
            if not 0 <= index < len(tokens):
                raise TokenizerError(
                    f"the id {index} at place {place} is not in the vocabulary; expected 0 to {len(tokens) - 1}; "
                    f"check that model and tokenizer belong together (a model's vocab_size may be padded)"
                )
        return b"".join([tokens[operator.index(index)] for index in ids])

    def _gather(self, ids: Sequence[int] | NDArray[np.integer], before: int = 0) -> bytes:
        if isinstance(ids, np.ndarray):
            array = ids
        else:
            try:  # half the time of np.array, and it takes integers only
                array = np.frombuffer(struct.pack(f"{len(ids)}i", *ids), np.int32)
            except struct.error:
                return self._join(ids, before)
        if array.min() < 0 or array.max() >= len(self._tokens):
            return self._join(ids, before)
        rows, where = self._rows
        found = where.take(array)
        count = found & _COUNT
        if not count.all():
            return self._join(ids, before)
        places = found >> _COUNT_BITS
        if count.max() > 1:
            places = spread(places, count)
        return rows.take(places).tobytes().translate(None, _FILL)

    @functools.cached_property
    def _rows(self) -> tuple[NDArray[np.void], NDArray[np.int64]]:
        """The rows, and of each id its first row << _COUNT_BITS | how many it has, 0 for what cannot be in rows."""
        sizes = np.fromiter(map(len, self._tokens), np.int64, len(self._tokens))
        count = np.maximum(-(-sizes // _WIDTH), 1)
        first = np.cumsum(count) - count
        rows = np.full(int(count.sum()) * _WIDTH, _FILL[0], np.uint8)
        data = np.frombuffer(b"".join(self._tokens), np.uint8)
        places = spread(first * _WIDTH, sizes)
        rows[places] = data
        count[np.searchsorted(first, places[data == _FILL[0]] // _WIDTH, side="right") - 1] = 0
        count[count > _COUNT] = 0
        return rows.view(f"V{_WIDTH}"), first << _COUNT_BITS | count


@functools.lru_cache(maxsize=4)
def vocabulary_decoder(vocabulary: Vocabulary) -> IdDecoder:
    """The decoder of a vocabulary's ids, made once for all tokenizers of that vocabulary."""
    return IdDecoder(vocabulary.token_bytes)
