"""The reference model against facts that need no other implementation."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from gpt2_core import engine, plan, reference, reference_heads, sampling, strategies_assisted
from gpt2_core.config import ACTIVATIONS, GPT2Config
from gpt2_core.errors import CheckpointMismatchError, ConfigError, HubError, InputError
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import PREFIX, parameter_table
from gpt2_core.reference import ReferenceModel, attend, layer_norm, visible

CLOSE = 1e-12  # float64 sums taken in another order

CONFIG = GPT2Config(vocab_size=13, n_positions=12, n_embd=12, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=1)


def parameters_of(config: GPT2Config, head: str = "lm", seed: int = 0) -> dict[str, np.ndarray]:
    """Values large enough that every gain, bias and transpose shows."""
    generator = np.random.default_rng(seed)
    return {row.name: generator.normal(0.1, 0.4, row.shape) for row in parameter_table(config, head)}


def model_of(config: GPT2Config = CONFIG, head: str = "lm", seed: int = 0) -> ReferenceModel:
    return ReferenceModel(config, parameters_of(config, head, seed), head)


def ids_of(*shape: int, seed: int = 0, config: GPT2Config = CONFIG) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, config.vocab_size, shape)


def same(a, b, tolerance: float = CLOSE) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# -- the pieces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [reference, reference_heads, engine, plan, sampling, strategies_assisted])
def test_the_worked_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_attention_is_the_sum_written_out():
    B, H, T, S, D = 2, 2, 3, 5, 4
    generator = np.random.default_rng(0)
    q, k, v = (generator.normal(size=(B, H, n, D)) for n in (T, S, S))
    gathered, probs = attend(q, k, v, visible(T, S), scale=0.7)
    for b, h, t in np.ndindex(B, H, T):
        last = S - T + t  # the query's own place among the keys
        weights = [math.exp(0.7 * sum(q[b, h, t] * k[b, h, s])) for s in range(last + 1)]
        expected = sum(weight * v[b, h, s] for s, weight in enumerate(weights)) / sum(weights)
        same(gathered[b, h, t], expected)
        same(probs[b, h, t], np.array([*weights, *[0.0] * (S - last - 1)]) / sum(weights))


def test_a_mask_hides_padding_but_never_a_query_from_itself():
    mask = visible(3, 3, np.array([[False, True, True]]))[0, 0]
    assert mask.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_layer_norm_gives_mean_and_variance_as_told():
    x = np.random.default_rng(0).normal(3, 5, (4, 64))
    plain = layer_norm(x, {"n.weight": np.ones(64), "n.bias": np.zeros(64)}, "n", 0.0)
    same(plain.mean(axis=1), 0)
    same(plain.var(axis=1), 1)
    same(layer_norm(x, {"n.weight": np.full(64, 2.0), "n.bias": np.full(64, 0.5)}, "n", 0.0), 2 * plain + 0.5)
    # The epsilon stands under the root: variance 1 and epsilon 3 halve everything.
    same(layer_norm(np.array([[1.0, -1.0]]), {"n.weight": np.ones(2), "n.bias": np.zeros(2)}, "n", 3.0), [[0.5, -0.5]])


@pytest.mark.parametrize("x", [-30.0, -3.0, -0.7, 0.0, 0.3, 1.0, 4.0, 30.0])
def test_activations_are_their_formulas(x):
    def tanh_gelu(root: float) -> float:
        return 0.5 * x * (1 + math.tanh(root * (x + 0.044715 * x**3)))

    expected = {
        "gelu_new": tanh_gelu(math.sqrt(2 / math.pi)),
        "gelu_pytorch_tanh": tanh_gelu(math.sqrt(2 / math.pi)),
        "gelu_fast": tanh_gelu(0.7978845608),
        "gelu": 0.5 * x * math.erfc(-x / math.sqrt(2)),
        "quick_gelu": x / (1 + math.exp(-1.702 * x)),
        "relu": max(x, 0.0),
        "silu": x / (1 + math.exp(-x)),
        "swish": x / (1 + math.exp(-x)),
        "tanh": math.tanh(x),
    }
    assert set(expected) == set(ACTIVATIONS) == set(reference.ACTIVATIONS)
    for name, value in expected.items():
        same(reference.ACTIVATIONS[name](np.array([x])), [value], 1e-14)


def test_no_activation_overflows_on_large_numbers():
    x = np.array([-1e6, -1e3, 1e3, 1e6])
    with np.errstate(all="raise", under="ignore"):
        for activation in reference.ACTIVATIONS.values():
            assert np.isfinite(activation(x)).all()


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", range(1, 12))
def test_cached_equals_uncached_at_every_split(split):
    model, ids = model_of(), ids_of(2, 12)
    whole = model(ids, output_hidden_states=True, output_attentions=True)
    first = model(ids[:, :split])
    second = model(ids[:, split:], first.past, output_hidden_states=True, output_attentions=True)
    same(second.logits, whole.logits[:, split:])
    for part, full in zip(second.hidden_states, whole.hidden_states, strict=True):
        same(part, full[:, split:])
    for part, full in zip(second.attentions, whole.attentions, strict=True):
        same(part, full[:, :, split:])
    same(np.array(second.past), np.array(whole.past))


def test_the_same_past_serves_two_continuations_and_stays_as_it_is():
    model, ids = model_of(), ids_of(2, 9)
    past = model(ids[:, :5]).past
    before = np.array(past).copy()
    once = model(ids[:, 5:], past).logits
    other = model(ids_of(2, 4, seed=9), past).logits
    assert not np.allclose(once, other)
    assert np.array_equal(model(ids[:, 5:], past).logits, once)
    assert np.array_equal(np.array(past), before)


def test_past_is_taken_stacked_as_lists_and_under_its_newer_name():
    model, ids = model_of(), ids_of(2, 6)
    past = model(ids[:, :4]).past
    expected = model(ids[:, 4:], past).logits
    stacked = [np.stack(pair) for pair in past]  # version 2: (2, B, H, S, D) for each layer
    assert np.array_equal(model(ids[:, 4:], stacked).logits, expected)
    assert np.array_equal(model(ids[:, 4:], np.array(past)).logits, expected)
    assert np.array_equal(model(ids[:, 4:], [list(pair) for pair in past]).logits, expected)
    assert np.array_equal(model(ids[:, 4:], past_key_values=past).logits, expected)
    assert np.array_equal(model(ids, past=()).logits, model(ids).logits)


def test_past_has_a_pair_for_each_layer_of_batch_head_position_and_width():
    past = model_of()(ids_of(2, 5)).past
    assert len(past) == 3
    assert all(len(pair) == 2 and pair[0].shape == pair[1].shape == (2, 3, 5, 4) for pair in past)


# -- masks and positions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_single_run(side):
    model, texts = model_of(), [ids_of(n, seed=n) for n in (3, 7, 1)]
    ids, mask = np.zeros((3, 7), np.int64), np.zeros((3, 7), np.int64)
    for row, text in enumerate(texts):
        at = slice(7 - len(text), 7) if side == "left" else slice(0, len(text))
        ids[row, at], mask[row, at] = text, 1
    out = model(ids, attention_mask=mask)
    assert np.isfinite(out.logits).all()
    for row, text in enumerate(texts):
        same(out.logits[row, mask[row] == 1], model([text]).logits[0])


def test_a_hole_in_the_mask_is_as_if_the_token_were_not_there():
    model, ids = model_of(), ids_of(1, 6)
    mask = np.array([[1, 1, 0, 1, 0, 1]])
    same(model(ids, attention_mask=mask).logits[0, mask[0] == 1], model(ids[:, mask[0] == 1]).logits[0])


@pytest.mark.parametrize("split", range(1, 8))
def test_a_padded_batch_may_be_cached_at_every_split(split):
    model, ids = model_of(), ids_of(2, 8)
    mask = np.ones((2, 8), np.int64)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :split], attention_mask=mask[:, :split])
    second = model(ids[:, split:], first.past, mask)
    real = mask[:, split:] == 1
    same(second.logits[real], whole[:, split:][real])


def test_later_tokens_never_change_earlier_numbers():
    model, ids = model_of(), ids_of(1, 8)
    changed = ids.copy()
    changed[0, 5:] = ids_of(3, seed=4)
    same(model(ids).logits[:, :5], model(changed).logits[:, :5], 0)
    assert not np.allclose(model(ids).logits[:, 5:], model(changed).logits[:, 5:])


def test_positions_can_be_given_and_default_to_counting():
    model, ids = model_of(), ids_of(2, 4)
    plain = model(ids).logits
    assert np.array_equal(model(ids, position_ids=[[0, 1, 2, 3]]).logits, plain)
    assert np.array_equal(model(ids, position_ids=[0, 1, 2, 3]).logits, plain)
    assert not np.allclose(model(ids, position_ids=[[1, 2, 3, 4]]).logits, plain)


def test_all_positions_work_and_one_more_does_not():
    model = model_of()
    assert model(ids_of(1, 12)).logits.shape == (1, 12, 13)
    with pytest.raises(InputError, match="13 tokens long but this model has 12 positions"):
        model(ids_of(1, 13))
    past = model(ids_of(1, 12)).past
    with pytest.raises(InputError, match=r"13 tokens long \(12 from past\)"):
        model([[2]], past)


# -- embeddings, scaling, heads ------------------------------------------------------------------------------


def test_embeddings_serve_in_place_of_ids_and_token_types_are_added():
    model, ids, types = model_of(), ids_of(2, 4), ids_of(2, 4, seed=1)
    table = model.parameters["transformer.wte.weight"]
    assert np.array_equal(model(inputs_embeds=table[ids]).logits, model(ids).logits)
    same(model(ids, token_type_ids=types).logits, model(inputs_embeds=table[ids] + table[types]).logits)


def test_hidden_states_start_with_the_embeddings_and_end_after_the_final_norm():
    model = model_of(head="none")
    ids = ids_of(1, 4)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert np.array_equal(
        out.hidden_states[0], model.parameters["wte.weight"][ids] + model.parameters["wpe.weight"][:4]
    )
    assert out.hidden_states[-1] is out.last_hidden_state
    shallow = CONFIG.replace(n_layer=2)
    names = {row.name for row in parameter_table(shallow, "none")}
    cut = ReferenceModel(shallow, {name: value for name, value in model.parameters.items() if name in names}, "none")
    norm = model.parameters
    same(cut(ids).last_hidden_state, layer_norm(out.hidden_states[2], norm, "ln_f", CONFIG.layer_norm_epsilon))


def scaled_queries(parameters: dict[str, np.ndarray], factors: list[float]) -> dict[str, np.ndarray]:
    """The same weights, with each layer's queries multiplied by its factor."""
    out = {name: value.copy() for name, value in parameters.items()}
    for layer, factor in enumerate(factors):
        for kind in ("weight", "bias"):
            out[f"{PREFIX}h.{layer}.attn.c_attn.{kind}"][..., :12] *= factor
    return out


