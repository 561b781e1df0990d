"""gpt2_core.checkpoints.llmc: model files of every version, and the tokenizer beside them.

llm.c's writers are made again here from what its train_gpt2.py does, tensor by tensor.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import About, Tensor, detect, llmc, open_checkpoint, round_to_bfloat16
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.checkpoints.tokenizers import gpt2_parts, parts_of
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import CheckpointError, CheckpointFormatError, TokenizerError
from gpt2_core.parameters import parameter_table
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.vocabulary import BYTE_TO_CHAR

CONFIG = GPT2Config(vocab_size=130, n_positions=6, n_embd=8, n_layer=3, n_head=2, bos_token_id=None, eos_token_id=None)
BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
NORMS_LAST = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
PADDED = 256  # the next multiple of 128


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def parameters() -> dict[str, np.ndarray]:
    """Values that bfloat16 holds, so that every version has the same ones."""
    chance = np.random.default_rng(0)
    return {row.name: (chance.integers(-64, 64, row.shape) / 32).astype(np.float32) for row in parameter_table(CONFIG)}


def numbers(value: np.ndarray, dtype: str) -> bytes:
    return value.tobytes() if dtype == "float32" else round_to_bfloat16(value).tobytes()


def header(version: int, **changes: int) -> bytes:
    fields = {"n_positions": 6, "vocab_size": 130, "n_layer": 3, "n_head": 2, "n_embd": 8, "padded": PADDED} | changes
    return struct.pack("<256i", 20240326, version, *fields.values(), *[0] * 248)


def made(version: int, dtype: str, norms: str, order: tuple[str, ...], *, padded: bool) -> bytes:
    """A model file as write_model and write_tensors make it: Linear kernels are (out, in)."""
    values = parameters()
    wte = values["transformer.wte.weight"]
    if padded:
        wte = np.concatenate([wte, np.zeros((PADDED - 130, 8), np.float32)])
    parts = [numbers(wte, dtype), numbers(values["transformer.wpe.weight"], dtype)]
    for part in order:
        for kind in ("weight", "bias"):
            for layer in range(3):
                value = values[f"transformer.h.{layer}.{part}.{kind}"]
                value = np.ascontiguousarray(value.T) if value.ndim == 2 else value
                parts.append(numbers(value, norms if part.startswith("ln") else dtype))
    parts += [numbers(values[f"transformer.ln_f.{kind}"], norms) for kind in ("weight", "bias")]
    return header(version, padded=PADDED if padded else 0) + b"".join(parts)


VERSIONS: dict[str, Any] = {
    "1": lambda: made(1, "float32", "float32", BLOCK, padded=False),
    "2": lambda: made(2, "float32", "float32", NORMS_LAST, padded=False),
    "2 of bfloat16": lambda: made(2, "bfloat16", "float32", NORMS_LAST, padded=False),
    "3": lambda: made(3, "float32", "float32", BLOCK, padded=True),
    "3 of bfloat16": lambda: made(3, "bfloat16", "float32", NORMS_LAST, padded=False),
    "4": lambda: made(4, "bfloat16", "float32", NORMS_LAST, padded=True),
    "5": lambda: made(5, "bfloat16", "bfloat16", BLOCK, padded=True),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_read(tmp_path: Path, version: str) -> None:
    (tmp_path / "gpt2_124M.bin").write_bytes(VERSIONS[version]())
    assert detect(tmp_path)[0] == detect(tmp_path / "gpt2_124M.bin")[0] == "llmc"
    with open_checkpoint(tmp_path) as opened:
        assert set(opened) == set(parameters())
        for name, value in parameters().items():
            assert np.array_equal(opened.array(name), value), name
        assert config_of(opened, beside=False).config == CONFIG
        assert opened.names_in_file["transformer.h.2.attn.c_attn.weight"] == "qkvw[2]"
        padded = version[0] in "45" or version == "3"
        assert opened.ignored == ({"the last 126 rows of wte": "padding to a multiple of 128"} if padded else {})


@pytest.mark.parametrize(("dtype", "version"), [("float32", "3"), ("bfloat16", "5")])
def test_what_is_written_is_what_the_program_writes_byte_for_byte(tmp_path: Path, dtype: str, version: str) -> None:
    given = {
        name: Tensor.of(value) if dtype == "float32" else Tensor.of(round_to_bfloat16(value), "bfloat16")
        for name, value in parameters().items()
    }
    (written,) = llmc.write(tmp_path / "model.bin", given, about=About(CONFIG))
    assert written.read_bytes() == VERSIONS[version]()


def test_a_mixture_of_dtypes_needs_one_to_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "four.bin").write_bytes(VERSIONS["4"]())
    with open_source(tmp_path / "four.bin") as source:
        with pytest.raises(CheckpointError, match="holds one dtype, and there are bfloat16, float32: give --dtype"):
            plan_conversion(source, tmp_path / "x.bin", "llmc")
        carry_out(plan_conversion(source, tmp_path / "five.bin", "llmc", dtype="bfloat16"))
    assert (tmp_path / "five.bin").read_bytes() == VERSIONS["5"]()


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: struct.pack("<i", 20240326), "it is truncated"),
        (lambda: header(0), "a version from 1 to 5"),
        (lambda: header(6), "a version from 1 to 5"),
        (lambda: header(3), "asks for"),
        (lambda: VERSIONS["3"]()[:-1], "it is truncated, or of another kind"),
        (lambda: VERSIONS["5"]() + b"\0", "it is truncated, or of another kind"),
        (lambda: header(3, n_layer=0), "it is damaged"),
        (lambda: header(3, n_embd=-8), "it is damaged"),
        (lambda: header(3, n_head=3), "it is damaged"),
        (lambda: header(3, padded=129), "it is damaged"),
        (lambda: header(3, n_layer=2**31 - 1, n_embd=2**31 - 2), "asks for"),
        (lambda: header(5, padded=0), "a padded size that goes with its version"),
    ],
)
def test_a_header_that_lies_is_found_out(tmp_path: Path, data: Any, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(data())
    with pytest.raises(CheckpointFormatError, match=message):
        llmc.read(tmp_path / "a.bin")


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    less = parameters()
    del less["transformer.ln_f.bias"]
    with pytest.raises(CheckpointError, match="not those of the configuration: lnfb"):
        llmc.write(tmp_path / "a.bin", less, about=About(CONFIG))
    with pytest.raises(CheckpointError, match="float32 or bfloat16 alone, not float64"):
        llmc.write(tmp_path / "a.bin", {"wte.weight": np.zeros((130, 8))}, about=About(CONFIG))
    with pytest.raises(CheckpointError, match="needs about"):
        llmc.write(tmp_path / "a.bin", parameters())
    with pytest.raises(CheckpointError, match="holds no model of llm"):
        llmc.read(tmp_path)
    assert list(tmp_path.iterdir()) == []


# The tokenizer --------------------------------------------------------------------------------------------------------


def tokenizer_file(tokens: list[bytes], version: int = 2, count: int | None = None, end: int = 50256) -> bytes:
    """As write_tokenizer makes it."""
    first = (20240328, version, len(tokens) if count is None else count, end if version > 1 else 0)
    return struct.pack("<256i", *first, *[0] * 252) + b"".join(bytes([len(token)]) + token for token in tokens)


def gpt2_tokens() -> list[bytes]:
    tokenizer = GPT2Tokenizer()
    return [tokenizer.decode_bytes([index]) for index in range(len(tokenizer))]


def test_gpt2s_tokenizer_goes_there_and_back(tmp_path: Path) -> None:
    llmc.write(tmp_path, parameters(), about=About(CONFIG, tokenizer=gpt2_parts()))
    assert (tmp_path / "gpt2_tokenizer.bin").read_bytes() == tokenizer_file(gpt2_tokens())
    with open_source(tmp_path) as source:
        assert source.tokenizer is not None and source.tokenizer.read().vocabulary.is_gpt2
        carry_out(plan_conversion(source, tmp_path / "hub", "safetensors"))
    assert GPT2Tokenizer.from_pretrained(tmp_path / "hub").encode("Hello world") == [15496, 995]


def test_the_first_version_of_the_tokenizer_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(tokenizer_file(gpt2_tokens(), version=1))
    assert llmc.read_tokenizer(tmp_path / "t.bin").vocabulary.is_gpt2


def bytes_only(longest: int = 1) -> Any:
    """A tokenizer of the 256 bytes, and of one merged run of `longest` a's."""
    ids = {char: index for index, char in enumerate(BYTE_TO_CHAR.values())}
    merges = []
    while longest > 1:
        merges.append(("a" * len(merges) + "a", "a"))
        ids["a" * (len(merges) + 1)] = len(ids)
        longest -= 1
    return parts_of(ids, merges, source="the test")


def test_another_vocabulary_is_written_but_not_read_for_want_of_merges(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(llmc.tokenizer_bytes(bytes_only()))
    assert struct.unpack("<4i", (tmp_path / "t.bin").read_bytes()[:16]) == (20240328, 1, 256, 0), "no end of text"
    with pytest.raises(TokenizerError, match="256 tokens that are not GPT-2's"):
        llmc.read_tokenizer(tmp_path / "t.bin")


def test_a_token_too_long_for_a_byte_is_refused() -> None:
    with pytest.raises(CheckpointError, match="one of the tokens has 256 bytes"):
        llmc.tokenizer_bytes(bytes_only(longest=256))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a header"),
        (tokenizer_file([b"a"], version=3), "version 1 or 2"),
        (tokenizer_file([b"a"], count=-1), "and tokens"),
        (tokenizer_file([b"a"], count=2**30), "and tokens"),
        (tokenizer_file([b"a"], count=2), "need"),
        (tokenizer_file([b"a", b"bc"])[:-1], "need"),
        (tokenizer_file([b"a"]) + b"x", "need"),
    ],
)
def test_a_damaged_tokenizer_is_found_out(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=message):
        llmc.read_tokenizer(tmp_path / "t.bin")
