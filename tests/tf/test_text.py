"""The tokenizer inside a TensorFlow graph gives GPT2Tokenizer's ids and bytes, wherever the graph runs."""

from __future__ import annotations

import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_core.errors import TokenizerError
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.vocabulary import BYTE_TO_CHAR, build_vocabulary

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

from gpt2_tf import text_graph  # noqa: E402 - after the frameworks are known to be there
from gpt2_tf.text import TFGPT2Tokenizer  # noqa: E402

TOKENIZER = GPT2Tokenizer()
# Characters that the rules speak of, from every class and every length in UTF-8, and the parts of a special token.
TELLING = " \n\t\r\x0b\x0c\x1c\x1f'sdmtlvreSa1-\"\x00\x7f\x85\xa0é²½́ǆΩ٣\u1680\u2003\u2028\u3000中ー🙂🏽𝟘𠀀<|endoftx>"
WORDS = [
    "'s", "'d", "'m", "'t", "'ll", "'ve", "'re", "'l", "'v", "'r", "'", "a", "e", " ", "!", "\n", "\r\n", "中", "  ",
    "\u3000", "<|endoftext|>", "<|", "<|endoftext|", "hello", " world", "ization", "ÃÂ" * 20, "=" * 40, " " * 33, "🙂",
]  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.text(TELLING, max_size=60), st.text(max_size=60)
)
SETTINGS = {
    "errors": "replace", "bos_token": None, "eos_token": None, "unk_token": None, "pad_token": None,
    "padding_side": "right", "truncation_side": "right", "add_prefix_space": False, "model_max_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def ragged() -> Any:
    """GPT-2's own vocabulary, without padding."""
    return TFGPT2Tokenizer(padding=False)


@pytest.fixture(scope="module")
def padded() -> Any:
    return TFGPT2Tokenizer(pad_token_id=50256)


def ids_of(layer: Any, texts: list[Any]) -> list[list[int]]:
    return layer(texts)["input_ids"].to_list()


def small_vocabulary(draw: random.Random, shuffled: bool) -> GPT2Tokenizer:
    """Random merges of a, b and c; shuffled, a merge may come before those that make its sides."""
    characters = [BYTE_TO_CHAR[byte] for byte in range(256)]
    draw.shuffle(characters)
    ids = {char: index for index, char in enumerate(characters)}
    known = [BYTE_TO_CHAR[byte] for byte in b"abc"]
    merges: list[tuple[str, str]] = []
    while len(merges) < 60:
        left, right = draw.choice(known), draw.choice(known)
        if len(left + right) <= 12 and (left, right) not in merges:
            merges.append((left, right))
            if left + right not in ids:
                ids[left + right] = len(ids)
                known.append(left + right)
    if shuffled:
        draw.shuffle(merges)
    tokenizer = GPT2Tokenizer.__new__(GPT2Tokenizer)
    tokenizer._setup(text_graph_parts(build_vocabulary(ids, merges, source="a test")), SETTINGS)
    return tokenizer


def text_graph_parts(vocabulary: Any) -> Any:
    from gpt2_core.tokenizer_files import TokenizerParts

    return TokenizerParts(vocabulary, [], {})


# ---- the ids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [15496, 995]),
        # Where a regular expression without a look ahead takes both line ends as one piece, they become 628.
        ("One.\n\nTwo", [3198, 13, 198, 198, 7571]),
        ("One.\n\n", [3198, 13, 628]),
        ("One.\r\n\r\nTwo\r\n", [3198, 13, 201, 198, 201, 198, 7571, 201, 198]),
        ("a  b", [64, 220, 275]),
        ("\u3000\u3000x", [5099, 222, 5099, 222, 87]),
        (" \u2028x \xa0y", [220, 447, 101, 87, 220, 1849, 88]),  # a wide space begins a piece at its first byte
        ("we'll've'd", [732, 1183, 1053, 1549]),
        ("I'M", [40, 6, 44]),
        ("a<|endoftext|>b", [64, 50256, 65]),
        ("a\x00b", [64, 188, 65]),
        ("🙂🏽é e\u0301", [8582, 25081, 8582, 237, 121, 2634, 304, 136, 223]),
        ("\U000e0fff\U000110ff\u0378", None),  # not assigned in Unicode 16
        ("\U00010d40\U0001e5d0\U0001cc00", None),  # new in Unicode 16: a number, a letter, a symbol
        ("١٢٣ ½²Ⅷ 𝟘𝟙 ǅ", None),
    ],
)
def test_telling_texts_have_gpt2s_ids(ragged: Any, text: str, ids: list[int] | None) -> None:
    wanted = TOKENIZER.encode(text)
    assert ids is None or wanted == ids
    assert ids_of(ragged, [text]) == [wanted]


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=8))
def test_any_texts_have_gpt2s_ids_and_come_back(ragged: Any, texts: list[str]) -> None:
    rows = ragged(texts)["input_ids"]
    assert rows.to_list() == TOKENIZER.encode_batch(texts)
    assert ragged.detokenize(rows).numpy().tolist() == [text.encode() for text in texts]


