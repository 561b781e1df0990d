"""How far two runs of a model are apart: tensor by tensor, against one published table of tolerances.

    side = Side(source, framework, dtype, config, parameters, outputs, gradients)    what one run gave, in numpy
    report = compare(one, other)                                                     what differs, where, how much
    report.verdict                                                                   identical, match or mismatch

No framework is needed here: whoever runs a model hands over arrays. They are read piece by piece, so mappings that
fetch theirs from the disk keep memory small.

An **error** is |a - b| / (1 + |b|): absolute near zero, relative far from it. A nan is an infinite error. What each
tolerance was measured on is in docs/decisions/0006-tolerances.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints.tensors import round_to_bfloat16, widen_bfloat16
from gpt2_core.config import FIELDS, GPT2Config
from gpt2_core.errors import CheckpointFormatError, InputError, nearest
from gpt2_core.outputs import Output

Array = NDArray[Any]

IDENTICAL, MATCH, MISMATCH = "identical", "match", "mismatch"

_PIECE = 1 << 20  # numbers compared at a time: in float64, a few arrays of 8 MB
_FORMAT = 1  # of `Report.to_json`


# -- the published table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """The largest errors that are let pass, by what is compared.

    ``values``: logits, hidden states, attentions, past. ``loss``: means over many of them, which err less.
    ``gradients``: of the loss, by parameter.
    """

    values: float
    loss: float
    gradients: float


#: By the number format of weights and arithmetic, the finest first: against the float64 reference on the same
#: (rounded) weights, and between frameworks. Measured, times a margin: docs/decisions/0006-tolerances.md.
TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float64": Tolerance(values=1e-10, loss=1e-10, gradients=1e-8),
        "float32": Tolerance(values=4e-5, loss=7e-6, gradients=1e-5),
        "float16": Tolerance(values=1.6e-1, loss=1.5e-3, gradients=8e-2),
        "bfloat16": Tolerance(values=7e-1, loss=1.6e-2, gradients=7e-1),
    }
)

#: Float32 against transformers in float32.
TRANSFORMERS = 2e-5


def error(got: Any, expected: Any) -> float:
    """The largest error of ``got``, an array or a nest of tuples of them; infinite where shapes or nests differ."""
    if isinstance(expected, tuple):
        if not isinstance(got, tuple) or len(got) != len(expected):
            return np.inf
        return max((error(one, other) for one, other in zip(got, expected, strict=True)), default=0.0)
    got, expected = np.asarray(got), np.asarray(expected)
    return measure(got, expected).error if got.shape == expected.shape else np.inf


def coarsest(dtypes: Sequence[str]) -> str:
    """The number format with the widest tolerance. Raises: InputError for one that is not in the table."""
    for dtype in dtypes:
        if dtype not in TOLERANCES:
            hint = nearest(dtype, list(TOLERANCES))
            raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(TOLERANCES)}{hint}")
    return max(dtypes, key=list(TOLERANCES).index)


def rounded(values: Array, dtype: str) -> Array:
    """``values`` as ``dtype`` holds them, to the nearest, ties to even; bfloat16 comes back in float32."""
    if dtype == "bfloat16":
        return widen_bfloat16(round_to_bfloat16(np.asarray(values, np.float32)))
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, as in the frameworks
        return np.asarray(values).astype(dtype)


# -- two arrays ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """How far two arrays of one shape are apart.

    Attributes:
        identical: every number has the same bits (number formats are widened first, which is exact).
        differing: how many numbers have not.
        absolute, relative: the largest |a - b|, and the largest |a - b| / max(|a|, |b|); each over all numbers.
        error: the largest |a - b| / (1 + |b|); infinite where either is nan.
        where: the index of the largest error; None where there is no error at all.
        values: the two numbers there.
    """

    identical: bool
    differing: int
    absolute: float
    relative: float
    error: float
    where: tuple[int, ...] | None
    values: tuple[float, float] | None


def measure(a: Array, b: Array) -> Measure:
    """Compare two arrays of the same shape, a piece at a time."""
    return _measure(a, b)[0]


def _measure(a: Array, b: Array) -> tuple[Measure, NDArray[np.float64]]:
    """The measure, and the largest error of each row (all axes but the last)."""
    last = a.shape[-1] if a.ndim else 1
    rows = math.prod(a.shape[:-1])
    one, other = a.reshape(rows, last), b.reshape(rows, last)
    errors = np.zeros(rows)
    differing, absolute, relative, worst, at = 0, 0.0, 0.0, 0.0, None
    step = max(1, _PIECE // max(last, 1))
    for start in range(0, rows if last else 0, step):
        x, y = (np.ascontiguousarray(side[start : start + step], np.float64) for side in (one, other))
        unlike = x.view(np.int64) != y.view(np.int64)
        if not unlike.any() and not np.isnan(x).any():
            continue
        differing += int(unlike.sum())
        far, share, wrong = _errors(x, y)
        absolute, relative = max(absolute, float(far.max())), max(relative, float(share.max()))
        errors[start : start + step] = wrong.max(axis=1)
        highest = int(wrong.argmax())
        if wrong.flat[highest] > worst:
            worst, at = float(wrong.flat[highest]), start * last + highest
    where = None if at is None else tuple(int(i) for i in np.unravel_index(at, a.shape or (1,)))[: a.ndim]
    values = None if where is None else (float(a[where]), float(b[where]))
    return Measure(not differing, differing, absolute, relative, worst, where, values), errors.reshape(a.shape[:-1])


def _errors(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Of each pair of numbers: absolute difference, relative difference, error; nan counts as infinitely far."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        far = np.abs(x - y)
        share = far / np.maximum(np.abs(x), np.abs(y))
        wrong = far / (1 + np.abs(y))
    same = x == y  # so that 0 / 0 and infinity less itself are no difference
    for found in (far, share, wrong):
        found[np.isnan(found)] = np.inf
        found[same] = 0.0
    return far, share, wrong


# -- what one run gave ---------------------------------------------------------------------------------------


class Key(NamedTuple):
    """The name of one output tensor: the field of the model's output, and the layer where it has one of each."""

    kind: str
    layer: int | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        field, dot, part = self.kind.partition(".")
        return f"{field}[{self.layer}]{dot}{part}"


