"""The pieces whose ids are known, looked up many at a time.

A piece is found by all of its bytes, never by a hash alone. Pieces of up to 8 bytes are their own key: the bytes as
one 64-bit word, filled up with 0xFF, which is in no UTF-8. For longer ones, up to 64 bytes, a hash leads to a candidate
whose bytes are then compared, word by word. A piece that is not found, whatever the reason, is merged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_core.hash_table import ABSENT, HashTable

LONGEST = 128  # bytes; longer pieces hardly ever come twice
_WORD = 8
_LEARNT = 1 << 16  # pieces beyond those known at first; 10 MB of source code have 60,000 (measured)
_ONES = np.uint64((1 << 64) - 1)
_THREE = np.uint64(3)
# Odd numbers without pattern: the fractional digits of e and pi (xxhash and others take such primes).
_MIX = np.uint64(0xB7E151628AED2A6B)
_STEP = np.uint64(0x243F6A8885A308D3)
_FOLD = np.uint64(32)


def words_at(data: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The 8 bytes from each place on as one word; `data` must have 8 bytes from the last place on."""
    windows = np.ndarray((len(data) - _WORD + 1,), "V8", data, strides=(1,))
    words: NDArray[np.uint64] = windows.take(places).view("<u8")
    return words


def short_keys(data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The first 8 bytes of each piece, with 0xFF behind its end."""
    keys = words_at(data, starts)
    keys |= _ONES << (lengths.view(np.uint64) << _THREE)  # 8 bits for each byte; shifting by 64 or more gives 0
    return keys


class Words(NamedTuple):
    """The next 8 bytes of some pieces: which pieces (None for all), and their words."""

    which: NDArray[np.int64] | None
    words: NDArray[np.uint64]


def words_of(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    first: NDArray[np.uint64],
) -> list[Words]:
    """The pieces' first LONGEST bytes, 8 at a time; first: `short_keys` of the same pieces, where the list begins."""
    found = [Words(None, first)]
    which: NDArray[np.int64] | None = None
    rest = lengths - _WORD
    for done in range(_WORD, LONGEST, _WORD):
        longer = np.flatnonzero(rest > 0)
        if not len(longer):
            break
        if len(longer) < len(rest):
            which = longer if which is None else which[longer]
            starts, rest = starts[longer], rest[longer]
        found.append(Words(which, short_keys(data, starts + done, rest)))
        rest = rest - _WORD
    return found


def hash_words(pieces: list[Words]) -> NDArray[np.uint64]:
    """One word for each piece. It says where to look and which pieces may be equal, never that they are."""
    hashes = pieces[0].words * _MIX
    for which, words in pieces[1:]:
        mixed = hashes.copy() if which is None else hashes[which]
        mixed ^= mixed >> _FOLD
        mixed *= _MIX
        mixed += words * _STEP
        if which is None:
            hashes = mixed
        else:
            hashes[which] = mixed
    return hashes ^ (hashes >> _FOLD)


def same_bytes(
    data: NDArray[np.uint8],
    starts: NDArray[np.int64],
    others: NDArray[np.uint8],
    other_starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether data[start : start + length] is others[other : other + length], for each; all bytes are compared."""
    same = np.ones(len(starts), bool)
    left: NDArray[np.int64] | slice = slice(None)
    rest = lengths
    done = 0
    while len(rest):
        here = short_keys(data, starts[left] + done, rest)
        there = short_keys(others, other_starts[left] + done, rest)
        same[left] &= here == there
        longer = np.flatnonzero(rest > _WORD)
        left = longer if isinstance(left, slice) else left[longer]
        rest = rest[longer] - _WORD
        done += _WORD
    return same


class PieceCache:
    """Known pieces and their ids. Not for two threads at a time: each takes its own.

    values: what the tables hold and `find` gives: an id, ABSENT, or ``-2 - entry`` for a piece of several ids.
    """

    def __init__(self, pieces: Sequence[bytes], ids: NDArray[np.int64]) -> None:
        """A cache that knows `pieces` of UTF-8, each with one id, the frequent ones first."""
        self._short = HashTable(_bits(sum(len(piece) <= _WORD for piece in pieces)))
        self._long = HashTable(_bits(sum(len(piece) > _WORD for piece in pieces)))
        # Of each long piece: where its words begin in _words, its length and its value.
        self._long_start = _Column(np.int64)
        self._long_facts = _Column(np.int64)  # length << 32 | value's 32 bits
        self._words = _Column(np.uint64)
        # Of each piece of several ids: where they begin in _ids, and how many.
        self._first = _Column(np.int64)
        self._count = _Column(np.int64)
        self._ids = _Column(np.int32)
        self._learnt = 0
        if len(pieces):
            lengths = np.array([len(piece) for piece in pieces], np.int64)
            data = np.frombuffer(b"".join(pieces) + b"\xff" * _WORD, np.uint8)
            self._store(data, np.cumsum(lengths) - lengths, lengths, ids.astype(np.int32))

    def copy(self) -> PieceCache:
        """An independent cache with the same content."""
        other = object.__new__(PieceCache)
        for name, value in self.__dict__.items():
            other.__dict__[name] = value if isinstance(value, int) else value.copy()
        return other

    @property
    def is_full(self) -> bool:
        """Whether it learns no more, and should be given up for a fresh one."""
        return self._learnt >= _LEARNT

    def find(self, data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        """The value of each piece of `data`, which needs 8 bytes behind the last piece's start."""
        short = lengths <= _WORD
        keys = short_keys(data, starts, lengths)
        values = self._short.find(keys, short)
        long = np.flatnonzero(~short)
        if len(long):
            values[long] = self._find_long(data, starts[long], lengths[long], keys[long])
        return values

    def _find_long(
        self,
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        first: NDArray[np.uint64],
    ) -> NDArray[np.int32]:
        """As `find`; first: the first word of each piece."""
        pieces = words_of(data, starts, lengths, first)
        entries = self._long.find(hash_words(pieces), lengths <= LONGEST)
        entries[entries < 0] = 0
        facts = self._long_facts.array.take(entries)
        stored = self._long_start.array.take(entries)
        same = (facts >> 32 == lengths) & (lengths <= LONGEST)
        for number, (which, words) in enumerate(pieces):
            if which is None:
                same &= self._words.array.take(stored + number, mode="clip") == words
            else:
                same[which] &= self._words.array.take(stored[which] + number, mode="clip") == words
        return np.where(same, facts.astype(np.int32), np.int32(ABSENT))

    def ids_of(self, values: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of pieces of several ids, one piece after the other, and how many each has; from their values."""
        entries = -2 - values
        count = self._count.array[entries]
        return self._ids.array[spread(self._first.array[entries], count)], count

    def learn(
        self,
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ids: NDArray[np.int32],
        count: NDArray[np.int64],
    ) -> None:
        """Remember pieces of up to LONGEST bytes, as long as there is room; ids: one piece's after the other's."""
        room = _LEARNT - self._learnt
        starts, lengths, count = starts[:room], lengths[:room], count[:room]
        self._learnt += len(starts)
        firsts = np.cumsum(count) - count
        values = np.empty(len(starts), np.int32)
        single = count == 1
        values[single] = ids[firsts[single]]
        several = np.flatnonzero(~single)
        values[several] = -2 - (self._first.size + np.arange(len(several), dtype=np.int32))
        self._first.extend(firsts[several] + self._ids.size)
        self._count.extend(count[several])
        self._ids.extend(ids[: count.sum()])
        self._store(data, starts, lengths, values)

    def _store(
        self,
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        values: NDArray[np.int32],
    ) -> None:
        short = np.flatnonzero(lengths <= _WORD)
        self._short.insert(short_keys(data, starts[short], lengths[short]), values[short])
        long = np.flatnonzero(lengths > _WORD)
        starts, lengths = starts[long], lengths[long]
        entries = self._long_start.size + np.arange(len(long), dtype=np.int32)
        pieces = words_of(data, starts, lengths, words_at(data, starts))
        self._long.insert(hash_words(pieces), entries)
        sizes = -(-lengths // _WORD)
        begins = self._words.size + np.cumsum(sizes) - sizes
        self._long_start.extend(begins)
        self._long_facts.extend(lengths << 32 | values[long].view(np.uint32))
        self._words.extend(np.zeros(sizes.sum(), np.uint64))
        for number, (which, words) in enumerate(pieces):
            self._words.array[(begins if which is None else begins[which]) + number] = words


def _bits(known: int) -> int:
    """Of a table two thirds full when half of what is learnt is in it: small, to stay in the processor's cache."""
    return max((3 * (known + _LEARNT // 2) // 2 - 1).bit_length(), 4)


class _Column:
    """An array that grows at its end, by doubling."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.array: NDArray[Any] = np.zeros(1 << 10, dtype)
        self.size = 0

    def copy(self) -> _Column:
        other = object.__new__(_Column)
        other.array, other.size = self.array.copy(), self.size
        return other

    def extend(self, more: NDArray[Any]) -> None:
        end = self.size + len(more)
        if end > len(self.array):
            grown = np.zeros(2 * end, self.array.dtype)
            grown[: self.size] = self.array[: self.size]
            self.array = grown
        self.array[self.size : end] = more
        self.size = end


def spread(firsts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``first, first + 1, ...``, `count` of them, for each pair of first and count, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    places: NDArray[np.int64] = np.arange(total) + np.repeat(firsts - (ends - counts), counts)
    return places
