"""`gpt2 compare`: two checkpoints, or one in two frameworks, held against each other number by number."""

from __future__ import annotations

import tempfile
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gpt2_app import backends, failures, terminal
from gpt2_app.sources import check_argument, decoded, one_source, open_source
from gpt2_core.errors import Gpt2Error, InputError, nearest

if TYPE_CHECKING:
    from gpt2_app.running import Checkpoint
    from gpt2_core.comparison import Array, Report, Side
    from gpt2_core.parameters import Head

# What both sides read where nothing else is given: long and short words, figures, quotes, line ends, other scripts.
PASSAGE = (
    "The lamplighter of Gr\u00fcnau had 37 lamps to light, and a ladder older than he was. \u201cEvery evening "
    "the same streets,\u201d he said, \u201cand every evening they are others.\u201d\n\nFirst came the bridge, where "
    "the wind put out one match in three; then the bakery (closed at 18:30, but warm); then the long wall behind which "
    "nobody had ever seen a house. He counted his steps: 212 up to the gate, 0.75 m each, and didn't forget the one "
    "for luck. At the gate a sign said \u00abПривет\u00bb, and below it, in a child's hand, \u3053\u3093\u306b\u3061"
    "\u306f!\n\n    for lamp in street:\n        lamp.light()\n\nHe could not read that; the wind could, perhaps, for "
    "it turned the page."
)
LENGTH = 128


def command(
    a: Annotated[str, typer.Argument(metavar="A", help="A model's name, its folder, or one checkpoint file.")],
    b: Annotated[
        str | None, typer.Argument(metavar="B", help="What A is held to; without it, A itself in another framework.")
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option("--framework", "-F", metavar=backends.CHOICES, help="Runs A. Default: the first installed."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar=backends.CHOICES, help="Runs B. Default: as A for two checkpoints, else the next installed."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Number format of both: float64, float32, float16, bfloat16.")
    ] = "float32",
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="What both read. Default: a fixed passage.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the text from a file.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME|FOLDER", help="Whose vocabulary the text is read with. Default: A's.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", "-n", min=1, help=f"Tokens in a row. Default: {LENGTH}, or those of the text."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch; each has the next tokens of the text.")] = 1,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which model: none, lm, double, sequence, token, qa. Default: what the files hold."
        ),
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare the gradients of the loss too.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest error to let pass, for parameters too. Default: the published table."),
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the errors by layer and token; needs the extra 'plots'.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the whole report there, as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, the whole report.")] = False,
) -> None:
    """Compare two checkpoints, or one checkpoint in two frameworks: parameters, and all that a run returns.

    Parameters have to be the same numbers. Loss, logits, hidden states, attentions and past of one text, and with
    --gradients the gradient of every parameter, have to be within the published tolerances. Exit code 1 where they
    are not.

    Each checkpoint is the model that its head makes it: of classes, their logits are compared, and so on. Of unlike
    heads, what both have is compared, and the rest is listed.
    """
    one_source(text, file, "--text")
    names = _frameworks(b, framework, against)
    _check(names, dtype, gradients=gradients, heatmap=heatmap)
    said = _text(text, file)
    with terminal.busy("looking at the files ..."):
        models = _look(a, b, head)
        sides = (models[0].checkpoint, models[1].checkpoint)
        ids, notes = _ids(sides, said, tokenizer or a, rows, length)
        inputs, more = _inputs(models, ids, gradients=gradients)
        read = None if ids is None else ids.shape
    with tempfile.TemporaryDirectory(prefix="gpt2-compare-") as folder:
        report = _compare(models, names, dtype, inputs, Path(folder), gradients, tolerance, read, [*more, *notes])
    _tell(report, heatmap, output, as_json=as_json)
    if report.verdict == "mismatch":
        raise typer.Exit(failures.DIFFERENT)


# -- what was asked for --------------------------------------------------------------------------------------


def _frameworks(b: str | None, framework: str | None, against: str | None) -> tuple[str, str]:
    """Which framework runs A and which runs B."""
    first = backends.choose(framework).name
    if against is not None:
        second = backends.choose(against).name
    elif b is not None:
        second = first
    else:
        others = (each.name for each in backends.BACKENDS.values() if each.name != first and each.is_installed())
        second = next(others, first)
    if b is None and first == second:
        raise typer.BadParameter(
            f"A in {first} against A in {second} is one and the same; give a second checkpoint, or another --against"
        )
    return first, second


def _check(names: tuple[str, str], dtype: str, *, gradients: bool, heatmap: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    from gpt2_core.comparison import TOLERANCES

    if dtype not in TOLERANCES:
        hint = nearest(dtype, list(TOLERANCES))
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(TOLERANCES)}{hint}")
    if gradients and "numpy" in names:
        raise InputError(
            "the numpy reference computes no gradients; leave out --gradients, or compare two of the frameworks"
        )
    if heatmap is not None:
        from gpt2_app.heatmap import check_installed

        check_installed()


