"""`gpt2 encode` and `gpt2 decode` hold to the tokenizer, byte for byte, whatever the text came through."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from app_process import Run, child, environment
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_app import decode, encode, sources
from gpt2_app.encode import shown
from gpt2_app.vocabularies import id_dtype
from gpt2_core.errors import InputError
from gpt2_core.tokenizer import GPT2Tokenizer

TEXT = "Once upon a time — there was naïve 🐉, wasn't there?\n\n  The end.\n"
TOKENIZER = GPT2Tokenizer()


class Drip(io.BytesIO):
    """A stream that never gives more than a few bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(5)


# -- encode --------------------------------------------------------------------------------------------------


def test_encode_prints_the_tokenizers_ids_on_one_line(gpt2: Run) -> None:
    result = gpt2("encode", TEXT)
    assert result.stdout == " ".join(map(str, TOKENIZER.encode(TEXT))) + "\n"
    assert result.stderr == ""


def test_argument_file_and_standard_input_give_the_same_ids(gpt2: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT.encode())
    expected = gpt2("encode", TEXT).stdout
    assert gpt2("encode", "--file", tmp_path / "text").stdout == expected
    assert gpt2("encode", input=TEXT.encode()).stdout == expected
    assert gpt2("encode", "--file", "-", input=TEXT.encode()).stdout == expected


def test_line_ends_are_part_of_the_text(gpt2: Run) -> None:
    assert gpt2("encode", input=b"a\r\nb\n").stdout.split() == [str(i) for i in TOKENIZER.encode("a\r\nb\n")]


def test_an_empty_text_has_no_ids(gpt2: Run) -> None:
    assert gpt2("encode", "").stdout == "\n"
    assert gpt2("encode", "", "--count").stdout == "0\n"


def test_count_prints_only_the_number(gpt2: Run) -> None:
    assert gpt2("encode", TEXT, "--count").stdout == f"{len(TOKENIZER.encode(TEXT))}\n"


def test_json_is_one_object(gpt2_json: Run) -> None:
    ids = TOKENIZER.encode(TEXT)
    assert gpt2_json("encode", TEXT) == {"count": len(ids), "ids": ids}
    assert gpt2_json("encode", TEXT, "--count") == {"count": len(ids)}


def test_special_tokens_are_recognised_refused_or_read_as_text(gpt2: Run) -> None:
    assert gpt2("encode", "a<|endoftext|>").stdout == "64 50256\n"
    refused = gpt2("encode", "a<|endoftext|>", "--special", "forbid")
    assert refused.exit_code == 2
    assert "special tokens are forbidden" in refused.stderr
    plain = gpt2("encode", "a<|endoftext|>", "--special", "text").stdout
    assert plain.split() == [str(index) for index in TOKENIZER.encode("a<|endoftext|>", special="text")]
    assert gpt2("encode", "a", "--special", "maybe").exit_code == 2


def test_a_table_of_tokens_names_characters_and_ids(gpt2: Run) -> None:
    lines = gpt2("encode", 'a "é\n🐉', "--tokens").stdout.splitlines()
    assert lines[0] == "id\tstart\tend\ttoken"
    assert lines[1:3] == ['64\t0\t1\t"a"', '366\t1\t3\t" \\""']
    assert '198\t4\t5\t"\\n"' in lines
    assert lines[-1].split("\t")[1:3] == ["5", "6"]


def test_tokens_as_json_are_written_as_in_vocabulary_files(gpt2_json: Run) -> None:
    found = gpt2_json("encode", "a the", "--tokens")
    assert found["tokens"] == [
        {"id": 64, "token": "a", "start": 0, "end": 1},
        {"id": 262, "token": "Ġthe", "start": 1, "end": 5},
    ]


def test_every_token_is_shown_on_one_line_of_printable_characters() -> None:
    spelt = [shown(TOKENIZER, index) for index in range(len(TOKENIZER))]
    assert all(text.isprintable() for text in spelt)
    assert len(set(spelt)) == len(spelt)


@pytest.mark.parametrize("name", ["ids.npy", "ids.bin", "ids.txt"])
def test_ids_go_to_a_file_and_come_back(gpt2: Run, tmp_path: Path, name: str) -> None:
    assert gpt2("encode", TEXT, "--output", tmp_path / name).stdout == ""
    assert gpt2("decode", "--file", tmp_path / name).stdout_bytes == TEXT.encode()


@pytest.mark.parametrize("text", ["", TEXT])
def test_an_array_file_is_what_numpy_reads(gpt2: Run, tmp_path: Path, text: str) -> None:
    gpt2("encode", text, "--output", tmp_path / "ids.npy")
    array = np.load(tmp_path / "ids.npy")
    assert array.dtype == np.uint16
    assert array.tolist() == TOKENIZER.encode(text)
    gpt2("encode", text, "--output", tmp_path / "ids.bin")
    assert np.fromfile(tmp_path / "ids.bin", "<u2").tolist() == TOKENIZER.encode(text)


