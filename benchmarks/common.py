"""What the benchmarks share: interleaved runs, medians, spread, and a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> str:
    """The machine and the versions, in a line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def versions(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contestant, in turn A B C A B C ..., so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def fresh_process(code: str, env: Mapping[str, str] | None = None) -> dict[str, float]:
    """Run ``code`` in a Python of its own: wall seconds and peak resident megabytes of the whole process."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _PEAK],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {"seconds": seconds, "peak_mb": float(done.stdout.strip().splitlines()[-1])}


# The kernel's own high-water mark of this process; getrusage would also count what it was forked from.
_PEAK = """
import re as _re
print(int(_re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1000)
"""


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with one row a contestant."""
    print(f"\n{title}")
    if not rows:
        return
    names = list(rows[0])
    cells = [names, *[[_cell(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        print("  " + "  ".join([first, *rest]))


def _cell(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def write_json(path: str | None, results: Mapping[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
