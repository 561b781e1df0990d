"""`gpt2 compare` for people: a report of `gpt2_core.comparison` as tables that fit the terminal, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt2_app.backends import BACKENDS
from gpt2_app.terminal import console
from gpt2_core.comparison import IDENTICAL, MISMATCH, Difference, Report, Run, Section
from gpt2_core.parameters import PREFIX, Head

# What a model with each head is called.
HEADS: Mapping[str, str] = {
    Head.NONE.value: "no head",
    Head.LM.value: "language model",
    Head.DOUBLE.value: "double heads",
    Head.SEQUENCE.value: "sequence classification",
    Head.TOKEN.value: "token classification",
    Head.QA.value: "question answering",
}
_MOST_LISTED = 8
_NARROW = 72
_STYLES = {IDENTICAL: "bold green", MISMATCH: "bold red"}


def show(report: Report) -> None:
    """Print everything, in sections, the verdict last."""
    out = console()
    for letter, side in (("A", report.a), ("B", report.b)):
        out.print(Text.assemble((letter, "bold cyan"), "  ", (side.source, "bold"), f" in {_ran(side)}"))
    if report.read is not None:
        rows, tokens = report.read
        out.print(Text(f"both read {tokens:,} tokens" + (f" in each of {rows:,} rows" if rows > 1 else ""), "dim"))
    for note in report.notes:
        out.print(Text(f"note: {note}", "yellow"))
    _config(out, report)
    _parameters(out, report)
    if report.outputs is not None:
        _outputs(out, report.outputs, report.bound)
    if report.gradients is not None:
        _gradients(out, report.gradients)
    out.print()
    out.print(Text(verdict(report), _STYLES.get(report.verdict, "green")))


def _ran(side: Run) -> str:
    backend = BACKENDS.get(side.framework)
    title = backend.title if backend else side.framework
    # The reference computes in float64 whatever the weights were rounded to.
    model = f", {HEADS[side.head]}" if side.head in HEADS else ""
    return f"{title}, {side.dtype}{' weights' if side.framework == 'numpy' else ''}, {side.numbers:,} parameters{model}"


# -- sections ------------------------------------------------------------------------------------------------


def _config(out: Console, report: Report) -> None:
    if report.config:
        _heading(out, "Configuration: differs")
        for name, one, other in report.config:
            out.print(Text(f"  {name}: {one} in A, {other} in B", "yellow"))


def _heading(out: Console, text: str) -> None:
    out.print()
    out.print(Text(text, "bold"))


def _table(*columns: str, wrap: bool = True) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=True, padding=(0, 1))
    table.add_column(columns[0], style="cyan", overflow="fold", no_wrap=not wrap)
    for name in columns[1:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    return table


def _incomplete(out: Console, section: Section) -> None:
    """What cannot be compared: everything of it, together."""
    shapes = [f"{name}: {_shape(one)} in A, {_shape(other)} in B" for name, one, other in section.misshaped]
    for title, rows in (
        ("only in A", section.only_in_a),
        ("only in B", section.only_in_b),
        ("of unlike shapes", shapes),
    ):
        if rows:
            more = [f"... and {len(rows) - _MOST_LISTED} more"] if len(rows) > _MOST_LISTED else []
            out.print(Text(f"  {title} ({len(rows)}):", "red"))
            for row in [*rows[:_MOST_LISTED], *more]:
                out.print(Text(f"    {row}", "red"))


def _parameters(out: Console, report: Report) -> None:
    section = report.parameters
    unlike = [each for each in section.differences if not each.identical]
    count = f"{len(section.differences)} compared"
    _heading(out, f"Parameters: {count}, {f'{len(unlike)} not bit-identical' if unlike else 'all bit-identical'}")
    _incomplete(out, section)
    if not unlike:
        return
    unlike.sort(key=lambda each: (each.ratio, each.error), reverse=True)
    table = _table("parameter", "absolute", "relative", "numbers", "worst at: A, B")
    for each in unlike[:_MOST_LISTED]:
        size = math.prod(each.shape)
        table.add_row(
            _short(each.name),
            _number(each.absolute),
            _number(each.relative),
            f"{each.differing:,} of {size:,}",
            _where(each),
        )
    out.print(table)
    if len(unlike) > _MOST_LISTED:
        out.print(Text(f"  ... and {len(unlike) - _MOST_LISTED} more", "dim"))


def _outputs(out: Console, section: Section, bound: str) -> None:
    held = "the tolerance given" if bound == "given" else f"the tolerances of {bound}"
    _heading(out, f"Outputs, held to {held}")
    _incomplete(out, section)
    table = _table("output", *_columns(out), wrap=False)
    for kind, every in section.by_kind().items():
        _row(table, kind, every)
    out.print(table)


def _gradients(out: Console, section: Section) -> None:
    _heading(out, f"Gradients: {len(section.differences)} compared")
    _incomplete(out, section)
    table = _table("gradient", *_columns(out))
    ranked = sorted(section.differences, key=lambda each: (each.ratio, each.error), reverse=True)
    for each in ranked[:_MOST_LISTED]:
        _row(table, _short(each.name), [each])
    out.print(table)
    if len(ranked) > _MOST_LISTED:
        out.print(Text(f"  ... and {len(ranked) - _MOST_LISTED} more, nearer to each other", "dim"))


def _columns(out: Console) -> list[str]:
    """What stands beside the name: on a narrow terminal the figures of the verdict alone."""
    return [*(("absolute", "relative") if out.width >= _NARROW else ()), "error", "ratio", "worst at"]


def _row(table: Table, name: str, every: Sequence[Difference]) -> None:
    """The worst of several tensors of one kind in each column, and where the error of the worst is."""
    worst = max(every, key=lambda each: (each.ratio, each.error))
    style = "" if all(each.within for each in every) else "red"
    layer = f"{worst.name.removeprefix(worst.kind.partition('.')[0])} " if worst.layer is not None else ""
    cells = {
        "absolute": _number(max(each.absolute for each in every)),
        "relative": _number(max(each.relative for each in every)),
        "error": _number(worst.error),
        "ratio": _number(worst.ratio),
        "worst at": "bit-identical" if all(each.identical for each in every) else f"{layer}{worst.place}",
    }
    shown = [name, *(cells[str(column.header)] for column in table.columns[1:])]
    table.add_row(*(Text(cell, style) if style else cell for cell in shown))


def _where(each: Difference) -> str:
    if each.values is None:
        return "zeros of unlike sign"
    one, other = each.values
    return f"{each.place}: {one:.6g}, {other:.6g}"


def _short(name: str) -> str:
    """A parameter's name without what all of them begin with, as released; the verdict has it whole."""
    return name.removeprefix(PREFIX)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) if shape else "one number"


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if value < 0.01 or value >= 1000 else f"{value:.2g}"


