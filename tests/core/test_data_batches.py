"""Batches: what is in them, their order, their ranks, and where they go on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.data import IGNORED, Batch, Batches, TokenData, open_data
from gpt2_core.data_order import Order
from gpt2_core.data_shards import Shard, Tokens
from gpt2_core.errors import InputError

END = 50256


def data_of(ids: list[int] | np.ndarray, folder: Path, mask: list[int] | None = None, **changes: object) -> TokenData:
    np.asarray(ids, "<u2").tofile(folder / "ids.bin")
    data = open_data(folder / "ids.bin")
    labelled = None
    if mask is not None:
        np.asarray(mask, "u1").tofile(folder / "mask.bin")
        labelled = Tokens([Shard(folder / "mask.bin", "u1", 0, len(mask))])
    values = {"vocab_size": data.vocab_size, "end_of_text": data.end_of_text} | changes
    return TokenData(data.source, data.split, data.tokens, labelled=labelled, **values)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    named, others = one.inputs(), other.inputs()
    return named.keys() == others.keys() and all(np.array_equal(named[name], others[name]) for name in named)


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row) for row in batch.input_ids.tolist()]


# ---- the order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 255, 256, 257, 4097, 70000])
def test_an_order_has_every_number_once(size):
    for epoch in range(3):
        assert sorted(Order(size, 5, epoch)(np.arange(size)).tolist()) == list(range(size))


def test_an_order_is_known_place_by_place_and_by_seed_and_epoch():
    whole = Order(1000, 5, 2)(np.arange(1000))
    assert Order(1000, 5, 2)(np.array([7, 3, 999])).tolist() == whole[[7, 3, 999]].tolist()
    for other in (Order(1000, 6, 2), Order(1000, 5, 3), Order(1000, 5 + 2**40, 2)):
        assert (other(np.arange(1000)) == whole).mean() < 0.02


def test_all_orders_are_about_as_likely():
    """Of the 120 orders of five things 20 each in 2,400: chi-squared of 119 degrees is beyond 200 once in 10^5."""
    places = np.arange(5)
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(2400):
        order = tuple(Order(5, 1, epoch)(places).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 120
    assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 200


def test_the_order_of_a_seed_stays_what_it_is():
    """A run that is resumed years later has to find the rows that would have come."""
    assert Order(10, 0, 0)(np.arange(10)).tolist() == [4, 7, 9, 5, 8, 1, 2, 3, 6, 0]
    assert Order(10**12, 3, 1)(np.arange(3)).tolist() == [617706666099, 28916980058, 57614895834]


# ---- packed ----------------------------------------------------------------------------------------------------


def test_packed_blocks_follow_each_other_and_their_targets_are_the_next_tokens(tmp_path):
    ids = np.arange(100, 123)
    batch = next(Batches(data_of(ids, tmp_path), batch_size=2, block_size=5, shuffle=False))
    assert batch.input_ids.tolist() == [list(range(100, 105)), list(range(105, 110))]
    assert batch.labels.tolist() == batch.input_ids.tolist()
    assert batch.targets is not None
    assert batch.targets.tolist() == [list(range(101, 106)), list(range(106, 111))]
    assert batch.attention_mask is None
    assert (batch.tokens, batch.predicted) == (10, 10)
    assert {array.dtype for array in batch.inputs().values()} == {np.dtype(np.int64)}


def test_an_epoch_of_packed_blocks_has_every_token_once_but_for_the_rest(tmp_path):
    batches = Batches(data_of(np.arange(53), tmp_path), batch_size=5, block_size=5, seed=3)
    assert (batches.rows, batches.batches_per_epoch) == (10, 2)
    firsts = set()
    for _ in range(6):
        seen = [number for _ in range(2) for row in rows_of(next(batches)) for number in row]
        assert len(seen) == len(set(seen)) == 50
        firsts.add(min(set(range(53)) - set(seen)))
    assert len(firsts) > 3  # the three tokens left out are others each time
    assert batches.epoch == 6


def test_the_token_after_the_last_is_not_learnt(tmp_path):
    """A block over the ring's end goes on with the first tokens, which do not follow the last ones."""
    batches = Batches(data_of(np.arange(20), tmp_path), batch_size=4, block_size=5, seed=1)
    ends = 0
    for _ in range(20):
        batch = next(batches)
        assert batch.targets is not None
        following = batch.input_ids + 1
        wrong = batch.targets != following
        assert np.array_equal(batch.targets[wrong], np.full(wrong.sum(), IGNORED))
        assert np.array_equal(batch.input_ids[wrong], np.full(wrong.sum(), 19))
        shifted = batch.labels[:, 1:][wrong[:, :-1]]
        assert np.array_equal(shifted, np.full(len(shifted), IGNORED))
        ends += int(wrong.sum())
    assert ends == 20  # once an epoch


