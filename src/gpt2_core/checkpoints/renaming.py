"""How a format names and lays out a GPT-2's parameters: a table, and both directions computed from it.

    NAMES = Names(
        Rule("h.{layer}.attn.c_attn.weight", "blocks/{layer}/attn/kernel", "I O -> O I"),           # transposed
        Rule("h.{layer}.attn.c_attn.bias", ("q_{layer}", "k_{layer}", "v_{layer}"), "(3 H D) -> 3 H D"),  # split
        Rule("wte.weight", "embeddings"),
    )

A row gives our name, the file's name or names, and a pattern where the numbers are laid out otherwise. Our names are
those of the parameter table without ``transformer.``; ``{layer}`` stands for the number of a block, from 0. Keras
counts otherwise: ``block{_layer}`` there is block, block_1, block_2.

A pattern names the axes of the tensor here, an arrow, and the axes there. Each axis has a letter; ``(H D)`` is one axis
made of two, the first the slower; a number is an axis of that length. Where a row has several names there, the first
axis there counts them. Lengths follow from the shape at hand and from the config (`sizes_of`). A pattern only moves
numbers, so its inverse is the pattern with its sides changed over. The notation is that of Rogozhnikov 2022 (einops).

Nothing is looked up by suffix or guessed: a name without a row keeps its own and is reported as unexpected later on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.checkpoints.naming import HEADS, PREFIX
from gpt2_core.checkpoints.tensors import Shape, Tensor, ahead, reshaped
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError

LAYER = "{layer}"
FURTHER = "{_layer}"
_MOST_LAYERS = 10_000
_MOST_LISTED = 10
_NUMBER = re.compile("|".join(map(re.escape, (LAYER, FURTHER))))
_OURS = re.compile(r"h\.(\d{1,9})\.")

Sizes = Mapping[str, int]
Side = tuple[tuple[str, ...], ...]


def sizes_of(config: GPT2Config, layer: int | None) -> Sizes:
    """The lengths of axes that a shape alone does not tell: H heads that a block has left, D the width of one."""
    return {"H": config.n_head if layer is None else config.heads_of(layer), "D": config.head_dim}


@dataclass(frozen=True)
class Pattern:
    """Two ways to lay out the same numbers; `here` and `there` are sides as `pattern` reads them."""

    here: Side
    there: Side

    @property
    def inverse(self) -> Pattern:
        """The way back."""
        return Pattern(self.there, self.here)

    @property
    def moves(self) -> bool:
        """Whether numbers change their order; axes of 1 that come or go, and axes that are split or joined, do not."""
        here, there = ([axis for group in side for axis in group if axis != "1"] for side in (self.here, self.there))
        return here != there

    def shape(self, shape: Shape, sizes: Sizes) -> Shape | None:
        """The shape there of a tensor of `shape` here; None if no such tensor fits the pattern."""
        lengths = self._lengths(shape, sizes)
        return None if lengths is None else tuple(prod(lengths[axis] for axis in group) for group in self.there)

    def view(self, array: NDArray[Any], sizes: Sizes) -> NDArray[Any]:
        """The array laid out as there; no numbers are copied unless axes that stood apart become one."""
        lengths = self._lengths(array.shape, sizes)
        there = self.shape(array.shape, sizes)
        if lengths is None or there is None:
            raise CheckpointError(f"an array of shape {array.shape} does not fit the pattern {self}")
        here, moved_to = ([axis for group in side for axis in group if axis != "1"] for side in (self.here, self.there))
        moved = [here.index(axis) for axis in moved_to]
        return array.reshape([lengths[axis] for axis in here]).transpose(moved).reshape(there)

    def _lengths(self, shape: Shape, sizes: Sizes) -> dict[str, int] | None:
        """The length of each axis; None if `shape` does not fit."""
        if len(shape) != len(self.here):
            return None
        lengths = {axis: int(axis) for group in (*self.here, *self.there) for axis in group if axis.isdecimal()}
        for group, length in zip(self.here, shape, strict=True):
            unknown = [axis for axis in group if axis not in lengths and not (len(group) > 1 and axis in sizes)]
            known = prod(lengths.get(axis, sizes.get(axis, 1)) for axis in group if axis not in unknown)
            if len(unknown) > 1:
                return None
            for axis in group:
                if axis not in unknown and axis not in lengths:
                    lengths[axis] = sizes[axis]
            if unknown:
                lengths[unknown[0]] = length // known if known else 0
            if prod(lengths[axis] for axis in group) != length:
                return None
        return lengths

    def __str__(self) -> str:
        sides = ([f"({' '.join(g)})" if len(g) != 1 else g[0] for g in side] for side in (self.here, self.there))
        return " -> ".join(" ".join(side) for side in sides)


@lru_cache(maxsize=256)
def pattern(text: str) -> Pattern:
    """The pattern that `text` writes: see the module."""
    here, arrow, there = text.partition("->")
    sides = [_side(half) for half in (here, there)]
    atoms = [[axis for group in side for axis in group] for side in sides]
    letters = [sorted(axis for axis in side if axis != "1") for side in atoms]
    if not arrow or letters[0] != letters[1] or any(len(set(side)) < len(side) for side in letters):
        raise CheckpointError(f"{text!r} is not a pattern: both sides have to name the same axes, each once")
    return Pattern(*sides)


def _side(text: str) -> Side:
    tokens = re.findall(r"\(([^()]*)\)|([A-Za-z]+|\d+)", text)
    return tuple(tuple(group.split()) if group else (single,) for group, single in tokens)


@dataclass(frozen=True)
class Rule:
    """One row of a table of names: a parameter here, and what it is there; see the module."""

    ours: str
    theirs: str | tuple[str, ...]
    layout: str = ""

    @property
    def in_block(self) -> bool:
        """Whether there is one for each block."""
        return LAYER in self.ours


@dataclass(frozen=True)
class Row:
    """A `Rule` for one block, or for none."""

    ours: str
    theirs: tuple[str, ...]
    layer: int | None
    pattern: Pattern | None
    split: bool


@dataclass
class Renamed:
    """What a file's tensors are here: our names, what they were called, and whether a name had no row."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names_in_file: dict[str, str] = field(default_factory=dict)


