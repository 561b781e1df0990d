"""Texts to shards: the ids of the whole text whatever the blocks, parts, masks, hashes; and all or nothing."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core import data_writing
from gpt2_core.data import open_data, verify_data, write_data
from gpt2_core.errors import InputError, TokenizerError, WriteError
from gpt2_core.tokenizer import GPT2Tokenizer

END = 50256
TEXT = (
    "One morning, in 1870, the Müllers' cat didn't come home.\n\n  \u00a0\n“Where is it?”  asked   the girl\u3000\n"
    "私は猫である。名前はまだ無い。 Ну вот и всё \t\n   end of it\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


def ids_of(folder: Path, split: str = "train") -> list[int]:
    return list(open_data(folder, split).tokens[:])


def jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize("block", [7, 64, 1000, 1 << 22])
def test_blocks_of_any_size_give_the_ids_of_the_whole_text(tmp_path, tokenizer, monkeypatch, block):
    monkeypatch.setattr(data_writing, "BLOCK", block)
    text = TEXT * 20 + "<|endoftext|>" + TEXT * 3
    (tmp_path / "a.txt").write_bytes(text.encode())
    seen: list[tuple[int, int]] = []
    manifest = write_data(
        tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer, progress=lambda *pair: seen.append(pair)
    )
    assert ids_of(tmp_path / "d") == [END, *tokenizer.encode(text)]
    assert seen[-1] == (len(text.encode()), len(text.encode()))
    part = manifest["splits"]["train"]
    assert part["documents"] == 2
    assert part["text_bytes"] == len(text.encode())
    assert part["tokens"] == len(ids_of(tmp_path / "d"))
    assert manifest == json.loads((tmp_path / "d" / "manifest.json").read_text())


def test_a_text_is_cut_before_spaces_that_follow_no_other_space():
    for text, place in (("one two", 3), ("one\u00a0\n", None), ("one \u3000 two", 3), ("one  two\nt", 8), ("私\n", 3)):
        assert data_writing._text_cut(text.encode()) == place


def test_a_prefix_space_is_for_the_beginning_of_a_text_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(data_writing, "BLOCK", 11)
    own = GPT2Tokenizer(add_prefix_space=True)
    text = "word\n" * 30
    (tmp_path / "a.txt").write_text(text)
    write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=own)
    assert ids_of(tmp_path / "d") == [END, *own.encode(text)]


def test_every_file_of_a_folder_is_a_document_in_the_order_of_names(tmp_path, tokenizer):
    source = tmp_path / "texts"
    (source / "b").mkdir(parents=True)
    (source / "a.txt").write_text("first")
    (source / "b" / "c.md").write_text("<|endoftext|>second<|endoftext|>")
    (source / "z.txt").write_text("third")
    (source / "empty.txt").write_text("")
    (source / ".hidden").write_bytes(b"\0")
    manifest = write_data(source, tmp_path / "d", tokenizer=tokenizer)
    words = [tokenizer.encode(word) for word in ("first", "second", "third")]
    assert ids_of(tmp_path / "d") == [END, *words[0], END, *words[1], END, *words[2]]
    assert manifest["splits"]["train"]["documents"] == 3
    assert manifest["source"]["empty"] == [str(source / "empty.txt")]
    assert len(open_data(tmp_path / "d").documents) == 3


def test_every_line_of_jsonl_is_a_document(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data_writing, "BLOCK", 200)
    texts = [f"{TEXT} {number}" for number in range(30)]
    path = jsonl(tmp_path / "a.jsonl", *({"body": text, "other": 1} for text in texts), {"body": ""})
    write_data(path, tmp_path / "d", tokenizer=tokenizer, text_key="body")
    assert ids_of(tmp_path / "d") == [index for text in texts for index in (END, *tokenizer.encode(text))]


def test_prompts_of_pairs_are_masked(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", {"q": "Who? ", "a": "Nobody."}, {"q": "", "a": "And you?"})
    write_data(path, tmp_path / "d", tokenizer=tokenizer, prompt_key="q", response_key="a", shard_tokens=4)
    data = open_data(tmp_path / "d", verify=True)
    q, a, b = map(tokenizer.encode, ("Who? ", "Nobody.", "And you?"))
    assert data.tokens[:].tolist() == [END, *q, *a, END, *b]
    assert data.labelled is not None
    assert data.labelled[:].tolist() == [1, *[0] * len(q), *[1] * (len(a) + 1 + len(b))]
    assert len(data.tokens.shards) == len(data.labelled.shards) == 3


def test_shards_hold_so_many_tokens(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT * 5)
    manifest = write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer, shard_tokens=100)
    sizes = [shard["tokens"] for shard in manifest["splits"]["train"]["shards"]]
    assert set(sizes[:-1]) == {100}
    assert 0 < sizes[-1] <= 100
    assert ids_of(tmp_path / "d") == [END, *tokenizer.encode(TEXT * 5)]
    assert verify_data(tmp_path / "d") == 2 * sum(sizes)
    assert np.fromfile(tmp_path / "d" / "train_00000.bin", "<u2").tolist() == ids_of(tmp_path / "d")[:100]


@pytest.mark.parametrize("block", [200, 1 << 22])
def test_the_end_of_a_single_text_is_for_validation(tmp_path, tokenizer, monkeypatch, block):
    monkeypatch.setattr(data_writing, "BLOCK", block)
    text = "".join(f"This is line {number}.\n" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    manifest = write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer, val_fraction=0.1)
    train, val = (tokenizer.decode(ids_of(tmp_path / "d", name)[1:]) for name in ("train", "val"))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.09 < manifest["splits"]["val"]["text_bytes"] / len(text) <= 0.1
    assert ids_of(tmp_path / "d", "val")[0] == END


def test_a_text_of_several_documents_is_divided_between_two(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"line\nand line {number}\n" for number in range(100)))
    write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer, val_fraction=0.1)
    val = open_data(tmp_path / "d", "val")
    assert tokenizer.decode(val.tokens[:]).startswith("<|endoftext|>line\nand line 9")


def test_files_of_a_folder_are_drawn_for_validation_whole(tmp_path, tokenizer):
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(10):
        (source / f"{number}.txt").write_text(f"text {number}")
    write_data(source, tmp_path / "d", tokenizer=tokenizer, val_fraction=0.01)
    assert len(open_data(tmp_path / "d", "val").documents) == 1
    assert len(open_data(tmp_path / "d").documents) == 9


def test_lines_are_drawn_for_validation_each_by_itself(tmp_path, tokenizer, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"text {number}"} for number in range(300)))
    write_data(path, tmp_path / "one", tokenizer=tokenizer, val_fraction=0.2)
    monkeypatch.setattr(data_writing, "BLOCK", 300)
    write_data(path, tmp_path / "two", tokenizer=tokenizer, val_fraction=0.2)
    assert 40 < len(open_data(tmp_path / "one", "val").documents) < 80
    for name in ("train", "val"):
        assert ids_of(tmp_path / "one", name) == ids_of(tmp_path / "two", name)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_packed_files_are_unpacked_on_the_way(tmp_path, tokenizer, suffix, pack):
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(TEXT.encode()))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(json.dumps({"text": "x"}).encode()))
    write_data([tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"], tmp_path / "d", tokenizer=tokenizer)
    assert ids_of(tmp_path / "d") == [END, *tokenizer.encode(TEXT), END, *tokenizer.encode("x")]
    write_data(tmp_path / f"a.txt{suffix}", tmp_path / "e", tokenizer=tokenizer, val_fraction=0.3)
    assert len(ids_of(tmp_path / "e", "val")) > 5
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(TEXT.encode())[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        write_data(tmp_path / f"a.txt{suffix}", tmp_path / "f", tokenizer=tokenizer)


def test_several_processes_write_what_one_does(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data_writing, "BLOCK", 2000)
    (tmp_path / "a.txt").write_text(TEXT * 60)
    one = write_data(tmp_path / "a.txt", tmp_path / "one", tokenizer=tokenizer)
    two = write_data(tmp_path / "a.txt", tmp_path / "two", tokenizer=tokenizer, workers=2)
    assert one == two


def test_an_error_in_another_process_is_the_same_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: 'text' is int, expected a string"):
        write_data(tmp_path / "a.jsonl", tmp_path / "d", tokenizer=tokenizer, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_tokenizer_with_added_tokens_and_prefix_spaces_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(data_writing, "BLOCK", 40)
    own = GPT2Tokenizer(add_prefix_space=True)
    own.add_tokens(["<two words>", "<more>"])
    text = "A <two words> here <more> and\nthere <two words>.\n" * 9
    (tmp_path / "a.txt").write_text(text)
    write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=own)
    assert ids_of(tmp_path / "d") == [END, *own.encode(text)]
    write_data(jsonl(tmp_path / "a.jsonl", {"text": "b c"}, {"text": "d"}), tmp_path / "e", tokenizer=own)
    assert ids_of(tmp_path / "e") == [END, *own.encode("b c"), END, *own.encode("d")]
    assert open_data(tmp_path / "d").vocab_size == 50259


def test_a_vocabulary_of_more_than_two_bytes_gets_four(tmp_path):
    own = GPT2Tokenizer()
    own.add_tokens([f"<{number}>" for number in range(15300)])
    (tmp_path / "a.txt").write_text("one <15299>")
    assert write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=own)["dtype"] == "uint32"
    assert ids_of(tmp_path / "d") == [END, *own.encode("one "), 50257 + 15299]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"a\.txt is empty; expected some text"),
        (b"abc\0def", r"a\.txt is not text: it has zero bytes"),
        (b"abc \xff def", r"a\.txt is not UTF-8: byte 0xff at 4"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    ],
)
def test_what_is_no_text_is_refused_and_nothing_is_left(tmp_path, tokenizer, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"val_fraction": 1}, "val_fraction is 1"),
        ({"prompt_key": "a"}, "expected both, or neither"),
        ({"text_key": "txt"}, r"line 1 has no 'txt' but 'text'; .*did you mean 'text'"),
        ({"val_fraction": 1e-9}, "no document falls into the 'val' part"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, tokenizer, changes, words):
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(InputError, match=words):
        write_data(path, tmp_path / "d", tokenizer=tokenizer, **changes)
    assert not (tmp_path / "d").exists()


def test_sources_that_are_not_there_are_reported(tmp_path, tokenizer):
    with pytest.raises(InputError, match="is not there; expected a text file"):
        write_data(tmp_path / "x.txt", tmp_path / "d", tokenizer=tokenizer)
    (tmp_path / "e").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        write_data(tmp_path / "e", tmp_path / "d", tokenizer=tokenizer)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(TokenizerError, match="no end-of-text token"):
        write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=GPT2Tokenizer(eos_token=None))


def test_what_is_there_is_replaced_only_when_asked_for(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(TEXT)
    write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer, shard_tokens=10)
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(WriteError, match="holds shards already") as caught:
        write_data(tmp_path / "b.txt", tmp_path / "d", tokenizer=tokenizer)
    assert caught.value.errno == errno.EEXIST
    assert len(ids_of(tmp_path / "d")) > 10
    write_data(tmp_path / "b.txt", tmp_path / "d", tokenizer=tokenizer, overwrite=True)
    assert ids_of(tmp_path / "d") == [END, *tokenizer.encode("b")]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["manifest.json", "train_00000.bin"]
    with pytest.raises(InputError, match="where the shards would go"):
        write_data(tmp_path / "d" / "manifest.json", tmp_path / "d", tokenizer=tokenizer, overwrite=True)


def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path, tokenizer, monkeypatch):
    def full(self: Any, values: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data_writing._ShardFile, "write", full)
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(WriteError, match=r"No space left.*free some space"):
        write_data(tmp_path / "a.txt", tmp_path / "d", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


KILLED = """
import sys
from gpt2_core import data_writing
from gpt2_core.data import write_data
from gpt2_core.tokenizer import GPT2Tokenizer

data_writing.BLOCK = 1 << 14
if __name__ == "__main__":
    write_data(sys.argv[1], sys.argv[2], tokenizer=GPT2Tokenizer(), workers=int(sys.argv[3]), shard_tokens=5000,
               overwrite=True, progress=lambda done, size: print(done, flush=True))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no kill -9 here")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_is_killed_leaves_what_was_there_and_no_process(tmp_path, tokenizer, workers):
    (tmp_path / "a.txt").write_text(TEXT * 4000)
    (tmp_path / "run.py").write_text(KILLED)
    (tmp_path / "b.txt").write_text("b")
    write_data(tmp_path / "b.txt", tmp_path / "d", tokenizer=tokenizer)
    command = [sys.executable, "run.py", "a.txt", "d", str(workers)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(4):
        process.stdout.readline()
    process.kill()
    # The workers hold the other end of the pipe: it is at its end when all of them are gone.
    started = time.monotonic()
    process.stdout.read()
    process.wait()
    assert time.monotonic() - started < 60
    assert ids_of(tmp_path / "d") == [END, *tokenizer.encode("b")]
    write_data(tmp_path / "b.txt", tmp_path / "d", tokenizer=tokenizer, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["manifest.json", "train_00000.bin"]
