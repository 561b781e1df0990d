"""CTranslate2's folders: what its converter wrote (tests/peers/ctranslate2), what we write, and what is refused.

The tests at the end ask CTranslate2 itself, where the environment variable GPT2_DUET_CTRANSLATE2 names the Python of an
environment that has it; see tests/peers.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import About, Tensor, ctranslate2, open_checkpoint
from gpt2_core.config import ACTIVATIONS, GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointFormatError, Gpt2Error, TokenizerError
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.reference import ReferenceModel
from gpt2_core.tokenizer import GPT2Tokenizer

PEERS = Path(__file__).parent.parent / "peers"
CASES = ("plain", "int8", "int16", "float16")
CONFIG = GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)


def theirs(tmp_path: Path, case: str) -> Path:
    with zipfile.ZipFile(PEERS / "ctranslate2" / f"{case}.zip") as archive:
        archive.extractall(tmp_path / case)
    return tmp_path / case


def parameters(config: GPT2Config = CONFIG, dtype: str = "float32") -> dict[str, Tensor]:
    chance = np.random.default_rng(0)
    return {
        row.name: Tensor.of(chance.normal(0.1, 0.4, row.shape).astype(dtype))
        for row in parameter_table(config, Head.LM)
    }


def ours(folder: Path, config: GPT2Config = CONFIG, **settings: Any) -> Path:
    ctranslate2.write(folder, parameters(config), about=About(config, Head.LM, **settings))
    return folder


def computed(folder: Path, ids: np.ndarray) -> np.ndarray:
    with open_source(folder) as opened:
        values = {name: tensor.array() for name, tensor in opened.tensors().items()}
        return np.asarray(ReferenceModel(opened.config, values, opened.head)(ids).logits)


# What CTranslate2 wrote -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_its_converter_wrote_computes_what_it_computed(tmp_path: Path, case: str) -> None:
    folder = theirs(tmp_path, case)
    with np.load(folder / "answers.npz") as answers:
        logits = computed(folder, answers["ids"])
        assert np.abs(logits - answers["logits"]).max() < 2e-5 * np.abs(logits).max()
    with open_source(folder) as opened:
        config = opened.config
        assert (config.n_head, config.n_inner, config.activation_function) == (2, 12, "gelu")
        assert config.tie_word_embeddings and config.layer_norm_epsilon == 1e-5 and config.eos_token_id == 256
        assert opened.known.source == str(folder / "config.json")
        assert any("quantized" in note for note in opened.checkpoint.notes) == (case in ("int8", "int16"))
        assert "decoder/alignment_layer" in opened.checkpoint.ignored


def test_what_is_written_again_is_what_its_converter_wrote_byte_for_byte(tmp_path: Path) -> None:
    folder = theirs(tmp_path, "plain")
    with open_source(folder) as opened:
        report = carry_out(plan_conversion(opened, tmp_path / "again", "ctranslate2", tokenizer=False))
    assert (tmp_path / "again" / "model.bin").read_bytes() == (folder / "model.bin").read_bytes()
    said, again = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert again.pop("gpt2_duet")["n_inner"] == 12 and again == said
    assert report.verification is not None and report.verification.difference == 0


def test_equal_biases_that_are_stored_once_are_read_where_they_belong(tmp_path: Path) -> None:
    data = (ours(tmp_path / "a") / "model.bin").read_bytes()
    names = [f"decoder/layer_{layer}/self_attention/linear_1/bias" for layer in (0, 1)]
    start = data.index(ctranslate2._text(names[1]))
    size = len(ctranslate2._text(names[1])) + 1 + 4 + 1 + 4 + 32
    count = (
        data.index(ctranslate2._text("TransformerDecoderSpec")) + len(ctranslate2._text("TransformerDecoderSpec")) + 4
    )
    (variables,) = struct.unpack_from("<I", data, count)
    aliases = data.rindex(ctranslate2._text("decoder/projection/weight")) - 4
    data = (
        data[:count] + struct.pack("<I", variables - 1) + data[count + 4 : start] + data[start + size : aliases]
        + struct.pack("<I", 2) + data[aliases + 4 :] + ctranslate2._text(names[1]) + ctranslate2._text(names[0])
    )  # fmt: skip
    (tmp_path / "a" / "model.bin").write_bytes(data)
    with open_checkpoint(tmp_path / "a") as opened:
        first, second = (opened.array(f"transformer.h.{layer}.attn.c_proj.bias") for layer in (0, 1))
        assert np.array_equal(first, second) and first.any()


# What we write --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_configuration_comes_back(tmp_path: Path, activation: str, tied: bool) -> None:
    config = CONFIG.replace(
        activation_function=activation, tie_word_embeddings=tied, layer_norm_epsilon=1e-3, resid_pdrop=0.3,
        extra={"author": "me"}, n_inner=None if tied else 32,
    )  # fmt: skip
    with open_source(ours(tmp_path / "a", config)) as opened:
        assert opened.config == config
    kept = json.loads((tmp_path / "a" / "config.json").read_text())
    del kept["gpt2_duet"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(kept))
    with open_source(tmp_path / "a") as opened:
        said = opened.config
        assert ctranslate2.ACTIVATIONS[said.activation_function] == ctranslate2.ACTIVATIONS[activation]
        assert said.layer_norm_epsilon == 1e-3 and said.tie_word_embeddings == tied and said.resid_pdrop == 0.1


def test_the_tokenizer_is_a_list_of_tokens_and_the_hubs_files(tmp_path: Path) -> None:
    config = CONFIG.replace(vocab_size=50304, bos_token_id=50256, eos_token_id=50256)
    parts = GPT2Tokenizer()
    parts.save_pretrained(tmp_path / "tokens")
    from gpt2_core.checkpoints.tokenizers import parts_beside

    ours(tmp_path / "a", config, tokenizer=parts_beside(tmp_path / "tokens"))
    tokens = json.loads((tmp_path / "a" / "vocabulary.json").read_text())
    assert len(tokens) == 50304 and tokens[50256] == "<|endoftext|>" and tokens[15496] == "Hello"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert GPT2Tokenizer.from_pretrained(tmp_path / "a").encode("Hello world") == [15496, 995]
    with pytest.raises(CannotHoldError, match="--no-tokenizer"):
        ours(tmp_path / "b", CONFIG, tokenizer=parts_beside(tmp_path / "tokens"))
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (tmp_path / "a" / name).unlink()
    with open_checkpoint(tmp_path / "a") as opened, pytest.raises(TokenizerError, match="does not store merges"):
        assert opened.tokenizer is not None
        opened.tokenizer()
    (tmp_path / "a" / "vocabulary.json").write_text(json.dumps(tokens[:50257]))
    with open_checkpoint(tmp_path / "a") as opened:
        assert opened.tokenizer is not None and len(opened.tokenizer().vocabulary) == 50257


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"pruned_heads": {0: [1]}}, "pruned_heads"),
    ):
        config = CONFIG.replace(**changes)
        with pytest.raises(CannotHoldError, match=message):
            ctranslate2.write(tmp_path / "a", parameters(config), about=About(config))
    with pytest.raises(CannotHoldError, match="float64"):
        ctranslate2.write(tmp_path / "a", parameters(dtype="float64"), about=About(CONFIG))
    with pytest.raises(CheckpointError, match="needs about"):
        ctranslate2.write(tmp_path / "a", parameters())
    assert list(tmp_path.iterdir()) == []
    several = CONFIG.replace(eos_token_id=(3, 4))
    assert "stops at one token only" in ctranslate2.remarks(About(several))[0] and not ctranslate2.remarks(
        About(CONFIG)
    )


# What is no such file -------------------------------------------------------------------------------------------------


def file(*variables: bytes, version: int = 6, kind: str = "TransformerDecoderSpec", aliases: bytes = bytes(4)) -> bytes:
    head = struct.pack("<I", version) + ctranslate2._text(kind) + struct.pack("<II", 8, len(variables))
    return head + b"".join(variables) + aliases


def variable(name: str, shape: tuple[int, ...] = (2,), code: int = 0, size: int | None = None, data: int = -1) -> bytes:
    width = {0: 4, 1: 1, 2: 2}.get(code, 4)
    count = int(np.prod(shape, dtype=np.int64)) * width if size is None else size
    sizes = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return ctranslate2._text(name) + sizes + struct.pack("<BI", code, count) + bytes(count if data < 0 else data)


def alias(*names: str) -> bytes:
    return struct.pack("<I", len(names) // 2) + b"".join(map(ctranslate2._text, names))


SETTINGS = [variable("decoder/num_heads", (), 2), variable("decoder/activation", (), 1)]
GPT = [*SETTINGS, variable("decoder/scale_embeddings", (), 1)]
LIES: dict[str, tuple[bytes, str]] = {
    "another version": (file(version=7), "version is 7; expected one of 4, 5, 6"),
    "another model": (file(kind="WhisperSpec"), "holds a 'WhisperSpec'"),
    "cut in a header": (file()[:30], "it is truncated"),
    "too many variables": (file()[:31] + b"\xff" * 8, "claims 4294967295 variables"),
    "a name without an end": (file(variable("a").replace(b"a\0", b"ab")), "damaged or truncated"),
    "a name that is no text": (file(variable("a").replace(b"a\0", b"\xff\0")), "is not UTF-8"),
    "a name twice": (file(variable("a"), variable("a")), "a stands there twice"),
    "an unknown dtype": (file(variable("a", code=6)), "of the dtype 6"),
    "huge sizes": (file(variable("a", (2**32 - 1,) * 3, size=8)), "that memory could hold"),
    "too many sizes": (file(variable("a", (1,) * 40)), "at most 32"),
    "fewer bytes than the shape": (file(variable("a", size=4)), "has 4 bytes .* expected 8"),
    "beyond the end": (file(variable("a", (2**20,), data=8)), "within the file"),
    "something behind": (file() + b"x", "and describes"),
    "an alias of nothing": (file(variable("a"), aliases=alias("b", "c")), "or means nothing"),
    "an alias of itself": (file(variable("a"), aliases=alias("a", "a")), "stands there twice"),
    "no heads": (file(variable("decoder/activation", (), 1)), "lacks decoder/num_heads"),
    "no word about scaling": (file(*SETTINGS), "scale_embeddings=0 among them"),
    "rotary positions": (file(*SETTINGS, variable("decoder/rotary_dim", (), 2)), "decoder/rotary_dim=0"),
    "nothing more": (file(*GPT), "it lacks"),
    "integers without a scale": (
        file(*GPT, variable("w", (2, 2), 1)),
        "w is int8 without a scale",
    ),
    "a scale of another size": (
        file(
            *SETTINGS, variable("decoder/scale_embeddings", (), 1), variable("w", (2, 2), 1), variable("w_scale", (3,))
        ),
        "with a scale of float32",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_with_what_is_wrong(tmp_path: Path, lie: str) -> None:
    data, message = LIES[lie]
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(CheckpointFormatError, match=message):
        ctranslate2.read(tmp_path)


def test_each_setting_that_makes_it_another_model_is_refused(tmp_path: Path) -> None:
    folder = ours(tmp_path / "a")
    sound = (folder / "model.bin").read_bytes()
    for name, value in ctranslate2.GPT2.items():
        at = sound.find(ctranslate2._text(name) + b"\0\1")
        if at >= 0:
            at += len(ctranslate2._text(name)) + 6
            (folder / "model.bin").write_bytes(sound[:at] + bytes([1 - value]) + sound[at + 1 :])
            with pytest.raises(CheckpointFormatError, match=f"{name}={1 - value}"):
                ctranslate2.read(folder)
    assert ctranslate2.find(folder) == folder / "model.bin" and ctranslate2.find(tmp_path) is None


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json"])
def test_texts_beside_it_that_are_damaged_are_told(tmp_path: Path, name: str) -> None:
    folder = theirs(tmp_path, "plain")
    for content in (b"{", b"3", b"\xff", b"[" * 100_000):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointFormatError, match=name.replace(".", r"\.")):
            open_source(folder)
    (folder / name).unlink()
    (tmp_path / name).write_text("{}")
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="outside of"):
        open_source(folder)


@pytest.mark.parametrize("case", ["plain", "int8"])
def test_flipped_cut_and_spliced_files_end_well(tmp_path: Path, case: str) -> None:
    folder = theirs(tmp_path, case)
    sound, pick = (folder / "model.bin").read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(pick.choice([1, 2, 5])):
            at = pick.choice([pick.randrange(len(data)), pick.randrange(200)])
            data[at : at + pick.choice([1, 1, 4])] = pick.randbytes(pick.choice([1, 1, 4, 0, 9]))
        (folder / "model.bin").write_bytes(data[: pick.choice([len(data), len(data), pick.randrange(len(data))])])
        try:
            with open_source(folder) as opened:
                for tensor in opened.tensors().values():
                    tensor.array()
        except Gpt2Error:
            pass


# CTranslate2 itself ---------------------------------------------------------------------------------------------------

INTERPRETER = os.environ.get("GPT2_DUET_CTRANSLATE2", "")
LIVE: dict[str, dict[str, Any]] = {
    **{name: {"activation_function": name} for name in ACTIVATIONS},
    "untied": {"tie_word_embeddings": False},
    "n_inner": {"n_inner": 20},
    "epsilon": {"layer_norm_epsilon": 0.1},
}


@pytest.mark.skipif(not INTERPRETER, reason="GPT2_DUET_CTRANSLATE2 names no Python that has ctranslate2")
def test_ctranslate2_computes_our_logits_from_what_we_write(tmp_path: Path) -> None:
    GPT2Tokenizer().save_pretrained(tmp_path / "tokens")
    from gpt2_core.checkpoints.tokenizers import parts_beside

    jobs, ids = [], np.random.default_rng(1).integers(0, 50257, (2, 12))
    np.save(tmp_path / "ids.npy", ids)
    for name, changes in LIVE.items():
        config = CONFIG.replace(vocab_size=50257, **changes)
        ours(tmp_path / name, config, tokenizer=parts_beside(tmp_path / "tokens"))
        jobs.append(
            {"folder": str(tmp_path / name), "ids": str(tmp_path / "ids.npy"), "answers": f"{tmp_path / name}.npy"}
        )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [INTERPRETER, str(PEERS / "make_ctranslate2.py"), "answer", str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in LIVE:
        logits = computed(tmp_path / name, ids)
        difference = np.abs(np.load(f"{tmp_path / name}.npy") - logits).max()
        assert difference < 2e-5 * np.abs(logits).max(), (name, difference)