def _text(text: str | None, file: Path | None) -> str | None:
    if text is not None:
        return check_argument(text, "--text")
    if file is None:
        return None
    with open_source(file) as (stream, name):
        return "".join(decoded(stream, name))


# -- which models they are -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """The head that a checkpoint is of, and the number format of every tensor of any head in its file, by name."""

    head: Head
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class _Model:
    """One side before it is run.

    Attributes:
        checkpoint: with the head that it is run with.
        own: the head that it is of.
        others: parameters of heads in its file that it is not run with, but that are compared all the same, and their
            number formats.
        left_out: what is not compared, in words.
    """

    checkpoint: Checkpoint
    own: Head
    others: Mapping[str, str]
    left_out: tuple[str, ...]


def _look(a: str, b: str | None, given: str | None) -> tuple[_Model, _Model]:
    """Both sides, with the head that was ``given``, else with their own, or what there is of both where these differ.

    Raises: HubError, Failure; BadParameter for a head that there is not.
    """
    from gpt2_core.parameters import Head

    try:
        kind = None if given is None else Head(given)
    except Gpt2Error as error:
        raise typer.BadParameter(str(error)) from error
    held = [_held(source) for source in ([a] if b is None else [a, b])]
    head = kind or _common([each.head for each in held])
    one = _model(a, held[0], head, chosen=kind is not None)
    return one, one if b is None else _model(b, held[1], head, chosen=kind is not None)


def _held(source: str) -> _Held:
    from gpt2_core.checkpoints.configs import head_of
    from gpt2_core.checkpoints.naming import HEADS, LM_HEAD, TOKENS, same_numbers
    from gpt2_core.parameters import PREFIX, Head
    from gpt2_core.pretrained import open_pretrained

    with failures.reading_a_model():
        found = open_pretrained(source, Head.NONE)
        with found.checkpoint as file:
            tensors = {name: file.dtype(name) for every in HEADS.values() for name in every if name in file}
            if LM_HEAD in tensors and found.config.tie_word_embeddings:
                tokens = next(file[name] for name in (TOKENS, PREFIX + TOKENS) if name in file)
                if same_numbers(file[LM_HEAD], tokens):
                    del tensors[LM_HEAD]  # the token table once more
            return _Held(head_of(file, found.config), tensors)


def _common(heads: list[Head]) -> Head:
    """What models of these heads have in common."""
    from gpt2_core.parameters import Head

    if len(set(heads)) == 1:
        return heads[0]
    return Head.LM if set(heads) == {Head.LM, Head.DOUBLE} else Head.NONE


def _model(source: str, held: _Held, head: Head, *, chosen: bool) -> _Model:
    """One side run with ``head``; what else the file has is compared as it is, unless this head was ``chosen``."""
    from gpt2_app.running import look

    checkpoint = look(source, head)
    others = {name: kind for name, kind in held.tensors.items() if name not in checkpoint.stored}
    returned = () if held.head is head else (f"what the head ({held.head.value}) returns",)
    if chosen:
        return _Model(checkpoint, held.head, {}, (*others, *returned))
    return _Model(checkpoint, held.head, others, returned)


def _whole(side: Side, model: _Model, dtype: str) -> Side:
    """What a run gave, with the parameters that it was not run with, as ``dtype`` holds them, and what was left out."""
    from gpt2_core.comparison import rounded
    from gpt2_core.parameters import Head
    from gpt2_core.pretrained import open_pretrained

    side = replace(side, head=model.checkpoint.head.value, left_out=model.left_out)
    if not model.others:
        return side
    with failures.reading_a_model():
        found = open_pretrained(model.checkpoint.source, Head.NONE)
        with found.checkpoint as file:
            arrays = {name: rounded(file[name].array(), dtype).copy() for name in model.others}
    # Nothing is written to it: the large ones stay on the disk until they are asked for.
    every = ChainMap(arrays, cast("dict[str, Array]", side.parameters))
    return replace(side, parameters=every, stored={**(side.stored or {}), **model.others})


# -- what both read ------------------------------------------------------------------------------------------