def test_the_scaling_switches_are_factors_on_the_queries():
    plain, ids = parameters_of(CONFIG), ids_of(2, 6)
    inverse = ReferenceModel(CONFIG.replace(scale_attn_by_inverse_layer_idx=True), plain)
    same(inverse(ids).logits, ReferenceModel(CONFIG, scaled_queries(plain, [1, 1 / 2, 1 / 3]))(ids).logits)
    unscaled = ReferenceModel(CONFIG.replace(scale_attn_weights=False), plain)
    same(unscaled(ids).logits, ReferenceModel(CONFIG, scaled_queries(plain, [2.0] * 3))(ids).logits)  # sqrt(D) is 2


def pruned(parameters: dict[str, np.ndarray], layer: int, head: int, width: int = 4) -> dict[str, np.ndarray]:
    """The weights with one head's columns and rows cut out."""
    out = dict(parameters)
    name, here = f"{PREFIX}h.{layer}.attn", np.arange(12) // width == head
    for kind in ("weight", "bias"):
        out[f"{name}.c_attn.{kind}"] = parameters[f"{name}.c_attn.{kind}"][..., ~np.tile(here, 3)]
    out[f"{name}.c_proj.weight"] = parameters[f"{name}.c_proj.weight"][~here]
    return out


def test_a_head_masked_to_zero_equals_a_pruned_head():
    whole, ids = parameters_of(CONFIG), ids_of(2, 6)
    mask = np.ones((3, 3))
    mask[1, 2] = mask[2, 0] = 0
    masked = ReferenceModel(CONFIG, whole)(ids, head_mask=mask).logits
    config = CONFIG.replace(pruned_heads={1: [2], 2: [0]})
    model = ReferenceModel(config, pruned(pruned(whole, 1, 2), 2, 0))
    same(model(ids).logits, masked)
    assert not np.allclose(masked, ReferenceModel(CONFIG, whole)(ids).logits)
    past = model(ids[:, :3]).past
    assert [pair[0].shape[1] for pair in past] == [3, 2, 2]
    same(model(ids[:, 3:], past).logits, masked[:, 3:])


