"""Ids to bytes: the bytes of each token, one after the other."""

from __future__ import annotations

import functools
import operator
import struct
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_core.errors import TokenizerError
from gpt2_core.vocabulary import Vocabulary

_SHORT = 50  # ids; below, a loop over them is quicker than numpy
_BLOCK = 1 << 14  # ids: what is gathered for a block stays in the processor's cache


class IdDecoder:
    """The bytes of sequences of ids; `skipped` are ids that stand for nothing.

    Long sequences: an array of the tokens is indexed with the ids, which takes half the time of a loop over a list.
    """

    def __init__(self, token_bytes: Sequence[bytes], skipped: Collection[int] = ()) -> None:
        self._tokens = np.empty(len(token_bytes), object)
        self._tokens[:] = token_bytes
        self._tokens[list(skipped)] = b""

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> bytes:
        """The bytes of one sequence of ids.

        Raises: TokenizerError for an id that is not there; TypeError for what is no integer.
        """
        if len(ids) < _SHORT:
            return self._one_by_one(ids)
        if len(ids) <= _BLOCK:
            return self._block(ids)
        return b"".join([self._block(ids[start : start + _BLOCK], start) for start in range(0, len(ids), _BLOCK)])

    def _one_by_one(self, ids: Sequence[int] | NDArray[np.integer], before: int = 0) -> bytes:
        tokens = self._tokens
        for place, index in enumerate(ids, before):
            if not 0 <= index < len(tokens):
                raise TokenizerError(
                    f"the id {index} at place {place} is not in the vocabulary; expected 0 to {len(tokens) - 1}; "
                    f"check that model and tokenizer belong together (a model's vocab_size may be padded)"
                )
        return b"".join([tokens[operator.index(index)] for index in ids])

    def _block(self, ids: Sequence[int] | NDArray[np.integer], before: int = 0) -> bytes:
        if isinstance(ids, np.ndarray):
            array = ids
        else:
            try:  # half the time of np.array, and it takes integers only
                array = np.frombuffer(struct.pack(f"{len(ids)}i", *ids), np.int32)
            except struct.error:
                return self._one_by_one(ids, before)
        if array.min() < 0 or array.max() >= len(self._tokens):
            return self._one_by_one(ids, before)
        return b"".join(self._tokens[array].tolist())


@functools.lru_cache(maxsize=4)
def vocabulary_decoder(vocabulary: Vocabulary) -> IdDecoder:
    """The decoder of a vocabulary's ids, made once for all tokenizers of that vocabulary."""
    return IdDecoder(vocabulary.token_bytes)
