"""What changes a model's shape: resizing, replacing and tying its token table, and pruning heads."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from gpt2_core.errors import ConfigError, InputError
from gpt2_core.reference import ReferenceModel
from gpt2_pt import GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model
from models import ordinary_parameters
from pt.helpers import MODELS, ids_of, model_of, torch

TIED = (GPT2LMHeadModel, GPT2DoubleHeadsModel)


def logits(model, ids):
    with torch.no_grad():
        return model(ids)[0]


# -- resizing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_new_tokens_start_at_the_mean_and_old_ones_stay(cls):
    model = model_of(cls)
    ids = ids_of(model, 2, 5)
    before, table = logits(model, ids), model.get_input_embeddings().weight.detach().clone()
    assert model.resize_token_embeddings(40) is model.get_input_embeddings()
    grown = model.get_input_embeddings().weight
    assert grown.shape == (40, 8)
    assert torch.equal(grown[:37], table)
    torch.testing.assert_close(grown[37:], table.mean(0).expand(3, -1), rtol=1e-15, atol=1e-15)
    assert model.config.vocab_size == 40
    assert model.get_input_embeddings().num_embeddings == 40
    after = logits(model, ids)
    torch.testing.assert_close(after[..., :37] if cls in TIED else after, before)
    logits(model, torch.full_like(ids, 39))
    with pytest.raises(InputError, match="expected ids from 0 to 39"):
        model(torch.full_like(ids, 40))


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_is_about_as_likely_as_an_average_one(tied):
    model = model_of(tie_word_embeddings=tied)
    model.resize_token_embeddings(38)
    out = logits(model, ids_of(model, 2, 5))
    torch.testing.assert_close(out[..., 37], out[..., :37].mean(-1))


@pytest.mark.parametrize("tied", [True, False])
def test_cutting_the_vocabulary_keeps_the_first_tokens(tied):
    model = model_of(tie_word_embeddings=tied)
    ids = ids_of(model, 2, 5) % 20
    before = logits(model, ids)
    model.resize_token_embeddings(20)
    torch.testing.assert_close(logits(model, ids), before[..., :20])
    with pytest.raises(InputError, match="expected ids from 0 to 19"):
        model(ids + 20)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert model.lm_head.out_features == 20


def test_an_untied_head_grows_by_its_own_mean():
    model = model_of(tie_word_embeddings=False)
    head = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(39)
    assert torch.equal(model.lm_head.weight[:37], head)
    torch.testing.assert_close(model.lm_head.weight[38], head.mean(0), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_is_saved_loaded_and_trained(tmp_path, tied):
    model = model_of(dtype=torch.float32, tie_word_embeddings=tied)
    model.resize_token_embeddings(41)
    model.save_pretrained(tmp_path)
    other = GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = ids_of(model, 2, 5)
    assert torch.equal(logits(other, ids), logits(model, ids))
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (41, 8)


def test_resizing_keeps_dtype_and_what_is_frozen():
    model = model_of(dtype=torch.bfloat16, tie_word_embeddings=False)
    model.transformer.wte.weight.requires_grad_(False)
    model.resize_token_embeddings(40)
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert not model.transformer.wte.weight.requires_grad
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize("size", [0, -1, 3.5, "40", None])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(InputError, match="expected a whole number of at least 1"):
        model_of().resize_token_embeddings(size)


# -- replacing and tying -----------------------------------------------------------------------------------------


def test_a_new_token_table_takes_the_place_of_the_old_and_the_head_follows():
    model = model_of()
    table = torch.nn.Embedding(50, 8, dtype=torch.float64)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings().weight is table.weight
    assert model.lm_head.weight is table.weight
    assert model.config.vocab_size == model.transformer.config.vocab_size == 50
    assert logits(model, torch.tensor([[49, 3]])).shape == (1, 2, 50)
    with pytest.raises(InputError, match="expected ids from 0 to 49"):
        model(torch.tensor([[50]]))


def test_a_token_table_that_does_not_fit_is_refused():
    model = model_of()
    with pytest.raises(InputError, match="token table is 9 wide, expected n_embd=8"):
        model.set_input_embeddings(torch.nn.Embedding(37, 9))
    with pytest.raises(InputError, match=r"is a Tensor, expected a torch.nn.Embedding"):
        model.set_input_embeddings(torch.zeros(37, 8))
    untied = model_of(tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"has 40 rows, expected 37 .* call resize_token_embeddings first"):
        untied.set_input_embeddings(torch.nn.Embedding(40, 8))
    head = untied.lm_head.weight
    untied.set_input_embeddings(torch.nn.Embedding(37, 8, dtype=torch.float64))
    assert untied.lm_head.weight is head


CHANGES = {
    "to": lambda model: model.to(torch.float32),
    "half": lambda model: model.half(),
    "deepcopy": copy.deepcopy,
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "meta": lambda model: model.to("meta"),
    "load": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "assign": lambda model: (model.load_state_dict(model.state_dict(), assign=True), model)[1],
    "resize": lambda model: (model.resize_token_embeddings(39), model)[1],
    "eval and train": lambda model: model.eval().train(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cls", TIED)
def test_head_and_token_table_stay_one_through_every_change(cls, change):
    model = CHANGES[change](model_of(cls))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [name for name, _ in model.named_parameters()].count("lm_head.weight") == 0


@pytest.mark.parametrize("change", ["to", "to_empty", "assign"])
def test_an_untied_head_stays_its_own(change):
    model = CHANGES[change](model_of(tie_word_embeddings=False))
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_tied_weights_get_gradients_from_both_of_their_uses():
    tied, apart = model_of(), model_of(tie_word_embeddings=False)
    apart.load_state_dict(tied.state_dict())
    ids = ids_of(tied, 2, 6)
    tied(ids, labels=ids).loss.backward()
    apart(ids, labels=ids).loss.backward()
    both = apart.transformer.wte.weight.grad + apart.lm_head.weight.grad
    torch.testing.assert_close(tied.transformer.wte.weight.grad, both)


def test_a_tied_head_counts_once():
    tied, apart = model_of(), model_of(tie_word_embeddings=False)
    assert apart.num_parameters() - tied.num_parameters() == 37 * 8
    tied.transformer.wte.weight.requires_grad_(False)
    assert tied.num_parameters() - tied.num_parameters(only_trainable=True) == 37 * 8


# -- pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("heads", [{0: [1]}, {1: [0, 2]}, {0: [0, 3], 1: [1]}], ids=str)
def test_pruned_heads_equal_masked_ones(cls, heads):
    model = model_of(cls, n_head=4)
    ids, mask = ids_of(model, 2, 6), torch.ones(2, 4)
    for layer, numbers in heads.items():
        mask[layer, numbers] = 0
    with torch.no_grad():
        expected = model(ids, head_mask=mask)[0]
    whole = model.num_parameters()
    model.prune_heads(heads)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-12, atol=1e-12)
    assert model.num_parameters() == whole - sum(map(len, heads.values())) * (3 * (8 * 2 + 2) + 2 * 8)
    assert model.num_parameters() == sum(row.size for row in model.parameter_table())


def test_heads_keep_their_first_numbers_when_pruned_again():
    once, twice = model_of(n_head=4), model_of(n_head=4)
    once.prune_heads({0: [0, 1, 3], 1: [2]})
    twice.prune_heads({0: [1]})
    twice.prune_heads({0: [3, 1], 1: [2]})
    twice.prune_heads({0: [0]})
    twice.prune_heads({})
    assert once.config.pruned_heads == twice.config.pruned_heads == {0: (0, 1, 3), 1: (2,)}
    assert twice.transformer.config is twice.config
    for name, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[name])


def test_a_pruned_model_is_saved_loaded_cached_and_generates(tmp_path):
    model = model_of(n_head=4)
    model.prune_heads({0: [0], 1: [1, 2]})
    model.save_pretrained(tmp_path)
    other = GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto")
    assert other.config.pruned_heads == {0: (0,), 1: (1, 2)}
    ids = ids_of(model, 2, 6)
    assert torch.equal(logits(other, ids), logits(model, ids))
    past = other(ids[:, :3]).past
    assert [pair[0].shape[1] for pair in past] == [3, 2]
    torch.testing.assert_close(other(ids[:, 3:], past).logits, logits(model, ids)[:, 3:])
    reference = ReferenceModel.from_pretrained(tmp_path)
    assert other.generate(ids, max_new_tokens=5).tolist() == reference.generate(ids.numpy(), max_new_tokens=5).tolist()
    other.prune_heads({1: [0]})
    assert other.config.pruned_heads == {0: (0,), 1: (0, 1, 2)}
    assert logits(other, ids).shape == (2, 6, 37)


def test_a_pruned_model_trains_and_keeps_what_is_frozen():
    model = model_of(n_head=4)
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    model.prune_heads({0: [0], 1: [2]})
    assert not model.transformer.h[0].attn.c_attn.weight.requires_grad
    ids = ids_of(model, 2, 6)
    model.train()(ids, labels=ids).loss.backward()
    assert model.transformer.h[1].attn.c_attn.weight.grad.shape == (8, 18)


def test_a_mask_over_heads_counts_those_that_are_left():
    model = model_of(n_head=4)
    model.prune_heads({0: [0], 1: [1]})
    ids = ids_of(model, 1, 5)
    assert torch.equal(model(ids, head_mask=torch.ones(2, 3))[0], model(ids, head_mask=torch.ones(3))[0])
    with pytest.raises(InputError, match="head_mask has shape"):
        model(ids, head_mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ({2: [0]}, "names layer 2, expected 0 to 1"),
        ({0: [4]}, "names head 4, expected 0 to 3"),
        ({0: [-1]}, "names head -1"),
        ({1: [0, 1, 2, 3]}, "removes all 4 heads; at least one must stay"),
    ],
)
def test_heads_that_cannot_be_pruned_are_refused_and_nothing_changes(heads, match):
    model = model_of(n_head=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=match):
        model.prune_heads({0: [1], **heads})
    assert model.config.pruned_heads == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pruning_works_without_numbers():
    with torch.device("meta"):
        model = GPT2Model(model_of(n_head=4).config)
    model.prune_heads({0: [1, 2]})
    assert model.h[0].attn.c_attn.weight.shape == (8, 12)


def test_ordinary_parameters_cover_the_table():
    model = model_of()
    assert set(ordinary_parameters(model.config, "lm")) == {name for name, _ in model.named_parameters()}
    assert np.isfinite(logits(model, ids_of(model, 1, 3)).numpy()).all()