def test_head_masks_of_every_shape_mean_the_same():
    model, ids = model_of(), ids_of(2, 4)
    row = np.array([1.0, 0.0, 0.5])
    expected = model(ids, head_mask=row, output_attentions=True)
    full = np.broadcast_to(row[:, None, None], (3, 2, 3, 4, 4))
    for mask in (np.tile(row, (3, 1)), full, full[:, :1, :, :1, :1]):
        assert np.array_equal(model(ids, head_mask=mask).logits, expected.logits)
    same(expected.attentions[0].sum(axis=-1), np.broadcast_to(row[:, None], (2, 3, 4)))


def test_a_tied_head_is_the_token_table_and_an_untied_one_is_not():
    tied = model_of()
    bare = ReferenceModel(CONFIG, {n.removeprefix(PREFIX): v for n, v in tied.parameters.items()}, "none")
    ids = ids_of(1, 3)
    x = bare(ids).last_hidden_state
    same(tied(ids).logits, x @ tied.parameters["transformer.wte.weight"].T)
    head = np.random.default_rng(5).normal(size=(13, 12))
    untied = ReferenceModel(CONFIG.replace(tie_word_embeddings=False), {**tied.parameters, "lm_head.weight": head})
    same(untied(ids).logits, x @ head.T)


# -- losses --------------------------------------------------------------------------------------------------


