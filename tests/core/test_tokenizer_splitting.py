"""The three ways of cutting text into pieces agree, and what is a letter, number or space is Unicode 16.0's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_core import bulk
from gpt2_core.pretokenize import (
    BARRIER_BYTE,
    LETTER,
    NUMBER,
    OTHER,
    SPACE,
    class_table,
    piece_starts,
    safe_cut,
    split,
    split_by_regex,
)

# Characters that the rules speak of, from every class and every length in UTF-8.
TELLING = " \n\t\r\x0b\x0c\x1c\x1f'sdmtlvreSa1-\"\x00\x7f\x85\xa0é²½́ǆΩ٣\u1680\u2003\u2028\u3000中ー🙂𝟘𠀀"
CONTRACTIONS = ["'s", "'d", "'m", "'t", "'ll", "'ve", "'re", "'l", "'v", "'r", "a", "e", " ", "!", "\n", "中"]
texts = st.one_of(
    st.lists(st.sampled_from(CONTRACTIONS), max_size=12).map("".join),
    st.text(TELLING, max_size=60),
    st.text(max_size=60),
)


def split_by_array(text: str) -> list[str]:
    data = text.encode()
    starts = piece_starts(data).tolist()
    return [data[start:end].decode() for start, end in zip(starts, [*starts[1:], len(data)], strict=False)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("Hello  world's", ["Hello", " ", " world", "'s"]),
        ("we'll've'd", ["we", "'ll", "'ve", "'d"]),
        ("'sing 'sing a'sing", ["'s", "ing", " '", "sing", " a", "'s", "ing"]),
        ("\n'll ''ll", ["\n", "'ll", " ''", "ll"]),
        ("a  \n b\n\nc \n", ["a", "  \n", " b", "\n", "\n", "c", " \n"]),
        ("x\u3000\u3000y\u3000 z\u3000", ["x", "\u3000", "\u3000", "y", "\u3000", " z", "\u3000"]),
        ("3rd 1/2", ["3", "rd", " 1", "/", "2"]),
        ("I'M", ["I", "'", "M"]),
        ("a'llama'vex'red", ["a", "'ll", "ama", "'ve", "x", "'re", "d"]),
        ("a'l'v'rs'e", ["a", "'", "l", "'", "v", "'", "rs", "'", "e"]),
    ],
)
def test_pieces_are_cut_as_the_pattern_says(text: str, pieces: list[str]) -> None:
    assert split(text) == split_by_array(text) == split_by_regex(text) == pieces


@settings(max_examples=400, deadline=None)
@given(texts)
def test_short_and_long_way_cut_alike(text: str) -> None:
    assert split(text) == split_by_array(text)


@settings(max_examples=400, deadline=None)
@given(st.text(TELLING, max_size=60))
def test_the_regex_twin_cuts_alike(text: str) -> None:
    assert split(text) == split_by_regex(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(TELLING, max_size=12), min_size=1, max_size=6))
def test_text_on_either_side_of_a_barrier_is_cut_by_itself(parts: list[str]) -> None:
    data = bytes([BARRIER_BYTE]).join(part.encode() for part in parts)
    starts = piece_starts(data).tolist()
    pieces = [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=False)]
    wanted: list[bytes] = []
    for part in parts:
        wanted += [piece.encode() for piece in split(part)] + [b"\xff"]
    assert pieces == wanted[:-1]


@settings(max_examples=300, deadline=None)
@given(st.text(TELLING, min_size=2, max_size=200), st.data())
def test_a_safe_cut_changes_no_piece(text: str, data: st.DataObject) -> None:
    encoded = text.encode()
    end = data.draw(st.integers(1, len(encoded)))
    cut = safe_cut(encoded, 0, end)
    assert 0 <= cut <= end
    if cut:
        left, right = encoded[:cut].decode(), encoded[cut:].decode()
        assert split(left) + split(right) == split(text)


def test_long_text_is_cut_into_chunks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK", 100)
    prose = "It was a dark, stormy night; the rain fell in torrents. " * 100
    parts = list(bulk.chunks(prose.encode()))
    assert b"".join(parts) == prose.encode()
    assert max(map(len, parts)) <= 200
    chinese = "天地玄黃，宇宙洪荒。" * 200
    parts = list(bulk.chunks(chinese.encode()))
    assert b"".join(parts) == chinese.encode()
    assert max(map(len, parts)) <= 200


def test_text_without_a_place_to_cut_stays_in_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "CHUNK", 100)
    text = b"x" * 5000 + b" then" * 100
    parts = list(bulk.chunks(text))
    assert b"".join(parts) == text
    assert len(parts[0]) >= 5000


def test_the_class_table_counts_what_unicode_16_counts() -> None:
    """DerivedGeneralCategory.txt and PropList.txt of 16.0.0: the totals of L, N and White_Space."""
    table = class_table()
    assert [int((table == kind).sum()) for kind in (LETTER, NUMBER, SPACE)] == [141_028, 1_911, 25]
    assert table[[ord("a"), ord("Z"), 0x4E00, 0x1D7D8, ord("½"), 0x1C, 0x85, 0x3000]].tolist() == [
        LETTER, LETTER, LETTER, NUMBER, NUMBER, OTHER, SPACE, SPACE,
    ]  # fmt: skip


def test_the_class_table_differs_from_the_regex_module_only_where_unicode_versions_do() -> None:
    """A character that both know has one class; one that only the newer version knows is `other` in the older."""
    regex = pytest.importorskip("regex")
    table = class_table()
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    theirs = np.full(0x110000, OTHER, np.uint8)
    for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
        theirs[[ord(char) for char in regex.findall(pattern, characters)]] = kind
    both_know = (table != OTHER) & (theirs != OTHER)
    differing = [f"U+{code:04X}" for code in np.flatnonzero(both_know & (table != theirs))]
    assert not differing
    for name, newer in (
        ("regex", (table == OTHER) & (theirs != OTHER)),
        ("ours", (theirs == OTHER) & (table != OTHER)),
    ):
        unknown = np.flatnonzero(newer)
        # A version adds whole scripts; ASCII, Latin-1 and the spaces have been settled for decades.
        assert not len(unknown) or unknown.min() > 0x2FF, f"{name} has more: {[hex(code) for code in unknown[:20]]}"
    assert np.array_equal(table == SPACE, theirs == SPACE)
