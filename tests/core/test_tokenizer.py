"""The public face of the tokenizer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_core.errors import TokenizerError
from gpt2_core.tokenizer import EMBEDDED_NAMES, GPT2Tokenizer

TOKENIZER = GPT2Tokenizer()
END = 50256


def padded() -> GPT2Tokenizer:
    return GPT2Tokenizer(pad_token="<|endoftext|>")


# ---- encode and decode -----------------------------------------------------------------------------------------


def test_known_texts_have_their_known_ids() -> None:
    assert TOKENIZER.encode("Hello world") == [15496, 995]
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.tokenize("Hello world's") == ["Hello", "Ġworld", "'s"]
    assert TOKENIZER.encode("a<|endoftext|>b") == [64, END, 65]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200))
def test_decode_is_the_exact_inverse_of_encode(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert TOKENIZER.decode(TOKENIZER.encode(text, special="text")) == text


@pytest.mark.parametrize("repeat", [1, 1000])
@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.uint16)])
def test_ids_may_come_in_any_container(kind: Any, repeat: int) -> None:
    text = "Any container will do, won't it? 🙂 <|endoftext|>antidisestablishmentarianism" * repeat
    assert TOKENIZER.decode(kind(TOKENIZER.encode(text))) == text


def test_one_id_may_come_alone() -> None:
    assert TOKENIZER.decode(995) == TOKENIZER.decode(np.int32(995)) == TOKENIZER.decode(np.array(995)) == " world"
    assert TOKENIZER.decode([]) == TOKENIZER.decode(np.array([])) == ""


@pytest.mark.parametrize("repeat", [1, 1000])
def test_bytes_that_are_not_text_decode_as_errors_says(repeat: int) -> None:
    ids = [255, 254, 64] * repeat  # the byte tokens 0xAD and 0xAC... and "a"
    data = TOKENIZER.decode_bytes(ids)
    assert TOKENIZER.decode(ids) == data.decode("utf-8", "replace")
    assert GPT2Tokenizer(errors="ignore").decode(ids) == "a" * repeat
    with pytest.raises(UnicodeDecodeError):
        GPT2Tokenizer(errors="strict").decode(ids)


def test_every_single_token_decodes_to_its_bytes_in_a_long_sequence_and_a_short_one() -> None:
    ids = list(range(50257))
    whole = TOKENIZER.decode_bytes(ids)
    assert whole == b"".join(TOKENIZER.decode_bytes([index]) for index in ids)
    assert TOKENIZER.decode_bytes(np.array(ids)) == whole


@pytest.mark.parametrize("index", [50257, -1, -50257, 1 << 40, -(1 << 40)])
@pytest.mark.parametrize("before", [0, 5, 1000, 70_000])
def test_an_id_out_of_range_is_named_with_its_place(index: int, before: int) -> None:
    with pytest.raises(TokenizerError, match=rf"id {index} at place {before} .*expected 0 to 50256"):
        TOKENIZER.decode([1] * before + [index])
    with pytest.raises(TokenizerError, match=rf"id {index} at place"):
        TOKENIZER.decode(np.array([1] * before + [index]))


@pytest.mark.parametrize("ids", [[1.5], ["a"], [[1, 2]], np.array([1.0]), np.array([[1]]), "abc", [None], [1.5] * 500])
def test_what_is_no_sequence_of_ids_is_refused(ids: Any) -> None:
    with pytest.raises(TokenizerError, match="one sequence of integers"):
        TOKENIZER.decode(ids)


def test_special_tokens_can_be_left_out_when_decoding() -> None:
    ids = TOKENIZER.encode("a<|endoftext|>b")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "ab"
    assert TOKENIZER.decode(ids * 500, skip_special_tokens=True) == "ab" * 500
    assert TOKENIZER.batch_decode([ids, ids[:1]], skip_special_tokens=True) == ["ab", "a"]
    assert TOKENIZER.batch_decode(np.array([ids, ids])) == ["a<|endoftext|>b"] * 2


# ---- special and added tokens ----------------------------------------------------------------------------------


def test_special_tokens_are_recognised_forbidden_or_read_as_text() -> None:
    text = "a<|endoftext|>b"
    assert END in TOKENIZER.encode(text, special="allow")
    as_text = TOKENIZER.encode(text, special="text")
    assert END not in as_text
    assert TOKENIZER.decode(as_text) == text
    with pytest.raises(TokenizerError) as caught:
        TOKENIZER.encode(text, special="forbid")
    told = str(caught.value)
    assert "'<|endoftext|>' at character 1" in told
    assert 'special="allow"' in told and 'special="text"' in told and "take it out" in told
    assert TOKENIZER.encode("ab", special="forbid") == TOKENIZER.encode("ab")
    with pytest.raises(TokenizerError, match="special is 'none'"):
        TOKENIZER.encode(text, special="none")


def test_special_tokens_are_treated_alike_by_every_door() -> None:
    text = "a<|endoftext|>b"
    for special in ("allow", "text"):
        wanted = TOKENIZER.encode(text, special=special)
        assert TOKENIZER(text, special=special).input_ids == wanted
        assert TOKENIZER.encode_array(text, special=special).tolist() == wanted
        assert TOKENIZER.encode_batch([text, text], special=special) == [wanted, wanted]
        assert TOKENIZER.convert_tokens_to_ids(TOKENIZER.tokenize(text, special=special)) == wanted
    for door in (TOKENIZER, TOKENIZER.encode_array, TOKENIZER.tokenize, lambda text, special: TOKENIZER.encode_batch([text], special=special)):  # fmt: skip  # noqa: E501
        with pytest.raises(TokenizerError, match="forbidden"):
            door(text, special="forbid")


def test_added_tokens_are_found_the_longest_first() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.add_tokens(["qz", "qzx", "qz"]) == 2
    assert tokenizer.add_tokens("x y") == 1
    assert len(tokenizer) == 50260
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("qzxqz x y") == [50258, 50257, 220, 50259]
    assert tokenizer.encode("qzx", special="text") == [50258], "these are not special"
    assert tokenizer.encode("qzx", special="forbid") == [50258]
    assert tokenizer.decode([50258, 50259], skip_special_tokens=True) == "qzxx y"
    assert tokenizer.decode([50258, 50259] * 200) == "qzxx y" * 200
    assert tokenizer.convert_ids_to_tokens([50258, 220]) == ["qzx", "Ġ"]


def test_a_token_of_the_vocabulary_keeps_its_id_when_added() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.add_tokens(["hello"]) == 0
    assert tokenizer.encode("xhello") == [87, 31373]
    assert tokenizer.encode("othello") == [*tokenizer.encode("ot"), 31373]


def test_tokens_added_after_decoding_are_decoded() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.decode([64] * 200) == "a" * 200
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.decode([50257] * 200) == "<pad>" * 200
    assert tokenizer.decode([50257, 64] * 200, skip_special_tokens=True) == "a" * 200


def test_special_tokens_are_added_by_role() -> None:
    tokenizer = GPT2Tokenizer()
    added = tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]})
    assert added == 3
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 50257)
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "<pad>", "<a>", "<b>"]
    assert tokenizer.all_special_ids == [END, 50257, 50258, 50259]
    with pytest.raises(TokenizerError, match=r"'pad_tok' is no role of a special token; .*did you mean 'pad_token'\?$"):
        tokenizer.add_special_tokens({"pad_tok": "<pad>"})
    with pytest.raises(TokenizerError, match="bos_token is 5; expected one token"):
        tokenizer.add_special_tokens({"bos_token": 5})  # type: ignore[dict-item]


@pytest.mark.parametrize("content", ["", "\ud800", 5, None, b"x"])
def test_what_cannot_be_a_token_is_refused(content: Any) -> None:
    with pytest.raises(TokenizerError, match="cannot be added"):
        GPT2Tokenizer().add_tokens([content])


def test_the_roles_can_be_read_and_set() -> None:
    tokenizer = GPT2Tokenizer()
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == END
    assert tokenizer.pad_token is None and tokenizer.pad_token_id is None
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == END
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    with pytest.raises(TokenizerError, match=r"pad_token is '<pad>'.*add_special_tokens"):
        tokenizer.pad_token = "<pad>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert repr(tokenizer).startswith("GPT2Tokenizer(50257 tokens")


def test_tokens_are_converted_to_ids_and_back() -> None:
    assert TOKENIZER.convert_tokens_to_ids(["Hello", "Ġworld", "no such token"]) == [15496, 995, END]
    assert TOKENIZER.convert_tokens_to_ids("Ġworld") == 995
    assert TOKENIZER.convert_ids_to_tokens([15496, 995, END]) == ["Hello", "Ġworld", "<|endoftext|>"]
    assert TOKENIZER.convert_ids_to_tokens(995) == "Ġworld"
    assert TOKENIZER.get_vocab()["Ġworld"] == 995
    assert len(TOKENIZER.get_vocab()) == len(TOKENIZER)
    tokenizer = GPT2Tokenizer(unk_token=None)
    with pytest.raises(TokenizerError, match="'no such token' is not in the vocabulary"):
        tokenizer.convert_tokens_to_ids(["no such token"])
    with pytest.raises(TokenizerError, match="id 50257 at place 0"):
        TOKENIZER.convert_ids_to_tokens(50257)


# ---- what is no text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"bytes", bytearray(b"x"), memoryview(b"x")])
def test_bytes_are_refused_with_the_way_to_decode_them(text: Any) -> None:
    for door in (TOKENIZER.encode, TOKENIZER.tokenize, TOKENIZER.encode_array, TOKENIZER):
        with pytest.raises(TokenizerError, match="decode"):
            door(text)
    with pytest.raises(TokenizerError, match="decode"):
        TOKENIZER(["a", text])


@pytest.mark.parametrize("text", [None, 5, 1.5, [None], ["a", 5]])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(TokenizerError, match="expected a str"):
        TOKENIZER(text)


@pytest.mark.parametrize("repeat", [1, 1000])
def test_lone_surrogates_become_replacement_characters_and_pairs_their_character(repeat: int) -> None:
    text = "a\ud800b\udc00c\ud83d\ude42d" * repeat
    repaired = "a\ufffdb\ufffdc🙂d" * repeat
    assert TOKENIZER.encode(text) == TOKENIZER.encode(repaired)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == repaired
    assert TOKENIZER([text, "x"]).input_ids == [TOKENIZER.encode(repaired), [87]]


# ---- batches ---------------------------------------------------------------------------------------------------


def test_a_call_gives_what_a_model_takes() -> None:
    encoding = TOKENIZER("Hello world")
    assert encoding == {"input_ids": [15496, 995], "attention_mask": [1, 1]}
    assert encoding.input_ids is encoding["input_ids"]
    assert dict(**encoding) == encoding
    assert TOKENIZER(["Hello world", "Hello"]).input_ids == [[15496, 995], [15496]]
    assert list(TOKENIZER("x", return_attention_mask=False)) == ["input_ids"]
    assert TOKENIZER([]) == {"input_ids": [], "attention_mask": []}
    with pytest.raises(AttributeError, match="has no 'labels'"):
        _ = encoding.labels


@pytest.mark.parametrize(
    "texts", [["a b c", "", "d"], ["<|endoftext|>", "x<|endoftext|>"], ["long " * 3000, "", "é" * 3000]]
)
def test_a_batch_is_encoded_as_its_texts_one_by_one(texts: list[str]) -> None:
    wanted = [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER(texts).input_ids == wanted
    for threads in (None, 1, 3):
        assert TOKENIZER.encode_batch(texts, threads=threads) == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(" \n'sab中<|endoftext|>", max_size=20), max_size=6))
def test_any_batch_is_encoded_as_its_texts_one_by_one(texts: list[str]) -> None:
    wanted = [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch(texts) == wanted
    assert TOKENIZER.encode_batch([*texts, "x" * 9000])[:-1] == wanted


def test_short_rows_are_padded_right_or_left() -> None:
    tokenizer = padded()
    encoding = tokenizer(["a b c", "d"], padding=True)
    assert encoding.input_ids == [[64, 275, 269], [67, END, END]]
    assert encoding.attention_mask == [[1, 1, 1], [1, 0, 0]]
    encoding = tokenizer(["a b c", "d"], padding="longest", padding_side="left")
    assert encoding.input_ids == [[64, 275, 269], [END, END, 67]]
    assert encoding.attention_mask == [[1, 1, 1], [0, 0, 1]]
    tokenizer.padding_side = "left"
    assert tokenizer(["a b c", "d"], padding=True).attention_mask[1] == [0, 0, 1]
    assert tokenizer("d", padding="max_length", max_length=3).input_ids == [END, END, 67]
    assert tokenizer(["d", "a b"], padding="do_not_pad").input_ids == [[67], [64, 275]]


def test_padding_without_a_pad_token_tells_what_to_do() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        GPT2Tokenizer()(["a b", "c"], padding=True)


def test_long_rows_are_cut_on_either_side() -> None:
    tokenizer = padded()
    assert tokenizer("a b c", truncation=True, max_length=2).input_ids == [64, 275]
    tokenizer.truncation_side = "left"
    encoding = tokenizer("a b c", truncation="longest_first", max_length=2, return_offsets_mapping=True)
    assert encoding == {"input_ids": [275, 269], "attention_mask": [1, 1], "offset_mapping": [(1, 3), (3, 5)]}
    assert tokenizer.encode("a b c", truncation=True, max_length=2) == [275, 269]
    assert tokenizer.encode("a b c", truncation=True, max_length=0) == []
    assert len(tokenizer.encode("a " * 3000, truncation=True)) == 1024
    assert tokenizer("a b c", max_length=2).input_ids == [64, 275, 269], "not without truncation"


def test_the_rows_come_as_numpy_arrays() -> None:
    encoding = padded()(["a b c", "d"], padding=True, return_tensors="np", return_offsets_mapping=True)
    assert encoding.input_ids.dtype == np.int64
    assert encoding.input_ids.tolist() == [[64, 275, 269], [67, END, END]]
    assert encoding.attention_mask.shape == (2, 3)
    assert encoding.offset_mapping.tolist() == [[[0, 1], [1, 3], [3, 5]], [[0, 1], [0, 0], [0, 0]]]
    assert TOKENIZER("", return_tensors="np", return_offsets_mapping=True).offset_mapping.shape == (1, 0, 2)
    assert TOKENIZER.encode("a b", return_tensors="np").tolist() == [[64, 275]]
    with pytest.raises(TokenizerError, match=r"rows of 1 to 2 tokens.*padding=True"):
        TOKENIZER(["a b", "c"], return_tensors="np")
    with pytest.raises(TokenizerError, match=r'expected PyTorch tensors; .*return_tensors="pt"'):
        encoding.to("cpu")


def test_the_rows_come_as_pytorch_tensors() -> None:
    torch = pytest.importorskip("torch")
    encoding = padded()(["a b c", "d"], padding=True, return_tensors="pt")
    assert encoding.input_ids.dtype == torch.int64
    assert encoding.to("cpu").attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert TOKENIZER.decode(encoding.input_ids[0]) == "a b c"
    assert TOKENIZER.batch_decode(encoding.input_ids, skip_special_tokens=True) == ["a b c", "d"]


def test_the_rows_come_as_tensorflow_tensors() -> None:
    tensorflow = pytest.importorskip("tensorflow")
    encoding = padded()(["a b c", "d"], padding=True, return_tensors="tf")
    assert encoding.input_ids.dtype == tensorflow.int32
    assert encoding.input_ids.numpy().tolist() == [[64, 275, 269], [67, END, END]]
    assert TOKENIZER.batch_decode(encoding.input_ids, skip_special_tokens=True) == ["a b c", "d"]


def test_a_framework_that_is_missing_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, module, extra in (("pt", "torch", "pip install gpt2-duet[pt]"), ("tf", "tensorflow", "gpt2-duet[tf]")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(TokenizerError) as caught:
            TOKENIZER("x", return_tensors=kind)
        assert module in str(caught.value) and extra in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"return_tensors": "jax"}, "return_tensors is 'jax'"),
        ({"padding": "widest"}, "padding is 'widest'"),
        ({"truncation": "middle"}, "truncation is 'middle'"),
        ({"padding_side": "top"}, "padding_side is 'top'"),
        ({"truncation": True, "max_length": -1}, "max_length is -1"),
        ({"truncation": True, "max_length": 2.5}, "max_length is 2.5"),
        ({"special": "maybe"}, "special is 'maybe'"),
    ],
)
def test_an_argument_that_means_nothing_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(TokenizerError, match=told):
        padded()("x", **arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"errors": "shrug"}, "errors is 'shrug'"),
        ({"padding_side": "top"}, "padding_side is 'top'"),
        ({"truncation_side": "top"}, "truncation_side is 'top'"),
        ({"model_max_length": -5}, "model_max_length is -5"),
        ({"pad_token": "<pad>"}, "pad_token is '<pad>'"),
        ({"vocab_file": "vocab.json"}, "expected both or neither"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(TokenizerError, match=told):
        GPT2Tokenizer(**arguments)


# ---- offsets and the prefix space ------------------------------------------------------------------------------


def test_offsets_are_the_characters_of_each_token() -> None:
    text = "naïve 🤗<|endoftext|>don't"
    encoding = TOKENIZER(text, return_offsets_mapping=True)
    tokens = TOKENIZER.convert_ids_to_tokens(encoding.input_ids)
    spans = [text[start:end] for start, end in encoding.offset_mapping]
    assert list(zip(tokens, spans, strict=True)) == [
        ("na", "na"), ("Ã¯ve", "ïve"), ("ĠðŁ", " 🤗"), ("¤", "🤗"), ("Ĺ", "🤗"),
        ("<|endoftext|>", "<|endoftext|>"), ("don", "don"), ("'t", "'t"),
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text(" ab'sé中🙂<|endoftext|>\n", max_size=60), st.booleans())
def test_offsets_cover_the_text_in_order(text: str, prefix: bool) -> None:
    encoding = TOKENIZER(text, return_offsets_mapping=True, add_prefix_space=prefix)
    covered = 0
    for index, (start, end) in zip(encoding.input_ids, encoding.offset_mapping, strict=True):
        assert 0 <= start <= covered <= end <= len(text)
        data = TOKENIZER.decode_bytes(index)
        assert data.lstrip(b" ") in text[start:end].encode()
        covered = end
    assert covered == len(text)


def test_offsets_point_into_the_text_as_it_was_given_when_surrogates_pair_up() -> None:
    text = "x\ud83d\ude42 y\ud800z"
    encoding = TOKENIZER(text, return_offsets_mapping=True)
    covered = sorted(set(encoding.offset_mapping))
    assert covered == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 7)]


def test_a_space_is_put_before_the_text_if_asked_for() -> None:
    assert TOKENIZER.encode("Hello", add_prefix_space=True) == TOKENIZER.encode(" Hello")
    assert TOKENIZER.encode(" Hello", add_prefix_space=True) == TOKENIZER.encode(" Hello")
    assert TOKENIZER.encode("", add_prefix_space=True) == []
    tokenizer = GPT2Tokenizer(add_prefix_space=True)
    assert tokenizer.encode("Hello") == tokenizer.encode_array("Hello").tolist() == [18435]
    assert tokenizer.encode("Hello", add_prefix_space=False) == [15496]
    encoding = TOKENIZER("Hello you", add_prefix_space=True, return_offsets_mapping=True)
    assert encoding.offset_mapping == [(0, 5), (5, 9)]


# ---- streams ---------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=20), st.text("é中🙂 a", max_size=20))
def test_a_stream_gives_the_same_text_as_decoding_at_once(ids: list[int], text: str) -> None:
    ids = ids + TOKENIZER.encode(text)
    stream = TOKENIZER.decode_stream()
    assert "".join([stream.push(index) for index in ids] + [stream.finish()]) == TOKENIZER.decode(ids)


def test_a_stream_never_splits_a_character() -> None:
    stream = TOKENIZER.decode_stream()
    parts = [stream.push(index) for index in TOKENIZER.encode("🙂é")]
    assert parts == ["", "", "🙂", "é"] or parts == ["", "🙂", "é"]
    first = TOKENIZER.encode("🙂")[0]
    assert (stream.push(first), stream.finish()) == ("", "\ufffd")
    assert stream.push(64) == "a", "a stream begins again after its end"
    skipping = TOKENIZER.decode_stream(skip_special_tokens=True)
    assert [skipping.push(index) for index in (64, END, 65)] == ["a", "", "b"]
    with pytest.raises(TokenizerError, match="id 60000"):
        stream.push(60000)


# ---- where it comes from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDED_NAMES)
def test_the_released_names_need_no_network(name: str) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(name)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.model_max_length == (512 if name == "gpt2-tales" else 1024)
    assert GPT2Tokenizer.from_pretrained(name, pad_token="<|endoftext|>").pad_token_id == END


def test_a_setting_that_from_pretrained_does_not_know_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"'padding_sides', which is no setting.*did you mean 'padding_side'"):
        GPT2Tokenizer.from_pretrained("gpt2", padding_sides="left")


def test_the_tokenizer_needs_no_framework_and_no_regex() -> None:
    code = (
        "import sys; from gpt2_core.tokenizer import GPT2Tokenizer;"
        "assert GPT2Tokenizer().encode('Hello wörld') == [15496, 266, 30570, 335];"
        "assert not {'torch', 'tensorflow', 'regex', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Settings that are changed later --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["bos", "eos", "unk", "pad"])
def test_a_role_can_be_given_by_id_as_by_token(role: str) -> None:
    tokenizer = GPT2Tokenizer()
    setattr(tokenizer, f"{role}_token_id", 262)
    assert getattr(tokenizer, f"{role}_token") == "Ġthe"
    setattr(tokenizer, f"{role}_token_id", np.int64(END))
    assert getattr(tokenizer, f"{role}_token") == "<|endoftext|>"
    setattr(tokenizer, f"{role}_token_id", None)
    assert getattr(tokenizer, f"{role}_token") is None
    for wrong in (50257, -1, "262", True, 1.0):
        with pytest.raises(TokenizerError, match=rf"{role}_token_id is .*expected None or an id from 0 to 50256"):
            setattr(tokenizer, f"{role}_token_id", wrong)


def test_an_id_pads_as_its_token_does_also_one_that_was_added() -> None:
    tokenizer = GPT2Tokenizer()
    tokenizer.add_tokens("<pad>")
    tokenizer.pad_token_id = 50257
    assert tokenizer(["a", "a b"], padding=True)["input_ids"] == [[64, 50257], [64, 275]]
    assert 50257 in tokenizer.all_special_ids


@pytest.mark.parametrize("name", ["padding_side", "truncation_side", "errors", "model_max_length"])
def test_a_setting_that_cannot_be_is_refused_when_it_is_set(name: str) -> None:
    tokenizer = GPT2Tokenizer()
    before = getattr(tokenizer, name)
    with pytest.raises(TokenizerError, match=rf"{name} is 'lft'"):
        setattr(tokenizer, name, "lft")
    assert getattr(tokenizer, name) == before
    good = {"errors": "ignore", "model_max_length": 7}.get(name, "left")
    setattr(tokenizer, name, good)
    assert getattr(tokenizer, name) == good


def test_the_side_that_is_cut_can_be_changed() -> None:
    tokenizer = GPT2Tokenizer()
    tokenizer.truncation_side = "left"
    assert tokenizer.encode("one two three", truncation=True, max_length=1) == tokenizer.encode(" three")