#: What the axes of an output are, by its kind and how many it has.
AXES: Mapping[tuple[str, int], tuple[str, ...]] = MappingProxyType(
    {
        ("logits", 4): ("row", "choice", "token", "entry"),
        ("logits", 3): ("row", "token", "entry"),
        ("logits", 2): ("row", "entry"),
        ("mc_logits", 2): ("row", "choice"),
        ("start_logits", 2): ("row", "token"),
        ("end_logits", 2): ("row", "token"),
        ("last_hidden_state", 3): ("row", "token", "unit"),
        ("hidden_states", 3): ("row", "token", "unit"),
        ("attentions", 4): ("row", "head", "token", "seen token"),
        ("past.key", 4): ("row", "head", "token", "unit"),
        ("past.value", 4): ("row", "head", "token", "unit"),
    }
)


def named(output: Output) -> Iterator[tuple[Key, Any]]:
    """Every tensor of a model's output, of any framework, with its name: ``hidden_states[3]``, ``past[0].key``.

    hidden_states[0] are the embeddings, hidden_states[i] what block i gave, counted from 1; attentions and past are
    counted from 0.
    """
    for kind, value in output.items():
        if not isinstance(value, tuple):
            yield Key(kind), value
            continue
        for layer, tensor in enumerate(value):
            if kind == "past":
                yield Key("past.key", layer), tensor[0]
                yield Key("past.value", layer), tensor[1]
            else:
                yield Key(kind, layer), tensor


@dataclass(frozen=True)
class Side:
    """What one run of one model gave, as arrays of float16, float32 or float64 (bfloat16 widened).

    Attributes:
        source: name, folder or file of the checkpoint.
        framework: what ran it.
        dtype: the number format of the weights, one of `TOLERANCES`.
        config: what the model is.
        parameters: by the names of the parameter table, as the framework holds them.
        outputs: by `Key`; `named` makes them.
        gradients: by the names of the parameter table; None where they were not asked for.
        stored: the number format of each parameter in its file.
        head: which model it was run as, one of `gpt2_core.parameters.Head`.
        left_out: what the checkpoint has and this side has not, in words: parameters, and what its own head returns.
    """

    source: str
    framework: str
    dtype: str
    config: GPT2Config
    parameters: Mapping[str, Array]
    outputs: Mapping[Key, Array]
    gradients: Mapping[str, Array] | None = None
    stored: Mapping[str, str] | None = None
    head: str = ""
    left_out: tuple[str, ...] = ()