@pytest.mark.parametrize(("context", "step"), [("a{}b", 1), ("'{}s {}{}\n", 9)])
def test_every_code_point_has_gpt2s_ids_in_context(ragged: Any, context: str, step: int) -> None:
    characters = [chr(code) for code in range(0, 0x110000, step) if not 0xD800 <= code < 0xE000]
    texts = [
        "".join([context.replace("{}", char) for char in characters[first : first + 20_000]])
        for first in range(0, len(characters), 20_000)
    ]
    rows = ragged(texts)["input_ids"]
    for text, row in zip(texts, rows, strict=True):
        assert np.array_equal(row.numpy(), TOKENIZER.encode_array(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=12), st.text(TELLING, max_size=8).map(str.encode)), max_size=6))
def test_bytes_that_are_no_utf8_are_read_as_python_replaces_them(ragged: Any, parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert ids_of(ragged, [data, b"ok"]) == [TOKENIZER.encode(data.decode("utf-8", "replace")), [482]]


@pytest.mark.parametrize(
    "data",
    [
        b"\xc3", b"\xe4\xbd", b"\xf0\x9f\x99", b"a\x80b", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xff", b"\xfe\xfd", b"\xc3\xe4\xbd\xa0",
        b"\xe4\xbd\xa0\xbd", b"\xf5\x80\x80\x80",
    ],
)  # fmt: skip
def test_each_way_of_not_being_utf8_is_noticed(ragged: Any, data: bytes) -> None:
    assert ids_of(ragged, [data]) == [TOKENIZER.encode(data.decode("utf-8", "replace"))]


@pytest.mark.parametrize(
    "text",
    [
        "".join(random.Random(1).choices("etaoinshrdlu", k=4000)),
        "".join(random.Random(2).choices("ACGT", k=3000)),
        "a" * 5000,
        "x" + "ÃÂ" * 1000,
        " " * 3000 + "x",
        "-" * 1999,
        "abc" * 700 + "abcde" * 500 + "abcdefg" * 300,
        "สวัสดีชาวโลก" * 60,
        "天地玄黃宇宙洪荒" * 100,
        "🙂" * 300,
        "\n\n\r\n" * 400,
    ],
    ids=lambda text: ascii(text[:8]),
)
def test_long_runs_have_gpt2s_ids(ragged: Any, text: str) -> None:
    assert ids_of(ragged, ["before", text, "after"]) == TOKENIZER.encode_batch(["before", text, "after"])


def test_windows_are_joined_only_where_that_is_sure_to_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that share few bytes: the same ids, but only sometimes by joining them."""
    monkeypatch.setattr(text_graph, "_STEP", 40)
    monkeypatch.setattr(text_graph, "_WINDOW", 45)
    layer = TFGPT2Tokenizer(padding=False)
    draw = random.Random(3)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.uint8)])
    def is_sure(data: Any) -> Any:
        return layer._graph._merge_windows(data, tf.constant([1], tf.int64), tf.size(data, tf.int64)[None] - 41)[2]

    joined = []
    for text in ["=" * 500, "ÃÂ" * 90, *("".join(draw.choices("etaoinshrdlu", k=80)) for _ in range(60))]:
        assert ids_of(layer, [text]) == [TOKENIZER.encode(text)]
        joined.append(bool(is_sure(np.frombuffer(b"\xff" + text.encode() + b"\xff" * 40, np.uint8))))
    assert set(joined) == {True, False}


@pytest.mark.parametrize("shuffled", [False, True])
def test_other_vocabularies_have_their_own_ids(shuffled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_graph, "_STEP", 40)
    monkeypatch.setattr(text_graph, "_WINDOW", 70)
    draw = random.Random(4)
    tokenizer = small_vocabulary(draw, shuffled)
    layer = TFGPT2Tokenizer(tokenizer, padding=False)
    assert layer._graph.in_order is not shuffled
    for _ in range(20):
        texts = ["".join(draw.choices("abcab'é", k=draw.choice([3, 20, 90, 400]))) for _ in range(6)]
        assert ids_of(layer, texts) == tokenizer.encode_batch(texts)
    config = layer.get_config() | {"native": False}
    assert ids_of(TFGPT2Tokenizer.from_config(config), texts) == tokenizer.encode_batch(texts)


def test_a_vocabulary_without_merges_gives_bytes() -> None:
    tokenizer = GPT2Tokenizer.__new__(GPT2Tokenizer)
    ids = {BYTE_TO_CHAR[byte]: byte for byte in range(256)}
    tokenizer._setup(text_graph_parts(build_vocabulary(ids, [], source="a test")), SETTINGS)
    assert ids_of(TFGPT2Tokenizer(tokenizer, padding=False), ["hé\n"]) == [list("hé\n".encode())]


# ---- added tokens ------------------------------------------------------------------------------------------------


def with_added_tokens() -> GPT2Tokenizer:
    tokenizer = GPT2Tokenizer()
    tokenizer.add_tokens(["ab", "bcd", "abcd", "[x]", ".*", "中\x00", " hello", "é" * 40])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|end", "🙂"]})
    return tokenizer


PIECES = ["ab", "bcd", "abcd", "a", "b", "c", "d", "[x]", ".*", "中\x00", " hello", "é" * 40, "<pad>", "<|end", "🙂",
          "<|endoftext|>", " ", "\n", "x", "'s"]  # fmt: skip


@pytest.mark.parametrize("special", ["allow", "text"])
def test_added_tokens_are_found_as_gpt2tokenizer_finds_them(special: str) -> None:
    tokenizer = with_added_tokens()
    layer = TFGPT2Tokenizer(tokenizer, special=special, add_prefix_space=True, padding=False)
    draw = random.Random(5)
    for _ in range(60):
        texts = ["".join(draw.choices(PIECES, k=draw.randrange(9))) for _ in range(draw.randrange(6))]
        wanted = tokenizer.encode_batch(texts, special=special, add_prefix_space=True)
        rows = layer(texts)["input_ids"]
        assert rows.to_list() == wanted
        assert layer.detokenize(rows).numpy().tolist() == [tokenizer.decode_bytes(row) for row in wanted]


def test_forbidden_tokens_raise_as_in_gpt2tokenizer_and_the_others_are_found() -> None:
    tokenizer = with_added_tokens()
    layer = TFGPT2Tokenizer(tokenizer, special="forbid", padding=False)
    assert ids_of(layer, ["xab", "end|>"]) == tokenizer.encode_batch(["xab", "end|>"])
    with pytest.raises(TokenizerError) as of_core:
        tokenizer.encode("x<|endoftext|>", special="forbid")
    with pytest.raises(TokenizerError) as of_layer:
        layer(["ab", "x<|endoftext|>"])
    assert str(of_layer.value) == str(of_core.value)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"special tokens are forbidden .*<pad>"):
        tf.function(layer)(tf.constant(["<pad>"]))


def test_tokens_added_afterwards_are_not_seen(ragged: Any) -> None:
    tokenizer = GPT2Tokenizer()
    layer = TFGPT2Tokenizer(tokenizer, padding=False, native=False)
    tokenizer.add_tokens(["zebra crossing"])
    assert ids_of(layer, ["zebra crossing"]) == [TOKENIZER.encode("zebra crossing")]


# ---- rows of equal length ----------------------------------------------------------------------------------------


def test_rows_are_padded_and_cut_as_gpt2tokenizer_does_it() -> None:
    for options in (
        {"padding": "longest"},
        {"padding": True, "padding_side": "left"},
        {"padding": "longest", "truncation": True, "max_length": 3},
        {"padding": "longest", "truncation": True, "max_length": 3, "truncation_side": "left"},
        {"padding": "max_length", "truncation": True, "max_length": 4, "padding_side": "left"},
        {"padding": "max_length", "max_length": 9},
        {"padding": "max_length", "truncation": True},
    ):
        side = options.pop("truncation_side", "right")
        tokenizer = GPT2Tokenizer(pad_token="!", model_max_length=5, truncation_side=side)
        layer = TFGPT2Tokenizer(tokenizer, native=False, **options)  # what comes after the ids is the same graph
        for texts in (["a", "", "one two three four five"], ["x y"]):
            wanted = tokenizer(texts, return_tensors="np", **options)
            got = layer(texts)
            assert got["input_ids"].dtype == got["attention_mask"].dtype == tf.int32
            assert got["input_ids"].numpy().tolist() == wanted["input_ids"].tolist()
            assert got["attention_mask"].numpy().tolist() == wanted["attention_mask"].tolist()


def test_ragged_rows_have_a_ragged_mask_and_are_cut() -> None:
    layer = TFGPT2Tokenizer(padding=False, truncation=True, max_length=2, truncation_side="left", native=False)
    batch = layer(["a b c", "", "d"])
    assert batch["input_ids"].to_list() == [TOKENIZER.encode("a b c")[1:], [], TOKENIZER.encode("d")]
    assert batch["attention_mask"].to_list() == [[1, 1], [], [1]]


def test_one_text_has_one_row_and_no_texts_have_none(padded: Any) -> None:
    one = padded("Hello world")
    assert one["input_ids"].numpy().tolist() == [15496, 995] and one["attention_mask"].numpy().tolist() == [1, 1]
    for nothing in ([], tf.zeros([0], tf.string)):
        assert padded(nothing)["input_ids"].shape == (0, 0)
    assert padded(["", ""])["attention_mask"].shape == (2, 0)


def test_python_gives_the_same_batches_as_the_graph(padded: Any) -> None:
    in_python = TFGPT2Tokenizer(pad_token_id=50256, native=False)
    for texts in ([], [""], ["a", "One.\n\nTwo", "", b"\xff\xc3x", "a<|endoftext|>b"], ["x" * 6000, "y"]):
        here, there = padded(texts), in_python(texts)
        assert {name: rows.numpy().tolist() for name, rows in here.items()} == {
            name: rows.numpy().tolist() for name, rows in there.items()
        }


def test_lone_surrogates_in_python_strings_are_repaired_as_in_gpt2tokenizer(padded: Any) -> None:
    text = "\ud83d\ude42 \ud800x"
    for texts in ([text], np.array([text], object)):
        assert padded(texts)["input_ids"].numpy().tolist() == [TOKENIZER.encode(text)]


# ---- back to text ------------------------------------------------------------------------------------------------


def test_every_token_comes_back_as_its_bytes(padded: Any) -> None:
    ids = np.arange(len(TOKENIZER))
    strings = padded.detokenize(ids[:, None]).numpy().tolist()
    assert strings == [TOKENIZER.decode_bytes(index) for index in ids.tolist()]
    assert padded.detokenize(ids.astype(np.int32)).numpy() == TOKENIZER.decode_bytes(ids)
    assert padded.detokenize(15496).numpy() == b"Hello"
    assert padded.detokenize([[[15496], [995]]]).numpy().tolist() == [[b"Hello", b" world"]]
    assert padded.detokenize([]).numpy() == b""


def test_masked_and_special_tokens_can_be_left_out(padded: Any) -> None:
    batch = padded(["a<|endoftext|>b", "One.\n\nTwo"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert padded.detokenize(ids, mask).numpy().tolist() == [b"a<|endoftext|>b", b"One.\n\nTwo"]
    assert padded.detokenize(ids).numpy().tolist()[0] == b"a<|endoftext|>b" + b"<|endoftext|>" * 2
    assert padded.detokenize(ids, skip_special_tokens=True).numpy().tolist() == [b"ab", b"One.\n\nTwo"]
    labels = tf.where(mask == 1, ids, -100)
    assert padded.detokenize(labels, mask).numpy().tolist() == [b"a<|endoftext|>b", b"One.\n\nTwo"]


# ---- where graphs run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_it_works_in_tf_function_and_in_tf_data_one_by_one_and_in_batches(native: bool) -> None:
    layer = TFGPT2Tokenizer(pad_token_id=50256, native=native)
    texts = ["Hello world", "One.\n\nTwo", "", "héllo 🙂", "'s"]
    data = tf.data.Dataset.from_tensor_slices(texts)  # the layer's first use is inside the pipeline's graph
    rows = [row["input_ids"].numpy().tolist() for row in data.map(layer, num_parallel_calls=2)]
    assert rows == [TOKENIZER.encode(text) for text in texts]
    pipeline = data.batch(2).map(layer, num_parallel_calls=2)
    assert pipeline.element_spec["input_ids"].shape.rank == 2
    whole = [row for batch in pipeline for row in layer.detokenize(**renamed(batch)).numpy().tolist()]
    assert whole == [text.encode() for text in texts]
    traced = tf.function(lambda batch: layer.detokenize(**renamed(layer(batch))))
    assert traced(tf.constant(texts)).numpy().tolist() == [text.encode() for text in texts]


def renamed(batch: dict[str, Any]) -> dict[str, Any]:
    return {"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_a_keras_model_begins_with_text_and_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    layer = TFGPT2Tokenizer(with_added_tokens(), padding="max_length", max_length=6, truncation=True, native=False)
    inputs = keras.Input(shape=(), dtype="string")
    ids = layer(inputs)["input_ids"]
    assert ids.shape == (None, 6) and ids.dtype == "int32"
    model = keras.Model(inputs, keras.layers.Embedding(len(with_added_tokens()), 3)(ids))
    texts = tf.constant(["abcd 🙂<pad>x", "One.\n\nTwo"])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(again(texts), model(texts))
    assert again.layers[1].get_config() == layer.get_config()


def test_configurations_make_the_same_layer_again() -> None:
    options = {"special": "text", "truncation_side": "left", "pad_token_id": 7, "native": False, "name": "words"}
    layer = TFGPT2Tokenizer(truncation=True, max_length=3, padding_side="left", **options)
    for again in (TFGPT2Tokenizer.from_config(layer.get_config()), pickle.loads(pickle.dumps(layer))):
        assert again.get_config() == layer.get_config()
        assert again(["a b c d", "<|"])["input_ids"].numpy().tolist() == [
            TOKENIZER.encode("a b c d")[1:], [7, *TOKENIZER.encode("<|")],
        ]  # fmt: skip


PLAIN_TENSORFLOW = """
import json, sys
sys.modules.update(gpt2_tf=None, gpt2_core=None)
import tensorflow as tf
loaded = tf.saved_model.load(sys.argv[1])
texts = json.loads(sys.argv[2])
batch = loaded.signatures["encode"](tf.constant(texts))
back = loaded.decode(batch["input_ids"], batch["attention_mask"])
print(json.dumps([batch["input_ids"].numpy().tolist(), [text.decode() for text in back.numpy().tolist()]]))
"""


def test_a_saved_model_runs_in_plain_tensorflow(tmp_path: Path) -> None:
    import json

    tokenizer = with_added_tokens()
    layer = TFGPT2Tokenizer(tokenizer, pad_token_id=50256)
    module = tf.Module()
    module.tokenizer = layer
    encode = tf.function(layer.call, input_signature=[tf.TensorSpec([None], tf.string)])
    module.decode = tf.function(layer.detokenize, input_signature=[tf.TensorSpec([None, None], tf.int32)] * 2)
    tf.saved_model.save(module, tmp_path, signatures={"encode": encode})
    texts = ["One.\n\nTwo", "abcd 🙂<pad>" + "qu" * 700, "", "héllo\u3000\u3000wörld's", "Привет 你好"]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TENSORFLOW, str(tmp_path), json.dumps(texts)],
        capture_output=True, text=True, check=False, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids, back = json.loads(done.stdout)
    tokenizer.pad_token = "<|endoftext|>"
    assert ids == tokenizer(texts, padding=True)["input_ids"]
    assert back == texts


def test_what_runs_python_is_not_exported(tmp_path: Path) -> None:
    module = tf.Module()
    module.tokenizer = TFGPT2Tokenizer(pad_token_id=0, native=False)
    with pytest.raises(TokenizerError, match="native=True"):
        tf.saved_model.save(module, tmp_path)


def test_the_example_on_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2].joinpath("docs", "tokenizer.md").read_text(encoding="utf-8")
    section = page.partition("## Inside a TensorFlow graph")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["texts"].numpy().tolist() == [b"One.\n\nTwo"]
    assert [batch["input_ids"].shape[0] for batch in names["data"]] == [2, 1]


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["no pad token", "pad_token_id=50256", "padding=False"]),
        ({"tokenizer": "gpt2"}, ["tokenizer is of type str", "GPT2Tokenizer.from_pretrained"]),
        ({"padding": "widest"}, ["'widest'", '"longest"', '"max_length"']),
        ({"padding": False, "special": "ignore"}, ["special is 'ignore'", "'allow'", "'text'"]),
        ({"padding": False, "padding_side": "top"}, ["padding_side is 'top'", "'left'"]),
        ({"padding": False, "truncation_side": "top"}, ["truncation_side is 'top'", "'left'"]),
        ({"padding": False, "max_length": 8}, ["max_length is 8", "truncation=True"]),
        ({"padding": False, "truncation": True, "max_length": -1}, ["max_length is -1", "0 or more"]),
        ({"pad_token_id": 50257}, ["pad_token_id is 50257", "0 to 50256"]),
    ],
)
def test_arguments_that_do_not_fit_are_named_with_a_remedy(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(TokenizerError) as error:
        TFGPT2Tokenizer(**arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer([1, 2]), ["expected a string"]),
        (lambda layer: layer(tf.constant([1, 2])), ["int32", "expected a dense tensor of strings", "detokenize"]),
        (lambda layer: layer([["a"], ["b"]]), ["(2, 1)", "(B,)", "tf.reshape"]),
        (lambda layer: layer(tf.ragged.constant([["a"], []])), ["RaggedTensor", "dense"]),
        (lambda layer: layer.detokenize(["a"]), ["string", "expected integers"]),
        (lambda layer: layer.detokenize([1.5]), ["float32", "expected integers"]),
        (lambda layer: layer.detokenize([[1], [2, 3]]), ["rows of equal length"]),
        (lambda layer: layer.detokenize([[3, -1]]), ["the id -1", "0 to 50256"]),
        (lambda layer: layer.detokenize([[3, 50257]]), ["the id 50257", "0 to 50256"]),
    ],
)
def test_input_that_cannot_be_taken_is_named_with_a_remedy(padded: Any, call: Any, words: list[str]) -> None:
    with pytest.raises(TokenizerError) as error:
        call(padded)
    assert all(word in str(error.value) for word in words), error.value


def test_rows_that_do_not_fit_into_max_length_are_refused_eagerly_and_in_a_graph() -> None:
    layer = TFGPT2Tokenizer(padding="max_length", max_length=2, pad_token_id=0, native=False)
    assert layer(["a b"])["input_ids"].shape == (1, 2)
    with pytest.raises(TokenizerError, match=r"a row is 4 tokens long.*max_length=2.*truncation=True"):
        layer(["a", "a b c d"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="longer than max_length"):
        tf.function(layer)(tf.constant(["a b c d"]))


def test_ids_that_are_not_there_are_refused_in_a_graph(padded: Any) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="not in the vocabulary; expected 0 to 50256"):
        tf.function(padded.detokenize)(tf.constant([50257]))


def test_more_added_tokens_than_a_pattern_holds_are_refused() -> None:
    draw = random.Random(6)
    pattern = "|".join(str(draw.randrange(10**30)) for _ in range(30_000))
    with pytest.raises(TokenizerError, match=r"30000 added tokens.*native=False"):
        text_graph._check_pattern(pattern, 30_000)
