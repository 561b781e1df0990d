"""The embedded vocabulary is GPT-2's, and vocabularies that lie are found out."""

from __future__ import annotations

import hashlib

import pytest

from gpt2_core.errors import TokenizerError
from gpt2_core.vocabulary import BYTE_TO_CHAR, build_vocabulary, gpt2_vocabulary, read_bytes, show_bytes

# sha256 of the files that OpenAI released with GPT-2.
ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

BYTES = {BYTE_TO_CHAR[byte]: byte for byte in range(256)}


def test_the_released_files_can_be_written_again_bit_for_bit() -> None:
    vocabulary = gpt2_vocabulary()
    assert hashlib.sha256(vocabulary.to_vocab_json()).hexdigest() == ENCODER_JSON
    assert hashlib.sha256(vocabulary.to_merges_txt()).hexdigest() == VOCAB_BPE


def test_there_are_50257_tokens_and_the_last_one_ends_a_text() -> None:
    vocabulary = gpt2_vocabulary()
    assert len(vocabulary) == 50257
    assert vocabulary.token_bytes[50256] == b"<|endoftext|>"
    assert vocabulary.is_piece.sum() == 50256


def test_bytes_are_shown_as_vocabulary_files_show_them() -> None:
    assert show_bytes(" é\n".encode()) == "ĠÃ©Ċ"
    assert read_bytes("ĠÃ©Ċ") == " é\n".encode()
    everything = bytes(range(256))
    assert read_bytes(show_bytes(everything)) == everything


def test_a_vocabulary_read_from_its_own_files_is_known_as_gpt2s() -> None:
    known = gpt2_vocabulary()
    merges = [merge.split(" ") for merge in known.merges()]
    assert build_vocabulary(dict(known.token_ids), merges, source="a test") is known


@pytest.mark.parametrize(
    ("ids", "merges", "told"),
    [
        ({**BYTES, "ab": 255}, [], "gives the id 255 to"),
        ({**BYTES, "ab": 257}, [], "without holes"),
        ({**BYTES, "ab": -1}, [], "without holes"),
        ({**BYTES, "ab": 256.0}, [], "expected an integer"),
        ({**BYTES, "ab": True}, [], "expected an integer"),
        ({**BYTES, "ab": "256"}, [], "expected an integer"),
        ({token: index for token, index in BYTES.items() if index < 255}, [], "no token for 1 of the 256 bytes"),
        ({**BYTES, "ab": 256}, [("a", "bc")], "needs the token 'bc'"),
        ({**BYTES, "ab": 256}, [("b", "a")], "needs the token 'ba'"),
        ({**BYTES, "ab": 256}, [("a", "b"), ("a", "b")], "stands there twice"),
        ({**BYTES, "a b": 256}, [("a", " b")], "needs the token ' b'"),
    ],
)
def test_a_vocabulary_that_lies_is_refused(ids: dict, merges: list, told: str) -> None:
    with pytest.raises(TokenizerError, match=told) as caught:
        build_vocabulary(ids, merges, source="lies.json")
    assert "lies.json" in str(caught.value)