def by_hand(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits).sum()) - logits[label])


def test_the_loss_is_the_mean_surprise_at_the_next_token():
    model, ids = model_of(), ids_of(2, 5)
    out = model(ids, labels=ids)
    expected = np.mean([by_hand(out.logits[b, t], ids[b, t + 1]) for b in range(2) for t in range(4)])
    same(out.loss, expected)
    assert out.keys()[0] == "loss"


def test_ignored_labels_do_not_count_whichever_way_they_are_marked():
    model, ids = model_of(), ids_of(1, 6)
    labels = ids.copy()
    labels[0, [1, 4]] = [-100, -1]
    out = model(ids, labels=labels)
    same(out.loss, np.mean([by_hand(out.logits[0, t], ids[0, t + 1]) for t in (1, 2, 4)]))


@pytest.mark.filterwarnings("error")
def test_the_mean_over_no_labels_is_nan_without_a_warning():
    ids = ids_of(1, 4)
    assert math.isnan(model_of()(ids, labels=np.full_like(ids, -100)).loss)
    assert math.isnan(model_of()(ids[:, :1], labels=ids[:, :1]).loss)  # one token has no next one


def test_the_loss_of_huge_logits_does_not_overflow():
    logits = np.array([[1e4, 0.0], [0.0, -1e4]])
    with np.errstate(all="raise", under="ignore"):
        same(reference_heads.cross_entropy(logits, np.array([1, 0])), 5000.0)


# -- the other heads -----------------------------------------------------------------------------------------


