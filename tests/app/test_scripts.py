"""scripts/report_tales.py: what it is given wrongly is one message, and what it is given rightly it measures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("report_tales", SCRIPTS / "report_tales.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stories(folder: Path, train: bytes = b"A tale. ", validation: bytes = b"A tale. ") -> Path:
    for part, content in (("train", train), ("validation", validation)):
        (folder / part).mkdir(parents=True)
        if content:
            (folder / part / "a.txt").write_bytes(content)
    return folder


def refused(report: ModuleType, capsys: Any, *arguments: object) -> str:
    with pytest.raises(SystemExit) as leaving:
        report.main([*map(str, arguments)])
    assert leaving.value.code == 2
    complaint: str = capsys.readouterr().err
    return complaint


def test_a_folder_without_stories_is_named_with_what_was_expected(
    report: ModuleType, tmp_path: Path, capsys: Any
) -> None:
    for folder, part in (
        (tmp_path / "missing", "train"),
        (stories(tmp_path / "a", train=b""), "train"),
        (stories(tmp_path / "b", validation=b""), "validation"),
    ):
        told = refused(report, capsys, "--data", folder)
        assert f"{folder / part} holds no .txt files; expected stories in train/ and validation/ of --data" in told


def test_stories_and_models_that_cannot_be_read_are_named(report: ModuleType, tmp_path: Path, capsys: Any) -> None:
    told = refused(report, capsys, "--data", stories(tmp_path / "a", validation=b"\xff"))
    assert "validation/a.txt is not UTF-8" in told.replace("\\", "/")
    told = refused(report, capsys, "--data", stories(tmp_path / "b"), "--model", "./no-such-model")
    assert "./no-such-model" in told


def test_a_book_is_measured(report: ModuleType, tmp_path: Path, capsys: Any, tiny: str) -> None:
    data = stories(tmp_path, b"Once upon a time there was a tale. " * 20, b"Once upon a time. " * 5)
    report.main(["--data", str(data), "--model", tiny, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["book"], row["bytes"]) == ("a", 90)
    assert 0 < row["5-gram"] < row["model"]  # which has never been trained
