"""A hash table over whole arrays: 64-bit keys to 31-bit values, looked up and filled many at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Low byte 0xFF, then others: neither UTF-8 padded with 0xFF nor a pair of ids looks like this.
EMPTY = np.uint64(0x00FFFFFFFFFFFFFF)
ABSENT = -1
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: D. Knuth, TAOCP vol. 3, 6.4
_ONE = np.int64(1)


class HashTable:
    """Open addressing with linear probing over at most `probe` slots.

    A key that finds no free slot so near is not kept: the owner must be able to do without it. So keys chosen to
    collide cost their own lookup and never make others slow.

    The keys themselves are compared, all 64 bits: a value that is found is the value of that key.
    """

    def __init__(self, bits: int, probe: int = 16) -> None:
        """A table of ``2 ** bits`` slots."""
        self._shift = np.uint64(64 - bits)
        self._probe = min(probe, 1 << bits)
        self._mask = np.int64((1 << bits) - 1)
        self._keys = np.full(1 << bits, EMPTY, np.uint64)
        self._values = np.full(1 << bits, ABSENT, np.int32)

    def copy(self) -> HashTable:
        """An independent table with the same content."""
        other = object.__new__(HashTable)
        other.__dict__.update(self.__dict__)
        other._keys, other._values = self._keys.copy(), self._values.copy()
        return other

    def _home(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        return ((keys * _MULTIPLIER) >> self._shift).view(np.int64)

    def find(self, keys: NDArray[np.uint64], wanted: NDArray[np.bool_] | None = None) -> NDArray[np.int32]:
        """The value of each key, ABSENT for keys that are not there; anything where `wanted` is false."""
        slots = self._home(keys)
        values: NDArray[np.int32] = self._values.take(slots)
        elsewhere = self._keys.take(slots) != keys
        if wanted is not None:
            elsewhere &= wanted
        places = np.flatnonzero(elsewhere)
        if len(places):
            values[places] = self._find_further(keys[places], slots[places])
        return values

    def _find_further(self, keys: NDArray[np.uint64], slots: NDArray[np.int64]) -> NDArray[np.int32]:
        """The lookup for keys that are not in their first slot."""
        values = np.full(len(keys), ABSENT, np.int32)
        open_ = np.flatnonzero(self._keys.take(slots) != EMPTY)
        for _ in range(1, self._probe):
            if not len(open_):
                break
            slots[open_] = (slots[open_] + _ONE) & self._mask
            there = self._keys.take(slots[open_])
            hit = there == keys[open_]
            values[open_[hit]] = self._values.take(slots[open_[hit]])
            open_ = open_[~hit & (there != EMPTY)]
        return values

    def insert(self, keys: NDArray[np.uint64], values: NDArray[np.int32]) -> int:
        """Add keys that are not there yet (of equal ones the first counts); returns how many were added.

        Earlier keys get the better slots, so give the frequent ones first.
        """
        slots = self._home(keys)
        waiting = np.arange(len(keys))
        added = 0
        for _ in range(self._probe):
            free = waiting[self._keys.take(slots[waiting]) == EMPTY]
            # Where several keys want one slot the last written stays, so write in reverse.
            claims = slots[free[::-1]]
            self._values[claims] = free[::-1]
            winners = free[self._values.take(slots[free]) == free]
            self._keys[slots[winners]] = keys[winners]
            self._values[slots[winners]] = values[winners]
            added += len(winners)
            waiting = waiting[self._keys.take(slots[waiting]) != keys[waiting]]
            if not len(waiting):
                break
            slots[waiting] = (slots[waiting] + _ONE) & self._mask
        return added