# -- the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """How far one tensor of the two sides is apart; the attributes of `Measure`, and what they are held to.

    ``kind`` is "parameter", "gradient", or the field of the output; ``axes`` names what ``where`` counts.
    """

    name: str
    kind: str
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    tolerance: float
    identical: bool
    differing: int
    absolute: float
    relative: float
    error: float
    where: tuple[int, ...] | None
    values: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        """The error as a multiple of the tolerance; infinite for any error where none is let pass."""
        if self.error == 0:
            return 0.0
        return self.error / self.tolerance if self.tolerance else math.inf

    @property
    def within(self) -> bool:
        """Whether the error is let pass. Parameters of the same bits are the same, even where they are nan."""
        return self.error <= self.tolerance or (self.kind == "parameter" and self.identical)

    @property
    def place(self) -> str:
        """Where the largest error is, in words: ``row 0, token 17, unit 5``; empty where there is none."""
        if not self.where:
            return ""
        if not self.axes:
            return f"[{', '.join(map(str, self.where))}]"
        return ", ".join(f"{axis} {i}" for axis, i in zip(self.axes, self.where, strict=True))


@dataclass(frozen=True)
class Section:
    """Parameters, outputs or gradients of both sides: what only one has, unlike shapes, and all that was compared."""

    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    differences: tuple[Difference, ...]

    @property
    def complete(self) -> bool:
        """Whether both sides have the same tensors, in the same shapes."""
        return not (self.only_in_a or self.only_in_b or self.misshaped)

    @property
    def matches(self) -> bool:
        """Whether nothing is missing and every error is let pass."""
        return self.complete and all(each.within for each in self.differences)

    @property
    def identical(self) -> bool:
        """Whether every number has the same bits."""
        return self.complete and all(each.identical for each in self.differences)

    @property
    def worst(self) -> Difference | None:
        """The difference with the highest ratio to its tolerance; None where there is no error at all."""
        wrong = [each for each in self.differences if each.error > 0]
        return max(wrong, key=lambda each: (each.ratio, each.error), default=None)

    def by_kind(self) -> dict[str, tuple[Difference, ...]]:
        """The differences by their kind, in the order of the model."""
        kinds = dict.fromkeys(each.kind for each in self.differences)
        return {kind: tuple(each for each in self.differences if each.kind == kind) for kind in kinds}


@dataclass(frozen=True)
class Run:
    """What was compared, and what was left out: one side, without its numbers."""

    source: str
    framework: str
    dtype: str
    numbers: int
    head: str = ""
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatRow:
    """The largest error at each token position of one output tensor, over all rows of the batch."""

    kind: str
    layer: int | None
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """What differs between two sides, where, and how much.

    Attributes:
        a, b: what was compared; b is what a is held to.
        read: rows and tokens of the input; None where the models were not run.
        bound: the row of `TOLERANCES` that was used, or "given" for a tolerance of the caller's.
        config: fields in which the configurations differ, with both values.
        notes: what else a reader should know, in words.
        parameters, outputs, gradients: outputs are None where the models could not be run on the same input (``notes``
            says why), gradients also where they were not asked for.
        heat: for a heat map, in the order of the model.
    """

    a: Run
    b: Run
    read: tuple[int, ...] | None
    bound: str
    config: tuple[tuple[str, Any, Any], ...]
    notes: tuple[str, ...]
    parameters: Section
    outputs: Section | None
    gradients: Section | None
    heat: tuple[HeatRow, ...]

    @property
    def sections(self) -> dict[str, Section]:
        """The parts that were compared, by name."""
        parts = {"parameters": self.parameters, "outputs": self.outputs, "gradients": self.gradients}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the checkpoints have and nothing was held to, in words, with the side that has it."""
        both = [name for name in self.a.left_out if name in self.b.left_out]
        return (
            *(f"{name} of both" for name in both),
            *(f"{name} of A" for name in self.a.left_out if name not in both),
            *(f"{name} of B" for name in self.b.left_out if name not in both),
        )

    @property
    def verdict(self) -> str:
        """Either "identical", the same bits everywhere, or "match", every error is let pass, or "mismatch"."""
        if self.outputs is None or not all(part.matches for part in self.sections.values()):
            return MISMATCH
        return IDENTICAL if all(part.identical for part in self.sections.values()) else MATCH

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON can hold; infinities and nan as strings. `from_json` is the inverse."""
        return {"format": _FORMAT, "verdict": self.verdict, **_plain(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_json` wrote. Raises: CheckpointFormatError for anything else."""
        try:
            if data["format"] != _FORMAT:
                raise CheckpointFormatError(
                    f"the report has format {data['format']!r}, expected {_FORMAT}; make it again with gpt2 compare"
                )
            return _report(data)
        except (KeyError, TypeError, ValueError) as cause:
            if isinstance(cause, CheckpointFormatError):
                raise
            raise CheckpointFormatError(
                f"this is no report of gpt2 compare ({type(cause).__name__}: {cause}); expected what --json writes"
            ) from cause


