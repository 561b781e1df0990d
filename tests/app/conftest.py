"""A tiny random GPT-2 on disk, and the command in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from app_process import TINY, Run
from typer.testing import CliRunner

from gpt2_app.cli import app
from gpt2_core.checkpoints import Tensor
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import Head
from gpt2_core.pretrained import save_pretrained


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny language model, without a tokenizer: to be used with ``--tokenizer gpt2``."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    values = {name: Tensor.of(value) for name, value in initial_values(TINY).items()}
    save_pretrained(folder, TINY, Head.LM, values, architecture="GPT2LMHeadModel")
    return str(folder)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.delenv("GPT2_DEBUG", raising=False)


@pytest.fixture
def gpt2() -> Run:
    """The command in this process: ``gpt2("encode", "text", input=b"...")`` gives typer's result."""

    def run(*arguments: object, input: bytes | str | None = None) -> Any:
        result = CliRunner().invoke(app, [str(each) for each in arguments], input=input, prog_name="gpt2")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def gpt2_json(gpt2: Run) -> Run:
    """The command with ``--json``: the value it prints."""

    def run(*arguments: object, **options: Any) -> Any:
        result = gpt2(*arguments, "--json", **options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, for models so small that more of them only wait for each other; skips without PyTorch."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