def test_double_heads_fold_choices_into_the_batch_and_add_their_losses():
    model, ids = model_of(head="double"), ids_of(2, 3, 5)
    labels, right = ids.copy(), [2, 0]
    labels[:, :, :2] = -100
    out = model(ids, labels=labels, mc_labels=right)
    single = model.language_model()(ids.reshape(6, 5))
    same(out.logits, single.logits.reshape(2, 3, 5, 13))
    assert out.mc_logits.shape == (2, 3)
    assert out.past[0][0].shape == (6, 3, 5, 4)
    same(out.mc_loss, np.mean([by_hand(out.mc_logits[b], right[b]) for b in range(2)]))
    same(out.loss, out.lm_loss + out.mc_loss)
    same(model(ids, labels=labels).loss, out.lm_loss)
    same(model(ids, mc_labels=right).loss, out.mc_loss)
    assert model(ids).loss is None


@pytest.mark.parametrize("activation", [None, "tanh"])
@pytest.mark.parametrize("kind", ["cls_index", "last", "first", "mean"])
def test_each_choice_is_scored_by_its_own_summary(kind, activation):
    config = CONFIG.replace(summary_type=kind, summary_activation=activation)
    model, ids = model_of(config, "double"), ids_of(2, 3, 5)
    at = np.array([[0, 1, 2], [3, 4, -2]])
    x = model(ids, output_hidden_states=True).hidden_states[-1].reshape(2, 3, 5, 12)
    picked = {
        "cls_index": np.stack([[x[b, n, at[b, n]] for n in range(3)] for b in range(2)]),
        "last": x[:, :, -1],
        "first": x[:, :, 0],
        "mean": x.mean(axis=2),
    }[kind]
    score = picked @ model.parameters["multiple_choice_head.summary.weight"][0]
    score += model.parameters["multiple_choice_head.summary.bias"]
    same(model(ids, mc_token_ids=at).mc_logits, np.tanh(score) if activation else score)


