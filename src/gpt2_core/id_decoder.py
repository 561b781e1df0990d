"""Ids to bytes: the bytes of each token, one after the other."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_core.errors import TokenizerError
from gpt2_core.piece_cache import spread

_WIDTH = 8
_FILL = b"\xff"
_SHORT = 100  # ids; below, joining the tokens' bytes is quicker than numpy
_BLOCK = 1 << 16  # ids: keeps the arrays in the processor's cache


class IdDecoder:
    """The bytes of sequences of ids. `skipped` are ids that stand for nothing.

    Long sequences: each token is one or more rows of 8 bytes, filled up with 0xFF. The rows of all ids are gathered,
    and the 0xFF taken out again. So tokens in which 0xFF occurs, which are not in UTF-8, go the short way.
    """

    def __init__(self, token_bytes: Sequence[bytes], skipped: Collection[int] = ()) -> None:
        self._tokens = [b"" if index in skipped else data for index, data in enumerate(token_bytes)]
        self._rows: NDArray[np.void] | None = None  # made when first needed
        self._first = self._count = np.zeros(0, np.int64)

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
        count = self._count.take(array)
        if not count.all():
            return self._join(ids)
        places = self._first.take(array)
        if count.max() > 1:
            places = spread(places, count)
        return rows.take(places).tobytes().translate(None, _FILL)

    def _make_rows(self) -> NDArray[np.void]:
        sizes = np.array([len(data) for data in self._tokens])
        count = np.maximum(-(-sizes // _WIDTH), 1)
        data = b"".join(
            [data.ljust(wide, _FILL) for data, wide in zip(self._tokens, (count * _WIDTH).tolist(), strict=True)]
        )
        self._first = np.cumsum(count) - count
        count[[_FILL in data for data in self._tokens]] = 0
        self._count = count
        self._rows = np.frombuffer(data, f"V{_WIDTH}")
        return self._rows