def compare(
    a: Side,
    b: Side,
    *,
    tolerance: float | None = None,
    read: tuple[int, ...] | None = None,
    notes: Sequence[str] = (),
) -> Report:
    """Hold ``a`` to ``b``: parameters, outputs, and gradients where both have them.

    Parameters have to be the same numbers. Where the files store them in unlike formats, the finer is rounded to the
    coarser first, and the tolerances are the coarser format's. Outputs and gradients are held to `TOLERANCES`.

    Args:
        tolerance: in the place of the table, for everything, parameters too.
        read: rows and tokens of the input, to be kept with the report; and so are
        notes: remarks in words.
    """
    stored = [side.stored or {} for side in (a, b)]
    unlike = {
        name: (kind, stored[1][name])
        for name, kind in stored[0].items()
        if name in stored[1] and kind != stored[1][name] and {kind, stored[1][name]} <= TOLERANCES.keys()
    }
    formats = [a.dtype, b.dtype, *(kind for pair in unlike.values() for kind in pair)]
    bound = TOLERANCES[coarsest(formats)]
    if tolerance is not None:
        bound = Tolerance(tolerance, tolerance, tolerance)
    parameters = _parameters(a, b, {name: coarsest(pair) for name, pair in unlike.items()}, tolerance or 0.0)
    outputs, heat = _outputs(a, b, bound)
    if unlike:
        pairs = sorted(set(unlike.values()))
        said = "; ".join(f"{one} in A, {other} in B" for one, other in pairs)
        notes = [*notes, f"parameters are stored in unlike number formats ({said}): compared as the coarser holds them"]
    ran = bool(a.outputs and b.outputs)
    return Report(
        a=_run(a),
        b=_run(b),
        read=read,
        bound="given" if tolerance is not None else coarsest(formats),
        config=config_differences(a.config, b.config),
        notes=tuple(notes),
        parameters=parameters,
        outputs=outputs if ran else None,
        gradients=_gradients(a.gradients, b.gradients, bound) if a.gradients and b.gradients else None,
        heat=heat,
    )


def config_differences(a: GPT2Config, b: GPT2Config) -> tuple[tuple[str, Any, Any], ...]:
    """The fields in which two configurations differ, with both values, as a ``config.json`` writes them."""
    one, other = a.to_dict(), b.to_dict()
    names = [name for name in FIELDS if name != "extra"]
    return tuple((name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name))


def _run(side: Side) -> Run:
    numbers = sum(value.size for value in side.parameters.values())
    return Run(side.source, side.framework, side.dtype, numbers, side.head, side.left_out)


def _difference(
    name: str, kind: str, layer: int | None, axes: tuple[str, ...], tolerance: float, a: Array, found: Measure
) -> Difference:
    measured = {field.name: getattr(found, field.name) for field in fields(found)}
    return Difference(name, kind, layer, tuple(a.shape), axes, tolerance, **measured)