def _ids(
    sides: tuple[Checkpoint, Checkpoint], text: str | None, vocabulary: str, rows: int, length: int | None
) -> tuple[Array | None, list[str]]:
    """The ids (rows, length) that both sides are given, and what is to be said about them.

    None where the text has tokens that one of the two does not have: they are no models of the same text.
    """
    import numpy as np

    room = min(side.config.n_positions for side in sides)
    sizes = [side.config.vocab_size for side in sides]
    if length is not None and length > room:
        raise InputError(f"--length is {length}, but the models have {room} positions; give at most {room}")
    notes = []
    if sizes[0] != sizes[1]:
        notes.append(f"the vocabularies are unlike: {sizes[0]:,} tokens in A, {sizes[1]:,} in B")
    if text is None:
        return _passage(min(sizes), rows, length or min(LENGTH, room)), notes
    ids, more = _read(text, vocabulary, sides[1].source if sides[0] is not sides[1] else None)
    notes += more
    length = length or min(len(ids) // rows, room)
    if not length or rows * length > len(ids):
        raise InputError(
            f"the text has {len(ids)} tokens, but {rows} x {length or 1} were asked for; give a longer text, or less "
            f"of --rows and --length"
        )
    if rows * length < len(ids):
        notes.append(f"of the text's {len(ids):,} tokens the first {rows * length:,} were read")
    ids = ids[: rows * length]
    if max(ids) >= min(sizes):
        short = "A" if sizes[0] < sizes[1] else "B"
        notes.append(
            f"the outputs were not compared: the text has token {max(ids)}, and the vocabulary of {short} ends at "
            f"{min(sizes) - 1}"
        )
        return None, notes
    return np.array(ids, np.int64).reshape(rows, length), notes


def _passage(size: int, rows: int, length: int) -> Array:
    """The fixed passage, again and again, in GPT-2's ids; smaller vocabularies read the remainders by their size."""
    import numpy as np

    from gpt2_core.tokenizer import GPT2Tokenizer

    return np.resize(np.array(GPT2Tokenizer().encode(PASSAGE), np.int64) % size, (rows, length))


def _read(text: str, vocabulary: str, other: str | None) -> tuple[list[int], list[str]]:
    """The ids of a text, and whether B's own vocabulary, where it has one, reads it otherwise."""
    from gpt2_app.vocabularies import load_tokenizer

    ids: list[int] = load_tokenizer(vocabulary).encode(text)
    if other is None or other == vocabulary:
        return ids, []
    try:
        theirs: list[int] = load_tokenizer(other).encode(text)
    except (failures.Failure, Gpt2Error):
        return ids, []  # a checkpoint without a vocabulary takes any
    if theirs == ids:
        return ids, []
    return ids, [
        f"the vocabularies are unlike: {vocabulary} reads the text as {len(ids)} tokens, {other} as {len(theirs)} "
        f"others; both were given the ids of {vocabulary}"
    ]


def _inputs(
    models: tuple[_Model, _Model], ids: Array | None, *, gradients: bool
) -> tuple[dict[str, Array] | None, list[str]]:
    """What both models are given, with labels that both can take, and what is to be said about the heads.

    Raises: InputError for gradients of a loss that the two do not both have.
    """
    from gpt2_app.compare_view import HEADS
    from gpt2_app.running import inputs_of
    from gpt2_core.parameters import Head, parameter_table

    one, other = models
    head, notes = one.checkpoint.head, []
    if one.own is not other.own:
        told = f"the heads are unlike: {HEADS[one.own.value]} in A, {HEADS[other.own.value]} in B"
        if gradients and head is Head.NONE:
            raise InputError(f"{told}, so they have no loss in common; leave out --gradients, or name one --head")
        below = "transformers without a head" if head is Head.NONE else f"models of one kind ({HEADS[head.value]})"
        notes.append(f"{told}; both were run as {below}")
    for letter, each in zip("AB", models if one is not other else models[:1], strict=False):
        side = each.checkpoint
        lacking = [row.name for row in parameter_table(side.config, head) if row.name not in side.stored]
        if lacking:
            notes.append(f"the file of {letter} has no {', '.join(lacking)}: begun anew, from the same seed")
    if ids is None:
        return None, notes
    inputs = inputs_of(one.checkpoint.config, head, ids)  # labels as A's configuration has them, for both
    if head in (Head.SEQUENCE, Head.TOKEN):
        theirs = inputs_of(other.checkpoint.config, head, ids)["labels"]
        count = {each.checkpoint.config.num_labels for each in models}
        if len(count) > 1 or theirs.shape != inputs["labels"].shape:
            notes.append("the classes are unlike, in number or in kind: no loss was computed")
            del inputs["labels"]
    return inputs, notes


# -- comparing and telling -----------------------------------------------------------------------------------


def _compare(
    models: tuple[_Model, _Model],
    names: tuple[str, str],
    dtype: str,
    inputs: dict[str, Array] | None,
    folder: Path,
    gradients: bool,
    tolerance: float | None,
    read: tuple[int, ...] | None,
    notes: list[str],
) -> Report:
    from gpt2_app.running import run
    from gpt2_core.comparison import compare

    ran: list[Side] = []
    for letter, model, name in zip("AB", models, names, strict=True):
        side = model.checkpoint
        with terminal.busy(f"running {letter}: {side.source} in {backends.BACKENDS[name].title} ..."):
            done = run(name, side, dtype, inputs, folder / letter, gradients=gradients)
            ran.append(_whole(done, model, dtype))
    with terminal.busy("comparing ..."):
        return compare(*ran, tolerance=tolerance, read=read, notes=notes)


def _tell(report: Report, heatmap: Path | None, output: Path | None, *, as_json: bool) -> None:
    value: dict[str, Any] = report.to_json()
    if output is not None:
        import json

        from gpt2_core.files import atomic_write

        with atomic_write(output) as out:
            out.write(json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n")
    if heatmap is not None:
        from gpt2_app.heatmap import draw

        draw(report, heatmap)
    if as_json:
        terminal.write_json(value)
    else:
        from gpt2_app.compare_view import show

        show(report)
