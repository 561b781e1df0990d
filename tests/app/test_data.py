"""`gpt2 data`: shards from texts, what they hold, and what is refused with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from app_process import Run, child

from gpt2_core.data import open_data
from gpt2_core.tokenizer import GPT2Tokenizer

TEXT = "One day the cat came home.\nNobody knew where it had been.\n" * 40


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def test_a_text_becomes_shards_and_the_report_says_how_many_tokens(gpt2: Run, text, tmp_path):
    result = gpt2("data", text, tmp_path / "d", "--val-fraction", "0.1", "--verify")
    assert result.exit_code == 0, result.stderr
    train = open_data(tmp_path / "d")
    assert f"{len(train):,} tokens, 1 document," in result.stdout
    assert "every hash as it should be" in result.stdout
    both = [*train.tokens[1:], *open_data(tmp_path / "d", "val").tokens[1:]]
    assert both == GPT2Tokenizer().encode(TEXT)


def test_the_manifest_is_what_json_prints(gpt2_json: Run, text, tmp_path):
    value = gpt2_json("data", text, tmp_path / "d", "--shard-size", "200", "--tokenizer", "gpt2-tales")
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert {name: value[name] for name in manifest} == manifest
    assert value["verified"] is False
    sizes = [shard["tokens"] for shard in manifest["splits"]["train"]["shards"]]
    assert set(sizes[:-1]) == {100}


def test_shards_that_are_there_are_shown(gpt2: Run, gpt2_json: Run, text, tmp_path):
    gpt2("data", text, tmp_path / "d", "--val-fraction", "0.1")
    shown = gpt2_json("data", tmp_path / "d", "--verify")
    assert shown["splits"]["val"]["documents"] == 1
    assert shown["verified"] is True
    assert "50,257 tokens" in gpt2("data", tmp_path / "d").stdout
    np.arange(99, dtype="<u2").tofile(tmp_path / "train.bin")
    assert gpt2_json("data", tmp_path / "train.bin")["splits"]["train"]["tokens"] == 99
    refused = gpt2("data", tmp_path / "train.bin", "--verify")
    assert refused.exit_code == 2
    assert "no hashes to compare" in refused.stderr


def test_pairs_get_a_mask(gpt2: Run, gpt2_json: Run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "Who?", "a": " I."}\n')
    gpt2("data", tmp_path / "a.jsonl", tmp_path / "d", "--prompt-key", "q", "--response-key", "a")
    assert gpt2_json("data", tmp_path / "d")["splits"]["train"]["masked"] is True


@pytest.mark.parametrize(
    ("content", "options", "code", "words"),
    [
        (b"", [], 2, "a.txt is empty"),
        (b"\0", [], 2, "is not text"),
        (b"x", ["--shard-size", "x"], 2, "--shard-size is 'x'"),
        (b"x", ["--prompt-key", "x"], 2, "--prompt-key is 'x' and --response-key is None"),
        (b"x", ["--val-fraction", "1"], 2, "--val-fraction is 1"),
        (b"x", ["--tokenizer", "no/such"], 6, "no/such"),
    ],
)
def test_what_cannot_be_done_is_refused(gpt2: Run, tmp_path, content, options, code, words):
    (tmp_path / "a.txt").write_bytes(content)
    result = gpt2("data", tmp_path / "a.txt", tmp_path / "d", *options)
    assert result.exit_code == code
    assert words in result.stderr
    assert not (tmp_path / "d").exists()


def test_shards_are_replaced_only_when_asked_for(gpt2: Run, text, tmp_path):
    assert gpt2("data", text, tmp_path / "d").exit_code == 0
    again = gpt2("data", text, tmp_path / "d")
    assert again.exit_code == 5
    assert "with --overwrite" in again.stderr
    assert gpt2("data", text, tmp_path / "d", "--overwrite").exit_code == 0


def test_a_key_that_is_not_there_is_named_with_the_option(gpt2: Run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    result = gpt2("data", tmp_path / "a.jsonl", tmp_path / "d")
    assert result.exit_code == 2
    assert "has no 'text' but 'body'; name the key with --jsonl-key, or add it" in result.stderr


def test_several_processes_work_from_the_command_line(text, tmp_path):
    done = child("data", text, tmp_path / "d", "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["splits"]["train"]["tokens"] == 1 + len(GPT2Tokenizer().encode(TEXT))