def _unlike(a: Mapping[Any, Array], b: Mapping[Any, Array]) -> tuple[list[Any], dict[str, Any]]:
    """The names that can be compared, and the rest as a section reports it."""
    both = [name for name in a if name in b]
    fit = [name for name in both if a[name].shape == b[name].shape]
    misshaped = tuple((str(name), a[name].shape, b[name].shape) for name in both if a[name].shape != b[name].shape)
    return fit, {
        "only_in_a": tuple(str(name) for name in a if name not in b),
        "only_in_b": tuple(str(name) for name in b if name not in a),
        "misshaped": misshaped,
    }


def _parameters(a: Side, b: Side, formats: Mapping[str, str], tolerance: float) -> Section:
    fit, rest = _unlike(a.parameters, b.parameters)
    found = []
    for name in fit:
        one, other = a.parameters[name], b.parameters[name]
        if name in formats:
            one, other = rounded(one, formats[name]), rounded(other, formats[name])
        found.append(_difference(name, "parameter", None, (), tolerance, one, measure(one, other)))
    return Section(**rest, differences=tuple(found))


def _gradients(a: Mapping[str, Array], b: Mapping[str, Array], bound: Tolerance) -> Section:
    fit, rest = _unlike(a, b)
    found = [
        _difference(name, "gradient", None, (), bound.gradients, a[name], measure(a[name], b[name])) for name in fit
    ]
    return Section(**rest, differences=tuple(found))


def _outputs(a: Side, b: Side, bound: Tolerance) -> tuple[Section, tuple[HeatRow, ...]]:
    fit, rest = _unlike(a.outputs, b.outputs)
    found, heat = [], []
    for key in fit:
        one = a.outputs[key]
        measured, rows = _measure(one, b.outputs[key])
        axes = AXES.get((key.kind, one.ndim), ())
        tolerance = bound.loss if key.kind.endswith("loss") else bound.values
        found.append(_difference(str(key), key.kind, key.layer, axes, tolerance, one, measured))
        if "token" in axes[:-1]:
            others = tuple(i for i, axis in enumerate(axes[:-1]) if axis != "token")
            # Three digits are more than a picture shows, and keep the file small.
            line = tuple(float(f"{worst:.3g}") for worst in rows.max(axis=others, initial=0.0))
            heat.append(HeatRow(key.kind, key.layer, line))
    return Section(**rest, differences=tuple(found)), tuple(heat)


# -- JSON ----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (Report, Section, Difference, Run, HeatRow)):
        out = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return out | {"ratio": _plain(value.ratio)} if isinstance(value, Difference) else out
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _section(data: Mapping[str, Any] | None) -> Section | None:
    if data is None:
        return None
    return Section(
        tuple(data["only_in_a"]),
        tuple(data["only_in_b"]),
        tuple((name, tuple(one), tuple(other)) for name, one, other in data["misshaped"]),
        tuple(_read_difference(each) for each in data["differences"]),
    )


def _read_difference(data: Mapping[str, Any]) -> Difference:
    given = {field.name: data[field.name] for field in fields(Difference)}
    for name in ("tolerance", "absolute", "relative", "error"):
        given[name] = float(given[name])
    for name in ("shape", "axes"):
        given[name] = tuple(given[name])
    if given["where"] is not None:
        given["where"] = tuple(given["where"])
        given["values"] = tuple(float(each) for each in given["values"])
    return Difference(**given)


def _read_run(data: Mapping[str, Any]) -> Run:
    return Run(**{**data, "left_out": tuple(data.get("left_out", ()))})


def _report(data: Mapping[str, Any]) -> Report:
    parameters = _section(data["parameters"])
    if parameters is None:
        raise ValueError("parameters are missing")
    return Report(
        a=_read_run(data["a"]),
        b=_read_run(data["b"]),
        read=None if data["read"] is None else tuple(data["read"]),
        bound=data["bound"],
        config=tuple((name, one, other) for name, one, other in data["config"]),
        notes=tuple(data["notes"]),
        parameters=parameters,
        outputs=_section(data["outputs"]),
        gradients=_section(data["gradients"]),
        heat=tuple(HeatRow(row["kind"], row["layer"], tuple(map(float, row["errors"]))) for row in data["heat"]),
    )
