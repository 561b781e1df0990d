"""`gpt2 write` as it is started: what it prints, what it refuses, and what is left when it is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from gpt2_app import write
from gpt2_app.cli import app


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own, when it serves: the address it printed."""
    command = [sys.executable, "-m", "gpt2_app", "write", "--no-browser", "--port", "0", "--framework", "numpy"]
    command += ["--documents", str(folder / "documents.sqlite3"), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(folder / "no-cache"),
    }
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None
    try:
        yield running.stdout.readline().strip(), running
    finally:
        running.kill()
        running.communicate()


def refused(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["write", "--no-browser", *arguments])


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_it_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    with started(tmp_path) as (address, running):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        assert "Write With Transformer" in httpx.get(address).text
        assert httpx.get(f"{address}api/models").json()["frameworks"][0] == "numpy"
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
        assert (out, err) == ("", "")
        assert running.returncode in (0, 130, -signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_while_it_saves_it_has_all_that_it_confirmed(tmp_path: Path) -> None:
    with started(tmp_path) as (address, running):
        with httpx.Client(base_url=address) as client:
            doc = client.post("/api/documents", json={"text": "0"}).json()
            for version in range(1, 30):
                answer = client.put(f"/api/documents/{doc['id']}", json={"text": f"{version} " * 2000, "base": version})
                assert answer.status_code == 200
        running.send_signal(signal.SIGKILL)
        running.wait(30)
    with started(tmp_path) as (address, _):
        found = httpx.get(f"{address}api/documents/{doc['id']}").json()
    assert (found["version"], found["text"]) == (30, "29 " * 2000)


def test_for_other_machines_a_token_is_drawn_and_part_of_the_address(tmp_path: Path) -> None:
    with started(tmp_path, "--host", "0.0.0.0") as (address, _):
        token = urllib.parse.parse_qs(urllib.parse.urlsplit(address).query)["token"][0]
        assert len(token) >= 32
        plain = address.partition("?")[0]
        assert httpx.get(plain).status_code == 401
        with httpx.Client(follow_redirects=True) as browser:
            assert browser.get(address).status_code == 200
            assert browser.get(f"{plain}api/documents").json() == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = refused("--port", port, "--documents", str(tmp_path / "d.sqlite3"))
    assert result.exit_code == 5
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "--port" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token", "short"], "at least 8"),
        (["--token", "with space in it"], "without spaces"),
        (["--memory", "0"], "--memory"),
        (["--framework", "jax"], "framework 'jax' is not known"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid is no address"),
        (["--port", "70000"], "65535"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_served(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = refused("--documents", str(tmp_path / "d.sqlite3"), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_that_is_not_here_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    result = refused("--model", "owner/nothing", "--documents", str(tmp_path / "d.sqlite3"))
    assert result.exit_code == 6
    assert "owner/nothing" in result.stderr


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def found(name: str, *rest: Any) -> Any:
        return None if name == "uvicorn" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    result = refused()
    assert result.exit_code == 2
    assert "pip install 'gpt2-duet[web]'" in result.stderr


def test_documents_are_kept_in_the_users_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert write.default_documents() == tmp_path / "gpt2-duet" / "documents.sqlite3"


def test_the_command_starts_without_loading_a_framework_or_the_server() -> None:
    heavy = ("torch", "tensorflow", "fastapi", "uvicorn", "sqlite3")
    code = f"import sys, gpt2_app.cli; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
