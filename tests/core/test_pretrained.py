"""gpt2_core.pretrained: a config and weights as one, whatever the name, the size or the moment of a kill."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, ConfigError, Gpt2Error, HubError, WriteError
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import Head
from gpt2_core.pretrained import open_pretrained, save_pretrained
from gpt2_core.reference import ReferenceModel
from gpt2_core.tokenizer import GPT2Tokenizer

OLD = GPT2Config(vocab_size=7, n_positions=5, n_embd=4, n_layer=1, n_head=2)
NEW = OLD.replace(n_layer=2)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder: Path, config: GPT2Config, **settings: Any) -> Path:
    values = {name: Tensor.of(value) for name, value in initial_values(config).items()}
    return save_pretrained(folder, config, Head.LM, values, architecture="GPT2LMHeadModel", **settings)


def interrupted_after(moves: int, monkeypatch: pytest.MonkeyPatch, folder: Path, work: Callable[[], Any]) -> bool:
    """Whether `work` came to move more than so many files into place, and was stopped there as a kill would."""
    replace, left = Path.replace, moves

    def counted(self: Path, target: Path) -> Path:
        nonlocal left
        if Path(target).parent == folder and not Path(target).name.startswith("."):
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted)
        try:
            work()
        except WriteError:
            return True
    return False


def test_a_save_that_was_killed_is_finished_by_whoever_loads_the_model_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and weights are of different shapes: read from two saves they would not fit."""
    for moves in range(20):
        folder = save(tmp_path / str(moves), OLD)
        if not interrupted_after(moves, monkeypatch, folder, lambda: save(folder, NEW, max_shard_bytes=200)):  # noqa: B023
            break
        if moves % 2:
            assert GPT2Config.from_pretrained(folder).n_layer == NEW.n_layer
        model = ReferenceModel.from_pretrained(folder)
        assert model.config.n_layer == NEW.n_layer
        for name, value in initial_values(NEW).items():
            np.testing.assert_array_equal(model.parameters[name], value)
        assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]
    assert moves > 3


def test_a_tokenizer_whose_save_was_killed_is_finished_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = GPT2Tokenizer()
    tokenizer.add_tokens("<new>")
    GPT2Tokenizer().save_pretrained(tmp_path)
    assert interrupted_after(2, monkeypatch, tmp_path, lambda: tokenizer.save_pretrained(tmp_path))
    assert GPT2Tokenizer.from_pretrained(tmp_path).encode("<new>") == [50257]


@pytest.mark.parametrize("config", [{}, {"n_layer": 1}, "gpt2", 0])
def test_a_config_that_is_none_is_refused_before_anything_is_opened(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match=f"config is a {type(config).__name__}, expected a GPT2Config"):
        open_pretrained(tmp_path / "missing", "lm", config=config)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", None, 7])
def test_what_is_no_name_of_a_model_is_refused(tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save(tmp_path, OLD))  # which "" is not
    with pytest.raises(HubError, match=r"is (not|neither) a"):
        open_pretrained(name, "lm")


def test_what_may_not_be_read_is_no_missing_model(tmp_path: Path, unreadable: Callable[[Path], None]) -> None:
    folder = save(tmp_path / "m", OLD)
    unreadable(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Permission denied"):
        open_pretrained(folder, "lm")
    unreadable(folder)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(Gpt2Error, match=r"cannot be looked .*: Permission denied"):
            open_pretrained(path, "lm")


def test_shards_may_be_sized_in_the_units_of_the_field(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", NEW, max_shard_bytes="0.5KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert ReferenceModel.from_pretrained(folder).config.n_layer == NEW.n_layer
    with pytest.raises(CheckpointError, match=r"max_shard_bytes is 'lots', expected None or .*5GB"):
        save(folder, OLD, max_shard_bytes="lots")
    assert sorted(folder.glob("*.safetensors")) == shards