class Names:
    """The table of a format: rows, both directions, and the tensors renamed and laid out either way."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules
        for rule in rules:
            if any((LAYER in name or FURTHER in name) != rule.in_block for name in _names(rule)):
                raise CheckpointError(f"{rule} names a block on one side only")

    def rows(self, n_layer: int) -> Iterator[Row]:
        """Every row, those of blocks once for each of `n_layer`, in the order of the table."""
        blocks = [rule for rule in self.rules if rule.in_block]
        done = False
        for rule in self.rules:
            if not rule.in_block:
                yield _row(rule, None)
            elif not done:
                done = True
                yield from (_row(each, layer) for layer in range(n_layer) for each in blocks)

    def layers_in(self, names: Sequence[str] | Mapping[str, Any]) -> int:
        """How many blocks the names of a file speak of: one more than the highest that a row of the table has.

        Raises: CheckpointFormatError for a number beyond all reason.
        """
        matches = [match for match in map(self._block.fullmatch, names) if match]
        highest = max((int(match[match.lastindex]) if match.lastindex else 0 for match in matches), default=-1)
        if highest >= _MOST_LAYERS:
            raise CheckpointFormatError(f"it names block {highest}; expected at most {_MOST_LAYERS}")
        return highest + 1

    @cached_property
    def _block(self) -> re.Pattern[str]:
        """Any name there that holds the number of a block. That number is the only group that matches, by a lookahead;
        none does where the first block has no number.
        """
        texts = dict.fromkeys(name for rule in self.rules if rule.in_block for name in _names(rule))
        shapes = "|".join(_with_numbers(text, r"\d{1,9}") for text in texts)
        starts = dict.fromkeys(_NUMBER.split(text)[0] + _NUMBER.findall(text)[0] for text in texts)
        longest = sorted(starts, key=len, reverse=True)
        number = "|".join(_with_numbers(start, r"(\d{1,9})") for start in longest)
        return re.compile(rf"(?={number})(?:{shapes})")

    def from_file(self, tensors: Mapping[str, Tensor], sizes: Sizes | None = None) -> Renamed:
        """A file's tensors under our names, with ``transformer.``, in our layout; lazily.

        A name without a row, and a tensor that its row's pattern does not fit, keep their name and shape, so that
        matching them with a model reports them. `sizes` are needed only by patterns that take an axis apart on the way
        here. Raises: CheckpointFormatError if two tensors would end under one name, and for tensors that stand there
        with as many axes as here, where the format has others: their shapes might match, and nobody knows their order.
        """
        found = Renamed()
        left = dict(tensors)
        strange: list[str] = []
        for row in self.rows(self.layers_in(tensors)):
            parts = [left[name] for name in row.theirs if name in left]
            if len(parts) == len(row.theirs):
                for name in row.theirs:
                    del left[name]
                ours = PREFIX + row.ours if not _is_head(row.ours) else row.ours
                found.tensors[ours] = _here(row, parts, sizes or {})
                found.names_in_file[ours] = ", ".join(row.theirs)
                if found.tensors[ours] is parts[0] and row.pattern and len(parts[0].shape) == len(row.pattern.here):
                    strange.append(f"{row.theirs[0]} is of shape {parts[0].shape}, expected {row.pattern.inverse}")
        if strange:
            raise CheckpointFormatError(
                f"{len(strange)} tensors are not laid out as the format has them: {'; '.join(strange[:_MOST_LISTED])}"
            )
        for name, tensor in left.items():
            if name in found.tensors:
                raise CheckpointFormatError(f"it holds {name!r}, which is also what {found.names_in_file[name]!r} is")
            found.tensors[name] = tensor
        return found

    def to_file(self, tensors: Mapping[str, Tensor], config: GPT2Config | None = None) -> dict[str, Tensor]:
        """Our tensors, with or without ``transformer.``, as this format names and lays them out; lazily.

        `config` is needed only by patterns that take an axis apart. Raises: CheckpointError for tensors that have no
        row, listing them all.
        """
        blocks = [int(found[1]) for name in tensors for found in [_OURS.match(name.removeprefix(PREFIX))] if found]
        rows = {row.ours: row for row in self.rows(min(max(blocks, default=-1) + 1, _MOST_LAYERS))}
        homeless = [name for name in tensors if name.removeprefix(PREFIX) not in rows]
        if homeless:
            raise CheckpointError(
                f"these tensors have no place in this format: {', '.join(homeless[:20])}; expected only "
                f"{', '.join(rule.ours for rule in self.rules)}"
            )
        given = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        renamed: dict[str, Tensor] = {}
        for ours, row in rows.items():
            if ours in given:
                renamed.update(_there(row, given[ours], {} if config is None else sizes_of(config, row.layer)))
        return renamed


def _with_numbers(text: str, number: str) -> str:
    """The pattern of all names that `text` stands for, where `number` is the pattern of a block's."""
    return re.escape(text).replace(re.escape(LAYER), number).replace(re.escape(FURTHER), f"(?:_{number})?")


