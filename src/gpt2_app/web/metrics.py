"""Counts and times, in the text format of Prometheus.

Source of the format: prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

# Seconds; from one token of a small model to a request that waited as long as it may.
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HELP: Mapping[str, str] = {
    "gpt2_http_requests_total": "Requests by route and status.",
    "gpt2_http_seconds": "Seconds until a request was answered in full.",
    "gpt2_requests_refused_total": "Requests refused because too many wait.",
    "gpt2_requests_cancelled_total": "Requests whose client went away or asked for something else.",
    "gpt2_tokens_total": "Tokens written.",
    "gpt2_context_tokens_total": "Tokens of contexts.",
    "gpt2_context_seconds": "Seconds to read one context, or several at once.",
    "gpt2_steps_total": "Steps, each of one token for every row.",
    "gpt2_step_seconds": "Seconds of one step.",
    "gpt2_first_token_seconds": "Seconds from a request to its first token.",
    "gpt2_waiting": "Requests that wait.",
    "gpt2_rows": "Texts that are being written.",
    "gpt2_models": "Models in memory.",
    "gpt2_model_bytes": "Bytes of their weights.",
}

Labels = tuple[tuple[str, str], ...]


class _Histogram(NamedTuple):
    counts: list[int]
    total: list[float]


class Metrics:
    """Counters and histograms that any thread may add to; gauges are asked for when they are shown."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[str, _Histogram] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            found = self._histograms.setdefault(name, _Histogram([0] * (len(_BOUNDS) + 1), [0.0]))
            found.counts[sum(seconds > bound for bound in _BOUNDS)] += 1
            found.total[0] += seconds

    def gauge(self, name: str, value: Callable[[], float]) -> None:
        """Show what ``value`` gives."""
        self._gauges[name] = value

    def value(self, name: str, **labels: str) -> float:
        """A counter as it is."""
        with self._lock:
            return self._counters.get((name, tuple(sorted(labels.items()))), 0)

    def text(self) -> str:
        """All of them."""
        with self._lock:
            counters = dict(self._counters)
            histograms = {name: (list(each.counts), each.total[0]) for name, each in self._histograms.items()}
        lines: list[str] = []
        for name in sorted({name for name, _ in counters}):
            lines += _head(name, "counter")
            lines += [f"{name}{_labels(labels)} {value:g}" for (of, labels), value in counters.items() if of == name]
        for name, (counts, total) in sorted(histograms.items()):
            lines += _head(name, "histogram")
            below = 0
            for bound, count in zip((*map(str, _BOUNDS), "+Inf"), counts, strict=True):
                below += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
            lines += [f"{name}_sum {total:.6f}", f"{name}_count {below}"]
        for name, value_of in sorted(self._gauges.items()):
            lines += [*_head(name, "gauge"), f"{name} {value_of():.17g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str) -> list[str]:
    return [f"# HELP {name} {_HELP.get(name, name)}", f"# TYPE {name} {kind}"]


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    quoted = (f'{key}="{_escaped(value)}"' for key, value in labels)
    return "{" + ",".join(quoted) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
