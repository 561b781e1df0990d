"""PyTorch users keep their loops: the scripts of examples/ do what they say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NEEDS = {"own_loop": None, "with_accelerate": "accelerate", "with_lightning": "pytorch_lightning"}


@pytest.mark.parametrize("name", NEEDS)
def test_a_loop_of_one_s_own_learns(name, tmp_path):
    needed = NEEDS[name]
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    text = tmp_path / "text.txt"
    text.write_text("Two clocks hung in one hall. What the left one struck, the right one struck too. " * 4)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), str(text), "12"],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.5, done.stdout
    assert (tmp_path / "tuned" / "config.json").is_file()