def test_choices_are_read_at_the_last_token_that_is_not_padding():
    ids = ids_of(1, 3, 5)
    ids[0, 1, 3:] = ids[0, 2, 1:] = 0
    mask = (ids != 0).astype(np.int64)
    ends = [[4, 2, 0]]
    model = model_of(head="double")
    same(model(ids, attention_mask=mask).mc_logits, model(ids, attention_mask=mask, mc_token_ids=ends).mc_logits)
    knowing = ReferenceModel(CONFIG.replace(pad_token_id=0), model.parameters, "double")
    same(knowing(ids).mc_logits, model(ids, mc_token_ids=ends).mc_logits)
    same(model(ids).mc_logits, model(ids, mc_token_ids=[[4, 4, 4]]).mc_logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_classified_at_its_last_real_token(side):
    model, text = model_of(head="sequence"), ids_of(3)
    expected = model([text]).logits[0]
    ids, mask = np.zeros((2, 5), np.int64), np.zeros((2, 5), np.int64)
    at = slice(2, 5) if side == "left" else slice(0, 3)
    ids[0, at], mask[0, at], mask[1] = text, 1, 1
    same(model(ids, attention_mask=mask).logits[0], expected)
    if side == "right":
        knowing = ReferenceModel(CONFIG.replace(pad_token_id=0), model.parameters, "sequence")
        same(knowing(ids).logits[0], expected)


def test_each_kind_of_sequence_problem_has_its_own_loss():
    ids = ids_of(2, 4)
    model = model_of(CONFIG.replace(num_labels=3), "sequence")
    out = model(ids, labels=[2, 0])
    same(out.loss, (by_hand(out.logits[0], 2) + by_hand(out.logits[1], 0)) / 2)
    wanted = np.array([[1.0, 0, 1], [0, 0, 1]])
    chance = 1 / (1 + np.exp(-out.logits))
    several = -(wanted * np.log(chance) + (1 - wanted) * np.log(1 - chance)).mean()
    same(model(ids, labels=wanted).loss, several)
    regression = ReferenceModel(model.config.replace(problem_type="regression"), model.parameters, "sequence")
    same(regression(ids, labels=wanted).loss, ((out.logits - wanted) ** 2).mean())
    one = model_of(CONFIG.replace(num_labels=1), "sequence")
    logits = one(ids).logits
    for labels in ([0.5, -1.0], [[0.5], [-1.0]]):
        same(one(ids, labels=labels).loss, ((logits[:, 0] - [0.5, -1.0]) ** 2).mean())


def test_tokens_are_classified_one_by_one():
    model, ids = model_of(CONFIG.replace(num_labels=3), "token"), ids_of(2, 3)
    labels = np.array([[0, 2, -100], [1, -100, 2]])
    out = model(ids, labels=labels)
    assert out.logits.shape == (2, 3, 3)
    kept = [(0, 0), (0, 1), (1, 0), (1, 2)]
    same(out.loss, np.mean([by_hand(out.logits[b, t], labels[b, t]) for b, t in kept]))


def test_answers_outside_the_text_do_not_count():
    model, ids = model_of(head="qa"), ids_of(3, 4)
    out = model(ids, start_positions=[1, 9, -5], end_positions=[[3], [0], [4]])
    start = by_hand(out.start_logits[0], 1)
    end = (by_hand(out.end_logits[0], 3) + by_hand(out.end_logits[1], 0)) / 2
    same(out.loss, (start + end) / 2)
    assert out.start_logits.shape == out.end_logits.shape == (3, 4)


# -- what is returned ----------------------------------------------------------------------------------------


def test_what_is_returned_follows_the_call_and_then_the_config():
    ids = ids_of(1, 3)
    assert model_of()(ids).keys() == ("logits", "past")
    assert model_of()(ids, use_cache=False).keys() == ("logits",)
    talkative = CONFIG.replace(output_attentions=True, output_hidden_states=True, use_cache=False)
    assert model_of(talkative)(ids).keys() == ("logits", "hidden_states", "attentions")
    assert model_of(talkative)(ids, output_attentions=False, use_cache=True).keys() == (
        "logits",
        "past",
        "hidden_states",
    )
    assert model_of(head="none")(ids).keys() == ("last_hidden_state", "past")


def test_all_arithmetic_is_in_float64_whatever_the_weights_are_in():
    model = ReferenceModel(CONFIG, {name: v.astype(np.float16) for name, v in parameters_of(CONFIG).items()})
    out = model(ids_of(1, 3))
    assert out.logits.dtype == out.past[0][0].dtype == np.float64


def test_the_model_keeps_its_own_copy_of_the_parameters():
    parameters = parameters_of(CONFIG)
    model = ReferenceModel(CONFIG, parameters)
    before = model(ids_of(1, 3)).logits
    parameters["transformer.wte.weight"][:] = 0
    assert np.array_equal(model(ids_of(1, 3)).logits, before)


def test_a_seed_makes_the_projects_initial_values():
    model = ReferenceModel.from_seed(CONFIG, "lm", 7)
    for name, value in initial_values(CONFIG, "lm", 7).items():
        assert np.array_equal(model.parameters[name], value)


def test_a_saved_model_comes_back_with_every_head(tmp_path):
    from gpt2_core.checkpoints import Tensor
    from gpt2_core.pretrained import save_pretrained

    values = initial_values(CONFIG, "lm", 3)
    tensors = {name: Tensor.of(value) for name, value in values.items()}
    save_pretrained(tmp_path, CONFIG, "lm", tensors, architecture="GPT2LMHeadModel")
    model, ids = ReferenceModel.from_pretrained(tmp_path), ids_of(1, 3)
    assert np.array_equal(model(ids).logits, ReferenceModel.from_seed(CONFIG, "lm", 3)(ids).logits)
    classifier = ReferenceModel.from_pretrained(tmp_path, "sequence", seed=5)
    assert np.array_equal(classifier.parameters["score.weight"], initial_values(CONFIG, "sequence", 5)["score.weight"])
    with pytest.raises(HubError):
        ReferenceModel.from_pretrained(tmp_path / "nowhere", local_files_only=True)


# -- bad input -----------------------------------------------------------------------------------------------


def test_parameters_that_do_not_fit_are_reported_together():
    parameters = parameters_of(CONFIG)
    parameters["extra"] = np.zeros(1)
    del parameters["transformer.ln_f.bias"]
    name = "transformer.h.0.mlp.c_fc.weight"
    parameters[name] = parameters[name].T
    with pytest.raises(CheckpointMismatchError) as caught:
        ReferenceModel(CONFIG, parameters)
    assert caught.value.missing == ("transformer.ln_f.bias",)
    assert caught.value.unexpected == ("extra",)
    assert caught.value.misshaped == ((name, (48, 12), (12, 48)),)


PAST = ((np.zeros((1, 3, 2, 4)), np.zeros((1, 3, 2, 4))),) * 3


@pytest.mark.parametrize(
    ("head", "arguments", "words"),
    [
        ("lm", {}, "neither of input_ids and inputs_embeds"),
        ("lm", {"input_ids": [[2]], "inputs_embeds": np.zeros((1, 1, 12))}, "both of input_ids and inputs_embeds"),
        ("lm", {"input_ids": [2, 3]}, "input_ids has shape (2,), expected 2 axes"),
        ("lm", {"input_ids": [[]]}, "the input is empty"),
        ("lm", {"input_ids": [[13]]}, "input_ids holds 13, expected ids from 0 to 12"),
        ("lm", {"input_ids": [[-1]]}, "input_ids holds -1"),
        ("lm", {"input_ids": [[0.5]]}, "input_ids has dtype float64"),
        ("lm", {"inputs_embeds": np.zeros((1, 12))}, "inputs_embeds has shape (1, 12)"),
        ("lm", {"inputs_embeds": np.zeros((1, 2, 11))}, "inputs_embeds has shape (1, 2, 11), expected (1, 2, 12)"),
        ("lm", {"input_ids": [[2]], "attention_mask": [[1, 1]]}, "attention_mask has shape (1, 2), expected (1, 1)"),
        ("lm", {"input_ids": [[2]], "past": PAST, "attention_mask": [[1]]}, "expected (1, 3)"),
        ("lm", {"input_ids": [[2]], "token_type_ids": [[1, 1]]}, "token_type_ids has shape (1, 2)"),
        ("lm", {"input_ids": [[2]], "token_type_ids": [[13]]}, "token_type_ids holds 13"),
        ("lm", {"input_ids": [[2]], "position_ids": [[12]]}, "position_ids holds 12, expected ids from 0 to 11"),
        ("lm", {"input_ids": [[2]], "position_ids": [[0, 1]]}, "position_ids has shape (1, 2), expected (1, 1)"),
        ("lm", {"input_ids": [[2]], "head_mask": np.ones(2)}, "head_mask has shape (2,), expected (3,)"),
        ("lm", {"input_ids": [[2]], "head_mask": np.ones((2, 3))}, "head_mask has shape (2, 3)"),
        ("lm", {"input_ids": [[2]], "head_mask": np.ones((3, 1, 3, 2, 1))}, "head_mask has shape (3, 1, 3, 2, 1)"),
        ("lm", {"input_ids": [[2]], "past": PAST, "past_key_values": PAST}, "both past and past_key_values"),
        ("lm", {"input_ids": [[2]], "past": PAST[:2]}, "past has 2 layers, expected 3"),
        ("lm", {"input_ids": [[2], [3]], "past": PAST}, "past[0] has shape (1, 3, 2, 4), expected (2, 3, 2, 4)"),
        ("lm", {"input_ids": [[2]], "past": 5}, "past is a int, expected 3 pairs"),
        ("lm", {"input_ids": [[2]], "past": [1, 2, 3]}, "past is a list, expected 3 pairs"),
        ("lm", {"input_ids": [[2, 3]], "labels": [[2]]}, "labels has shape (1, 1), expected (1, 2)"),
        ("lm", {"input_ids": [[2, 3]], "labels": [[2, 13]]}, "labels holds 13"),
        ("lm", {"input_ids": [[2, 3]], "labels": [[2, -2]]}, "labels holds -2"),
        ("lm", {"input_ids": [[2, 3]], "labels": [[2.0, 3.0]]}, "labels has dtype float64"),
        ("lm", {"input_ids": [[2]], "mc_labels": [0]}, "head 'lm' does not take mc_labels"),
        ("none", {"input_ids": [[2]], "labels": [[2]]}, "head 'none' does not take labels"),
        ("double", {"input_ids": [[2, 3]]}, "input_ids has shape (1, 2), expected 3 axes: (batch, choice, position)"),
        ("double", {"inputs_embeds": np.zeros((1, 2, 12))}, "expected 4 axes"),
        ("double", {"input_ids": [[[2, 3]]], "mc_token_ids": [[2]]}, "mc_token_ids holds 2, expected ids from 0 to 1"),
        ("double", {"input_ids": [[[2, 3]]], "mc_token_ids": [2]}, "mc_token_ids has shape (1,), expected (1, 1)"),
        ("double", {"input_ids": [[[2, 3]]], "mc_labels": [1]}, "mc_labels holds 1, expected ids from 0 to 0"),
        ("double", {"input_ids": [[[2, 3]]], "mc_labels": [[0]]}, "mc_labels has shape (1, 1), expected (1,)"),
        ("sequence", {"input_ids": [[2, 3]], "labels": [[0]]}, "labels has shape (1, 1), expected (1,)"),
        ("sequence", {"input_ids": [[2, 3]], "labels": [0.5]}, "labels has shape (1,), expected (1, 2)"),
        ("token", {"input_ids": [[2, 3]], "labels": [0]}, "labels has shape (1,), expected (1, 2)"),
        ("qa", {"input_ids": [[2, 3]], "start_positions": [0]}, "only one of start_positions and end_positions"),
    ],
)
def test_bad_input_is_refused_with_what_was_got_and_expected(head, arguments, words):
    with pytest.raises(InputError) as caught:
        model_of(head=head)(**arguments)
    assert words in str(caught.value)


RAGGED = [[1, 2, 3], [1, 2]]


@pytest.mark.parametrize(
    ("head", "name", "others"),
    [
        ("lm", "input_ids", {}),
        ("lm", "inputs_embeds", {}),
        ("lm", "attention_mask", {"input_ids": [[1, 2], [1, 2]]}),
        ("lm", "token_type_ids", {"input_ids": [[1, 2], [1, 2]]}),
        ("lm", "position_ids", {"input_ids": [[1, 2], [1, 2]]}),
        ("lm", "head_mask", {"input_ids": [[1, 2]]}),
        ("lm", "labels", {"input_ids": [[1, 2], [1, 2]]}),
        ("double", "input_ids", {}),
        ("double", "mc_token_ids", {"input_ids": [[[1, 2], [1, 2]]]}),
        ("double", "mc_labels", {"input_ids": [[[1, 2], [1, 2]]]}),
        ("sequence", "labels", {"input_ids": [[1, 2], [1, 2]]}),
        ("qa", "start_positions", {"input_ids": [[1, 2], [1, 2]], "end_positions": [1, 1]}),
    ],
)
def test_rows_of_different_lengths_are_refused_by_name(head, name, others):
    with pytest.raises(InputError, match=f"{name} has rows of different lengths, expected .*pad them"):
        model_of(head=head)(**others, **{name: RAGGED})
    with pytest.raises(InputError, match=f"{name} .*numbers"):
        model_of(head=head)(**others, **{name: [["a", "b"]]})


def test_a_past_of_ragged_rows_is_refused():
    with pytest.raises(InputError, match="past is a list"):
        model_of()([[1]], past=[(RAGGED, RAGGED)] * CONFIG.n_layer)


def test_a_dictionary_is_no_config_and_the_way_to_one_is_told():
    for make in (lambda: ReferenceModel({}, {}), lambda: ReferenceModel.from_seed({"n_layer": 1})):
        with pytest.raises(ConfigError, match=r"config is a dict, expected a GPT2Config; .*from_dict"):
            make()
