"""The scripts of examples/ do what they say."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "keras_finetune.py"
RIDDLE = "Two clocks hung in one hall. What the left one struck, the right one struck too; nobody knew which was first."


def lines_of_code(source: str) -> int:
    """Lines that hold code: no blank ones, no comments, and the docstring left out."""
    tree = ast.parse(source)
    held: set[int] = set()
    for node in tree.body[1:]:
        held |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(held)


def test_a_model_tuned_with_fit_knows_its_text_by_heart_in_pytorch(tmp_path):
    pytest.importorskip("torch")
    source = SCRIPT.read_text(encoding="utf-8")
    assert lines_of_code(source) <= 30
    (tmp_path / "riddle.txt").write_text(RIDDLE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "riddle.txt"), str(tmp_path / "tuned")],
        capture_output=True, text=True, timeout=500, check=False, env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(RIDDLE)
    assert {file.name for file in (tmp_path / "tuned").iterdir()} >= {"config.json", "model.safetensors", "merges.txt"}


def test_the_page_shows_the_script_as_it_is():
    source = SCRIPT.read_text(encoding="utf-8")
    page = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
    assert source[source.index("import sys") :] in page