def test_a_block_needs_a_token_more_than_its_size(tmp_path):
    data = data_of(np.arange(5), tmp_path)
    with pytest.raises(InputError, match="5 tokens, expected at least 6 for blocks of 5"):
        Batches(data, batch_size=1, block_size=5)


def test_masked_tokens_are_read_and_not_learnt(tmp_path):
    data = data_of(np.arange(12), tmp_path, mask=[1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1])
    batch = next(Batches(data, batch_size=1, block_size=6, shuffle=False))
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[0, -100, -100, 3, 4, 5]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[-100, -100, 3, 4, 5, -100]]


# ---- documents -------------------------------------------------------------------------------------------------


def test_a_document_is_a_row_and_ends_with_the_end_of_text(tmp_path):
    data = data_of([END, 1, 2, 3, END, 4, END, 5, 6], tmp_path)
    batch = next(Batches(data, batch_size=3, block_size=8, mode="documents", shuffle=False))
    assert batch.input_ids.tolist() == [[END, 1, 2, 3], [END, 4, END, END], [END, 5, 6, END]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[END, 1, 2, 3], [END, 4, -100, -100], [END, 5, 6, -100]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[1, 2, 3, END], [4, END, -100, -100], [5, 6, END, -100]]
    assert (batch.tokens, batch.predicted) == (9, 9)


def test_long_documents_come_in_parts_and_empty_ones_do_not_come(tmp_path):
    data = data_of([1, 2, 3, 4, 5, END, END, END, 6, END], tmp_path)
    batch = next(Batches(data, batch_size=3, block_size=3, mode="documents", shuffle=False))
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, END], [END, 6, END]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[2, 3, 4], [5, END, -100], [6, END, -100]]


def test_rows_are_as_long_as_the_longest_or_as_a_block(tmp_path):
    data = data_of([END, 1, 2, END, 3], tmp_path)
    widths = [
        next(Batches(data, batch_size=2, block_size=7, mode="documents", padding=padding)).input_ids.shape[1]
        for padding in ("longest", "block")
    ]
    assert widths == [3, 7]


def test_masks_are_kept_for_documents_too(tmp_path):
    data = data_of([END, 1, 2, END, 3, 4], tmp_path, mask=[1, 0, 1, 1, 0, 1])
    batch = next(Batches(data, batch_size=2, block_size=4, mode="documents", shuffle=False))
    assert batch.labels.tolist() == [[END, -100, 2], [END, -100, 4]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[-100, 2, END], [-100, 4, END]]


