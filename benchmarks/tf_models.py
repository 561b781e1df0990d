"""gpt2_tf beside transformers 4's TensorFlow and KerasHub on 124M random weights: loading, forward, train step.

    python benchmarks/tf_models.py --transformers4 PYTHON --keras-hub PYTHON [--rounds 5] [--json FILE]

PYTHON is an interpreter of an environment that has the peer: `transformers==4.57.*` with `tf-keras` and `tensorflow`;
`keras-hub` with `tensorflow`. One that is not given is left out. Each contestant has a process of its own, and they
take turns, so that a drifting machine hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, show, summary, versions, write_json

WORKER = Path(__file__).with_name("tf_worker.py")
MODES = ("eager", "tf.function", "XLA")


class Contestant:
    """A worker process that runs one task at a time."""

    def __init__(self, name: str, python: str, folder: str) -> None:
        self.name, self.command = name, [python, str(WORKER), name, folder]
        self.process: Any = None

    def prepare(self) -> None:
        subprocess.run([*self.command, "prepare"], check=True, stderr=subprocess.DEVNULL)

    def load(self) -> dict[str, float]:
        """A fresh process that loads and ends: seconds, and the peak of its memory."""
        began = time.perf_counter()
        process = subprocess.Popen([*self.command, "load"], stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{self.name} did not load")
        return {"seconds": time.perf_counter() - began, "peak MB": usage.ru_maxrss / 1000}

    def run(self, task: str, mode: str) -> float | str:
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        self.process.stdin.write(json.dumps({"task": task, "mode": mode}) + "\n")
        self.process.stdin.flush()
        answer: float | str = json.loads(self.process.stdout.readline() or '"the process ended"')
        return answer


def loading(contestants: list[Contestant], rounds: int) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, float]]] = {each.name: [] for each in contestants}
    for turn in range(rounds + 1):
        for each in contestants:
            run = each.load()
            if turn:  # the first one warms the file cache
                runs[each.name].append(run)
    return [
        {"load, imports included": name, **summary([run["seconds"] for run in of]),
         "peak MB": statistics.median(run["peak MB"] for run in of)}
        for name, of in runs.items()
    ]  # fmt: skip


def running(contestants: list[Contestant], task: str, mode: str, rounds: int) -> list[dict[str, Any]]:
    times: dict[str, list[float | str]] = {each.name: [] for each in contestants}
    for turn in range(rounds + 2):
        for each in contestants:
            seconds = each.run(task, mode)
            if turn >= 2:  # tracing, compiling, and one more
                times[each.name].append(seconds)
    for each in contestants:
        each.run("forget", mode)
    good = {name: [s for s in of if isinstance(s, float)] for name, of in times.items()}
    base = statistics.median(good["gpt2_tf"])
    rows = []
    for name, of in good.items():
        if len(of) < len(times[name]):
            print(f"  {name}, {task}, {mode}: {next(s for s in times[name] if isinstance(s, str))}")
            continue
        rows.append({f"{task}, {mode}": name, **summary(of), "ratio to gpt2_tf": statistics.median(of) / base})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transformers4", metavar="PYTHON")
    parser.add_argument("--keras-hub", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", default="load,forward,train")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--json")
    args = parser.parse_args()
    print(machine())
    print(versions("tensorflow", "keras", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        contestants = [
            Contestant(name, python, str(Path(folder) / name.replace(" ", "-")))
            for name, python in (
                ("gpt2_tf", sys.executable), ("transformers 4", args.transformers4), ("KerasHub", args.keras_hub),
            )
            if python
        ]  # fmt: skip
        _write_ours(Path(folder) / "gpt2_tf")
        for each in contestants[1:]:
            each.prepare()
        results: dict[str, Any] = {"machine": machine()}
        if "load" in args.tasks:
            results["load"] = loading(contestants, args.rounds)
            show("loading gpt2 in a fresh process, s", results["load"])
        for task in ("forward", "train"):
            for mode in args.modes.split(",") if task in args.tasks else ():
                results[f"{task}, {mode}"] = running(contestants, task, mode, args.rounds)
                show(f"{task}, {mode}, s", results[f"{task}, {mode}"])
    write_json(args.json, results)


def _write_ours(folder: Path) -> None:
    from gpt2_core import PRESETS
    from gpt2_core.checkpoints import Tensor
    from gpt2_core.initialization import initial_values
    from gpt2_core.pretrained import save_pretrained

    config = PRESETS["gpt2"]
    tensors = {name: Tensor.of(value) for name, value in initial_values(config).items()}
    save_pretrained(folder, config, "lm", tensors, architecture="GPT2LMHeadModel")


if __name__ == "__main__":
    main()