def test_files_of_ids_are_wide_enough_for_the_vocabulary() -> None:
    assert id_dtype(1 << 16) == "<u2"
    assert id_dtype((1 << 16) + 1) == "<u4"


def test_a_failure_leaves_the_output_file_as_it_was(gpt2: Run, tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(b"before")
    assert gpt2("encode", "--output", tmp_path / "ids.npy", input=b"a\xff").exit_code == 2
    assert (tmp_path / "ids.npy").read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["ids.npy"]


def test_output_that_cannot_be_written_is_exit_code_5(gpt2: Run, tmp_path: Path) -> None:
    result = gpt2("encode", "a", "--output", tmp_path / "missing" / "ids.npy")
    assert result.exit_code == 5
    assert "create the parent folder" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("encode", "a", "--file", "b"),
        ("encode", "a", "--output", "b", "--json"),
        ("encode", "a", "--tokens", "--count"),
        ("decode", "1", "--file", "b"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(gpt2: Run, arguments: tuple[str, ...]) -> None:
    assert gpt2(*arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [("encode", "--file"), ("decode", "--file")])
def test_files_that_cannot_be_read_are_named(gpt2: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        result = gpt2(*arguments, path)
        assert result.exit_code == 2
        assert f"cannot read {path}" in result.stderr


# -- pieces of long texts ------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from(" \n\t\x1c\x85\u00a0\u3000a1é!'s🐉Ġ"), max_size=60))
def test_a_text_encoded_in_pieces_has_the_ids_of_the_whole(text: str) -> None:
    pieces = list(sources.texts(Drip(text.encode()), "text"))
    assert "".join(pieces) == text
    assert [index for piece in pieces for index in TOKENIZER.encode(piece)] == TOKENIZER.encode(text)


def test_a_long_text_is_cut_into_pieces() -> None:
    assert len(list(sources.texts(Drip(b"ab cd " * 100), "text"))) > 50


def test_a_text_without_a_place_to_cut_stays_whole() -> None:
    assert list(sources.texts(Drip(b"a" * 1000), "text")) == ["a" * 1000]


def test_only_the_first_piece_of_a_text_is_given_a_space_in_front(gpt2: Run, tmp_path: Path, monkeypatch) -> None:
    GPT2Tokenizer(add_prefix_space=True).save_pretrained(tmp_path)
    monkeypatch.setattr(sources.read_bytes, "__defaults__", (8,))
    text = "many\nlines\nof\na\ntext\nin\npieces"
    found = gpt2("encode", "--model", tmp_path, input=text.encode()).stdout.split()
    assert found == [str(index) for index in TOKENIZER.encode(" " + text)]


def test_texts_are_not_cut_where_a_token_holds_a_space(gpt2: Run, tmp_path: Path, monkeypatch) -> None:
    tokenizer = GPT2Tokenizer()
    tokenizer.add_tokens("<two words>")
    tokenizer.save_pretrained(tmp_path)
    assert sources.can_be_cut(TOKENIZER)
    assert not sources.can_be_cut(tokenizer)
    monkeypatch.setattr(sources.read_bytes, "__defaults__", (6,))
    assert gpt2("encode", "--model", tmp_path, input=b"a<two words>b").stdout == "64 50257 65\n"


@pytest.mark.parametrize(("data", "place"), [(b"abcdefgh\xff", 8), (b"ab\xe2\x82", 2), (b"abcd\xe2\x82a", 4)])
def test_a_byte_that_is_not_utf8_is_named_with_its_place(data: bytes, place: int) -> None:
    with pytest.raises(InputError, match=rf"byte 0x{data[place]:02x} at {place};"):
        list(sources.texts(Drip(data), "text"))


# -- decode --------------------------------------------------------------------------------------------------


def test_decode_gives_exact_bytes_and_adds_nothing(gpt2: Run) -> None:
    assert gpt2("decode", *TOKENIZER.encode(TEXT)).stdout_bytes == TEXT.encode()
    assert gpt2("decode", "8582").stdout_bytes == b"\xf0\x9f"


@pytest.mark.parametrize("written", ["64,65", "[64, 65]", "64\n65\n", "\t64  65 "])
def test_ids_may_be_separated_in_any_usual_way(gpt2: Run, written: str) -> None:
    assert gpt2("decode", input=written.encode()).stdout == "ab"
    assert gpt2("decode", written).stdout == "ab"


def test_json_of_encode_is_read_back(gpt2: Run, gpt2_json: Run) -> None:
    ids = gpt2_json("encode", TEXT)["ids"]
    assert gpt2("decode", input=json.dumps(ids).encode()).stdout_bytes == TEXT.encode()


@settings(deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=50), st.sampled_from([" ", ",", "\n", ", "]))
def test_ids_are_not_torn_apart_between_reads(ids: list[int], separator: str) -> None:
    found = decode.of_text(Drip(separator.join(map(str, ids)).encode()), "ids")
    assert [index for some in found for index in some] == ids


def test_decode_as_json_says_whether_the_bytes_are_text(gpt2_json: Run) -> None:
    assert gpt2_json("decode", "64") == {"count": 1, "text": "a", "utf8": True}
    assert gpt2_json("decode", "8582") == {"count": 1, "text": "\ufffd", "utf8": False, "base64": "8J8="}


def test_special_tokens_can_be_left_out(gpt2: Run) -> None:
    assert gpt2("decode", "64", "50256").stdout == "a<|endoftext|>"
    assert gpt2("decode", "64", "50256", "--skip-special").stdout == "a"


@pytest.mark.parametrize("wrong", ["x", "1.5", "1_0", "1e3", "٣", "9" * 5000, "99999"])
def test_what_is_no_id_is_named(gpt2: Run, wrong: str) -> None:
    result = gpt2("decode", "64", wrong)
    assert result.exit_code == 2
    assert wrong[:5] in result.stderr
    assert result.stdout_bytes == b""


def test_negative_ids_are_refused(gpt2: Run) -> None:
    assert gpt2("decode", input=b"64 -1").exit_code == 2


def test_the_place_of_an_unknown_id_is_told_also_in_a_long_input(gpt2: Run, monkeypatch) -> None:
    monkeypatch.setattr(decode, "CHUNK", 12)
    result = gpt2("decode", input=b"64 64 64 64 64 64 64 99999")
    assert "at place 0" in result.stderr
    assert "places count from id 7 " in result.stderr


def test_array_files_that_hold_no_ids_are_refused(gpt2: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.uint16))
    np.save(tmp_path / "floats.npy", np.zeros(2))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    for file in sorted(tmp_path.iterdir()):
        result = gpt2("decode", "--file", file)
        assert result.exit_code == 2, file
        assert file.name in result.stderr


def test_archives_of_arrays_are_told_from_text(gpt2: Run, tmp_path: Path) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.array([64, 65]))
    (tmp_path / "renamed").write_bytes((tmp_path / "ids.npz").read_bytes())
    (tmp_path / "named.npy").write_bytes((tmp_path / "ids.npz").read_bytes())
    for name in ("ids.npz", "renamed", "named.npy"):
        result = gpt2("decode", "--file", tmp_path / name)
        assert result.exit_code == 2
        assert f"{name} is an archive" in result.stderr
        assert "numpy.save" in result.stderr
    np.save(tmp_path / "ids.npy", np.array([64, 65]))
    (tmp_path / "array").write_bytes((tmp_path / "ids.npy").read_bytes())
    assert gpt2("decode", "--file", tmp_path / "array").stdout == "ab"
    (tmp_path / "ids.bin").write_bytes(b"PK\x03\x04")
    assert gpt2("decode", "--file", tmp_path / "ids.bin").stdout == TOKENIZER.decode([0x4B50, 0x0403])
    result = gpt2("encode", "a", "--output", tmp_path / "out.npz")
    assert result.exit_code == 2
    assert not (tmp_path / "out.npz").exists()


