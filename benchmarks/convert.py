"""Converting a model to every format and back, against copying its file: time, and the most memory held.

Each conversion runs in a process of its own, in turns with `cp` of the source and with `cp` followed by fsync (a
conversion forces what it wrote to the disk; `cp` does not). Numbers are random; the file is in the page cache, as after
a download. "ratio to cp" is of medians, "of the least" of the fastest run of each: where others use the machine too,
that is closer to what it is when they do not.

    python benchmarks/convert.py --size gpt2-xl --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import machine, show, write_json

CHILD = """
import json, sys, time
from pathlib import Path
from gpt2_core.conversion import carry_out, open_source, plan_conversion
source, target, to, verify = sys.argv[1:]
start = time.perf_counter()
with open_source(source) as opened:
    carry_out(plan_conversion(opened, target, to, verify=verify, tokenizer=False))
seconds = time.perf_counter() - start
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps([seconds, peak]))
"""


def source(folder: Path, size: str) -> Path:
    """A model of random float32 numbers, one file as the hub has it."""
    from gpt2_core.checkpoints import Tensor, save_checkpoint
    from gpt2_core.config import PRESETS
    from gpt2_core.parameters import parameter_table

    chance = np.random.default_rng(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return Tensor("float32", shape, lambda: chance.standard_normal(shape, np.float32))

    save_checkpoint(folder, {row.name: drawn(row.shape) for row in parameter_table(PRESETS[size])})
    PRESETS[size].save_pretrained(folder)
    return folder


def processor() -> float:
    """Seconds that the processes started here, and ended, have computed, the kernel's part included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copied(file: Path, target: Path, *, to_disk: bool) -> tuple[float, float]:
    start, before = time.perf_counter(), processor()
    subprocess.run(["cp", file, target], check=True)
    if to_disk:
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds, processor() - before


def converted(given: Path, target: Path, to: str, verify: str) -> tuple[float, float, int]:
    # Compiled modules are kept, as they are where a package is installed.
    keep = {"PYTHONPYCACHEPREFIX": str(given.parent / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
    before = processor()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, given, target, to, verify],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | keep,
    )
    seconds, peak = json.loads(done.stdout)
    return seconds, processor() - before, peak


def main() -> None:
    from gpt2_core.checkpoints import formats

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="gpt2", help="a preset: gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--formats", default=",".join(formats()))
    parser.add_argument("--verify", default="none", choices=("none", "tensors", "logits"))
    parser.add_argument("--folder", help="where to write; the default is the system's temporary folder")
    parser.add_argument("--json")
    args = parser.parse_args()

    print(machine())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        given = source(root / "source", args.size)
        file = given / "model.safetensors"
        converted(source(root / "small", "gpt2-tales"), root / "warm", "bin", args.verify)
        copies: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        found: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
        for _ in range(args.rounds):
            for to in args.formats.split(","):
                for to_disk, runs in copies.items():
                    runs.append(copied(file, root / "copy", to_disk=to_disk))
                found.setdefault((to, "to"), []).append(converted(given, root / "there", to, args.verify))
                found.setdefault((to, "from"), []).append(
                    converted(root / "there", root / "back", "safetensors", args.verify)
                )
                shutil.rmtree(root / "there")
                shutil.rmtree(root / "back")
        base, with_sync = (statistics.median(s for s, _ in copies[to_disk]) for to_disk in (False, True))
        least = min(s for s, _ in copies[False])
        computed = statistics.median(cpu for _, cpu in copies[False])
        rows: list[dict[str, Any]] = [
            {
                "format": format,
                "direction": direction,
                "s": statistics.median(s for s, _, _ in runs),
                "least s": min(s for s, _, _ in runs),
                "ratio to cp": statistics.median(s for s, _, _ in runs) / base,
                "of the least": min(s for s, _, _ in runs) / least,
                "to cp and fsync": statistics.median(s for s, _, _ in runs) / with_sync,
                "cpu s": statistics.median(cpu for _, cpu, _ in runs),
                "peak MB": max(peak for _, _, peak in runs) / 1e6,
            }
            for (format, direction), runs in found.items()
        ]
        size = file.stat().st_size
        title = (
            f"{args.size}, {size / 1e9:.2f} GB, {args.rounds} rounds; cp {base:.2f} s (least {least:.2f} s, "
            f"{computed:.2f} s of the processor), cp and fsync {with_sync:.2f} s; verify {args.verify}"
        )
        show(title, rows)
        write_json(args.json, {"machine": machine(), "title": title, "rows": rows})


if __name__ == "__main__":
    main()
