"""gpt2_core.pretrained: whole models in every format, with a configuration beside the weights or inside of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, formats, holds_of, save_checkpoint
from gpt2_core.checkpoints.holds import BESIDE, INSIDE, objections
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CannotHoldError, CheckpointError, CheckpointMismatchError, ConfigError
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import Head
from gpt2_core.pretrained import open_pretrained, save_pretrained
from gpt2_core.reference import ReferenceModel

FORMATS = [
    name
    for name, module in formats().items()
    if not objections(name, holds_of(module), GPT2Config(), Head.LM, ["float32"])
]
CONFIG = GPT2Config(vocab_size=37, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: Path, format: str, config: GPT2Config = CONFIG, head: Head = Head.LM) -> Path:
    values = {name: Tensor.of(value) for name, value in initial_values(config, head).items()}
    return save_pretrained(folder, config, head, values, architecture="GPT2LMHeadModel", format=format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_saved_in_a_format_is_loaded_from_it(tmp_path: Path, format: str) -> None:
    save(tmp_path / "m", format)
    assert (tmp_path / "m" / "config.json").exists() == (holds_of(formats()[format]).config == BESIDE) or format in (
        "ctranslate2",
        "kerashub",
    )
    model = ReferenceModel.from_pretrained(tmp_path / "m")
    for name, value in initial_values(CONFIG).items():
        assert np.array_equal(model.parameters[name], value), name
    assert (model.config.n_head, model.config.vocab_size) == (4, 37)


@pytest.mark.parametrize("format", [name for name in FORMATS if holds_of(formats()[name]).config == INSIDE])
def test_the_configuration_inside_comes_before_another_beside_it(tmp_path: Path, format: str) -> None:
    save(tmp_path, format)
    (tmp_path / "hidden").mkdir()
    if not (tmp_path / "config.json").exists():  # a format may have its own of this name
        CONFIG.replace(n_head=1).save_pretrained(tmp_path)
    assert open_pretrained(tmp_path, "lm").config.n_head == 4
    assert open_pretrained(tmp_path, "lm", config=CONFIG.replace(n_head=2)).config.n_head == 2


def test_what_a_format_cannot_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CannotHoldError, match="tie_word_embeddings=False"):
        save(tmp_path / "m", "nanogpt", CONFIG.replace(tie_word_embeddings=False))
    with pytest.raises(CannotHoldError, match="no place for the head 'qa'"):
        save(tmp_path / "m", "llmc", CONFIG, Head.QA)
    with pytest.raises(CheckpointError, match="keeps the configuration inside, and none was given"):
        save_checkpoint(tmp_path / "m", initial_values(CONFIG), format="llmc")
    assert not (tmp_path / "m").exists()


def test_weights_without_a_configuration_are_not_guessed_at(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, initial_values(CONFIG))
    with pytest.raises(ConfigError, match=r"config\.json does not exist, and .* has no configuration inside"):
        open_pretrained(tmp_path, "lm")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        open_pretrained(tmp_path, "lm")


def test_a_file_of_another_model_is_not_loaded(tmp_path: Path) -> None:
    save(tmp_path, "nanogpt")
    with pytest.raises(CheckpointMismatchError):
        open_pretrained(tmp_path, "lm", config=CONFIG.replace(n_layer=1))


def test_a_model_of_pytorch_is_loaded_from_any_of_them(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from gpt2_pt import GPT2LMHeadModel

    for format in FORMATS:
        save(tmp_path / format, format)
        model = GPT2LMHeadModel.from_pretrained(tmp_path / format)
        for name, value in initial_values(CONFIG).items():
            assert np.array_equal(model.get_parameter(name).detach().numpy(), value), (format, name)
