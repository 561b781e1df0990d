"""CRC-32C of data that pass by, at the speed of numpy: the checksum of TensorFlow's checkpoints and tables.

A CRC is the remainder of the data, as a polynomial over GF(2), on division by P of degree 32. So data may be replaced
by shorter data with the same remainder. P divides a polynomial of four terms,

    x^5685 + x^1362 + x^426 + 1,    so that    x^5685 = x^1362 + x^426 + 1   (mod P)

and it divides its k-th power too, where k is a power of two, which over GF(2) has x^k for x. With k = 128 this says: a
16-byte unit may be removed, if it is added (by XOR) to the units 5685, 5685 - 426 and 5685 - 1362 further on. That is
three XORs of long arrays for all data, and what is left after the last unit is short. It is folded again by smaller
units, then by single bytes, and the last few thousand bytes are looked up in a table. (Chosen as the four-term multiple
of least degree whose terms leave the longest stretches to work on at once; a test divides it by P. The idea is that of
Russell 2024, "Chorba: a novel CRC32 implementation", for another P.)

zlib.crc32 has another P. This takes 0.9 times its processor time for pieces of a megabyte (median of 60 pairs of runs,
one thread, numpy 2.4, zlib 1.2.13).

Source: Castagnoli, Braeuer and Herrmann 1993; RFC 3720, appendix B.4 (test vectors); TensorFlow, core/lib/hash/crc32c.h
(the mask).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: P, bit-reversed and without its leading term.
POLYNOMIAL = 0x82F63B78
#: The exponents of a multiple of P, from the highest.
MULTIPLE = (5685, 1362, 426, 0)

_REACH = tuple(MULTIPLE[0] - exponent for exponent in MULTIPLE[1:])  # how many units further on, the nearest first
_UNIT = 2  # words of 8 bytes that are folded as one
_WINDOW = _UNIT * _REACH[-1]  # words that what follows depends on
_STRETCH = _UNIT * _REACH[0]  # words that do not depend on each other
_ROOM = _WINDOW + 6 * _STRETCH  # words; it stays in a core's own cache
_ROW = 256  # bytes looked up at a time
_KINDS = ("<u8", "<u4", "<u2", "u1")  # ever smaller units to fold the window by
# In front of all data: 8 bytes that leave ones in a register that begins with zeros. The CRC's begins with ones.
_ONES = np.uint64(0x641F645400000000)
_MASK = 0xA282EAD8


class Crc32c:
    """A checksum of pieces that follow each other: `update` with each, then `value`."""

    def __init__(self) -> None:
        self._words = np.empty(_ROOM, np.uint64)
        self._words[:_WINDOW] = 0
        self._words[_WINDOW - 1] = _ONES
        self._end = _WINDOW  # up to where words are filled
        self._given = 1  # how many words of the window are not all zeros
        self._rest = b""  # bytes that do not fill a word yet

    def update(self, data: bytes | bytearray | memoryview | NDArray[Any]) -> None:
        """Add contiguous data."""
        piece = np.frombuffer(data, np.uint8)
        if self._rest:
            piece = np.concatenate([np.frombuffer(self._rest, np.uint8), piece])
        whole = piece.size - piece.size % 8
        self._rest = piece[whole:].tobytes()
        words = piece[:whole].view(np.uint64)
        for start in range(0, words.size, _STRETCH):
            self._fold(words[start : start + _STRETCH])
        self._given = min(_WINDOW, self._given + words.size)

    def _fold(self, words: NDArray[np.uint64]) -> None:
        """Add at most `_STRETCH` words, and to them what stood where they depend on."""
        if self._end + words.size > _ROOM:
            self._words[:_WINDOW] = self._words[self._end - _WINDOW : self._end]
            self._end = _WINDOW
        end = self._end + words.size
        into = self._words[self._end : end]
        for reach in _REACH:
            start = self._end - _UNIT * reach
            np.bitwise_xor(words, self._words[start : start + words.size], out=into)
            words = into
        self._end = end

    @staticmethod
    def _unfolded(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The last words without what they had from each other, since none of them is to be removed."""
        plain = words.copy()
        for reach in _REACH:
            plain[_UNIT * reach :] ^= words[: -_UNIT * reach]
        return plain

    @property
    def value(self) -> int:
        """The checksum of all data up to now."""
        words = self._unfolded(self._words[self._end - self._given : self._end])
        short = len(self._rest) % 8 and 8 - len(self._rest)
        # Zeros in front change no remainder.
        data = np.concatenate([np.zeros(short, np.uint8), words.view(np.uint8), np.frombuffer(self._rest, np.uint8)])
        for kind in _KINDS:
            data = _fold_in_place(data.view(kind)).view(np.uint8)
        return _look_up(data) ^ 0xFFFFFFFF


def crc32c(data: bytes | bytearray | memoryview | NDArray[Any]) -> int:
    """The checksum of contiguous data."""
    crc = Crc32c()
    crc.update(data)
    return crc.value


def masked(crc: int) -> int:
    """A checksum as TensorFlow stores it: turned and shifted, so that checksums of checksums are sound."""
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def _fold_in_place(units: NDArray[Any]) -> NDArray[Any]:
    """The last units of the same remainder, as many as the multiple's degree or fewer."""
    end = units.size - _REACH[-1]
    for start in range(0, end, _REACH[0]):
        given = units[start : min(end, start + _REACH[0])]
        for reach in _REACH:
            into = units[start + reach : start + reach + given.size]
            np.bitwise_xor(into, given, out=into)
    return units[max(0, end) :]


def _look_up(data: NDArray[np.uint8]) -> int:
    """The remainder of a few thousand bytes, with a register that begins with zeros."""
    table, places, (first, second, third, fourth) = _table()
    padded = np.concatenate([np.zeros(-data.size % _ROW, np.uint8), data]).reshape(-1, _ROW)
    crc = 0
    for row in np.bitwise_xor.reduce(table.take(places + padded), axis=1).tolist():
        # What is left of the rows before counts as if it were added to the first bytes of this one.
        crc = row ^ first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24]
    return crc


@lru_cache(maxsize=1)
def _table() -> tuple[NDArray[np.uint32], NDArray[np.intp], list[list[int]]]:
    """The remainder of each byte at each place of a row, where each place begins in it, and its first four places."""
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = np.where(last & 1, last >> 1 ^ POLYNOMIAL, last >> 1).astype(np.uint32)
    rows = [last]
    while len(rows) < _ROW:
        rows.append(rows[-1] >> 8 ^ last[rows[-1] & 0xFF])
    rows.reverse()
    return np.concatenate(rows), np.arange(_ROW, dtype=np.intp) * 256, [row.tolist() for row in rows[:4]]