def _names(rule: Rule) -> tuple[str, ...]:
    return (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs


def _row(rule: Rule, layer: int | None) -> Row:
    def named(text: str) -> str:
        return text.replace(LAYER, str(layer)).replace(FURTHER, f"_{layer}" if layer else "")

    theirs = tuple(named(name) for name in _names(rule))
    layout = pattern(rule.layout) if rule.layout else None
    return Row(named(rule.ours), theirs, layer, layout, not isinstance(rule.theirs, str))


def _is_head(name: str) -> bool:
    return any(name in names for names in HEADS.values())


def _here(row: Row, parts: list[Tensor], sizes: Sizes) -> Tensor:
    """One tensor of ours from the tensor or tensors of a file."""
    if row.pattern is None:
        return parts[0]
    if not row.split:
        return arranged(parts[0], row.pattern.inverse, sizes) or parts[0]
    shapes, dtypes = {part.shape for part in parts}, {part.dtype for part in parts}
    whole = (len(parts), *parts[0].shape)
    shape = row.pattern.inverse.shape(whole, sizes) if len(shapes) == 1 and len(dtypes) == 1 else None
    if shape is None:
        raise CheckpointFormatError(
            f"{', '.join(row.theirs)} are of the shapes {', '.join(str(part.shape) for part in parts)} and dtypes "
            f"{', '.join(part.dtype for part in parts)}; expected parts alike, which together are {row.ours}"
        )
    inverse = row.pattern.inverse

    def load() -> NDArray[Any]:
        return inverse.view(np.stack([part.view() for part in parts]), sizes)

    def release() -> None:
        for part in parts:
            part.release()

    return Tensor(parts[0].dtype, shape, load, release)


def _there(row: Row, tensor: Tensor, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """The tensor or tensors of a file from one of ours."""
    if row.pattern is None:
        yield row.theirs[0], tensor
        return
    whole = arranged(tensor, row.pattern, sizes)
    # Putting numbers in order is work that a thread does while the writer waits for the disk.
    whole = ahead(whole) if whole is not None and row.pattern.moves and not row.split else whole
    if whole is None or (row.split and whole.shape[0] != len(row.theirs)):
        raise CheckpointError(f"{row.ours} of shape {tensor.shape} does not fit the layout {row.pattern}")
    if not row.split:
        yield row.theirs[0], whole
        return
    for index, name in enumerate(row.theirs):
        last = index == len(row.theirs) - 1
        yield name, _part(whole, index, last)


def _part(whole: Tensor, index: int, last: bool) -> Tensor:
    return Tensor(whole.dtype, whole.shape[1:], lambda: whole.view()[index], whole.release if last else None)


def arranged(tensor: Tensor, layout: Pattern, sizes: Sizes) -> Tensor | None:
    """The tensor laid out by a pattern, lazily; None if it does not fit.

    Its view is one of the file where that is possible, so that writers put it in order a piece at a time. Where no
    number changes its place the pieces are those of the tensor itself.
    """
    shape = layout.shape(tensor.shape, sizes)
    if shape is None:
        return None
    if not layout.moves:
        return reshaped(tensor, shape)
    return Tensor(tensor.dtype, shape, lambda: layout.view(tensor.view(), sizes), tensor.release)