# -- whole processes -----------------------------------------------------------------------------------------


def test_encoding_and_decoding_load_no_framework() -> None:
    program = (
        "import sys\nfrom gpt2_app.cli import app\n"
        "for arguments in (['encode', 'a b'], ['decode', '64']):\n"
        "    try:\n        app(arguments)\n    except SystemExit:\n        pass\n"
        "print({'torch', 'tensorflow', 'huggingface_hub', 'h5py', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=True)
    assert done.stdout.split(b"\n")[1].endswith(b"set()")


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_text_is_utf8_whatever_the_locale(locale: dict[str, str]) -> None:
    ids = " ".join(map(str, TOKENIZER.encode("naïve 🐉"))).encode()
    assert child("encode", "naïve 🐉", **locale).stdout == ids + b"\n"
    done = child("decode", "--json", input=ids, **locale)
    assert json.loads(done.stdout.decode("utf-8"))["text"] == "naïve 🐉"


def test_an_argument_that_is_not_utf8_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_app", "encode", b"a\xff"], capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 2
    assert b"not valid UTF-8" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"some words " * 400_000)
    command = [sys.executable, "-m", "gpt2_app", "encode", "--file", str(tmp_path / "text")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(4) == b"11246"[:4]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("arguments", [["--help"], ["info", "gpt2"], ["decode", "64"]])
def test_writing_into_a_closed_pipe_is_silent(arguments: list[str]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_app", *arguments], stdout=theirs, stderr=subprocess.PIPE, env=environment()
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_exit_code_5() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gpt2_app", "encode", "a"], stdout=full, stderr=subprocess.PIPE, env=environment()
        )
    assert done.returncode == 5
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


@settings(deadline=None)
@given(st.lists(st.integers(0, 300_000), max_size=40))
def test_many_ids_are_written_as_few_are(ids: list[int]) -> None:
    few = encode.in_digits(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_MANY", 1)
        assert encode.in_digits(ids) == few
