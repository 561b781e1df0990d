"""The command in a process of its own, as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from gpt2_core.config import GPT2Config

# The whole vocabulary, so that GPT-2's own tokenizer goes with it; weights large enough for texts that vary.
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=48, initializer_range=0.4)

#: The fixtures `gpt2` and `gpt2_json`: arguments in, typer's result or the printed value out.
Run = Callable[..., Any]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child: one thread, no network, and `changes`."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def child(*arguments: object, input: bytes = b"", **changes: str) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, as users run it."""
    return subprocess.run(
        [sys.executable, "-m", "gpt2_app", *map(str, arguments)],
        input=input,
        capture_output=True,
        env=environment(**changes),
        check=False,
        timeout=120,
    )
