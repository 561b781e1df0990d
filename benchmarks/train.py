"""A training step of the 124M GPT-2: ours in both frameworks beside plain PyTorch, transformers and KerasHub.

    python benchmarks/train.py [--rows 4] [--tokens 512] [--steps 3] [--rounds 3] [--threads 0] [--json FILE]
        [--keras-hub PYTHON] [--transformers4 PYTHON]

Each contestant is a fresh process that trains from random weights; all come in turn, ``--rounds`` times. A step is
gradients of one batch, clipping and AdamW, in float32, without dropout; the first is left out. Peak memory is that of
the whole process. KerasHub and transformers 4 need a Python of their own, and are left out without one.

On a machine that does other things too, look at the seconds of the processor: they hardly change with what others do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from common import machine, show, versions, write_json

WORKER = str(Path(__file__).parent / "train_worker.py")


def run(python: str, name: str, args: argparse.Namespace) -> dict | str:
    """What a contestant measured, or why it could not."""
    command = [python, WORKER, name, *map(str, (args.rows, args.tokens, args.steps, args.threads))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no word"])[-1][:200]
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to the frameworks")
    parser.add_argument("--keras-hub", help="the Python of an environment with keras-hub and tensorflow")
    parser.add_argument(
        "--transformers4", help="the Python of an environment with transformers 4, tf-keras, tensorflow"
    )
    parser.add_argument("--only", nargs="*", help="some contestants")
    parser.add_argument("--json")
    args = parser.parse_args()
    pythons = {
        "gpt2_pt": sys.executable,
        "plain PyTorch, as nanoGPT": sys.executable,
        "transformers, PyTorch": sys.executable,
        "gpt2_tf": sys.executable,
        "KerasHub, fit": args.keras_hub,
        "transformers 4, TensorFlow": args.transformers4,
    }
    pythons = {name: python for name, python in pythons.items() if python and (not args.only or name in args.only)}
    print(machine())
    print(versions("torch", "transformers", "tensorflow", "keras"))
    made: dict[str, list[dict]] = {name: [] for name in pythons}
    for turn in range(args.rounds):
        for name, python in pythons.items():
            found = run(python, name, args)
            if isinstance(found, str):
                print(f"  {name}: left out ({found})")
                continue
            made[name].append(found)
            median = statistics.median(found["seconds"])
            used = statistics.median(found["processor"])
            told = f"{median:.2f} s a step, {used:.2f} of the processor's, {found['peak_mb']:.0f} MB"
            print(f"  round {turn + 1}: {name}: {told}", flush=True)
    table = []
    for name, rounds in made.items():
        if rounds:
            wall = [second for one in rounds for second in one["seconds"]]
            processor = [second for one in rounds for second in one["processor"]]
            table.append(
                {
                    "contestant": name,
                    "s a step": statistics.median(wall),
                    "min": min(wall),
                    "max": max(wall),
                    "processor s": statistics.median(processor),
                    "its min": min(processor),
                    "peak MB": max(one["peak_mb"] for one in rounds),
                }
            )
    show(f"a step of {args.rows} x {args.tokens} tokens", table)
    write_json(args.json, {"machine": machine(), "rows": table, "rounds": made})


if __name__ == "__main__":
    main()
