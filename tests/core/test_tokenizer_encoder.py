"""Short way and long way give the same ids, no collision can change them, and memory is bounded."""

from __future__ import annotations

import copy
import random
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_core import bulk, hash_table, piece_cache, text_encoder
from gpt2_core.bpe import MergeRules, merge_piece
from gpt2_core.hash_table import ABSENT, EMPTY, HashTable
from gpt2_core.pretokenize import split
from gpt2_core.text_encoder import TextEncoder, to_list
from gpt2_core.vocabulary import BYTE_TO_CHAR, build_vocabulary, gpt2_vocabulary

RULES = MergeRules(gpt2_vocabulary())
LATIN = "tokenizers merge unfamiliar words like floccinaucinihilipilification and deadbeef'll we've 0123456789012345678"
OTHERS = "中华人民共和国 Привет мир γειά σου नमस्ते 🙂🙃👩\u200d👩\u200d👧 ------------------ \t\t\n\n x"
WORDS = [*LATIN.split(" "), *OTHERS.split(" "), *["        "] * 3]


def one_by_one(text: str) -> list[int]:
    return [index for piece in split(text) for index in merge_piece(piece.encode(), RULES)]


def by_arrays(encoder: TextEncoder, text: str) -> list[int]:
    return to_list(encoder._encode_long(text.encode(), 1))


def composed(seed: int, words: int) -> str:
    draw = random.Random(seed)
    made = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyzéжλ", k=draw.randint(1, 40))) for _ in range(words // 2)]
    return "".join(draw.choice((" ", "\n", "  ", "")) + draw.choice((*WORDS, *made)) for _ in range(words))


ENCODER = TextEncoder(gpt2_vocabulary())


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=80), st.text("ab 'sl\n中é", max_size=200)))
def test_any_text_has_the_ids_of_its_pieces_merged_one_by_one(text: str) -> None:
    wanted = one_by_one(text)
    assert ENCODER.encode(text) == wanted
    assert by_arrays(ENCODER, text) == wanted
    assert by_arrays(ENCODER, text) == wanted  # now from the cache


def test_long_text_has_the_same_ids_cold_warm_and_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = composed(1, 3000)
    wanted = one_by_one(text)
    encoder = TextEncoder(gpt2_vocabulary())
    assert encoder.encode(text) == wanted
    assert encoder.encode(text) == wanted
    for size in (50, 1000):
        monkeypatch.setattr(bulk, "CHUNK", size)
        assert encoder.encode(text) == wanted


