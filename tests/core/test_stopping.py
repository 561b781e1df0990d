"""Stop strings and pieces of text: whatever way the tokens are cut, the characters are right."""

from __future__ import annotations

import random

import pytest

from gpt2_core import GPT2Tokenizer
from gpt2_core.errors import GenerationError
from gpt2_core.stopping import StopFinder, TextPieces, check_stops, text_of

TOKENIZER = GPT2Tokenizer()
TEXT = "The old man said: «Ça alors!» 🦊🦊 and went — naïve — to the end. The end"


def cut_anywhere(text: str, seed: int) -> list[int]:
    """Tokens of a text that is cut into bytes here and there, even inside characters."""
    pick, data, ids, at = random.Random(seed), text.encode(), [], 0
    singles = {TOKENIZER.decode_bytes([index]): index for index in range(256)}
    while at < len(data):
        size = pick.randint(1, 9)
        piece = data[at : at + size]
        try:
            ids += TOKENIZER.encode(piece.decode())
        except UnicodeDecodeError:
            ids += [singles[bytes([byte])] for byte in piece]
        at += size
    assert TOKENIZER.decode(ids) == text
    return ids


@pytest.mark.parametrize("stops", [["end"], ["🦊 a"], ["«", "»"], ["ve — to the", " — "], ["nowhere"], ["e"], [TEXT]])
@pytest.mark.parametrize("seed", range(6))
def test_a_text_ends_before_the_first_stop_string_however_it_is_cut(stops, seed):
    ids = cut_anywhere(TEXT, seed)
    places = [TEXT.find(stop) for stop in stops if stop in TEXT]
    expected = TEXT[: min(places)] if places else TEXT
    assert text_of(TOKENIZER, ids, stops) == expected
    finder, count = StopFinder(TOKENIZER, stops), 0
    for index in ids:
        finder, count = finder.after(index), count + 1
        whole = any(stop.encode() in TOKENIZER.decode_bytes(ids[:count]) for stop in stops)
        assert finder.found == whole


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_passed_on_as_soon_as_they_are_certain_and_never_taken_back(seed):
    ids, stops = cut_anywhere(TEXT, seed), ["said?", "🦊🦊🦊", "The end."]
    pieces, shown = TextPieces(TOKENIZER, stops), ""
    for count, index in enumerate(ids, 1):
        shown += pieces.push(index)
        said = TOKENIZER.decode_bytes(ids[:count]).decode("utf-8", "ignore")
        assert said.startswith(shown)
        held = said[len(shown) :]
        assert not held or any(stop.encode().startswith(held.encode()) for stop in stops)
    assert shown + pieces.finish() == TEXT
    assert not pieces.stopped


def test_nothing_comes_after_a_stop_string():
    pieces = TextPieces(TOKENIZER, ["b"])
    ids = [TOKENIZER.encode(each)[0] for each in "abc"]
    assert [pieces.push(index) for index in ids] == ["a", "", ""]
    assert pieces.stopped and pieces.finish() == ""


def test_a_stop_string_inside_one_token_cuts_inside_its_text():
    (index,) = TOKENIZER.encode(" information")
    assert text_of(TOKENIZER, [index], ["form"]) == " in"
    assert StopFinder(TOKENIZER, ["form"]).after(index).found


def test_of_two_stop_strings_in_one_token_the_earlier_cuts():
    (index,) = TOKENIZER.encode(" information")
    assert text_of(TOKENIZER, [index], ["mat", "nfo"]) == " i"


def test_special_tokens_are_no_text_and_unknown_ids_are_marked():
    ids = [*TOKENIZER.encode("a"), TOKENIZER.eos_token_id, *TOKENIZER.encode("b"), 60000]
    assert text_of(TOKENIZER, ids) == "ab\ufffd"
    assert text_of(TOKENIZER, ids, ["ab"]) == ""


def test_a_character_that_never_ends_is_marked_at_the_end():
    ids = cut_anywhere("🦊", 1)[:1]
    pieces = TextPieces(TOKENIZER)
    broken = TOKENIZER.encode("🦊")[:1]
    assert pieces.push(broken[0]) == ""
    assert pieces.finish() == "\ufffd"
    assert ids


def test_a_finder_can_be_shared_by_texts_that_part():
    one = StopFinder(TOKENIZER, ["ab"]).after(TOKENIZER.encode("a")[0])
    assert one.after(TOKENIZER.encode("b")[0]).found
    assert not one.after(TOKENIZER.encode("c")[0]).found
    assert not one.found


def test_stop_strings_need_a_tokenizer_in_which_they_are_text():
    with pytest.raises(GenerationError, match=r"stop_strings=\['a'\] needs the tokenizer"):
        check_stops(["a"], None)
    with pytest.raises(GenerationError, match=r"is a special token, .* pass its id as eos_token_id=50256"):
        check_stops(["a", "<|endoftext|>"], TOKENIZER)
    check_stops(["a"], TOKENIZER)
