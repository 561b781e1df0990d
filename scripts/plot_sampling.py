#!/usr/bin/env python3
"""docs/strategies.png: what top-p, min-p and typical keep, where the embedded model is sure and where it is not.

    pip install 'gpt2-duet[plots]'
    python scripts/plot_sampling.py                    # or another file as argument

The distributions are those of gpt2-tales after two beginnings, by the float64 reference; the rules are those of
`gpt2_core.sampling`, the specification itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_core import GPT2Tokenizer, ReferenceModel
from gpt2_core.sampling import min_p, softmax, top_p, typical_p

BEGINNINGS = ("He opened his mouth, but he could not speak a", "Then he took her by the hand and led her to the")
# 0.2 is what Meister et al. 2023 found best for stories.
RULES: tuple[tuple[str, Any, float], ...] = (
    ("top-p 0.9", top_p, 0.9),
    ("min-p 0.1", min_p, 0.1),
    ("typical 0.9", typical_p, 0.9),
    ("typical 0.2", typical_p, 0.2),
)
COLOURS = ("#3b6fb6", "#c7651d", "#3f8f55", "#8a5aa8")
INK, GREY, LIGHT = "#222222", "#6b6b6b", "#ececec"
RANKS = 5000
NAMED = (1, 2, 3, 4, 6, 8, 11, 15, 21, 30, 44, 66, 100, 160, 260, 450, 800, 1500)  # a name's width apart


def main() -> None:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "docs" / "strategies.png"
    parser.add_argument("file", nargs="?", type=Path, default=default)
    file = parser.parse_args().file

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(4, 1, gridspec_kw={"height_ratios": [2.4, 1.25, 2.4, 1.25]})
    tokenizer, model = GPT2Tokenizer(), ReferenceModel.from_pretrained("gpt2-tales")
    for place, beginning in enumerate(BEGINNINGS):
        scores = model([tokenizer.encode(beginning)]).logits[0, -1]
        curve, bars = grid[2 * place : 2 * place + 2]
        _curve(curve, scores, beginning, tokenizer)
        _bars(bars, scores)
    figure.savefig(file, dpi=110)


def _curve(axes: Any, scores: Any, beginning: str, tokenizer: GPT2Tokenizer) -> None:
    """Probability by rank, the likeliest tokens by name."""
    p = softmax(scores)
    order = np.argsort(-p, kind="stable")
    entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
    ranks = np.arange(1, RANKS + 1)
    axes.plot(ranks, p[order[:RANKS]], color=INK, linewidth=1.3)
    for rank in NAMED:
        token = int(order[rank - 1])
        axes.plot([rank], [p[token]], "o", color=INK, markersize=3.5)
        axes.annotate(
            tokenizer.decode([token]).strip(), (rank, p[token]), (3, 5), rotation=35, textcoords="offset points",
            fontsize=9, color=INK,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(0.9, RANKS), ylim=(1e-6, 8))
    axes.set_yticks([1e-6, 1e-4, 1e-2, 1], ["0.0001%", "0.01%", "1%", "100%"])
    axes.minorticks_off()
    axes.set_title(
        f"“{beginning} …”    entropy {entropy:.2f} nats, likeliest token {p.max():.0%}",
        loc="left", fontsize=11.5, color=INK,
    )  # fmt: skip
    axes.set_ylabel("probability", color=GREY)
    axes.tick_params(labelbottom=False)
    _plain(axes)


def _bars(axes: Any, scores: Any) -> None:
    """Which ranks each rule keeps."""
    p = softmax(scores)
    order = np.argsort(-p, kind="stable")
    for row, (_, rule, value) in enumerate(RULES):
        kept = np.isfinite(rule(scores, value))
        y = len(RULES) - 1 - row
        axes.barh(y, RANKS, left=0.9, height=0.66, color=LIGHT)
        for start, stop in _runs(kept[order][:RANKS]):
            # On a logarithmic scale a rank reaches from half a rank before to half a rank behind it.
            left, right = max(start + 0.5, 0.9), min(stop + 0.5, RANKS)
            axes.barh(y, right - left, left=left, height=0.66, color=COLOURS[row])
        count = int(kept.sum())
        said = f"{count:,} token{'s' * (count != 1)}: {p[kept].sum():.0%}"
        axes.text(RANKS * 1.06, y, said, va="center", fontsize=9.5, color=INK)
    axes.set(xscale="log", xlim=(0.9, RANKS), ylim=(-0.6, len(RULES) - 0.4))
    axes.set_yticks(range(len(RULES)), [name for name, _, _ in reversed(RULES)], fontsize=9.5)
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    axes.set_xlabel("rank of the token, the likeliest first", color=GREY)
    _plain(axes)
    axes.tick_params(axis="y", length=0)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#bbbbbb")
    axes.tick_params(colors=GREY)
    axes.tick_params(axis="y", labelcolor=INK)


def _runs(kept: Any) -> list[tuple[int, int]]:
    """The first place of each stretch of truths and the one behind its last, counted from 0."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], kept, [False])).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


if __name__ == "__main__":
    main()
