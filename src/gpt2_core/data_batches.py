"""Batches of ids in an order that a seed decides: the same in every framework, for any number of ranks, and resumed.

    Batches(data, batch_size=8, block_size=1024, seed=0)      an endless row of `Batch`, each in numpy

What a batch holds follows from its number alone: rows are numbered, `gpt2_core.data_order.Order` puts them in another
order each epoch, and batch b has the places b * batch_size and following. So the position is one whole number, several
ranks read their rows of the same batch, and a run that is resumed with another number of ranks goes on with the very
rows that would have come.

    packed      the text is one ring of tokens, cut into blocks without regard to documents; another cut each epoch
    documents   a row is one document, or a part of a long one, filled up with padding that the mask leaves out
    examples    a row is one example of a task (`gpt2_core.data_examples`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt2_core.data_order import Order
from gpt2_core.data_shards import TokenData
from gpt2_core.errors import InputError, nearest
from gpt2_core.uniforms import check_seed, philox4x32

IGNORED = -100  # the label that counts for nothing (gpt2_core.inputs.IGNORED_LABELS)
MODES = ("packed", "documents")
PADDINGS = ("longest", "block")
_VERSION = 1
_USE = 0x63757473  # the last counter word of the numbers that say where an epoch's first block begins

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What a model is given at one step; B rows of T tokens, or of N choices of T tokens each.

    Attributes:
        input_ids: (B, T), or (B, N, T) for the double-heads task.
        labels: as the models take them, shifted inside: (B, T) or (B, N, T), the ids themselves, -100 where a token is
            not to be learnt; for classification (B,), the class.
        targets: the same aligned, for a loss of one's own: the token that follows each place, -100 where none counts.
            The last place of a packed block has one too: the first token of the next block. None for classification.
        attention_mask: as input_ids, 1 for tokens and 0 for padding; None where there is no padding at all.
        mc_token_ids: (B, N), where each choice is read for its score.
        mc_labels: (B,), the right choice.
    """

    input_ids: Ids
    labels: Ids
    targets: Ids | None = None
    attention_mask: Ids | None = None
    mc_token_ids: Ids | None = None
    mc_labels: Ids | None = None

    def inputs(self) -> dict[str, Ids]:
        """The arguments of a model's forward pass by name; ``targets`` is none of them."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "targets"}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def tokens(self) -> int:
        """How many tokens there are, padding left out."""
        return int(self.input_ids.size if self.attention_mask is None else self.attention_mask.sum())

    @property
    def predicted(self) -> int:
        """How many tokens, or classes, there are to learn: by ``targets``, or by ``labels`` where those are none."""
        return int(((self.labels if self.targets is None else self.targets) != IGNORED).sum())


class Rows(Protocol):
    """What batches are made of: rows that are numbered from 0."""

    fingerprint: str

    def __len__(self) -> int: ...

    def lengths(self, numbers: Ids) -> Ids | None:
        """How many tokens the rows have, the longest choice of each; None where all have the same number."""

    def batch(self, numbers: Ids, epochs: Ids, width: int) -> Batch:
        """The rows with these numbers in these epochs (both (B,)), filled up to ``width`` tokens."""


class PackedRows:
    """Blocks of ``block_size`` tokens of a text taken as a ring.

    Where the first block of an epoch begins is drawn for each (``seed``; None: at 0), so that a short text is not cut
    the same way every time, and all of it comes up. The token after the ring's end is not learnt.
    """

    def __init__(self, data: TokenData, block_size: int, seed: int | None) -> None:
        if len(data) <= block_size:
            raise InputError(
                f"{data.source} has {len(data)} tokens, expected at least {block_size + 1} for blocks of {block_size}; "
                f"give more text or a smaller block_size"
            )
        self.fingerprint = data.fingerprint
        self._data, self._block, self._seed = data, block_size, seed

    def __len__(self) -> int:
        return len(self._data) // self._block

    def lengths(self, numbers: Ids) -> Ids | None:
        """None: all blocks are full."""
        return None

    def batch(self, numbers: Ids, epochs: Ids, width: int) -> Batch:
        """The blocks with these numbers in these epochs; ``width`` is the size of all blocks."""
        size = len(self._data)
        starts = [(n * self._block + self._offset(epoch)) % size for n, epoch in zip(numbers, epochs, strict=True)]
        rows = np.stack([self._ring(start) for start in starts])  # (B, T + 1)
        learnt = rows.copy()
        for row, start in zip(learnt, starts, strict=True):
            if self._data.labelled is not None:
                row[self._ring(start, masks=True) == 0] = IGNORED
            if start + self._block >= size:  # the ring's end lies inside: what follows it is not learnt
                row[size - start] = IGNORED
        return Batch(rows[:, :-1], learnt[:, :-1], learnt[:, 1:])

    def _offset(self, epoch: int) -> int:
        if self._seed is None:
            return 0
        key = (self._seed & 0xFFFFFFFF, self._seed >> 32)
        words = philox4x32((0, int(epoch) & 0xFFFFFFFF, int(epoch) >> 32, _USE), key)
        return int(words[0] << np.uint64(32) | words[1]) % len(self._data)

    def _ring(self, start: int, *, masks: bool = False) -> Ids:
        tokens = self._data.labelled if masks and self._data.labelled is not None else self._data.tokens
        stop = start + self._block + 1
        if stop <= len(tokens):
            return tokens.read(start, stop)
        return np.concatenate((tokens.read(start, len(tokens)), tokens.read(0, stop - len(tokens))))


class DocumentRows:
    """Documents of at least one token besides the one between documents, long ones in parts of ``block_size``.

    A row begins with the id between documents, and the last target of a document is the id that ends it. A document's
    parts are rows of their own, and none sees the part before it.
    """

    def __init__(self, data: TokenData, block_size: int) -> None:
        self.fingerprint = data.fingerprint
        self._data, self._block = data, block_size
        starts = data.documents
        lengths = np.diff(starts, append=len(data))
        begins = np.ones(len(starts), bool)  # a text need not begin with the id between documents
        begins[0] = bool(data.tokens[0] == data.end_of_text) if len(data) else False
        kept = lengths > begins
        self._starts, self._lengths = starts[kept], lengths[kept]
        self._ends = np.cumsum(-(-self._lengths // block_size))  # rows up to each document
        if not len(self._ends):
            raise InputError(f"{data.source} has no documents of any tokens; give it some text")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _places(self, numbers: Ids) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        """Where each row begins and how long it is, and whether its document ends with it."""
        document = np.searchsorted(self._ends, numbers, "right")
        first = np.where(document > 0, self._ends[document - 1], 0)
        within = (numbers - first) * self._block
        left = self._lengths[document] - within
        return self._starts[document] + within, np.minimum(left, self._block), left <= self._block

    def lengths(self, numbers: Ids) -> Ids | None:
        """The tokens of each row: (B,)."""
        return self._places(numbers)[1]

    def batch(self, numbers: Ids, epochs: Ids, width: int) -> Batch:
        """The rows with these numbers, filled up to ``width``; they are the same in every epoch."""
        starts, lengths, ends = self._places(numbers)
        end, labelled = self._data.end_of_text or 0, self._data.labelled
        ids = np.full((len(numbers), width), end, np.int64)
        learnt = np.full((len(numbers), width + 1), IGNORED, np.int64)
        for row, (start, length, is_end) in enumerate(zip(starts.tolist(), lengths.tolist(), ends, strict=True)):
            stop = min(start + length + 1, len(self._data))
            tokens = self._data.tokens.read(start, stop)
            ids[row, :length] = tokens[:length]
            if is_end and stop == start + length:  # the end of the last document stands in no file
                tokens = np.append(tokens, end)
            if labelled is not None:
                mask = labelled.read(start, stop)
                tokens[: len(mask)][mask == 0] = IGNORED
            learnt[row, : len(tokens)] = tokens
        at = np.arange(width)
        mask_of_rows = (at < lengths[:, None]).astype(np.int64)
        return Batch(ids, np.where(mask_of_rows == 1, learnt[:, :-1], IGNORED), learnt[:, 1:], mask_of_rows)


class Batches(Iterator[Batch]):
    """Batches of `TokenData` or of examples of a task, without end, or for so many epochs.

    Args:
        data: what `open_data` or `read_examples` gives.
        batch_size: rows of one batch, of all ranks together.
        block_size: tokens of one row, at most.
        seed: decides the order; a whole number from 0 to 2**64 - 1.
        mode: "packed" or "documents", for `TokenData`.
        shuffle: whether the rows come in another order each epoch, or in that of the files.
        rank, world_size: which of so many parts of each batch this process gets; they have ``batch_size / world_size``
            rows, one after the other.
        epochs: after so many the batches end; the last is filled up with rows that count for nothing, so that all have
            the same shape and all ranks as many. None: without end, and a batch may reach into the next epoch.
        padding: where rows differ in length they are filled up to the "longest" of the whole batch (so that all ranks
            have the same shape) or to "block", always block_size.

    Raises: InputError, for numbers that do not go together and for too little data; GenerationError for the seed.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int,
        block_size: int,
        seed: int = 0,
        mode: str = "packed",
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        padding: str = "longest",
    ) -> None:
        for name, value in (("batch_size", batch_size), ("block_size", block_size), ("world_size", world_size)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")
        if batch_size % world_size:
            raise InputError(
                f"batch_size is {batch_size}, which {world_size} ranks cannot share evenly; expected a multiple of "
                f"{world_size}, such as {-(-batch_size // world_size) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank}, expected one from 0 to {world_size - 1} (world_size is {world_size})")
        if padding not in PADDINGS:
            raise InputError(f"padding is {padding!r}, expected {' or '.join(PADDINGS)}{nearest(padding, PADDINGS)}")
        self.data, self.batch_size, self.block_size = data, int(batch_size), int(block_size)
        self.seed, self.shuffle, self.epochs, self.padding = check_seed(seed), bool(shuffle), epochs, padding
        self.rank, self.world_size = int(rank), int(world_size)
        self._rows: Rows
        if not isinstance(data, TokenData):
            self.mode, self._rows = "examples", data.rows(self.block_size)
        elif mode == "packed":
            self.mode, self._rows = mode, PackedRows(data, self.block_size, self.seed if shuffle else None)
        elif mode == "documents":
            self.mode, self._rows = mode, DocumentRows(data, self.block_size)
        else:
            raise InputError(f"mode is {mode!r}, expected {' or '.join(MODES)}{nearest(str(mode), MODES)}")
        self.samples = 0  # rows that have come, of all ranks: the position
        self._orders: dict[int, Order] = {}

    @property
    def rows(self) -> int:
        """Rows of one epoch, of all ranks."""
        return len(self._rows)

    @property
    def epoch(self) -> float:
        """How many epochs have come."""
        return self.samples / len(self._rows)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches hold all rows once; the last of them may not be full."""
        return -(-len(self._rows) // self.batch_size)

    def __next__(self) -> Batch:
        """The next batch, this rank's part of it. Raises: StopIteration after the last epoch; InputError."""
        size = len(self._rows)
        if self.epochs is not None and self.samples >= self.epochs * size:
            raise StopIteration
        places = self.samples + np.arange(self.batch_size)
        counts = np.ones(self.batch_size, bool) if self.epochs is None else places < self.epochs * size
        epochs, numbers = np.where(counts, places // size, 0), np.where(counts, places % size, 0)
        if self.shuffle:
            for epoch in np.unique(epochs[counts]).tolist():
                of_epoch = counts & (epochs == epoch)
                numbers[of_epoch] = self._order(epoch)(numbers[of_epoch])
        lengths = self._rows.lengths(numbers)
        longest = self.block_size if lengths is None or self.padding == "block" else int(lengths.max())
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        batch = self._rows.batch(numbers[mine], epochs[mine], longest)
        if not counts[mine].all():
            batch = _without(batch, ~counts[mine])
        self._check(batch)
        self.samples += self.batch_size
        return batch

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = Order(len(self._rows), self.seed, epoch)
        return self._orders[epoch]

    def _check(self, batch: Batch) -> None:
        if not isinstance(self.data, TokenData):
            return
        read = [batch.input_ids] if batch.targets is None else [batch.input_ids, batch.targets]
        if (top := max(int(ids.max()) for ids in read)) >= self.data.vocab_size:
            raise self.data.out_of_vocabulary(top)

    def state(self) -> dict[str, Any]:
        """The position, and what it is a position in: plain values that JSON can hold."""
        return {"version": _VERSION, "samples": self.samples, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, maybe by batches of another size or for another number of ranks.

        Raises: InputError where data, seed or shape are others, naming all that differ: the rows would be others.
        """
        if state.get("version") != _VERSION:
            raise InputError(
                f"the data position has version {state.get('version')!r}, expected {_VERSION}; it was saved by another "
                f"version of this program: begin the data anew"
            )
        differing = [
            f"{name} was {state.get(name)!r} and is {value!r}"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if differing:
            raise InputError(
                f"the data position belongs to other batches: {'; '.join(differing)}; resume with what the run began "
                f"with, or begin the data anew"
            )
        samples = state.get("samples")
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
            raise InputError(f"the data position is {samples!r}, expected a number of rows; the saved state is damaged")
        self.samples = samples

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self._rows.fingerprint,
            "rows": len(self._rows),
            "mode": self.mode,
            "block_size": self.block_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def _without(batch: Batch, which: NDArray[np.bool_]) -> Batch:
    """The batch with nothing to learn in some rows."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name in ("labels", "targets", "mc_labels"):
        if values[name] is not None:
            values[name] = values[name].copy()
            values[name][which] = IGNORED
    return Batch(**values)
