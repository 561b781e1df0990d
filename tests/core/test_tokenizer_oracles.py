"""The ids are tiktoken's, tokenizers' and transformers' on any text, and what we save they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_core.pretokenize import LETTER, NUMBER, OTHER, PATTERN, SPACE, class_table
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.vocabulary import gpt2_vocabulary

TOKENIZER = GPT2Tokenizer()
TELLING = " \n\t\r\x0b\x0c\x1c\x1f'sdmtlvreSa1-\"\x00\x85\xa0é²½́ǆΩ٣\u1680\u2003\u2028\u3000中ー🙂𝟘𠀀\ud83d\ude42\udc00"
EVERY_CHARACTER = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def _tiktoken(pattern: str, tokens: list[bytes]) -> Any:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {data: index for index, data in enumerate(tokens)}
    return tiktoken.Encoding(
        "gpt2-test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


@pytest.fixture(scope="module")
def oracle() -> Any:
    return _tiktoken(PATTERN, list(gpt2_vocabulary().token_bytes[:-1]))


@pytest.fixture(scope="module")
def their_classes() -> np.ndarray:
    """The class of each code point according to tiktoken's regular expressions."""
    single_bytes = [bytes([byte]) for byte in range(256)]
    table = np.full(0x110000, OTHER, np.uint8)
    for kind, pattern in ((LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"\s")):
        matches = _tiktoken(pattern, single_bytes)
        table[[ord(char) for char in matches.decode(matches.encode_ordinary("".join(EVERY_CHARACTER)))]] = kind
    return table


def test_every_code_point_is_of_the_class_that_tiktoken_gives_it(their_classes: np.ndarray) -> None:
    """Another version of tiktoken may know another version of Unicode: then one of the two says `other`."""
    differ = np.flatnonzero(class_table() != their_classes)
    neither = [f"U+{c:04X}" for c in differ if OTHER not in (class_table()[c], their_classes[c])]
    assert not neither
    assert not len(differ) or differ.min() > 0x2FF, [f"U+{c:04X}" for c in differ[:20]]


@pytest.mark.parametrize("context", ["{}", "a{}b", " {} ", "1{}{}", "\n{}  {}'s{}", "'{}ll {}\t!{}."])
def test_every_code_point_has_tiktokens_ids_in_context(context: str, oracle: Any, their_classes: np.ndarray) -> None:
    known = [char for char in EVERY_CHARACTER if class_table()[ord(char)] == their_classes[ord(char)]]
    for first in range(0, len(known), 1 << 18):
        text = "".join(context.replace("{}", char) for char in known[first : first + (1 << 18)])
        assert np.array_equal(TOKENIZER.encode_array(text, special="text"), oracle.encode_ordinary(text))
    for first in range(0, 1 << 16, 1000):
        text = "".join(context.replace("{}", char) for char in known[first : first + 100])
        assert TOKENIZER.encode(text, special="text") == oracle.encode_ordinary(text)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(TELLING, max_size=40), st.text(max_size=40), st.text("ab<|endoftx>", max_size=60)))
def test_any_text_has_tiktokens_ids(oracle: Any, text: str) -> None:
    wanted = oracle.encode(text, allowed_special="all")
    assert TOKENIZER.encode(text) == wanted
    assert TOKENIZER.encode_array(text * 1).tolist() == wanted
    assert TOKENIZER.encode(text, special="text") == oracle.encode_ordinary(text)
    assert TOKENIZER.decode(wanted) == oracle.decode(wanted)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.text(TELLING, max_size=40), st.just("<|endoftext|>")), min_size=1, max_size=8))
def test_long_text_has_tiktokens_ids(oracle: Any, parts: list[str]) -> None:
    text = ("".join(parts) + " ") * (9000 // (len("".join(parts)) + 1) + 1)
    assert TOKENIZER.encode(text) == oracle.encode(text, allowed_special="all")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_any_ids_have_tiktokens_text(oracle: Any, ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == oracle.decode(ids)
    assert TOKENIZER.decode_bytes(ids) == oracle.decode_bytes(ids)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = GPT2Tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<sep>"]})
    tokenizer.add_tokens(["antidisestablish"])
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return folder


SENTENCES = [
    "Hello world's  end\n\n x",
    "a<sep>b <pad>antidisestablishment<|endoftext|> don't",
    "naïve 中文 🙂 \u3000 ½",
    "",
]


def test_the_saved_folder_loads_in_tokenizers(saved: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    ours = GPT2Tokenizer.from_pretrained(saved)
    for text in SENTENCES:
        encoding = theirs.encode(text)
        assert ours.encode(text) == encoding.ids
        assert ours.tokenize(text) == encoding.tokens
        assert ours(text, return_offsets_mapping=True).offset_mapping == encoding.offsets


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "AutoTokenizer"])
def test_the_saved_folder_loads_in_transformers(saved: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, name).from_pretrained(saved)
    ours = GPT2Tokenizer.from_pretrained(saved)
    assert len(theirs) == len(ours) == 50260
    assert (theirs.pad_token, theirs.pad_token_id) == (ours.pad_token, ours.pad_token_id) == ("<pad>", 50257)
    batch = theirs(SENTENCES[:3], padding=True)
    mine = ours(SENTENCES[:3], padding=True)
    assert mine.input_ids == batch["input_ids"]
    assert mine.attention_mask == batch["attention_mask"]
    for text in SENTENCES:
        ids = ours.encode(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids) == text
        assert theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == ours.decode(
            ids, skip_special_tokens=True
        )


def test_what_transformers_saves_we_read(saved: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Tokenizer.from_pretrained(saved).save_pretrained(tmp_path)
    ours, again = GPT2Tokenizer.from_pretrained(saved), GPT2Tokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == ours.get_vocab()
    assert again.all_special_tokens == ours.all_special_tokens
    assert (again.bos_token, again.eos_token, again.pad_token) == (ours.bos_token, ours.eos_token, ours.pad_token)
    for text in SENTENCES:
        assert again.encode(text) == ours.encode(text)


def test_vocab_json_and_merges_txt_load_in_tokenizers(saved: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.ByteLevelBPETokenizer(str(saved / "vocab.json"), str(saved / "merges.txt"))
    assert theirs.encode("Hello world's  end").ids == TOKENIZER.encode("Hello world's  end")