# -- the verdict ---------------------------------------------------------------------------------------------


def verdict(report: Report) -> str:
    """One line: whether the two are the same, the worst that stands for or against it, and what was left out."""
    left = report.left_out
    return _found(report) + (f"; LEFT OUT: {', '.join(left)}" if left else "")


def _found(report: Report) -> str:
    if report.verdict == IDENTICAL:
        return "IDENTICAL: every number that was compared has the same bits"
    if report.verdict != MISMATCH:
        worst = max(
            (part.worst for part in report.sections.values() if part.worst is not None),
            key=lambda each: each.ratio,
            default=None,
        )
        where = f"; the worst error is {_said(worst)}" if worst is not None else ""
        return f"MATCH: all within tolerance{where}"
    return "MISMATCH: " + "; ".join(_against(report))


def _against(report: Report) -> list[str]:
    found = ["the outputs were not compared"] if report.outputs is None else []
    for name, part in report.sections.items():
        lacking = len(part.only_in_a) + len(part.only_in_b) + len(part.misshaped)
        if lacking:
            found.append(f"{lacking} {name} without a counterpart")
        beyond = [each for each in part.differences if not each.within]
        if beyond and part.worst is not None:
            how = "beyond tolerance" if part.worst.tolerance else "not the same"
            found.append(f"{len(beyond)} of {len(part.differences)} {name} {how}, the worst {_said(part.worst)}")
    return found


def _said(worst: Difference) -> str:
    place = f" ({worst.place})" if worst.axes and worst.place else worst.place
    times = f", {_number(worst.ratio)} of its tolerance" if math.isfinite(worst.ratio) else ""
    return f"{worst.name}{place}, {_number(worst.error)}{times}"
