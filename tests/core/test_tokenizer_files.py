"""Reading and writing tokenizer folders: every format that exists, and files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2_core import tokenizer_files
from gpt2_core.errors import Gpt2Error, HubError, TokenizerError
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.vocabulary import BYTE_TO_CHAR, gpt2_vocabulary

BYTES = [BYTE_TO_CHAR[byte] for byte in range(256)]
SMALL_TOKENS = [*BYTES, "ab", "Ġab", "<|endoftext|>"]
SMALL_MERGES = ["a b", "Ġ ab"]
TEXT = "ab cab <|endoftext|>é"


def small_ids() -> dict[str, int]:
    return {token: index for index, token in enumerate(SMALL_TOKENS)}


def write_pair(folder: Path, ids: Any = None, merges: str | None = None, names: tuple[str, str] = ("vocab.json", "merges.txt")) -> Path:  # fmt: skip  # noqa: E501
    (folder / names[0]).write_text(json.dumps(small_ids() if ids is None else ids), encoding="utf-8")
    text = "#version: 0.2\n" + "\n".join(SMALL_MERGES) + "\n" if merges is None else merges
    (folder / names[1]).write_text(text, encoding="utf-8")
    return folder


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [{"id": 258, "content": "<|endoftext|>", "special": True, "lstrip": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "post_processor": {"type": "ByteLevel"},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": small_ids(), "merges": SMALL_MERGES},
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        place = content
        for key in above:
            place = place[key]
        place[last] = value
    return content


def write_json(folder: Path, name: str, content: Any) -> Path:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("version_line", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_vocabulary_and_merges_are_read(
    tmp_path: Path, names: tuple[str, str], version_line: bool, newline: str
) -> None:
    lines = (["#version: 0.2"] if version_line else []) + [*SMALL_MERGES, ""]
    write_pair(tmp_path, names=names)
    (tmp_path / names[1]).write_bytes(newline.join(lines).encode())
    for tokenizer in (
        GPT2Tokenizer.from_pretrained(tmp_path),
        GPT2Tokenizer(tmp_path / names[0], tmp_path / names[1]),
    ):
        assert tokenizer.encode("ab ab") == [256, 257]
        assert tokenizer.encode(TEXT)[-3] == 258
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.eos_token_id == 258


def test_a_vocabulary_without_endoftext_has_no_roles(tmp_path: Path) -> None:
    ids = {token: index for index, token in enumerate(SMALL_TOKENS[:-1])}
    tokenizer = GPT2Tokenizer.from_pretrained(write_pair(tmp_path, ids))
    assert tokenizer.eos_token is None and tokenizer.all_special_ids == []
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_merge_of_hash_signs_on_the_first_line_is_no_version(tmp_path: Path) -> None:
    ids = {**small_ids(), "##": 259}
    tokenizer = GPT2Tokenizer.from_pretrained(write_pair(tmp_path, ids, "# #\na b\nĠ ab\n"))
    assert tokenizer.encode("##") == [259]


def test_a_long_text_has_the_ids_of_the_small_vocabulary_too(tmp_path: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(write_pair(tmp_path))
    text = "ab cab babab 中ab " * 1000
    assert tokenizer.encode(text) == tokenizer.encode("ab cab babab 中ab") + [
        index for _ in range(999) for index in tokenizer.encode(" ab cab babab 中ab")
    ] + tokenizer.encode(" ")


@pytest.mark.parametrize("merges", [SMALL_MERGES, [merge.split(" ") for merge in SMALL_MERGES]])
def test_tokenizer_json_is_read(tmp_path: Path, merges: list) -> None:
    write_json(tmp_path, "tokenizer.json", tokenizer_json(model__merges=merges, pre_tokenizer__add_prefix_space=True))
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.add_prefix_space
    assert tokenizer.encode("ab ab<|endoftext|>") == [257, 257, 258]
    assert tokenizer.all_special_ids == [258]


def test_tokenizer_json_may_keep_its_special_tokens_apart(tmp_path: Path) -> None:
    vocab = {token: index for index, token in enumerate(SMALL_TOKENS[:-1])}
    tokenizer = GPT2Tokenizer.from_pretrained(
        write_json(tmp_path, "tokenizer.json", tokenizer_json(model__vocab=vocab))
    )
    assert tokenizer.encode("<|endoftext|>") == [258]
    first = {token: index for index, token in enumerate(["<|endoftext|>", *SMALL_TOKENS[:-1]])}
    del first["<|endoftext|>"]
    content = tokenizer_json(model__vocab=first, added_tokens=[{"id": 0, "content": "<|endoftext|>", "special": True}])
    tokenizer = GPT2Tokenizer.from_pretrained(write_json(tmp_path, "tokenizer.json", content))
    assert tokenizer.encode("<|endoftext|>ab") == [0, 257]


def test_settings_come_from_the_small_files(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_json(tmp_path, "special_tokens_map.json", {"pad_token": {"content": "<pad>"}, "eos_token": "<|endoftext|>"})
    write_json(tmp_path, "added_tokens.json", {"<pad>": 259, "word": 260})
    described = {"259": {"content": "<pad>", "special": True}}
    settings = {"padding_side": "left", "errors": "ignore", "model_max_length": 77, "added_tokens_decoder": described}
    write_json(tmp_path, "tokenizer_config.json", settings)
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.padding_side, tokenizer.errors) == (259, "left", "ignore")
    assert (tokenizer.model_max_length, len(tokenizer), tokenizer.vocab_size) == (77, 261, 259)
    assert tokenizer.encode("word<pad>", special="text")[0] == 260
    assert tokenizer.all_special_ids == [258, 259]
    assert GPT2Tokenizer.from_pretrained(tmp_path, padding_side="right").padding_side == "right"


def test_a_tokenizer_is_saved_and_read_again(tmp_path: Path) -> None:
    tokenizer = GPT2Tokenizer(padding_side="left", truncation_side="left", add_prefix_space=True, errors="ignore")
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<sep>"]})
    tokenizer.add_tokens(["new word"])
    written = tokenizer.save_pretrained(tmp_path / "made")
    assert sorted(path.name for path in written) == sorted(path.name for path in (tmp_path / "made").iterdir())
    names = {path.name for path in written}
    assert names >= {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for without in ("nothing", "tokenizer.json"):
        (tmp_path / "made" / without).unlink(missing_ok=True)
        again = GPT2Tokenizer.from_pretrained(tmp_path / "made")
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.all_special_ids == tokenizer.all_special_ids
        assert repr(again) == repr(tokenizer)
        for setting in ("padding_side", "truncation_side", "add_prefix_space", "errors", "model_max_length"):
            assert getattr(again, setting) == getattr(tokenizer, setting)
        text = "a<sep>new word <pad>b"
        assert again.encode(text) == tokenizer.encode(text)
        assert again._vocabulary is gpt2_vocabulary(), "the vocabulary is recognised as GPT-2's own"


def test_saving_keeps_other_files_and_removes_old_ones_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_json(tmp_path, "added_tokens.json", {"stale": 50257})
    GPT2Tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert not (tmp_path / "added_tokens.json").exists()
    assert len(GPT2Tokenizer.from_pretrained(tmp_path)) == 50257


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPT2Tokenizer().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def break_off(parts: Any) -> Any:
        yield "vocab.json", b"{}"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt2_core.tokenizer.folder_files", break_off)
    with pytest.raises(OSError, match="No space left"):
        GPT2Tokenizer().save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- files that lie --------------------------------------------------------------------------------------------


def refused(folder: Path, *told: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        GPT2Tokenizer.from_pretrained(folder)
    for words in (str(folder), *told):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("vocab.json", b"{", "not JSON"),
        ("vocab.json", b"[1, 2]", "holds a JSON list"),
        ("vocab.json", b'{"a": 0, "a": 1}', "'a' twice"),
        ("vocab.json", b'{"\xff": 0}', "not UTF-8"),
        ("vocab.json", b"{}", "no token for 256 of the 256 bytes"),
        ("vocab.json", b"[" * 100_000, "not JSON"),
        ("merges.txt", b"a b\nab\n", "line 2"),
        ("merges.txt", b"a b c\n", "line 1"),
        ("merges.txt", b"#version: 0.2\na  b\n", "line 2"),
        ("merges.txt", b"a \xff\n", "not UTF-8"),
        ("merges.txt", b"a c\n", "needs the token 'ac'"),
        ("merges.txt", b"a b\na b\n", "stands there twice"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, told: str) -> None:
    write_pair(tmp_path)
    (tmp_path / name).write_bytes(data)
    refused(tmp_path, name, told)


@pytest.mark.parametrize("ids", [{"ab": 0}, {"ab": 300}, {"ab": -1}, {"ab": None}, {"ab": 1.5}, {"ab": {}}])
def test_ids_that_repeat_or_leave_holes_are_told(tmp_path: Path, ids: dict) -> None:
    refused(write_pair(tmp_path, small_ids() | ids), "vocab.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model__type": "Unigram"},
        {"model__dropout": 0.1},
        {"model__byte_fallback": True},
        {"model__ignore_merges": True},
        {"model__end_of_word_suffix": "</w>"},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer__use_regex": False},
        {"post_processor": {"type": "TemplateProcessing"}},
        {"model": []},
        {"model__vocab": []},
        {"model__merges": ["a"]},
        {"model__merges": [["a", 5]]},
        {"model__merges": [["a", "b", "c"]]},
        {"model__merges": None},
        {"added_tokens": {"<new>": 259}},
        {"added_tokens": [{"id": 258}]},
        {"added_tokens": [{"id": "258", "content": "<|endoftext|>"}]},
        {"added_tokens": [{"id": 258, "content": "<|endoftext|>", "lstrip": True}]},
        {"added_tokens": [{"id": 300, "content": "<new>"}]},
        {"added_tokens": [{"id": 12, "content": "<|endoftext|>"}]},
        {"added_tokens": [{"id": 258, "content": "<new>"}]},
        {"added_tokens": [{"id": 259, "content": "<new>"}, {"id": 259, "content": "<newer>"}]},
    ],
    ids=str,
)
def test_a_tokenizer_json_that_is_not_gpt2s_kind_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(write_json(tmp_path, "tokenizer.json", tokenizer_json(**changes)), "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"padding_side": 5}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer_config.json", {"model_max_length": -1}),
        ("tokenizer_config.json", {"add_bos_token": True}),
        ("tokenizer_config.json", {"bos_token": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<pad>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "y"}}}),
        ("special_tokens_map.json", {"pad_token": ["<pad>"]}),
        ("added_tokens.json", {"<pad>": "259"}),
    ],
)
def test_small_files_that_make_no_sense_are_refused(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    refused(write_json(write_pair(tmp_path), name, content), name)


def test_a_role_of_an_unknown_token_is_refused(tmp_path: Path) -> None:
    write_json(write_pair(tmp_path), "special_tokens_map.json", {"pad_token": "<pad>"})
    refused(tmp_path, "pad_token is '<pad>'")


def test_a_folder_without_a_tokenizer_says_what_was_expected(tmp_path: Path) -> None:
    refused(tmp_path, "tokenizer.json", "vocab.json with merges.txt", "encoder.json with vocab.bpe")
    write_pair(tmp_path)
    (tmp_path / "merges.txt").unlink()
    refused(tmp_path, "has vocab.json but not merges.txt")


def test_a_file_of_the_arguments_that_is_missing_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    with pytest.raises(TokenizerError, match=r"other\.json is not there"):
        GPT2Tokenizer(tmp_path / "other.json", tmp_path / "merges.txt")
    with pytest.raises(TokenizerError, match=r"other\.txt cannot be read"):
        GPT2Tokenizer(tmp_path / "vocab.json", tmp_path / "other.txt")


def test_the_files_of_gpt2_are_the_released_ones(tmp_path: Path) -> None:
    GPT2Tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "vocab.json").read_bytes() == gpt2_vocabulary().to_vocab_json()
    assert (tmp_path / "merges.txt").read_bytes() == gpt2_vocabulary().to_merges_txt()
    assert tokenizer_files.read_merges_txt(tmp_path / "merges.txt")[0] == ("Ġ", "t")


# Ids that sort among others by accident, and those that cannot be compared.
@pytest.mark.parametrize("wrong", ["7", None, 1.5, True, [1], {}])
@pytest.mark.parametrize("added", [{}, {"<pad>": 259}])
def test_an_id_that_is_no_integer_is_named_in_every_file(tmp_path: Path, wrong: Any, added: dict[str, int]) -> None:
    write_pair(tmp_path, {**small_ids(), "ab": wrong})
    write_json(tmp_path, "added_tokens.json", added)
    refused(tmp_path, "vocab.json", "gives 'ab' the id", "expected an integer")
    write_json(tmp_path, "tokenizer.json", tokenizer_json(model__vocab={**small_ids(), "ab": wrong}))
    refused(tmp_path, "tokenizer.json gives 'ab' the id", "expected an integer")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1042301\n"


@pytest.mark.parametrize(
    "name", ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
)
def test_files_that_cannot_be_read_are_told_from_missing_ones(
    tmp_path: Path, name: str, unreadable: Callable[[Path], None]
) -> None:
    write_pair(tmp_path)
    (tmp_path / name).write_text(POINTER)
    refused(tmp_path, f"{name} is a git-LFS pointer", "git lfs pull")
    unreadable(tmp_path / name)
    refused(tmp_path, f"{name} cannot be read: Permission denied")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, f"{name} is a folder, expected a file")


def test_a_folder_that_may_not_be_entered_is_no_empty_one(tmp_path: Path, unreadable: Callable[[Path], None]) -> None:
    write_pair(tmp_path)
    unreadable(tmp_path)
    with pytest.raises(Gpt2Error, match="cannot be looked into: Permission denied"):
        GPT2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="cannot be looked into: Permission denied"):
        tokenizer_files.read_folder(tmp_path)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", None, 7])
def test_what_is_no_name_of_a_tokenizer_is_refused(name: Any) -> None:
    with pytest.raises(HubError, match=r"is (not|neither) a"):
        GPT2Tokenizer.from_pretrained(name)
