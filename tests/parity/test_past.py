"""``past`` is a value: cached equals uncached at every split, and any past may be continued any number of times."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.errors import InputError
from gpt2_core.reference import ReferenceModel
from models import padded_mask, random_config, random_ids, random_parameters, small_config
from tolerances import REFERENCE, error

CLOSE = REFERENCE["float64"].values


def models(framework, config, seed=0, head="lm"):
    values = random_parameters(config, head, seed)
    return ReferenceModel(config, values, head), framework.build(config, head, values)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_cached_equals_uncached_at_every_split(framework, seed, gradients):
    config = random_config(seed, n_positions=10)
    ours, model = models(framework, config, seed)
    ids = random_ids(config, 2, 10, seed=seed)
    whole = ours(ids, output_attentions=True)
    for at in range(1, 10):
        first = framework.run(model, gradients, input_ids=ids[:, :at])
        then = framework.run(model, gradients, input_ids=ids[:, at:], past=first.past, output_attentions=True)
        assert error(framework.numpy(first.logits), whole.logits[:, :at]) <= CLOSE
        assert error(framework.numpy(then.logits), whole.logits[:, at:]) <= CLOSE
        assert error(framework.numpy(tuple(then.past)), whole.past) <= CLOSE
        rows = tuple(probs[:, :, at:] for probs in whole.attentions)
        assert error(framework.numpy(then.attentions), rows) <= CLOSE


@pytest.mark.parametrize("gradients", [False, True])
def test_a_token_at_a_time_equals_all_at_once(framework, gradients):
    config = small_config(n_positions=12)
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 12)
    past, pieces = None, []
    for at in range(12):
        out = framework.run(model, gradients, input_ids=ids[:, at : at + 1], past=past)
        past = out.past
        pieces.append(framework.numpy(out.logits))
    assert error(np.concatenate(pieces, axis=1), ours(ids).logits) <= CLOSE


def test_the_same_past_given_to_two_continuations_is_right_both_times(framework):
    config = small_config()
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 5)
    past = framework.run(model, input_ids=ids).past
    before = framework.numpy(tuple(past))
    ends = [random_ids(config, 2, 3, seed=seed) for seed in range(3)]
    for end in (*ends, *ends):
        out = framework.run(model, input_ids=end, past=past)
        whole = ours(np.concatenate((ids, end), axis=1))
        assert error(framework.numpy(out.logits), whole.logits[:, 5:]) <= CLOSE
        assert error(framework.numpy(tuple(out.past)), whole.past) <= CLOSE
    assert error(framework.numpy(tuple(past)), before) == 0


def test_continuations_that_grow_in_turns_do_not_disturb_each_other(framework):
    config = small_config()
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 4)
    texts = [ids, ids, ids]
    pasts = [framework.run(model, input_ids=ids).past] * 3
    for step in range(8):
        for branch in range(3):
            new = random_ids(config, 2, 1, seed=10 * step + branch)
            texts[branch] = np.concatenate((texts[branch], new), axis=1)
            out = framework.run(model, input_ids=new, past=pasts[branch])
            pasts[branch] = out.past
            whole = ours(texts[branch])
            assert error(framework.numpy(out.logits), whole.logits[:, -1:]) <= CLOSE
    for text, past in zip(texts, pasts, strict=True):
        assert error(framework.numpy(tuple(past)), ours(text).past) <= CLOSE


def test_every_earlier_past_still_holds_its_own_numbers(framework):
    config = small_config()
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 10)
    pasts = [framework.run(model, input_ids=ids[:, :2]).past]
    for at in range(2, 10):
        pasts.append(framework.run(model, input_ids=ids[:, at : at + 1], past=pasts[-1]).past)
    for length, past in enumerate(pasts, start=2):
        assert error(framework.numpy(tuple(past)), ours(ids[:, :length]).past) <= CLOSE
    for length, past in enumerate(pasts[:-1], start=2):  # and each can be continued again
        out = framework.run(model, input_ids=ids[:, length:], past=past)
        assert error(framework.numpy(out.logits), ours(ids).logits[:, length:]) <= CLOSE


@pytest.mark.parametrize("form", ["own", "pairs", "lists", "stacked", "reference"])
def test_past_is_taken_in_every_form_that_users_have_it_in(framework, form):
    config = random_config(2, n_positions=16)
    ours, model = models(framework, config, 2)
    ids = random_ids(config, 2, 9)
    past = framework.run(model, input_ids=ids[:, :5]).past
    given = {
        "own": lambda: past,
        "pairs": lambda: tuple((key, value) for key, value in past),
        "lists": lambda: [[key, value] for key, value in past],
        "stacked": lambda: framework.stacked(past),
        "reference": lambda: framework.past(model, ours(ids[:, :5]).past),
    }[form]()
    for name in ("past", "past_key_values"):
        out = framework.run(model, input_ids=ids[:, 5:], **{name: given})
        assert error(framework.numpy(out.logits), ours(ids).logits[:, 5:]) <= CLOSE
        assert error(framework.numpy(tuple(out.past)), ours(ids).past) <= CLOSE
    stacked = [np.stack(pair) for pair in ours(ids[:, :5]).past]
    assert error(ours(ids[:, 5:], stacked).logits, ours(ids).logits[:, 5:]) <= CLOSE


def test_an_empty_past_is_none_at_all(framework):
    config = small_config()
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 4)
    assert error(framework.numpy(framework.run(model, input_ids=ids, past=()).logits), ours(ids).logits) <= CLOSE


def test_past_comes_back_as_pairs_of_key_and_value(framework):
    config = small_config(n_layer=2, n_head=2, n_embd=8)
    _, model = models(framework, config)
    past = framework.run(model, input_ids=random_ids(config, 3, 5)).past
    assert len(past) == 2
    assert [tuple(tensor.shape) for pair in past for tensor in pair] == [(3, 2, 5, 4)] * 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head", ["none", "lm", "token"])
def test_a_padded_row_equals_the_single_run(framework, head, side):
    config = random_config(7)
    values = random_parameters(config, head, 7)
    model = framework.build(config, head, values)
    ids, mask = random_ids(config, 5, 9), padded_mask(5, 9, side, seed=7)
    out = framework.numpy(framework.run(model, input_ids=ids, attention_mask=mask)[0])
    for row in range(5):
        real = mask[row] == 1
        single = framework.numpy(framework.run(model, input_ids=ids[row : row + 1, real])[0])
        assert error(out[row, real], single[0]) <= CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_continues_as_each_row_would_alone(framework, side):
    config = random_config(9, n_positions=16)
    ours, model = models(framework, config, 9)
    ids, mask = random_ids(config, 4, 6), padded_mask(4, 6, side, seed=3)
    new = random_ids(config, 4, 5, seed=1)
    past = framework.run(model, input_ids=ids, attention_mask=mask).past
    pieces = []
    for at in range(5):
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        out = framework.run(model, input_ids=new[:, at : at + 1], past=past, attention_mask=mask)
        past = out.past
        pieces.append(framework.numpy(out.logits))
    got = np.concatenate(pieces, axis=1)
    for row in range(4):
        real = mask[row, :6] == 1
        text = np.concatenate((ids[row, real], new[row]))[None]
        assert error(got[row], ours(text).logits[0, real.sum() :]) <= CLOSE


@pytest.mark.parametrize("split", [None, 1, 8, 15])
def test_all_positions_work_and_one_more_is_refused(framework, split):
    config = small_config(n_positions=16)
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 17)
    past = None if split is None else framework.run(model, input_ids=ids[:, :split]).past
    start = split or 0
    out = framework.run(model, input_ids=ids[:, start:16], past=past)
    assert error(framework.numpy(out.logits), ours(ids[:, :16]).logits[:, start:]) <= CLOSE
    cached = rf" \({split} from past\)" if split else ""
    with pytest.raises(InputError, match=rf"the input is 17 tokens long{cached} but this model has 16 positions"):
        framework.run(model, input_ids=ids[:, start:], past=past)


def test_token_types_and_positions_go_with_a_past(framework):
    config = random_config(11)
    ours, model = models(framework, config, 11)
    ids, types = random_ids(config, 2, 8), random_ids(config, 2, 8, seed=5)
    positions = np.random.default_rng(0).integers(0, 16, (2, 8))
    whole = ours(ids, token_type_ids=types, position_ids=positions)
    first = framework.run(model, input_ids=ids[:, :3], token_type_ids=types[:, :3], position_ids=positions[:, :3])
    out = framework.run(
        model, input_ids=ids[:, 3:], past=first.past, token_type_ids=types[:, 3:], position_ids=positions[:, 3:]
    )
    assert error(framework.numpy(out.logits), whole.logits[:, 3:]) <= CLOSE


def test_a_mask_over_heads_goes_with_a_past(framework):
    config = small_config()
    ours, model = models(framework, config)
    ids, heads = random_ids(config, 2, 8), np.array([[1.0, 0.0], [0.5, 1.0]])
    first = framework.run(model, input_ids=ids[:, :3], head_mask=heads)
    out = framework.run(model, input_ids=ids[:, 3:], past=first.past, head_mask=heads)
    assert error(framework.numpy(out.logits), ours(ids, head_mask=heads).logits[:, 3:]) <= CLOSE


def test_double_heads_continue_from_a_past_with_choices_folded(framework):
    config = small_config()
    ours, model = models(framework, config, head="double")
    ids = random_ids(config, 2, 3, 8)
    whole = ours(ids)
    first = framework.run(model, input_ids=ids[:, :, :5])
    assert tuple(first.past[0][0].shape) == (6, 2, 5, 4)
    out = framework.run(model, input_ids=ids[:, :, 5:], past=first.past)
    assert error(framework.numpy(out.logits), whole.logits[:, :, 5:]) <= CLOSE
    assert error(framework.numpy(out.mc_logits), whole.mc_logits) <= CLOSE


def test_no_past_comes_back_where_it_is_not_asked_for(framework):
    config = small_config()
    _, model = models(framework, config)
    assert framework.run(model, input_ids=random_ids(config, 1, 3), use_cache=False).past is None
