"""Plain text to ids: cut into pieces, look up the known ones, merge the rest."""

from __future__ import annotations

from collections.abc import Sequence

from gpt2_core.bpe import MergeRules, merge_piece
from gpt2_core.pretokenize import split
from gpt2_core.vocabulary import Vocabulary

_KEPT_PIECES = 1 << 16
_KEPT_LENGTH = 64  # characters; longer pieces hardly ever come twice


class TextEncoder:
    """The ids of plain text, in which no special token is recognised. Its memory of pieces is bounded."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._rules = MergeRules(vocabulary)
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which must have no surrogates."""
        known = self._known
        ids: list[int] = []
        for piece in split(text):
            found = known.get(piece)
            ids += self._learn(piece) if found is None else found
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]

    def _learn(self, piece: str) -> list[int]:
        ids = merge_piece(piece.encode("utf-8"), self._rules)
        if len(piece) <= _KEPT_LENGTH:
            if len(self._known) >= _KEPT_PIECES:
                self._known.clear()
            self._known[piece] = ids
        return ids
