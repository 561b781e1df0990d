#!/usr/bin/env python3
"""How far the frameworks are apart, measured here and now: the table of docs/parity.md, as markdown.

    python scripts/report_parity.py                     everything: minutes, 5 GB of memory, 7 GB of disk
    python scripts/report_parity.py --small             without the model of 124M parameters
    python scripts/report_parity.py --json report.json  every figure, as `gpt2 compare --json` gives them

Each checkpoint is run once in each framework on the same tokens, and each two of the runs are compared. The random
models are made from seed 0 with weights of the size that trained ones have: gains around 1 (deviation 0.1), biases
around 0 (0.1), kernels and tables of deviation 1/sqrt(columns). Parameters have to be bit-identical, and are checked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_app import running
from gpt2_app.compare import PASSAGE
from gpt2_core.checkpoints import Tensor
from gpt2_core.comparison import TOLERANCES, Report, Section, Side, compare
from gpt2_core.config import GPT2Config
from gpt2_core.parameters import Head, Parameter, count_parameters, parameter_table
from gpt2_core.pretrained import save_pretrained
from gpt2_core.tokenizer import GPT2Tokenizer

SMALL = GPT2Config(n_layer=4, n_head=4, n_embd=64, n_positions=128)
MODULES = {"pt": "torch", "tf": "tensorflow", "numpy": "numpy"}
TITLES = {"pt": "PyTorch", "tf": "TensorFlow", "numpy": "reference"}
COLUMNS = {
    "loss": ("loss",),
    "logits": ("logits",),
    "hidden states": ("hidden_states",),
    "attentions": ("attentions",),
    "past": ("past.key", "past.value"),
}


@dataclass(frozen=True)
class Job:
    """One checkpoint in one number format, on so many tokens."""

    title: str
    source: str
    dtype: str
    tokens: int


def ordinary(row: Parameter, seed: int) -> np.ndarray:
    """Values of one parameter as wide as a trained GPT-2's; they depend on the seed and on its name alone."""
    digest = hashlib.sha256(f"{seed}:{row.name}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    values = generator.standard_normal(row.shape, dtype=np.float32)
    if row.init == "ones":
        return np.float32(1) + np.float32(0.1) * values
    return values * np.float32(0.1 if row.init == "zeros" else 1 / math.sqrt(row.shape[-1]))


def make(folder: Path, config: GPT2Config, seed: int = 0) -> str:
    """A random checkpoint with these values, made one tensor at a time."""
    tensors = {
        row.name: Tensor("float32", row.shape, lambda row=row: ordinary(row, seed)) for row in parameter_table(config)
    }
    save_pretrained(folder, config, Head.LM, tensors, architecture="GPT2LMHeadModel")
    return str(folder)


def jobs(folder: Path, small_only: bool) -> Iterator[Job]:
    small = make(folder / "small", SMALL)
    for dtype in TOLERANCES:
        yield Job(f"random, {_millions(SMALL)}", small, dtype, SMALL.n_positions)
    for dtype in TOLERANCES:
        yield Job("gpt2-tales, trained", "gpt2-tales", dtype, 512)
    if not small_only:
        yield Job(f"random, {_millions(GPT2Config())}", make(folder / "gpt2", GPT2Config()), "float32", 1024)


def _millions(config: GPT2Config) -> str:
    return f"{count_parameters(config) / 1e6:.3g}M"


def measure(job: Job, names: list[str], folder: Path, gradients: bool) -> list[Report]:
    """Each framework's run held to that of each after it in ``names``."""
    checkpoint = running.look(job.source, Head.LM)
    ids = np.resize(np.array(GPT2Tokenizer().encode(PASSAGE)), (1, job.tokens))
    inputs = running.inputs_of(checkpoint.config, Head.LM, ids)
    sides = []
    for name in names:
        print(f"{job.title}, {job.dtype}: {TITLES[name]}", file=sys.stderr)
        wanted = gradients and name != "numpy"
        sides.append(_alone(name, checkpoint, job.dtype, inputs, folder / name, wanted))
    return [compare(a, b, read=ids.shape) for a, b in itertools.combinations(sides, 2)]


def _alone(
    name: str, checkpoint: running.Checkpoint, dtype: str, inputs: running.Inputs, folder: Path, gradients: bool
) -> Side:
    """One run in a process of its own: TensorFlow keeps the memory it once had, and the next run would add to it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(running.run, (name, checkpoint, dtype, inputs, folder), {"gradients": gradients})


def line(job: Job, report: Report) -> list[str]:
    """One row of the table."""
    outputs, gradients = report.outputs, report.gradients
    assert outputs is not None
    cells = [job.title, job.dtype, str(job.tokens), f"{TITLES[report.a.framework]}, {TITLES[report.b.framework]}"]
    cells.append("same bits" if report.parameters.identical else "**differ**")
    cells += [_worst(outputs, kinds) for kinds in COLUMNS.values()]
    cells.append("" if gradients is None else _worst(gradients, ("gradient",)))
    ratio = max((part.worst.ratio for part in report.sections.values() if part.worst is not None), default=0.0)
    cells.append(f"{ratio:.2g}" if ratio <= 1 else f"**{ratio:.2g}**")
    return cells


def _worst(section: Section, kinds: tuple[str, ...]) -> str:
    return f"{max(each.error for each in section.differences if each.kind in kinds):.1e}"


def table(lines: list[list[str]]) -> str:
    head = ["model", "format", "tokens", "compared", "parameters", *COLUMNS, "gradients", "of tolerance"]
    rule = ["---"] * 2 + ["--:", "---", "---"] + ["--:"] * (len(head) - 5)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *lines])


def machine(names: list[str]) -> str:
    versions = ", ".join(f"{MODULES[name]} {metadata.version(MODULES[name])}" for name in names)
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave out the model of 124M parameters")
    parser.add_argument("--no-gradients", action="store_true", help="outputs alone")
    parser.add_argument("--frameworks", nargs="+", choices=list(MODULES), help="default: all that are installed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    installed = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    names = args.frameworks or installed
    if len(names) < 2:
        parser.error(f"it takes two to compare; here are {', '.join(installed)}: install torch or tensorflow")
    lines, reports = [], []
    with tempfile.TemporaryDirectory(prefix="gpt2-parity-") as place:
        for job in jobs(Path(place), args.small):
            with tempfile.TemporaryDirectory(dir=place) as folder:
                found = measure(job, names, Path(folder), not args.no_gradients)
            lines += [line(job, report) for report in found]
            reports += [_as_json(job, report) for report in found]
    print(f"Measured on {machine(names)}.\n")
    print(table(lines))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(names), "reports": reports}) + "\n", encoding="utf-8")
    return 0 if all(report["verdict"] != "mismatch" for report in reports) else 1


def _as_json(job: Job, report: Report) -> dict[str, Any]:
    # Without the heat map, which is most of it, and without the name of a folder that is gone.
    value = report.to_json() | {"model": job.title}
    del value["heat"]
    for side in "ab":
        value[side]["source"] = job.title
    return value


if __name__ == "__main__":
    sys.exit(main())
