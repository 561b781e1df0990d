"""gpt2_core.checkpoints.naming: what a file may call things, and what is said about all that does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import Checkpoint, Tensor, naming, round_to_bfloat16
from gpt2_core.checkpoints.naming import HEADS, match, names_in_file, same_numbers
from gpt2_core.config import GPT2Config
from gpt2_core.errors import CheckpointError, CheckpointMismatchError
from gpt2_core.parameters import Head, parameter_table

CONFIG = GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2, num_labels=3)
UNTIED = CONFIG.replace(tie_word_embeddings=False)


def checkpoint(tensors: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(tensors, format="test", path=Path("some/file"))


def holding(config: GPT2Config, head: Head | str, prefix: bool = True) -> dict[str, Tensor]:
    """Tensors as a file of this model would hold them."""
    chance = np.random.default_rng(0)
    rows = parameter_table(config, head)
    names = (row.name if prefix else row.name.removeprefix("transformer.") for row in rows)
    return {
        name: Tensor.of(chance.normal(size=row.shape).astype(np.float32)) for name, row in zip(names, rows, strict=True)
    }


def matched(tensors: dict[str, Tensor], config: GPT2Config, head: Head | str, **settings: bool) -> naming.Matching:
    tied = config.tie_word_embeddings and Head(head) in (Head.LM, Head.DOUBLE)
    return match(checkpoint(tensors), parameter_table(config, head), n_layer=config.n_layer, tied=tied, **settings)


@pytest.mark.parametrize("head", list(Head))
def test_a_models_own_file_matches_name_by_name(head: Head) -> None:
    for config in (CONFIG, UNTIED):
        found = matched(holding(config, head), config, head)
        assert found.names == {row.name: row.name for row in parameter_table(config, head)}
        assert found.fits and not found.ignored and not found.newly_initialised


def test_names_with_and_without_prefix_are_the_same_parameters() -> None:
    released = holding(CONFIG, Head.NONE)
    assert matched(released, CONFIG, Head.LM).names["transformer.h.1.ln_2.bias"] == "h.1.ln_2.bias"
    saved = holding(CONFIG, Head.LM)
    assert matched(saved, CONFIG, Head.NONE).names["h.1.ln_2.bias"] == "transformer.h.1.ln_2.bias"


@pytest.mark.parametrize("head", list(Head))
def test_the_mapping_of_names_is_a_bijection_whatever_the_file_holds(head: Head) -> None:
    table = parameter_table(UNTIED, head)
    for tensors in ({}, holding(CONFIG, Head.NONE), holding(CONFIG, Head.LM)):
        names = names_in_file(tensors, table)
        assert list(names) == [row.name for row in table]
        assert len(set(names.values())) == len(names)


def test_the_table_of_heads_holds_every_head_of_the_parameter_table() -> None:
    listed = {name for names in HEADS.values() for name in names}
    body = {row.name for row in parameter_table(CONFIG, Head.LM)}
    for head in Head:
        rows = {row.name for row in parameter_table(UNTIED, head)}
        if head is not Head.NONE:
            assert rows - body <= listed
    assert listed - {"lm_head.weight"} == naming.FRESH


def test_two_spellings_of_one_parameter_are_not_chosen_between() -> None:
    both = holding(CONFIG, Head.NONE) | holding(CONFIG, Head.LM)
    with pytest.raises(CheckpointMismatchError) as error:
        matched(both, CONFIG, Head.LM)
    assert set(error.value.unexpected) == set(holding(CONFIG, Head.NONE))


def test_a_file_that_mixes_spellings_is_refused() -> None:
    mixed = holding(CONFIG, Head.LM)
    mixed["ln_f.bias"] = mixed.pop("transformer.ln_f.bias")
    with pytest.raises(CheckpointMismatchError) as error:
        matched(mixed, CONFIG, Head.LM)
    assert error.value.missing == ("transformer.ln_f.bias",) and error.value.unexpected == ("ln_f.bias",)


# Things that are no parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
def test_the_buffers_of_early_releases_are_ignored_by_name_and_with_a_reason(prefix: bool) -> None:
    front = "transformer." if prefix else ""
    buffers = [f"{front}h.{layer}.attn.{name}" for layer in range(2) for name in ("bias", "masked_bias")]
    tensors = holding(CONFIG, Head.LM, prefix) | {name: Tensor.of(np.ones((1, 1, 8, 8), bool)) for name in buffers}
    found = matched(tensors, CONFIG, Head.LM)
    assert list(found.ignored) == buffers and "causal mask" in found.ignored[buffers[0]]


def test_a_buffer_of_a_layer_that_the_model_does_not_have_is_unexpected() -> None:
    tensors = holding(CONFIG, Head.LM) | {"transformer.h.2.attn.bias": Tensor.of(np.ones(1))}
    with pytest.raises(CheckpointMismatchError, match=r"unexpected \(1\)"):
        matched(tensors, CONFIG, Head.LM)


# The language model's head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("head", [Head.LM, Head.DOUBLE])
def test_a_tied_head_stored_twice_is_ignored_if_it_is_the_same(head: Head, prefix: bool) -> None:
    tensors = holding(CONFIG, head, prefix)
    tokens = tensors["transformer.wte.weight" if prefix else "wte.weight"]
    found = matched(tensors | {"lm_head.weight": tokens}, CONFIG, head)
    assert "equal to the token table" in found.ignored["lm_head.weight"]


def test_a_tied_head_that_differs_is_an_error_with_the_remedy() -> None:
    tensors = holding(UNTIED, Head.LM)
    with pytest.raises(CheckpointError, match=r"differs from transformer.wte.weight.*tie_word_embeddings=False"):
        matched(tensors, CONFIG, Head.LM)
    tensors["lm_head.weight"] = Tensor.of(np.ones((12, 4), np.float32))
    with pytest.raises(CheckpointError, match="differs from"):
        matched(tensors, CONFIG, Head.LM)


def test_one_number_that_differs_is_seen_in_any_piece_and_any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_PIECE", 4)
    numbers = np.arange(11, dtype=np.float32)
    for index in range(11):
        other = numbers.copy()
        other[index] += 1
        assert not same_numbers(Tensor.of(numbers), Tensor.of(other))
        assert not same_numbers(Tensor.of(numbers), Tensor.of(other.astype(np.float16)))
    assert same_numbers(Tensor.of(numbers), Tensor.of(numbers.astype(np.float16)))
    assert same_numbers(Tensor.of(numbers), Tensor.of(round_to_bfloat16(numbers), "bfloat16"))
    nothing = np.array([np.nan, 0.0], np.float32)
    assert same_numbers(Tensor.of(nothing), Tensor.of(nothing.copy()))
    assert not same_numbers(Tensor.of(nothing), Tensor.of(-nothing))


def test_an_untied_model_needs_its_head() -> None:
    with pytest.raises(CheckpointMismatchError, match="tie_word_embeddings=True") as error:
        matched(holding(CONFIG, Head.LM), UNTIED, Head.LM)
    assert error.value.missing == ("lm_head.weight",)


# Other heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [Head.DOUBLE, Head.SEQUENCE, Head.TOKEN, Head.QA])
def test_a_head_that_the_file_lacks_starts_afresh_and_is_named(head: Head) -> None:
    found = matched(holding(CONFIG, Head.NONE), CONFIG, head)
    assert set(found.newly_initialised) == {row.name for row in parameter_table(CONFIG, head)} - set(
        holding(CONFIG, Head.LM)
    )
    assert found.newly_initialised and not set(found.newly_initialised) & set(found.names)


def test_a_head_that_the_model_lacks_is_dropped_and_named() -> None:
    for head in (Head.LM, Head.DOUBLE, Head.SEQUENCE, Head.TOKEN, Head.QA):
        tensors = holding(UNTIED, head)
        found = matched(tensors, UNTIED, Head.NONE)
        dropped = {name for name in tensors if not name.startswith("transformer.")}
        assert set(found.ignored) == dropped
        assert all("which this model does not have" in why for why in found.ignored.values())


def test_nothing_of_the_transformer_may_start_afresh() -> None:
    tensors = holding(CONFIG, Head.SEQUENCE)
    del tensors["transformer.h.0.attn.c_attn.bias"], tensors["score.weight"]
    with pytest.raises(CheckpointMismatchError) as error:
        matched(tensors, CONFIG, Head.SEQUENCE)
    assert error.value.missing == ("transformer.h.0.attn.c_attn.bias",)


def test_no_head_may_start_afresh_if_the_caller_says_so() -> None:
    table = parameter_table(CONFIG, Head.SEQUENCE)
    with pytest.raises(CheckpointMismatchError) as error:
        match(checkpoint(holding(CONFIG, Head.NONE)), table, n_layer=2, tied=False, optional=frozenset())
    assert error.value.missing == ("score.weight",)


def test_a_head_of_another_number_of_labels_names_the_remedy() -> None:
    with pytest.raises(CheckpointMismatchError, match="set num_labels") as error:
        matched(holding(CONFIG, Head.SEQUENCE), CONFIG.replace(num_labels=5), Head.SEQUENCE)
    assert error.value.misshaped == (("score.weight", (3, 4), (5, 4)),)


# Reports --------------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshaped_are_reported_together() -> None:
    tensors = holding(CONFIG, Head.LM)
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.h.0.mlp.extra"] = Tensor.of(np.ones(1))
    tensors["transformer.wpe.weight"] = Tensor.of(np.ones((4, 8)))
    with pytest.raises(CheckpointMismatchError) as error:
        matched(tensors, CONFIG, Head.LM)
    assert error.value.missing == ("transformer.ln_f.bias",)
    assert error.value.unexpected == ("transformer.h.0.mlp.extra",)
    assert error.value.misshaped == (("transformer.wpe.weight", (4, 8), (8, 4)),)
    assert str(Path("some/file")) in str(error.value)
    found = matched(tensors, CONFIG, Head.LM, strict=False)
    assert not found.fits and found.missing == error.value.missing and found.misshaped == error.value.misshaped


def test_shapes_are_never_bent() -> None:
    tensors = holding(CONFIG, Head.LM)
    for name, array in (
        ("transformer.ln_f.bias", np.ones((1, 4))),
        ("transformer.h.0.mlp.c_fc.weight", np.ones((16, 4))),
        ("transformer.wte.weight", np.ones((12, 4))),
    ):
        with pytest.raises(CheckpointMismatchError):
            matched(tensors | {name: Tensor.of(array)}, CONFIG, Head.LM)


def test_a_file_of_another_architecture_is_called_one() -> None:
    other = {f"model.layers.{n}.weight": Tensor.of(np.ones(1)) for n in range(5)}
    with pytest.raises(CheckpointMismatchError, match=r"none of its names is a GPT-2's.*model.layers.0.weight"):
        matched(other, CONFIG, Head.LM)


# transformers as oracle -----------------------------------------------------------------------------------------------


def classes() -> Iterable[tuple[str, Head]]:
    return [
        ("GPT2Model", Head.NONE),
        ("GPT2LMHeadModel", Head.LM),
        ("GPT2DoubleHeadsModel", Head.DOUBLE),
        ("GPT2ForSequenceClassification", Head.SEQUENCE),
        ("GPT2ForTokenClassification", Head.TOKEN),
        ("GPT2ForQuestionAnswering", Head.QA),
    ]


@pytest.mark.parametrize(("name", "head"), classes())
def test_every_parameter_that_transformers_has_is_matched(name: str, head: Head) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, num_labels=3
    )
    theirs = getattr(transformers, name)(config)
    tensors = {key: Tensor.of(tensor.numpy()) for key, tensor in theirs.state_dict().items()}
    found = matched(tensors, CONFIG, head)
    assert set(found.names.values()) | set(found.ignored) == set(tensors)
    assert not found.newly_initialised
