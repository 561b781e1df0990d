"""The uniform numbers of sampling: published answers, and independence from everything but their key."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.errors import GenerationError
from gpt2_core.uniforms import fresh_seed, philox4x32, uniforms

PINNED = [[0.8946847163350924, 0.8741119351871307], [0.25980214542417135, 0.9386339486184866]]
PINNED_FAR = 0.06813734568687746


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


# Known answers of philox4x32 with ten rounds: counter, key, output. Source: kat_vectors of the Random123 library by
# the authors of Salmon et al. 2011.
@pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_generator_gives_the_published_answers(counter, key, output):
    assert tuple(int(word) for word in philox4x32(words(counter), words(key))) == words(output)


def test_the_numbers_are_the_top_53_bits_of_the_first_two_words():
    low, high, *_ = words("6627e8d5 e169c58d bc57ac4c 9b00dbd8")
    assert uniforms(0, [0], [0])[0, 0] == ((high << 32 | low) >> 11) / 2**53


def test_the_numbers_are_pinned():
    # If this fails, every seed writes another text: that needs a reason and a line in the changelog.
    assert uniforms(1, [0, 1], [0, 1]).tolist() == PINNED
    assert uniforms(2**64 - 1, [2**40], [2**33])[0, 0] == PINNED_FAR


def test_a_number_depends_on_seed_sequence_and_step_alone():
    whole = uniforms(5, range(6), range(9))
    assert whole.shape == (6, 9)
    for sequence in range(6):
        for step in range(9):
            assert uniforms(5, [sequence], [step])[0, 0] == whole[sequence, step]
    assert np.array_equal(uniforms(5, [4, 2], [8, 3]), whole[np.ix_([4, 2], [8, 3])])


def test_every_part_of_the_key_matters_in_all_its_bits():
    seen = {float(uniforms(seed, [0], [0])[0, 0]) for seed in (0, *(1 << bit for bit in range(64)))}
    seen |= {float(uniforms(0, [1 << bit], [0])[0, 0]) for bit in range(64)}
    seen |= {float(uniforms(0, [0], [1 << bit])[0, 0]) for bit in range(64)}
    assert len(seen) == 65 + 64 + 64


def test_they_are_spread_evenly_over_zero_to_one():
    numbers = uniforms(0, range(100), range(1000))
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=100, range=(0, 1))
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert 55 < chi_squared < 155  # 99 degrees of freedom: outside once in ten thousand times
    neighbours = np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]
    across = np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.015
    assert abs(across) < 0.015


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", True, None])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(GenerationError, match=r"seed is .*expected None .* from 0 to 2\*\*64 - 1"):
        uniforms(seed, [0], [0])


def test_a_numpy_seed_is_the_same_as_a_plain_one():
    assert np.array_equal(uniforms(np.uint64(7), [0], [0]), uniforms(7, [0], [0]))


def test_fresh_seeds_differ_and_are_in_range():
    seeds = {fresh_seed() for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
