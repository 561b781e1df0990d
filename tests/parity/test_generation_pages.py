"""What the pages on generation show runs, in either framework."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
CHANGES = {
    "from gpt2_pt import GPT2LMHeadModel": "from gpt2_tf import TFGPT2LMHeadModel as GPT2LMHeadModel",
    "import torch\n": "import tensorflow as tf\n",
    "torch.tensor": "tf.constant",
    "torch.": "tf.",
}


@pytest.mark.parametrize("page", ["generation.md", "strategies.md"])
def test_the_python_on_the_page_runs_in_this_framework(framework, page, capsys):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.S | re.M))
    if framework.name == "tf":
        for pt, tf in CHANGES.items():
            code = code.replace(pt, tf)
    exec(compile(code, page, "exec"), {"__name__": "page"})
    assert len(capsys.readouterr().out) > 300