# ---- ranks, positions, ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_the_ranks_share_the_batch_of_one(tmp_path, mode):
    generator = np.random.default_rng(0)
    ids = np.where(generator.random(300) < 0.1, END, generator.integers(0, 50, 300))
    data = data_of(ids, tmp_path)
    settings = {"batch_size": 12, "block_size": 7, "seed": 9, "mode": mode}
    alone = Batches(data, **settings)
    ranks = [Batches(data, **settings, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(9):
        whole = next(alone)
        parts = [next(rank) for rank in ranks]
        for name, value in whole.inputs().items():
            assert np.array_equal(np.concatenate([part.inputs()[name] for part in parts]), value)


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_a_position_is_resumed_exactly_by_any_number_of_ranks(tmp_path, mode):
    ids = np.where(np.arange(200) % 9 == 0, END, np.arange(200))
    data = data_of(ids, tmp_path)
    settings = {"batch_size": 6, "block_size": 7, "seed": 9, "mode": mode}
    one = Batches(data, **settings)
    for _ in range(5):
        next(one)
    state = json.loads(json.dumps(one.state()))
    going_on = [next(one) for _ in range(8)]
    other = Batches(data, **settings)
    other.restore(state)
    assert all(same(next(other), batch) for batch in going_on)
    second = Batches(data, **settings, rank=1, world_size=2)
    second.restore(state)
    for batch in going_on:
        assert rows_of(next(second)) == rows_of(batch)[3:]


def test_a_position_of_other_batches_is_refused_with_what_differs(tmp_path):
    data = data_of(np.arange(100), tmp_path)
    state = Batches(data, batch_size=2, block_size=5, seed=1).state()
    other = Batches(data, batch_size=2, block_size=6, seed=2)
    with pytest.raises(InputError, match=r"rows was 20 and is 16; block_size was 5 and is 6; seed was 1 and is 2"):
        other.restore(state)
    with pytest.raises(InputError, match="version 7"):
        other.restore(state | {"version": 7})
    one = Batches(data, batch_size=2, block_size=5, seed=1)
    with pytest.raises(InputError, match="damaged"):
        one.restore(state | {"samples": -3})
    Batches(data, batch_size=4, block_size=5, seed=1).restore(state)


def test_batches_end_after_so_many_epochs_with_rows_that_count_for_nothing(tmp_path):
    data = data_of(np.arange(36), tmp_path)
    batches = list(Batches(data, batch_size=4, block_size=5, epochs=2, seed=4))
    assert [batch.input_ids.shape for batch in batches] == [(4, 5)] * 4
    assert sum(len(set(rows_of(batch))) for batch in batches[:3]) == 12
    assert batches[3].labels[2:].tolist() == [[-100] * 5] * 2
    assert batches[3].targets is not None
    assert batches[3].targets[2:].tolist() == [[-100] * 5] * 2
    assert (batches[3].targets[:2] != IGNORED).any()
    of_ranks = [list(Batches(data, batch_size=4, block_size=5, epochs=2, seed=4, rank=r, world_size=2)) for r in (0, 1)]
    assert len(of_ranks[0]) == len(of_ranks[1]) == 4


def test_an_id_beyond_the_vocabulary_is_reported(tmp_path):
    data = data_of([*range(10), 60000], tmp_path)
    with pytest.raises(InputError, match="holds the id 60000, expected ids below 50257"):
        list(Batches(data, batch_size=1, block_size=5, epochs=1))


def test_an_id_beyond_the_vocabulary_that_is_only_learnt_is_reported(tmp_path):
    data = data_of([*range(10), 60000], tmp_path)
    with pytest.raises(InputError, match="holds the id 60000, expected ids below 50257"):
        list(Batches(data, batch_size=1, block_size=5, epochs=1, shuffle=False))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"block_size": True}, "block_size is True"),
        ({"batch_size": 3, "world_size": 2}, "2 ranks cannot share evenly; expected a multiple of 2, such as 4"),
        ({"rank": 1}, "rank is 1, expected one from 0 to 0"),
        ({"mode": "document"}, "mode is 'document', expected packed or documents; did you mean 'documents'"),
        ({"padding": "x"}, "padding is 'x'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, words):
    settings = {"batch_size": 2, "block_size": 5} | changes
    with pytest.raises(ValueError, match=words):
        Batches(data_of(np.arange(100), tmp_path), **settings)
