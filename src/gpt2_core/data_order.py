"""An order of n things that is had place by place: a permutation as a function, with no list of all n.

    Order(n, seed, epoch)(places) -> the things at these places

A Feistel network takes the numbers of an even number of bits to each other, each to one: half of the bits is mixed and
added to the other half, in turn. Where a result lies beyond n it is put in again, until it does not: the numbers below
n are then permuted among themselves. The memory is that of the places asked for, whatever n is. Up to a few thousand
things are sorted by random keys, which is quicker.

Source: Luby & Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions"; Black & Rogaway
2002, "Ciphers with arbitrary finite domains", section 4 ("cycle-walking").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2_core.uniforms import check_seed, philox4x32

_ROUNDS = 8  # four are enough for numbers of many bits (Luby & Rackoff 1988), fewer bits need more
_SORTED = 1 << 12  # things, up to which a list of all is no matter
_USE = 0x6F726472  # the last counter word, apart from those of `gpt2_core.uniforms`: numbers for orders are others

# The two multipliers and three shifts of splitmix64's last step (Steele, Lea & Flood 2014, "Fast splittable
# pseudorandom number generators", figure 15, "variant 13" of Stafford's).
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


class Order:
    """The numbers from 0 to ``size`` - 1 in an order that ``seed`` and ``epoch`` decide.

    ``order(places)`` gives the numbers at these places: (n,) int64 -> (n,) int64, each place another number.

    Raises: GenerationError, for a seed that is no whole number from 0 to 2**64 - 1.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        seed = check_seed(seed)
        self._size = np.uint64(size)
        self._half = np.uint64(-(-(size - 1).bit_length() // 2))
        self._low = np.uint64((1 << int(self._half)) - 1)
        counter = (np.arange(size if size <= _SORTED else _ROUNDS), epoch & 0xFFFFFFFF, epoch >> 32, _USE)
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        self._keys = words[0] << np.uint64(32) | words[1]  # (size,) or (rounds,)
        self._list = np.argsort(self._keys, kind="stable") if size <= _SORTED else None

    def __call__(self, places: ArrayLike) -> NDArray[np.int64]:
        """The numbers at ``places``, which are whole numbers from 0 to size - 1."""
        if self._list is not None:
            return self._list[np.asarray(places, np.int64)].astype(np.int64)
        found = self._permute(np.asarray(places, np.uint64))
        while (beyond := found >= self._size).any():
            found[beyond] = self._permute(found[beyond])
        return found.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._low
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._low)
        joined: NDArray[np.uint64] = left << self._half | right
        return joined


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64
        for shift, factor in _MIX:
            words = (words ^ words >> shift) * factor
    return words ^ words >> _LAST_SHIFT
