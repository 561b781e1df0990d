"""The errors of a comparison as a picture: layers down, token positions across, colours on a log scale.

matplotlib draws it; it is an extra of its own (``plots``) and imported only here, when a picture is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_app.backends import BACKENDS
from gpt2_core.comparison import Array, HeatRow, Report
from gpt2_core.errors import InputError
from gpt2_core.files import atomic_write

# The panels from top to bottom; the logits are drawn like one more layer.
_PANELS = (
    ("hidden_states", "hidden states"),
    ("attentions", "attentions"),
    ("past.key", "keys"),
    ("past.value", "values"),
    ("last_hidden_state", "last state"),
    ("logits", "logits"),
)
_MOST_COLUMNS = 512  # more tokens than this share a column, which shows the worst of them
_NOTHING, _ENDLESS = "#d9d9d9", "#d62728"


def check_installed() -> None:
    """Raise InputError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--heatmap needs matplotlib, which is not installed; pip install 'gpt2-duet[plots]', or leave out --heatmap"
        )


def draw(report: Report, path: Path) -> None:
    """Write the heat map of a report as a PNG. Raises: InputError without matplotlib, WriteError."""
    check_installed()
    figure = _figure(report)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    with atomic_write(path) as out:
        out.write(data.getvalue())


def _figure(report: Report) -> Any:
    # The Agg canvas by itself: no window system is looked for, and pyplot's global state is left alone.
    figures = importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.backends.backend_agg")
    panels = [(title, rows) for kind, title in _PANELS if (rows := [row for row in report.heat if row.kind == kind])]
    heights = [max(len(rows), 2) for _, rows in panels] or [1]
    figure = figures.Figure(figsize=(11, min(max(2.2 + 0.16 * sum(heights), 4.5), 16)), layout="constrained")
    figure.suptitle(_title(report), fontsize=11)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    axes = list(grid[:, 0])
    if not panels:
        axes[0].text(0.5, 0.5, "nothing was compared by layer and token", ha="center", va="center")
        axes[0].set_axis_off()
        return figure
    colours, scale = _colours(report)
    for each, (title, rows) in zip(axes, panels, strict=True):
        _panel(each, title, rows, colours, scale)
    axes[-1].set_xlabel("token position")
    figure.align_ylabels(axes)
    _colour_bar(figure, axes, colours, scale, report)
    return figure


def _title(report: Report) -> str:
    said = [
        f"{side.source.rstrip('/').rpartition('/')[2]} in {BACKENDS[side.framework].title}, {side.dtype}"
        if side.framework in BACKENDS
        else f"{side.source} in {side.framework}, {side.dtype}"
        for side in (report.a, report.b)
    ]
    held = f" (tolerance {_tolerance(report):.2g})" if _tolerance(report) else ""
    return f"{said[0]}   against   {said[1]}: {report.verdict}\nlargest error at each token, by layer{held}"


def _colours(report: Report) -> tuple[Any, Any]:
    """The colour map, and the logarithmic scale: from the smallest error to the largest, or to the tolerance."""
    every = np.concatenate([np.array(row.errors) for row in report.heat])
    shown = every[(every > 0) & np.isfinite(every)]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (1e-16, 1e-15)
    # Whole powers of ten, at least two of them apart, so that the scale can be read.
    high = max(high, _tolerance(report))
    bottom = math.floor(math.log10(low))
    top = max(math.ceil(math.log10(high)), bottom + 2)
    colours = importlib.import_module("matplotlib").colormaps["viridis"].with_extremes(bad=_NOTHING, over=_ENDLESS)
    return colours, importlib.import_module("matplotlib.colors").LogNorm(10.0**bottom, 10.0**top)


def _panel(axes: Any, title: str, rows: list[HeatRow], colours: Any, scale: Any) -> None:
    errors = np.array([row.errors for row in rows])
    T = errors.shape[1]
    picture = _pooled(np.where(np.isfinite(errors), errors, scale.vmax * 10))
    axes.imshow(
        np.ma.masked_less_equal(picture, 0),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=scale,
        extent=(-0.5, T - 0.5, len(rows) - 0.5, -0.5),
    )
    axes.set_ylabel(f"{title}\nof layer" if len(rows) > 1 else "", fontsize=9)
    step = max(1, math.ceil(len(rows) / 8))
    ticks = list(range(0, len(rows), step))
    axes.set_yticks(ticks, [_layer(rows[i], title) for i in ticks], fontsize=7)


def _layer(row: HeatRow, title: str) -> str:
    if row.layer is None:
        return title
    return "embed" if row.kind == "hidden_states" and row.layer == 0 else str(row.layer)


def _pooled(errors: Array) -> Array:
    """At most `_MOST_COLUMNS` columns: the largest of each group."""
    T = errors.shape[1]
    group = math.ceil(T / _MOST_COLUMNS)
    padded = np.pad(errors, ((0, 0), (0, -T % group)))
    pooled: Array = padded.reshape(len(errors), -1, group).max(axis=2)
    return pooled


def _colour_bar(figure: Any, axes: list[Any], colours: Any, scale: Any, report: Report) -> None:
    mappable = importlib.import_module("matplotlib.cm").ScalarMappable(scale, colours)
    endless = any(math.isinf(each) for row in report.heat for each in row.errors)
    label = "error: |a - b| / (1 + |b|); grey: none" + ("; red: not a number" if endless else "")
    bar = figure.colorbar(mappable, ax=axes, label=label, pad=0.01)
    tolerance = _tolerance(report)
    if scale.vmin < tolerance < scale.vmax:
        bar.ax.axhline(tolerance, color="red", linewidth=1.5)
        bar.ax.text(-0.2, tolerance, "tolerance", color="red", fontsize=8, va="center", ha="right")


def _tolerance(report: Report) -> float:
    """What logits, hidden states, attentions and past were held to."""
    kinds = [kind for kind, _ in _PANELS]
    held = [] if report.outputs is None else [each for each in report.outputs.differences if each.kind in kinds]
    return held[0].tolerance if held else 0.0