def test_several_threads_may_use_one_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "CHUNK", 500)
    monkeypatch.setattr(bulk, "CHUNK", 500)
    text = composed(2, 2000)
    wanted = one_by_one(text)
    encoder = TextEncoder(gpt2_vocabulary())
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(encoder.encode(text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 4
    assert to_list(encoder._encode_long(text.encode(), 3)) == wanted


# Hashes at their worst. Every piece has the same hash; hashes that keep little; tables where all want one slot.
BAD_HASHES = {
    "all pieces have one hash": lambda pieces: np.zeros(len(pieces[0].words), np.uint64),
    "the hash is the first word": lambda pieces: pieces[0].words.copy(),
    "the hash is the last word": lambda pieces: _last_words(pieces),
    "the hash is the empty mark": lambda pieces: np.full(len(pieces[0].words), EMPTY),
}


def _last_words(pieces: list[piece_cache.Words]) -> np.ndarray:
    last = pieces[0].words.copy()
    for which, words in pieces[1:]:
        last[slice(None) if which is None else which] = words
    return last


@pytest.mark.parametrize("name", BAD_HASHES)
def test_no_collision_of_hashes_changes_an_id(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(piece_cache, "hash_words", BAD_HASHES[name])
    monkeypatch.setattr(bulk, "hash_words", BAD_HASHES[name])
    alike = [
        f"{'x' * place}{letter}{'x' * (length - place)}"
        for length in (8, 17, 40)
        for place in range(length + 1)
        for letter in "yz"
    ]
    text = composed(3, 800) + " ".join(alike * 2)
    text_encoder.known_beforehand.cache_clear()
    request.addfinalizer(text_encoder.known_beforehand.cache_clear)
    encoder = TextEncoder(gpt2_vocabulary())
    for _ in range(3):
        assert by_arrays(encoder, text) == one_by_one(text)


def test_no_crowded_slot_changes_an_id(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(hash_table.HashTable, "_home", lambda self, keys: np.zeros(len(keys), np.int64))
    text = composed(4, 120)
    encoder = TextEncoder(gpt2_vocabulary())
    # The table of merges has to hold all of them, and would take an hour to fill like this.
    monkeypatch.setattr(text_encoder, "merge_arrays", lambda vocabulary: _MERGES)
    text_encoder.known_beforehand.cache_clear()
    request.addfinalizer(text_encoder.known_beforehand.cache_clear)
    for _ in range(3):
        assert by_arrays(encoder, text) == one_by_one(text)


class _Ranks:
    """The ranks of pairs from a dictionary."""

    def find(self, keys: np.ndarray) -> np.ndarray:
        return np.array([RULES.ranks.get(int(key), ABSENT) for key in keys], np.int32)


_MERGES = copy.copy(text_encoder.merge_arrays(gpt2_vocabulary()))
_MERGES.ranks = _Ranks()  # type: ignore[assignment]


def colliding_pair() -> tuple[bytes, bytes]:
    """Two pieces of 24 letters with the same hash, made by solving for their last word; bytes need not be text."""
    draw = random.Random(5)
    mix, step = int(piece_cache._MIX), int(piece_cache._STEP)
    mask = (1 << 64) - 1

    def state(words: list[int]) -> int:
        value = words[0] * mix & mask
        for word in words[1:]:
            value = ((value ^ value >> 32) * mix + word * step) & mask
        return value

    def words() -> list[int]:
        return [int.from_bytes(bytes(draw.choices(b"abcdefgh", k=8)), "little") for _ in range(2)]

    left, right = words(), words()
    last = int.from_bytes(b"abcdefgh", "little")
    value = state(right)
    needed = (state([*left, last]) - ((value ^ value >> 32) * mix & mask)) * pow(step, -1, 1 << 64) & mask
    return tuple(b"".join(w.to_bytes(8, "little") for w in row) for row in ([*left, last], [*right, needed]))


def test_a_crafted_collision_is_told_apart_by_its_bytes() -> None:
    left, right = colliding_pair()
    data = np.frombuffer(left + right + b"\xff" * 8, np.uint8)
    starts, lengths = np.array([0, 24]), np.array([24, 24])
    first = piece_cache.short_keys(data, starts, lengths)
    hashes = piece_cache.hash_words(piece_cache.words_of(data, starts, lengths, first))
    assert hashes[0] == hashes[1], "the pieces do not collide: the hash has changed, so craft them anew"
    assert left != right
    cache = piece_cache.PieceCache([], np.zeros(0, np.int64))
    one = np.array([1])
    cache.learn(data, starts[:1], lengths[:1], np.array([7], np.int32), one)
    assert cache.find(data, starts, lengths).tolist() == [7, ABSENT]
    cache.learn(data, starts[1:], lengths[1:], np.array([8], np.int32), one)
    assert cache.find(data, starts, lengths).tolist() == [7, ABSENT]
    first, which = bulk.distinct(data, starts, lengths)
    assert first[which].tolist() == [0, 1]


def test_a_text_that_holds_the_padding_or_the_empty_mark_is_no_exception() -> None:
    for text in ("ÿ" * 3000, "\x00" * 9000, "a\x00\x00b" * 3000, "\x00ÿ\u07ff\uffff\U0010ffff " * 900):
        assert by_arrays(ENCODER, text) == one_by_one(text)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_cache, "_LEARNT", 300)
    monkeypatch.setattr(text_encoder, "_KEPT_PIECES", 300)
    monkeypatch.setattr(bulk, "CHUNK", 2000)
    encoder = TextEncoder(gpt2_vocabulary())
    for seed in range(3):
        text = composed(seed, 2000)
        wanted = one_by_one(text)
        assert by_arrays(encoder, text) == wanted
        assert encoder._encode_short(text) == wanted
        assert len(encoder._known) <= 300
        assert all(cache._learnt < 300 for cache in encoder._idle)
        assert len(encoder._idle) == 1 or not encoder._idle


@pytest.mark.parametrize(
    "text",
    [
        "x" * 200_000,
        " " * 200_000,
        " \n" * 100_000,
        "🙂" * 100_000,
        "a1" * 100_000,
        "'s" * 100_000,
        "中" * 100_000,
        "\u3000" * 100_000,
        "".join(random.Random(6).choices("abcdefghijklmnopqrstuvwxyz", k=200_000)),
        "".join(random.Random(7).choices("ABCDEFGHIJKLMNOPabcdefghijklmnopqrstuvwxyz", k=200_000)),
    ],
    ids=lambda text: ascii(text[:4]),
)
def test_no_text_takes_quadratic_time(text: str) -> None:
    """A quadratic way would not end within the hour."""
    ids = ENCODER.encode(text)
    assert b"".join(gpt2_vocabulary().token_bytes[index] for index in ids) == text.encode()


def test_a_hash_table_finds_what_was_put_in_and_nothing_else() -> None:
    draw = np.random.default_rng(8)
    keys = np.unique(draw.integers(0, 1 << 62, 5000, np.uint64))
    table = HashTable(14)
    values = np.arange(len(keys), dtype=np.int32)
    assert table.insert(keys, values) == len(keys)
    assert np.array_equal(table.find(keys), values)
    assert (table.find(keys + np.uint64(1 << 63)) == ABSENT).all()
    assert table.insert(keys, values + 1) == 0, "the first value counts"
    assert np.array_equal(table.find(keys), values)
    twice = HashTable(5)
    assert twice.insert(np.array([5, 5, 6], np.uint64), np.array([1, 2, 3], np.int32)) == 2
    assert twice.find(np.array([5, 6], np.uint64)).tolist() == [1, 3]


def test_a_full_hash_table_forgets_without_harm() -> None:
    table = HashTable(4)
    keys = np.arange(1, 1000, dtype=np.uint64)
    values = np.arange(1, 1000, dtype=np.int32)
    kept = table.insert(keys, values)
    found = table.find(keys)
    assert (found != ABSENT).sum() == kept < len(keys)
    assert np.array_equal(found[found != ABSENT], values[found != ABSENT])


def test_a_copy_of_a_cache_learns_by_itself() -> None:
    data = np.frombuffer(b"abcabcabcabcabcxyz" + b"\xff" * 8, np.uint8)
    starts, lengths = np.array([0, 15]), np.array([15, 3])
    cache = piece_cache.PieceCache([], np.zeros(0, np.int64))
    other = cache.copy()
    other.learn(data, starts, lengths, np.array([1, 2, 3], np.int32), np.array([2, 1]))
    assert (cache.find(data, starts, lengths) == ABSENT).all()
    values = other.find(data, starts, lengths)
    assert values[1] == 3
    ids, counts = other.ids_of(values[:1])
    assert (ids.tolist(), counts.tolist()) == ([1, 2], [2])


def test_a_cache_learns_no_more_than_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_cache, "_LEARNT", 3)
    data = np.frombuffer(b"abcdefghij" + b"\xff" * 8, np.uint8)
    places, ones = np.arange(10), np.ones(10, np.int64)
    cache = piece_cache.PieceCache([], np.zeros(0, np.int64))
    cache.learn(data, places, ones, np.arange(10, dtype=np.int32), ones)
    assert cache.is_full
    assert (cache.find(data, places, ones) != ABSENT).sum() == 3


def test_what_one_encoder_learns_no_other_begins_with() -> None:
    TextEncoder(gpt2_vocabulary()).encode(composed(9, 3000))
    fresh = text_encoder.known_beforehand(gpt2_vocabulary())
    assert fresh._learnt == 0
    assert fresh._first.size == 0


def test_a_token_that_no_merge_reaches_is_not_given_to_its_own_bytes() -> None:
    """Of merges in this order "abc" becomes a, bc: only of GPT-2's vocabulary is it known that this never happens."""
    tokens = [*(BYTE_TO_CHAR[byte] for byte in range(256)), "bc", "ab", "abc"]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    encoder = TextEncoder(build_vocabulary(ids, merges, source="a test"))
    assert encoder.encode("abc") == [ids["a"], ids["bc"]]
    assert encoder.encode("abc\n" * 3000) == [ids["a"], ids["bc"], ids["Ċ"]] * 3000
