"""What changes a model's shape: resizing, replacing and tying its token table, and pruning heads."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.errors import ConfigError, InputError
from gpt2_core.reference import ReferenceModel
from gpt2_tf import TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel
from tf.helpers import MODELS, close, equal, ids_of, keras, model_of, same_values, tf, tiny, values

TIED = (TFGPT2LMHeadModel, TFGPT2DoubleHeadsModel)


def trained_once(model):
    """The names of the parameters that a step of training changes."""
    before = values(model)
    ids = ids_of(model, 2, 6)
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    model.fit({"input_ids": ids, "labels": ids}, verbose=0)
    return {name for name, value in values(model).items() if not np.array_equal(value, before[name])}


# -- resizing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_new_tokens_start_at_the_mean_and_old_ones_stay(cls):
    model = model_of(cls)
    ids = ids_of(model, 2, 5)
    before, table = model(ids)[0], model.get_input_embeddings().weight.numpy()
    assert model.resize_token_embeddings(40) is model.get_input_embeddings()
    grown = model.get_input_embeddings().weight.numpy()
    assert grown.shape == (40, 8)
    assert equal(grown[:37], table)
    close(grown[37:], np.tile(table.mean(0), (3, 1)), 1e-15)
    assert model.config.vocab_size == model._body().config.vocab_size == 40
    after = model(ids)[0]
    close(after[..., :37] if cls in TIED else after, before)
    model(tf.fill(ids.shape, tf.constant(39, tf.int64)))
    with pytest.raises(InputError, match="expected ids from 0 to 39"):
        model(tf.fill(ids.shape, tf.constant(40, tf.int64)))


@pytest.mark.parametrize("tied", [True, False])
def test_cutting_the_vocabulary_keeps_the_first_tokens(tied):
    model, fresh = model_of(tie_word_embeddings=tied), model_of(tie_word_embeddings=tied)
    ids = ids_of(model, 2, 5) % 20
    before, text = model(ids).logits, model.generate(ids, max_new_tokens=5)
    for each in (model, fresh):
        each.resize_token_embeddings(20)
    close(model(ids).logits, before[..., :20])
    assert equal(model.generate(ids, max_new_tokens=5), fresh.generate(ids, max_new_tokens=5))
    if tied:  # with this seed the untied model happens to write the same
        assert not equal(fresh.generate(ids, max_new_tokens=5), text)  # or what was traced for the old size would do
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


def test_an_untied_head_grows_by_its_own_mean():
    model = model_of(tie_word_embeddings=False)
    head = model.lm_head.weight.numpy()
    model.resize_token_embeddings(39)
    assert equal(model.lm_head.weight[:37], head)
    close(model.lm_head.weight[38], head.mean(0), 1e-15)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_is_saved_loaded_and_trained(tmp_path, tied):
    model = tiny(tie_word_embeddings=tied)
    model.resize_token_embeddings(41)
    model.save_pretrained(tmp_path)
    other = TFGPT2LMHeadModel.from_pretrained(tmp_path)
    same_values(other, model)
    assert "transformer.wte.weight" in trained_once(other)


def test_resizing_keeps_dtype_place_and_what_is_frozen():
    model = model_of(dtype="bfloat16", tie_word_embeddings=False)
    model.transformer.wte.weight.trainable = False
    model.lm_head.trainable = False
    paths = [variable.path for variable in model.variables]
    model.resize_token_embeddings(40)
    assert [variable.path for variable in model.variables] == paths
    assert model.transformer.wte.weight.dtype == "bfloat16"
    assert not model.transformer.wte.weight.trainable
    assert len(model.trainable_variables) == len(paths) - 3
    model.lm_head.trainable = True
    assert model.lm_head.weight.trainable


@pytest.mark.parametrize("size", [0, -1, 3.5, "40", None])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(InputError, match="expected a whole number of at least 1"):
        model_of().resize_token_embeddings(size)


# -- replacing and tying -----------------------------------------------------------------------------------------


def test_a_new_token_table_takes_the_place_of_the_old_and_the_head_follows():
    layer = keras.layers.Embedding(50, 8, dtype="float64")
    layer.build()
    for table in (layer, layer.embeddings, layer.embeddings.numpy(), tf.constant(layer.embeddings)):
        model = model_of()
        model.set_input_embeddings(table)
        assert equal(model.get_input_embeddings().weight, layer.embeddings)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.config.vocab_size == model.transformer.config.vocab_size == 50
        assert model(np.array([[49, 3]])).logits.shape == (1, 2, 50)
        with pytest.raises(InputError, match="expected ids from 0 to 49"):
            model(np.array([[50]]))


def test_a_token_table_that_does_not_fit_is_refused():
    model = model_of()
    with pytest.raises(InputError, match="token table is 9 wide, expected n_embd=8"):
        model.set_input_embeddings(np.zeros((37, 9)))
    for wrong in (np.zeros(37), "table", None, keras.layers.Dense(3)):
        with pytest.raises(InputError, match=r"the new token table is a .*, expected a keras.layers.Embedding"):
            model.set_input_embeddings(wrong)
    untied = model_of(tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"has 40 rows, expected 37 .* call resize_token_embeddings first"):
        untied.set_input_embeddings(np.zeros((40, 8)))
    head = untied.lm_head.weight
    untied.set_input_embeddings(np.zeros((37, 8)))
    assert untied.lm_head.weight is head


@pytest.mark.parametrize("cls", TIED)
def test_a_tied_head_is_the_token_table_and_counts_once(cls):
    tied, apart = model_of(cls), model_of(cls, tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert apart.lm_head.weight is not apart.transformer.wte.weight
    assert apart.num_parameters() - tied.num_parameters() == 37 * 8
    assert len(apart.trainable_variables) - len(tied.trainable_variables) == 1
    tied.transformer.wte.trainable = False
    assert tied.num_parameters() - tied.num_parameters(only_trainable=True) == 37 * 8


def test_tying_an_untied_head_leaves_nothing_of_it_behind():
    model = model_of(tie_word_embeddings=False)
    model.tie_weights()
    assert model.lm_head.weight is not model.transformer.wte.weight  # the config says that they are two
    model._set_config(tie_word_embeddings=True)
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(model.trainable_variables) == len(model.parameter_table())


def test_tied_weights_get_gradients_from_both_of_their_uses():
    tied, apart = model_of(), model_of(tie_word_embeddings=False)
    for row in tied.parameter_table():
        apart.get_parameter(row.name).assign(tied.get_parameter(row.name))
    apart.lm_head.weight.assign(tied.transformer.wte.weight)
    ids = ids_of(tied, 2, 6)
    found = []
    for model, wanted in ((tied, [tied.lm_head.weight]), (apart, [apart.lm_head.weight, apart.transformer.wte.weight])):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids).loss
        found.append(sum(tf.convert_to_tensor(each) for each in tape.gradient(loss, wanted)))
    close(*found)


# -- pruning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_pruned_heads_equal_masked_ones(cls):
    heads = {0: [0, 3], 1: [1]}
    model = model_of(cls, n_head=4)
    ids, mask = ids_of(model, 2, 6), np.ones((2, 4))
    for layer, numbers in heads.items():
        mask[layer, numbers] = 0
    expected, whole = model(ids, head_mask=mask)[0], model.num_parameters()
    model.prune_heads(heads)
    close(model(ids)[0], expected)
    assert model.num_parameters() == whole - sum(map(len, heads.values())) * (3 * (8 * 2 + 2) + 2 * 8)
    assert model.num_parameters() == sum(row.size for row in model.parameter_table())
    assert [tuple(v.shape) for v in model.trainable_variables] == [row.shape for row in model.parameter_table()]


def test_heads_keep_their_first_numbers_when_pruned_again():
    once, twice = model_of(n_head=4), model_of(n_head=4)
    once.prune_heads({0: [0, 1, 3], 1: [2]})
    twice.prune_heads({0: [1]})
    twice.prune_heads({"0": [3, 1], 1: [2]})
    twice.prune_heads({0: [0]})
    twice.prune_heads({})
    assert once.config.pruned_heads == twice.config.pruned_heads == {0: (0, 1, 3), 1: (2,)}
    assert twice.transformer.config is twice.config
    same_values(once, twice)


def test_a_pruned_model_is_saved_loaded_cached_and_generates(tmp_path):
    model = model_of(n_head=4)
    ids = ids_of(model, 2, 6)
    model.generate(ids, max_new_tokens=2)
    model.prune_heads({0: [0], 1: [1, 2]})
    model.save_pretrained(tmp_path)
    other = TFGPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto")
    assert other.config.pruned_heads == {0: (0,), 1: (1, 2)}
    assert equal(other(ids).logits, model(ids).logits)
    past = other(ids[:, :3]).past
    assert [pair[0].shape[1] for pair in past] == [3, 2]
    close(other(ids[:, 3:], past).logits, model(ids).logits[:, 3:])
    reference = ReferenceModel.from_pretrained(tmp_path).generate(ids.numpy(), max_new_tokens=5).tolist()
    for each in (model, other):
        assert each.generate(ids, max_new_tokens=5).numpy().tolist() == reference


def test_a_pruned_model_trains_and_keeps_what_is_frozen():
    model = tiny(n_head=4)
    model.transformer.h[0].attn.c_attn.weight.trainable = False
    model.transformer.h[0].mlp.trainable = False
    model.prune_heads({0: [0, 2]})
    frozen = {row.name for row in model.parameter_table()} - trained_once(model)
    assert frozen == {"transformer.h.0.attn.c_attn.weight"} | {
        f"transformer.h.0.mlp.{layer}.{leaf}" for layer in ("c_fc", "c_proj") for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ({2: [0]}, "names layer 2, expected 0 to 1"),
        ({0: [-1]}, "names head -1"),
        ({1: [0, 1, 2, 3]}, "removes all 4 heads; at least one must stay"),
    ],
)
def test_heads_that_cannot_be_pruned_are_refused_and_nothing_changes(heads, match):
    model, same = model_of(n_head=4), model_of(n_head=4)
    with pytest.raises(ConfigError, match=match):
        model.prune_heads({0: [1], **heads})
    assert model.config.pruned_heads == {}
    same_values(model, same)
