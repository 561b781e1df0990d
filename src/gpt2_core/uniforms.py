"""The uniform numbers of sampling: a pure function of (seed, sequence, step, use), the same bits everywhere.

The generator is Philox4x32-10, written out in numpy: a counter goes through ten rounds of a keyed mixing function,
so any number is had without those before it, in any order and in any batch.

    uniforms(seed, sequences, steps, use=DRAW) -> (len(sequences), len(steps)) float64 in [0, 1)

Source: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2_core.errors import GenerationError

# Multipliers and key increments of Philox4x32 (Salmon et al. 2011, section 3.3; the increments are the golden ratio
# and sqrt(3) - 1, as 32-bit fractions).
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

SEED_LIMIT = 1 << 64

# What a number is for. Each use has numbers of its own; their meaning stands in docs/decisions/0004-randomness.md.
DRAW = 0  # the token of a text
ACCEPT = 1  # whether a drafted token stays
REDRAW = 2  # the token in the place of one that does not
BEAM_DRAW = 3  # the continuations of one beam
BEAM_PICK = 4  # from which beam the next continuation comes
_USES = 1 << 16  # the upper bits of the counter's second word


def philox4x32(counter: Sequence[ArrayLike], key: tuple[int, int]) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox: four counter words and two key words in, four random words out, each below 2**32.

    The counter words may be arrays (they broadcast); all arithmetic is on 32-bit words held in uint64.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in counter))
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _M0, c2 * _M1  # 32 x 32 -> 64 bits
        c0, c1, c2, c3 = (
            (right >> _32) ^ c1 ^ np.uint64(k0),
            right & _LOW,
            (left >> _32) ^ c3 ^ np.uint64(k1),
            left & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniforms(seed: int, sequences: ArrayLike, steps: ArrayLike, use: int = DRAW) -> NDArray[np.float64]:
    """One number in [0, 1) for each sequence and step: (len(sequences), len(steps)), in multiples of 2**-53.

    ``sequences`` and ``steps`` are whole numbers of at least 0, steps below 2**48: which text of the call, and which
    new token of it. ``use`` says what for. The number depends on nothing else, so a text is the same alone, in a
    batch, and resumed half-way.

    Raises: GenerationError, for a seed that is no whole number from 0 to 2**64 - 1.
    """
    seed = check_seed(seed)
    sequence = np.asarray(sequences, np.uint64).reshape(-1, 1)  # (R, 1)
    step = np.asarray(steps, np.uint64).reshape(1, -1)  # (1, N)
    high = (step >> _32) + np.uint64(use * _USES)
    words = philox4x32((step & _LOW, high, sequence & _LOW, sequence >> _32), (seed & 0xFFFFFFFF, seed >> 32))
    bits = (words[1] << _32) | words[0]
    # The top 53 of 64 bits: every multiple of 2**-53 below 1 is exact in float64, and 1 itself cannot come out.
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def check_seed(seed: int) -> int:
    """``seed`` as a plain int.

    Raises: GenerationError, for anything but a whole number from 0 to 2**64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < SEED_LIMIT:
        raise GenerationError(f"seed is {seed!r}, expected None (a fresh one) or a whole number from 0 to 2**64 - 1")
    return int(seed)


def fresh_seed() -> int:
    """A seed from the operating system's entropy, for a text that nobody asked to repeat."""
    return secrets.randbits(64)
