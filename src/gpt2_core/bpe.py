"""Merging one piece: the pair of neighbours whose merge stands first in the list becomes one token, until none is left.

" lower" with the merges (l, o) (lo, w) (e, r) (Ġ, low):   Ġ l o w e r → Ġ lo w e r → Ġ low e r → Ġ low er → Ġlow er
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from gpt2_core.vocabulary import Vocabulary

PAIR_SHIFT = 21  # a pair of ids is the one integer left << PAIR_SHIFT | right; see VOCABULARY_LIMIT
_HEAP_FROM = 64  # tokens; below, looking at every pair each time is quicker than keeping a heap


class MergeRules:
    """The merges as a dictionary: pair of ids -> (rank, id that the pair becomes), packed in one integer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        pairs = vocabulary.merge_pairs
        keys = (pairs[:, 0] << PAIR_SHIFT) | pairs[:, 1]
        self.ranks: dict[int, int] = dict(zip(keys.tolist(), range(len(keys)), strict=True))
        self.merged: list[int] = vocabulary.merge_ids.tolist()
        self.byte_ids: list[int] = vocabulary.byte_ids.tolist()


def merge_piece(piece: bytes, rules: MergeRules) -> list[int]:
    """The ids of one piece: quadratic time for the usual few bytes, n log n for long ones."""
    tokens = [rules.byte_ids[byte] for byte in piece]
    return _merge_few(tokens, rules) if len(tokens) < _HEAP_FROM else _merge_long(tokens, rules)


def _merge_few(tokens: list[int], rules: MergeRules) -> list[int]:
    never = len(rules.merged)
    find = rules.ranks.get
    ranks = [find(left << PAIR_SHIFT | right, never) for left, right in itertools.pairwise(tokens)]
    while ranks:
        rank = min(ranks)
        if rank == never:
            break
        place = ranks.index(rank)
        tokens[place : place + 2] = [rules.merged[rank]]
        del ranks[place]
        if place > 0:
            ranks[place - 1] = find(tokens[place - 1] << PAIR_SHIFT | tokens[place], never)
        if place < len(ranks):
            ranks[place] = find(tokens[place] << PAIR_SHIFT | tokens[place + 1], never)
    return tokens


def _merge_long(tokens: Sequence[int], rules: MergeRules) -> list[int]:
    """A heap of (rank, place) over a linked list; entries that no longer hold are dropped when they surface."""
    size = len(tokens)
    alive = list(tokens)
    after = list(range(1, size + 1))
    before = list(range(-1, size - 1))
    find = rules.ranks.get
    heap = [
        rank * size + place
        for place in range(size - 1)
        if (rank := find(alive[place] << PAIR_SHIFT | alive[place + 1])) is not None
    ]
    heapq.heapify(heap)
    while heap:
        rank, place = divmod(heapq.heappop(heap), size)
        other = after[place]
        if alive[place] < 0 or other == size or find(alive[place] << PAIR_SHIFT | alive[other]) != rank:
            continue
        alive[place] = rules.merged[rank]
        alive[other] = -1
        beyond = after[place] = after[other]
        if beyond < size:
            before[beyond] = place
            if (new := find(alive[place] << PAIR_SHIFT | alive[beyond])) is not None:
                heapq.heappush(heap, new * size + place)
        previous = before[place]
        if previous >= 0 and (new := find(alive[previous] << PAIR_SHIFT | alive[place])) is not None:
            heapq.heappush(heap, new * size + previous)
    return [token for token in alive if token >= 0]
