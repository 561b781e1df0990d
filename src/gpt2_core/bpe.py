"""Merging one piece: the pair of neighbours whose merge stands first in the list becomes one token, until none is left.

" lower" with the merges (l, o) (lo, w) (e, r) (Ġ, low):   Ġ l o w e r → Ġ lo w e r → Ġ low e r → Ġ low er → Ġlow er
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpt2_core.hash_table import HashTable
from gpt2_core.vocabulary import Vocabulary

PAIR_SHIFT = 21  # a pair of ids is the one integer left << PAIR_SHIFT | right; see VOCABULARY_LIMIT
_FEW = 12  # pieces; as many are merged one by one in the time of one round for all
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


class MergeArrays:
    """The same merges for whole arrays: a hash table from pairs of ids to ranks, and what each rank makes.

    rules: the same for single pieces.
    inside: (65536,) whether two bytes, the first in the low half of the index, stand side by side in any token.
        Where they do not, no merge can ever reach across, so a piece may be cut there without changing its ids.
    byte_ranks: (65536,) the rank of merging two bytes, with the same index; the number of merges if there is none.
    """

    def __init__(self, vocabulary: Vocabulary, rules: MergeRules) -> None:
        self.rules = rules
        pairs = vocabulary.merge_pairs
        keys = ((pairs[:, 0] << PAIR_SHIFT) | pairs[:, 1]).view(np.uint64)
        self.ranks = HashTable((2 * len(keys)).bit_length() + 1, probe=len(keys) + 1)
        self.ranks.insert(keys, np.arange(len(keys), dtype=np.int32))
        self.merged = vocabulary.merge_ids
        self.byte_ids = vocabulary.byte_ids
        self.inside = _pairs_inside(vocabulary)
        self.byte_ranks = self._byte_ranks()

    def _byte_ranks(self) -> NDArray[np.int64]:
        both = np.arange(1 << 16)
        pairs = self.byte_ids[both & 0xFF] << PAIR_SHIFT | self.byte_ids[both >> 8]
        ranks = self.ranks.find(pairs.view(np.uint64)).astype(np.int64)
        return np.where(ranks < 0, len(self.merged), ranks)


def _pairs_inside(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """A pair of bytes is inside a token if a merge has brought it there: last byte of the left, first of the right."""
    sizes = np.array([len(data) for data in vocabulary.token_bytes], np.int64)
    ends = np.cumsum(sizes)
    data = np.frombuffer(b"".join(vocabulary.token_bytes), np.uint8)
    left, right = vocabulary.merge_pairs[:, 0], vocabulary.merge_pairs[:, 1]
    inside = np.zeros(1 << 16, bool)
    inside[data[ends[left] - 1] | data[(ends - sizes)[right]].astype(np.intp) << 8] = True
    return inside


def merge_many(
    data: NDArray[np.uint8], lengths: NDArray[np.int64], merges: MergeArrays
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`merge_piece` for many short pieces at once: each round makes the next merge of every piece.

    data: (N,) the pieces' bytes, one piece after the other; lengths: (P,) of each.
    Returns: the ids, one piece's after the other's, and how many each piece has, (P,).
    Time: as many rounds as the longest piece has merges, so pieces should be short.
    """
    size = len(data)
    starts = np.cumsum(lengths) - lengths
    tokens = np.append(merges.byte_ids[data], 0)
    after = np.arange(1, size + 2)  # the linked lists of tokens; place `size` ends them
    before = np.arange(-1, size)
    edge = np.zeros(size + 1, bool)  # whether a piece begins here: no pair reaches over it
    edge[starts] = edge[size] = True
    # What pairs are chosen by: the lowest rank first, then the leftmost place.
    never = len(merges.merged) * size
    order = merges.byte_ranks[data[:-1] | data[1:].astype(np.intp) << 8] * size
    order = np.append(np.minimum(order + np.arange(size - 1), never), never)
    order[starts[1:] - 1] = never

    def update(places: NDArray[np.int64]) -> None:
        others = after[places]
        pairs = (tokens[places] << PAIR_SHIFT) | tokens[others]
        ranks = merges.ranks.find(pairs.view(np.uint64)).astype(np.int64)  # rank * size needs 64 bits
        order[places] = np.where((ranks < 0) | edge[others], never, ranks * size + places)

    while True:
        best = np.minimum.reduceat(order, starts)
        best = best[best < never]
        if len(best) < _FEW:
            break
        ranks = best // size
        places = best - ranks * size
        others = after[places]
        beyond = after[others]
        tokens[places] = merges.merged[ranks]
        tokens[others] = -1
        order[others] = never
        after[places] = beyond
        before[beyond] = places
        update(np.append(places, before[places[~edge[places]]]))
    for first in starts[np.searchsorted(starts, best % size, side="right") - 1].tolist():
        last = first + int(np.argmax(edge[first + 1 :])) + 1
        left = tokens[first:last]
        merged = _merge_few(left[left >= 0].tolist(), merges.rules)
        left[: len(merged)], left[len(merged) :] = merged, -1
    alive = tokens[:size] >= 0
    return tokens[:size][alive], np.add.reduceat(alive, starts, dtype=np.int64)
