"""What models take and refuse, and how they are made."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest

from gpt2_core import GPT2Config
from gpt2_core.config import PRESETS
from gpt2_core.errors import ConfigError, InputError
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import count_parameters
from gpt2_pt import GPT2DoubleHeadsModel, GPT2LMHeadModel, GPT2Model
from models import small_config
from pt.helpers import MODELS, ids_of, model_of, torch

# Counted from the released checkpoints; the tied head counts once.
RELEASED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


# -- making ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), RELEASED.items())
def test_the_released_sizes_have_their_parameter_counts_without_memory(name, count):
    with torch.device("meta"):
        model = GPT2LMHeadModel(PRESETS[name])
    assert model.num_parameters() == count
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not list(model.buffers())


def test_a_model_on_the_meta_device_runs_without_numbers():
    with torch.device("meta"):
        model = GPT2LMHeadModel(PRESETS["gpt2-xl"]).eval()
        out = model(torch.zeros(2, 7, dtype=torch.int64), labels=torch.zeros(2, 7, dtype=torch.int64))
    assert out.logits.shape == (2, 7, 50257)
    assert out.past[47][1].shape == (2, 25, 7, 64)


@pytest.mark.parametrize("cls", MODELS)
def test_parameters_are_those_of_the_table_and_start_from_its_values(cls):
    config = small_config(pruned_heads={1: [0]}, n_inner=5, num_labels=3)
    model = cls(config, seed=7)
    expected = initial_values(config, cls.head, 7)
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert np.array_equal(found[name].detach().numpy(), value), name
    assert model.num_parameters() == count_parameters(config, cls.head)


def test_another_seed_gives_another_model_and_the_same_seed_the_same():
    one, same, other = (GPT2LMHeadModel(small_config(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["transformer.wte.weight"], other["transformer.wte.weight"])


def test_making_and_running_a_model_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = GPT2DoubleHeadsModel(small_config())
    model.eval()(ids_of(model, 2, 5))
    model.generate(ids_of(model, 2, 5)[:, 0], do_sample=True, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_needs_a_config_and_says_where_trained_weights_come_from():
    with pytest.raises(ConfigError, match=r"needs a GPT2Config, got str; .* GPT2LMHeadModel.from_pretrained"):
        GPT2LMHeadModel("gpt2")


def test_state_dict_names_are_the_released_ones():
    names = set(GPT2LMHeadModel(GPT2Config(n_embd=4, n_head=1, n_layer=1, vocab_size=9)).state_dict())
    block = {
        f"transformer.h.0.{layer}.{leaf}"
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for leaf in ("weight", "bias")
    }
    ends = {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert names == block | ends | {"lm_head.weight"}


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("cls", MODELS)
def test_a_copied_model_is_whole_tied_and_its_own(cls, through):
    model = model_of(cls)
    if through == "deepcopy":
        other = copy.deepcopy(model)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    ids = ids_of(model, 2, 5)
    assert torch.equal(other(ids)[0], model(ids)[0])
    assert other.config == model.config
    if cls is GPT2LMHeadModel:
        assert other.lm_head.weight is other.transformer.wte.weight
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    assert not torch.equal(other(ids)[0], model(ids)[0])
    other.load_state_dict(model.state_dict())  # its hooks are bound to itself
    assert torch.equal(other(ids)[0], model(ids)[0])


def test_outputs_unpack_index_and_name_alike():
    model = model_of()
    ids = ids_of(model, 2, 5)
    out = model(ids, labels=ids)
    loss, logits, *rest = out
    assert loss is out.loss is out["loss"] is out[0]
    assert logits is out.logits is out[1]
    assert rest == [out.past]
    assert model(ids)[0].shape == (2, 5, 37)
    assert out.past is out.past_key_values


# -- refusing ----------------------------------------------------------------------------------------------------


def refused(match, model=None, **inputs):
    model = model or model_of()
    with pytest.raises(InputError, match=match):
        model(**inputs)


IDS = torch.arange(10).reshape(2, 5)


@pytest.mark.parametrize("wrong", [-1, 37, 10**6, -(10**6)])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("T", [1, 5])
def test_an_id_outside_the_vocabulary_is_named(wrong, kind, T):
    ids = torch.ones(2, T, dtype=kind)
    ids[1, -1] = wrong
    refused(f"input_ids holds {wrong}, expected ids from 0 to 36; use the tokenizer that belongs", input_ids=ids)


def test_an_id_outside_the_vocabulary_is_named_in_training_too():
    refused("input_ids holds 37", model_of().train(), input_ids=torch.full((1, 3), 37))


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.uint8, torch.int16])
def test_ids_of_another_kind_of_number_are_refused(kind):
    refused(
        rf"input_ids has dtype {str(kind).removeprefix('torch.')}, expected int64", input_ids=torch.ones(1, 3).to(kind)
    )


def test_token_types_and_positions_out_of_range_are_named():
    refused("token_type_ids holds 37, expected ids from 0 to 36", input_ids=IDS, token_type_ids=IDS + 28)
    refused("position_ids holds 16, expected ids from 0 to 15; positions count", input_ids=IDS, position_ids=IDS + 7)
    refused("position_ids holds -1", input_ids=IDS, position_ids=IDS - 1)
    refused("position_ids has dtype float32", input_ids=IDS, position_ids=IDS.float())
    refused("token_type_ids has dtype float32", input_ids=IDS, token_type_ids=IDS.float())


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_an_empty_batch_or_prompt_is_refused(shape):
    match = rf"the input is empty: its shape is \({shape[0]}, {shape[1]}\).*start with the end-of-text token"
    refused(match, input_ids=torch.zeros(shape, dtype=torch.int64))
    refused("the input is empty", inputs_embeds=torch.zeros(*shape, 8))
    refused("the input is empty", model_of(GPT2DoubleHeadsModel), input_ids=torch.zeros(2, *shape, dtype=torch.int64))


@pytest.mark.parametrize("cls", MODELS)
def test_ids_of_another_rank_are_refused(cls):
    double = cls is GPT2DoubleHeadsModel
    axes = r"3 axes: \(batch, choice, position\)" if double else r"2 axes: \(batch, position\)"
    for shape in ((5,), (1, 5), (1, 1, 5), (1, 1, 1, 5)):
        if len(shape) != (3 if double else 2):
            ids = torch.zeros(shape, dtype=torch.int64)
            refused(rf"input_ids has shape .*, expected {axes}", model_of(cls), input_ids=ids)


@pytest.mark.parametrize("cls", MODELS)
def test_ids_and_embeddings_must_be_given_one_at_a_time(cls):
    model = model_of(cls)
    refused("got neither of input_ids and inputs_embeds", model)
    refused("got both of input_ids and inputs_embeds", model, input_ids=IDS, inputs_embeds=torch.zeros(2, 5, 8))


def test_embeddings_of_another_shape_are_refused():
    refused(r"inputs_embeds has shape \(2, 5\), expected 3 axes", inputs_embeds=torch.zeros(2, 5))
    refused(r"inputs_embeds has shape \(2, 5, 7\), expected \(2, 5, 8\)", inputs_embeds=torch.zeros(2, 5, 7))
    double = model_of(GPT2DoubleHeadsModel)
    refused("inputs_embeds has shape .* 4 axes", double, inputs_embeds=torch.zeros(2, 5, 8))


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5), (5,), (2, 1, 5), (2, 1, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape):
    refused(r"attention_mask has shape .* expected \(2, 5\): one number for each", input_ids=IDS,
            attention_mask=torch.ones(shape))  # fmt: skip


def test_a_mask_must_cover_the_past_too():
    model = model_of()
    past = model(IDS).past
    match = r"attention_mask has shape \(2, 1\), expected \(2, 6\): .* the 5 cached and 1 new tokens"
    refused(match, model, input_ids=IDS[:, :1], past=past, attention_mask=torch.ones(2, 1))


def test_token_types_and_positions_of_another_shape_are_refused():
    refused(r"token_type_ids has shape \(1, 5\), expected \(2, 5\)", input_ids=IDS, token_type_ids=IDS[:1])
    refused(r"position_ids has shape \(2, 4\), expected \(2, 5\)", input_ids=IDS, position_ids=IDS[:, :4])
    refused(r"position_ids has shape \(2,\), expected \(2, 5\)", input_ids=IDS, position_ids=IDS[0, :2])


@pytest.mark.parametrize("shape", [(3,), (1, 2), (2, 3), (2, 2, 2), (2, 1, 2, 5, 4), (3, 1, 2, 5, 5), ()])
def test_a_mask_over_heads_of_another_shape_is_refused(shape):
    refused(r"head_mask has shape .* expected \(2,\), \(2, 2\) or", input_ids=IDS, head_mask=torch.ones(shape))


def test_a_past_that_does_not_fit_is_refused():
    model = model_of()
    past = model(IDS).past
    new = IDS[:, :1]
    refused("past has 1 layers, expected 2: pass back", model, input_ids=new, past=past[:1])
    refused(r"past\[0\] has shape \(2, 2, 5, 4\), expected \(1, 2, 5, 4\)", model, input_ids=new[:1], past=past)
    short = (past[0], (past[1][0][:, :, :3], past[1][1]))
    refused(r"past\[1\] has shape \(2, 2, 3, 4\), expected \(2, 2, 5, 4\)", model, input_ids=new, past=short)
    other = model_of(n_head=4)
    refused(r"past\[0\] has shape \(2, 2, 5, 4\), expected \(2, 4, 5, 2\)", other, input_ids=new, past=past)
    for wrong in (5, [1, 2], "ab", [None, None]):
        refused("past is a .* expected 2 pairs", model, input_ids=new, past=wrong)
    refused("past is a .* expected 2 pairs", model, input_ids=new, past=[[np.ones(1)] * 2] * 2)
    flat = tuple((key.flatten(), value.flatten()) for key, value in past)
    refused(r"past\[0\] has shape \(80,\)", model, input_ids=new, past=flat)
    refused("got both past and past_key_values", model, input_ids=new, past=past, past_key_values=past)


def test_positions_beyond_the_table_are_refused_before_anything_is_computed():
    refused("the input is 17 tokens long but this model has 16 positions; shorten the input, or read it in pieces",
            input_ids=torch.zeros(1, 17, dtype=torch.int64))  # fmt: skip


def test_positions_given_by_hand_may_run_over_more_tokens_than_the_table_has():
    model = model_of()
    ids = torch.zeros(1, 20, dtype=torch.int64)
    assert model(ids, position_ids=torch.arange(20) % 16).logits.shape == (1, 20, 37)


@pytest.mark.parametrize("cls", MODELS)
def test_an_unknown_argument_is_refused(cls):
    model = model_of(cls)
    with pytest.raises(TypeError, match="attention_masks"):
        model(ids_of(model, 1, 3), attention_masks=torch.ones(1, 3))


@pytest.mark.parametrize(
    ("cls", "inputs", "match"),
    [
        ("GPT2LMHeadModel", {"labels": IDS[:, :4]}, r"labels has shape \(2, 4\), expected \(2, 5\)"),
        ("GPT2LMHeadModel", {"labels": IDS + 30}, "labels holds 39, expected ids from 0 to 36; mark .* -100"),
        ("GPT2LMHeadModel", {"labels": IDS - 5}, "labels holds -4, expected ids from 0 to 36"),
        ("GPT2LMHeadModel", {"labels": IDS.float()}, "labels has dtype float32, expected whole numbers"),
        ("GPT2ForTokenClassification", {"labels": IDS}, "labels holds 9, expected ids from 0 to 1"),
        ("GPT2ForTokenClassification", {"labels": IDS[0]}, r"labels has shape \(5,\), expected \(2, 5\)"),
        ("GPT2ForSequenceClassification", {"labels": IDS[:, 0]}, "labels holds 5, expected ids from 0 to 1"),
        ("GPT2ForSequenceClassification", {"labels": IDS[0]}, r"labels has shape \(5,\), expected \(2,\)"),
        (
            "GPT2ForSequenceClassification",
            {"labels": torch.rand(2, 3)},
            r"labels has shape \(2, 3\), expected \(2, 2\)",
        ),
        ("GPT2ForQuestionAnswering", {"start_positions": IDS[:, 0]}, "only one of start_positions and end_positions"),
        (
            "GPT2ForQuestionAnswering",
            {"start_positions": IDS[0], "end_positions": IDS[0]},
            r"start_positions has shape \(5,\), expected \(2,\)",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(cls, inputs, match):
    refused(match, model_of(next(each for each in MODELS if each.__name__ == cls)), input_ids=IDS, **inputs)


def test_choices_that_do_not_fit_are_refused():
    model = model_of(GPT2DoubleHeadsModel)
    ids = ids_of(model, 2, 5)
    refused(
        r"mc_token_ids has shape \(2,\), expected \(2, 2\)", model, input_ids=ids, mc_token_ids=torch.zeros(2).long()
    )
    refused(
        "mc_token_ids holds 5, expected ids from 0 to 4; mc_token_ids are positions within the new tokens",
        model, input_ids=ids, mc_token_ids=torch.full((2, 2), 5),
    )  # fmt: skip
    refused(r"mc_labels has shape \(2, 2\)", model, input_ids=ids, mc_labels=torch.zeros(2, 2).long())
    refused("mc_labels holds 2, expected ids from 0 to 1", model, input_ids=ids, mc_labels=torch.tensor([0, 2]))
    refused("labels has shape", model, input_ids=ids, labels=ids[:, 0])
    refused("got both labels and lm_labels", model, input_ids=ids, labels=ids, lm_labels=ids)
    refused("attention_mask has shape", model, input_ids=ids, attention_mask=torch.ones(2, 5))
    assert torch.equal(model(ids, lm_labels=ids).loss, model(ids, labels=ids).loss)


def test_a_refused_call_leaves_its_past_as_it_was():
    model = model_of()
    with torch.no_grad():
        past = model(IDS).past
        before = model(IDS[:, :1], past).logits
        refused("input_ids holds 99", model, input_ids=torch.full((2, 1), 99), past=past)
        assert torch.equal(model(IDS[:, :1], past).logits, before)


def test_the_bare_model_has_no_output_embeddings():
    assert GPT2Model(small_config()).get_output_embeddings() is None
    assert model_of().get_output_embeddings() is not None
