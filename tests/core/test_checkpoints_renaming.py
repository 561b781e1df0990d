"""Tables of names and layouts: both directions of every format's, and the notation they are written in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import Checkpoint, Tensor, formats, holds_of
from gpt2_core.checkpoints.renaming import Names, Rule, arranged, pattern, sizes_of
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointFormatError
from gpt2_core.parameters import Head, parameter_table

CONFIG = GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=3, n_head=2, num_labels=3)
SPLIT = Rule("h.{layer}.attn.c_attn.weight", ("q/{layer}", "k/{layer}", "v/{layer}"), "C (3 H D) -> 3 C H D")
TURNED = Rule("h.{layer}.mlp.c_fc.weight", "block_{layer}/fc", "I O -> O I")
PLAIN = Rule("wte.weight", "embeddings")
HEAD = Rule("lm_head.weight", "out", "V C -> 1 C V")
NAMES = Names(PLAIN, SPLIT, TURNED, HEAD)


def some(seed: int = 0) -> dict[str, Tensor]:
    chance = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (11, 8), "lm_head.weight": (11, 8)}
    for layer in range(CONFIG.n_layer):
        shapes[f"transformer.h.{layer}.attn.c_attn.weight"] = (8, 24)
        shapes[f"transformer.h.{layer}.mlp.c_fc.weight"] = (8, 32)
    return {name: Tensor.of(chance.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


# The notation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "here", "there"),
    [
        ("I O -> O I", (2, 3), (3, 2)),
        ("C F -> 1 C F", (2, 3), (1, 2, 3)),
        ("C (H D) -> C H D", (5, 8), (5, 2, 4)),
        ("(H D) C -> H D C", (8, 5), (2, 4, 5)),
        ("C (3 H D) -> 3 H C D", (5, 24), (3, 2, 5, 4)),
        ("C -> C", (4,), (4,)),
    ],
)
def test_a_pattern_and_its_inverse_move_shapes_and_numbers_there_and_back(
    text: str, here: tuple[int, ...], there: tuple[int, ...]
) -> None:
    sizes, layout = {"H": 2, "D": 4}, pattern(text)
    array = np.arange(np.prod(here)).reshape(here)
    assert layout.shape(here, sizes) == there and layout.inverse.shape(there, sizes) == here
    moved = layout.view(array, sizes)
    assert moved.shape == there and np.array_equal(layout.inverse.view(moved, {}), array)
    assert str(layout) == text


def test_a_pattern_says_which_number_goes_where() -> None:
    array = np.arange(2 * 3 * 2 * 2).reshape(2, 12)
    moved = pattern("C (3 H D) -> 3 C H D").view(array, {"H": 2, "D": 2})
    assert moved[1].tolist() == [[[4, 5], [6, 7]], [[16, 17], [18, 19]]], "part 1 is columns 4 to 7"
    assert np.array_equal(pattern("I O -> O I").view(array, {}), array.T)


@pytest.mark.parametrize("shape", [(8,), (8, 3, 1), (8, 25)])
def test_a_shape_that_does_not_fit_a_pattern_is_none(shape: tuple[int, ...]) -> None:
    layout = pattern("C (3 H D) -> 3 C H D")
    assert layout.shape(shape, {"H": 2, "D": 4}) is None
    assert arranged(Tensor.of(np.zeros(shape, np.float32)), layout, {"H": 2, "D": 4}) is None
    with pytest.raises(CheckpointError, match="does not fit the pattern"):
        layout.view(np.zeros(shape), {"H": 2, "D": 4})
    assert pattern("C F -> 1 C F").inverse.shape((2, 3, 4), {}) is None, "an axis of 1 is never longer"


@pytest.mark.parametrize("text", ["C D", "C D -> C", "C C -> C C", "C -> C D", "3 C -> C"])
def test_a_pattern_that_would_lose_or_repeat_an_axis_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="is not a pattern"):
        pattern(text)


def test_a_moved_tensor_is_written_a_piece_at_a_time() -> None:
    big = np.arange(3000 * 2000, dtype=np.float32).reshape(3000, 2000)
    moved = arranged(Tensor.of(big), pattern("I O -> O I"), {})
    assert moved is not None and moved.view().base is not None, "it is a view"
    pieces = list(moved.chunks())
    assert max(map(len, pieces)) <= 1 << 20 and b"".join(pieces) == big.T.tobytes()


def test_a_tensor_whose_numbers_stay_in_order_is_passed_on_in_its_own_pieces() -> None:
    numbers = np.arange(24, dtype=np.float32)
    tensor = Tensor("float32", (4, 6), pytest.fail, None, lambda: iter([numbers[:7], numbers[7:]]))
    for text, shape in (("C F -> 1 C F", (1, 4, 6)), ("(H D) C -> H D C", (2, 2, 6)), ("C F -> C 1 F", (4, 1, 6))):
        moved = arranged(tensor, pattern(text), {"H": 2})
        assert moved is not None and moved.shape == shape and not pattern(text).moves
        assert b"".join(moved.chunks()) == numbers.tobytes()
    assert pattern("C F -> F C").moves and pattern("C (3 F) -> 3 C F").moves


# A table --------------------------------------------------------------------------------------------------------------


def test_a_table_there_and_back_changes_no_number_and_no_name() -> None:
    given = some()
    there = NAMES.to_file(given, CONFIG)
    assert {name: tensor.shape for name, tensor in there.items()} == {
        "embeddings": (11, 8),
        "out": (1, 8, 11),
        **{f"{part}/{layer}": (8, 2, 4) for part in "qkv" for layer in range(3)},
        **{f"block_{layer}/fc": (32, 8) for layer in range(3)},
    }
    back = NAMES.from_file({name: Tensor.of(tensor.raw()) for name, tensor in there.items()})
    assert set(back.tensors) == set(given)
    for name, tensor in given.items():
        assert np.array_equal(back.tensors[name].raw(), tensor.raw()), name
    assert back.names_in_file["transformer.h.1.attn.c_attn.weight"] == "q/1, k/1, v/1"


def test_names_without_a_row_stay_and_are_not_guessed() -> None:
    odd = {
        "q/0": Tensor.of(np.zeros((8, 2, 4))),
        "embeddings": Tensor.of(np.zeros((2, 2))),
        "Embeddings": some()["lm_head.weight"],
    }
    found = NAMES.from_file(odd)
    assert set(found.tensors) == {"q/0", "Embeddings", "transformer.wte.weight"}
    assert found.names_in_file == {"transformer.wte.weight": "embeddings"}
    with pytest.raises(CheckpointError, match=r"no place in this format: transformer\.wpe\.weight"):
        NAMES.to_file(some() | {"transformer.wpe.weight": Tensor.of(np.zeros(2))}, CONFIG)


def test_a_tensor_of_a_wrong_shape_keeps_it_so_that_it_is_reported() -> None:
    found = NAMES.from_file({"out": Tensor.of(np.zeros((2, 8, 11))), "block_0/fc": Tensor.of(np.zeros(3))})
    assert found.tensors["lm_head.weight"].shape == (2, 8, 11)
    assert found.tensors["transformer.h.0.mlp.c_fc.weight"].shape == (3,)
    with pytest.raises(CheckpointError, match="does not fit the layout"):
        NAMES.to_file({"h.0.mlp.c_fc.weight": Tensor.of(np.zeros(3))}, CONFIG)


def test_a_tensor_that_only_happens_to_have_our_shape_is_refused() -> None:
    wrong = {"out": Tensor.of(np.zeros((11, 8))), "embeddings": Tensor.of(np.zeros((11, 8)))}
    with pytest.raises(CheckpointFormatError, match=r"out is of shape \(11, 8\), expected 1 C V -> V C"):
        NAMES.from_file(wrong)
    squeezed = Names(Rule("h.{layer}.mlp.c_fc.bias", "b/{layer}", "N -> 1 N"))
    with pytest.raises(CheckpointFormatError, match=r"^2 tensors .* b/0 is .*; b/1 is of shape \(5,\)"):
        squeezed.from_file({f"b/{layer}": Tensor.of(np.zeros(5)) for layer in range(2)})


def test_parts_that_are_not_alike_are_refused() -> None:
    parts = {f"{part}/0": Tensor.of(np.zeros((8, 2, 4))) for part in "qk"} | {"v/0": Tensor.of(np.zeros((8, 2, 3)))}
    with pytest.raises(CheckpointFormatError, match="expected parts alike"):
        NAMES.from_file(parts)


def test_two_tensors_never_end_under_one_name() -> None:
    both = {"embeddings": Tensor.of(np.zeros(1)), "transformer.wte.weight": Tensor.of(np.zeros(2))}
    with pytest.raises(CheckpointFormatError, match="is also what 'embeddings' is"):
        NAMES.from_file(both)


def test_blocks_are_counted_by_the_table_and_bounded() -> None:
    assert NAMES.layers_in(["q/0", "block_11/fc", "block_x/fc", "other/77"]) == 12
    assert NAMES.layers_in(["embeddings"]) == 0
    with pytest.raises(CheckpointFormatError, match="block 123456789"):
        NAMES.layers_in(["q/123456789"])


def test_a_row_that_counts_blocks_on_one_side_only_is_refused() -> None:
    with pytest.raises(CheckpointError, match="one side only"):
        Names(Rule("wte.weight", "blocks/{layer}"))


def test_blocks_are_counted_as_keras_does_where_the_table_says_so() -> None:
    names = Names(
        PLAIN,
        Rule("h.{layer}.ln_1.bias", "h/block{_layer}/ln/1"),
        Rule("h.{layer}.mlp.c_fc.bias", ("h/block{_layer}/a", "b{layer}"), "(2 N) -> 2 N"),
    )
    theirs = [name for row in names.rows(12) for name in row.theirs]
    assert theirs[:4] == ["embeddings", "h/block/ln/1", "h/block/a", "b0"] and theirs[-1] == "b11"
    assert "h/block_11/a" in theirs and len(set(theirs)) == len(theirs) == 37
    for name, layers in (("h/block/ln/1", 1), ("h/block_4/a", 5), ("b7", 8), ("h/block_x/a", 0), ("h/blocks/a", 0)):
        assert names.layers_in(["embeddings", name]) == layers, name
    bias = Tensor.of(np.ones(8, np.float32))
    found = names.from_file(
        {"h/block/ln/1": bias, "h/block_0/ln/1": bias, "h/block_01/ln/1": bias, "h/block_1/ln/1": bias}
    )
    assert found.names_in_file == {
        "transformer.h.0.ln_1.bias": "h/block/ln/1",
        "transformer.h.1.ln_1.bias": "h/block_1/ln/1",
    }
    assert {"h/block_0/ln/1", "h/block_01/ln/1"} < set(found.tensors)
    with pytest.raises(CheckpointError, match="one side only"):
        Names(Rule("wte.weight", "block{_layer}"))


# The table of every format --------------------------------------------------------------------------------------------

TABLES = [name for name, module in formats().items() if getattr(module, "NAMES", None) is not None]


@pytest.mark.parametrize("n_layer", [1, 2, 12])
@pytest.mark.parametrize("format", TABLES)
def test_the_table_of_a_format_is_a_bijection(format: str, n_layer: int) -> None:
    rows = list(formats()[format].NAMES.rows(n_layer))  # type: ignore[attr-defined]
    theirs = [name for row in rows for name in row.theirs]
    assert len(set(theirs)) == len(theirs) and len({row.ours for row in rows}) == len(rows)
    assert formats()[format].NAMES.layers_in(theirs) == n_layer  # type: ignore[attr-defined]


@pytest.mark.parametrize("format", TABLES)
def test_the_table_of_a_format_has_every_parameter_of_the_heads_it_holds_and_inverts(format: str) -> None:
    module, chance = formats()[format], np.random.default_rng(0)
    names: Names = module.NAMES  # type: ignore[attr-defined]
    holds = holds_of(module)
    for tied in holds.fixed.get("tie_word_embeddings", (True, False)):
        for head in holds.heads:
            config = CONFIG.replace(tie_word_embeddings=tied)
            table = parameter_table(config, head)
            given = {row.name: Tensor.of(chance.normal(size=row.shape).astype(np.float32)) for row in table}
            there = {name: Tensor.of(tensor.raw()) for name, tensor in names.to_file(given, config).items()}
            back = names.from_file(there, sizes_of(config, None)).tensors
            bare = {name.removeprefix("transformer."): tensor for name, tensor in back.items()}
            assert sorted(bare) == sorted(row.name.removeprefix("transformer.") for row in table)
            for name, tensor in given.items():
                assert np.array_equal(bare[name.removeprefix("transformer.")].raw(), tensor.raw()), (head, name)


def test_a_checkpoint_says_nothing_beyond_tensors_unless_it_was_told() -> None:
    plain = Checkpoint({}, format="x", path=Path("x"))
    assert plain.config is plain.head is plain.tokenizer is None
    assert plain.names_in_file == plain.ignored == {} and plain.notes == ()
    assert Head.LM in holds_of(object()).heads
