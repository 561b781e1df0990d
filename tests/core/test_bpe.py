"""Merging: every way of doing it gives what the plain rule gives."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from gpt2_core.bpe import MergeArrays, MergeRules, merge_many, merge_piece
from gpt2_core.vocabulary import BYTE_TO_CHAR, Vocabulary, build_vocabulary, gpt2_vocabulary

ALPHABETS = (b"ab", b"aab c", b"etaoinshrdlu", b" \n\t", b"0123456789", bytes(range(256)))


def ranks_of(vocabulary: Vocabulary) -> dict[tuple[int, ...], int]:
    return {tuple(pair): rank for rank, pair in enumerate(vocabulary.merge_pairs.tolist())}


def merge_by_the_book(piece: bytes, vocabulary: Vocabulary, ranks: dict[tuple[int, ...], int]) -> list[int]:
    """Merge the neighbours with the lowest rank, the leftmost of them, until none can be merged."""
    tokens = [int(vocabulary.byte_ids[byte]) for byte in piece]
    while True:
        found = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(tokens)) if pair in ranks]
        if not found:
            return tokens
        rank, place = min(found)
        tokens[place : place + 2] = [int(vocabulary.merge_ids[rank])]


def random_pieces(seed: int, count: int, longest: int) -> list[bytes]:
    draw = random.Random(seed)
    return [bytes(draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, longest))) for _ in range(count)]


def small_vocabulary(merges: list[str]) -> Vocabulary:
    tokens = [BYTE_TO_CHAR[byte] for byte in range(256)]
    for merge in merges:
        left, right = merge.split(" ")
        if left + right not in tokens:
            tokens.append(left + right)
    ids = {token: index for index, token in enumerate(tokens)}
    return build_vocabulary(ids, [merge.split(" ") for merge in merges], source="a test")


VOCABULARIES = {
    "gpt2": gpt2_vocabulary(),
    "no merges": small_vocabulary([]),
    "the order of the merges is not the order of making": small_vocabulary(["ab c", "a b", "b a", "c a", "ab ab"]),
    "two merges make the same token": small_vocabulary(["a b", "b c", "a bc", "ab c", "abc abc"]),
    "one letter": small_vocabulary(["a a", "aa aa", "aa a"]),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_piece_is_merged_by_the_book(name: str) -> None:
    vocabulary = VOCABULARIES[name]
    rules, ranks = MergeRules(vocabulary), ranks_of(vocabulary)
    pieces = random_pieces(1, 150, 40) + random_pieces(2, 6, 300) + [b"a" * 200, b"abc" * 70]
    for piece in pieces:
        assert merge_piece(piece, rules) == merge_by_the_book(piece, vocabulary, ranks)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_many_pieces_at_once_are_merged_as_one_by_one(name: str) -> None:
    vocabulary = VOCABULARIES[name]
    rules, arrays = MergeRules(vocabulary), MergeArrays(vocabulary, MergeRules(vocabulary))
    for seed in range(20):
        pieces = random_pieces(seed, random.Random(seed).randint(1, 60), 60)
        lengths = np.array([len(piece) for piece in pieces])
        ids, counts = merge_many(np.frombuffer(b"".join(pieces), np.uint8), lengths, arrays)
        wanted = [merge_piece(piece, rules) for piece in pieces]
        assert counts.tolist() == [len(row) for row in wanted]
        assert ids.tolist() == [index for row in wanted for index in row]


def test_each_gpt2_token_is_the_single_token_of_its_own_bytes() -> None:
    """So a piece that is a token need not be merged: the encoder's cache begins with this knowledge."""
    vocabulary = gpt2_vocabulary()
    pieces = [data for data, piece in zip(vocabulary.token_bytes, vocabulary.is_piece, strict=False) if piece]
    ids, counts = merge_many(
        np.frombuffer(b"".join(pieces), np.uint8),
        np.array([len(piece) for piece in pieces]),
        MergeArrays(vocabulary, MergeRules(vocabulary)),
    )
    assert (counts == 1).all()
    assert np.array_equal(ids, np.flatnonzero(vocabulary.is_piece))


def test_the_pairs_of_bytes_inside_tokens_are_all_known() -> None:
    vocabulary = gpt2_vocabulary()
    inside = np.zeros(1 << 16, bool)
    for data, piece in zip(vocabulary.token_bytes, vocabulary.is_piece, strict=False):
        if piece:
            inside[[first | second << 8 for first, second in itertools.pairwise(data)]] = True
    assert np.array_equal(MergeArrays(vocabulary, MergeRules(vocabulary)).inside, inside)


@pytest.mark.parametrize("piece", [b"a" * 100_000, b"ab" * 50_000, b" " * 100_000, b"=-" * 50_000])
def test_long_pieces_take_no_quadratic_time(piece: bytes) -> None:
    """A quadratic way would take hours here."""
    ids = merge_piece(piece, MergeRules(gpt2_vocabulary()))
    assert b"".join(gpt2_vocabulary().token_bytes[index] for index in ids) == piece
