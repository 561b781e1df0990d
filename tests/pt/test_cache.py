"""How `Past` shares memory, and that nobody can tell."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest

from gpt2_pt import GPT2LMHeadModel, Past
from models import small_config
from pt.helpers import ids_of, model_of, torch


def step(model, past, seed=0, mode=torch.no_grad):
    with mode():
        return model(ids_of(model, past[0][0].size(0), 1, seed=seed), past)


def first(model, T=4, mode=torch.no_grad):
    with mode():
        return model(ids_of(model, 2, T)).past


def address(past):
    return past[0][0].untyped_storage().data_ptr()


def test_the_first_continuation_appends_in_place_and_the_second_copies():
    model = model_of()
    past = first(model)
    one, two = step(model, past, 1).past, step(model, past, 2).past
    assert address(one) == address(past)
    assert address(two) != address(past)
    assert address(step(model, one, 3).past) == address(past)
    assert past.length == 4
    assert one.length == two.length == 5


def test_a_long_continuation_copies_seldom():
    model = model_of(n_positions=600)
    past, homes = first(model), set()
    for at in range(500):
        past = step(model, past, at).past
        homes.add(address(past))
    assert len(homes) <= 6


def test_no_buffer_is_longer_than_the_model_can_address():
    model = model_of(n_positions=16)
    past = first(model)
    assert past._store.layers[0][0].size(2) == 16


@pytest.mark.parametrize("then", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("begin", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_value_semantics_hold_across_gradient_modes(begin, then):
    model = model_of()
    ids = ids_of(model, 2, 8)
    with torch.no_grad():
        whole = model(ids).logits
        other = model(torch.cat((ids[:, :4], ids[:, 4:].flip(1)), 1)).logits
    with begin():
        past = model(ids[:, :4]).past
    for new, expected in ((ids[:, 4:], whole), (ids[:, 4:].flip(1), other)) * 2:
        branch = past
        for at in range(4):
            with then() if at % 2 else begin():
                out = model(new[:, at : at + 1], branch)
            branch = out.past
            torch.testing.assert_close(out.logits[:, 0], expected[:, 4 + at], rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_a_past_made_with_gradients():
    model = model_of()
    ids = ids_of(model, 2, 8)

    def gradient(split):
        model.zero_grad()
        if split:
            past = model(ids[:, :split]).past
            logits = model(ids[:, split:], past).logits
        else:
            logits = model(ids).logits[:, 3:]
        logits.square().sum().backward()
        return model.transformer.h[0].attn.c_attn.weight.grad.clone()

    torch.testing.assert_close(gradient(3), gradient(0), rtol=1e-9, atol=1e-9)


def test_a_past_made_without_gradients_may_be_trained_behind():
    model = model_of()
    for mode in (torch.no_grad, torch.inference_mode):
        past = first(model, mode=mode)
        out = model(ids_of(model, 2, 3), past)
        out.logits.sum().backward()
        before = [tensor.clone() for pair in past for tensor in pair]
        step(model, past, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(before, [t for pair in past for t in pair], strict=True))


def test_crop_and_reorder_leave_the_original_as_it_is():
    model = model_of()
    ids = ids_of(model, 2, 6)
    with torch.no_grad():
        past = model(ids).past
        whole = model(ids_of(model, 2, 3, seed=5), past).logits
        short = past.crop(3)
        assert (short.length, past.length) == (3, 6)
        torch.testing.assert_close(model(ids[:, 3:], short).logits, model(ids).logits[:, 3:])
        rows = past.reorder(torch.tensor([1, 1, 0]))
        out = model(ids_of(model, 2, 3, seed=5)[[1, 1, 0]], rows).logits
        torch.testing.assert_close(out, whole[[1, 1, 0]])
        torch.testing.assert_close(model(ids_of(model, 2, 3, seed=5), past).logits, whole)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_a_copied_past_continues_on_its_own(through):
    model = model_of()
    past = first(model)
    if through == "deepcopy":
        other = copy.deepcopy(past)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(past))
    else:
        file = io.BytesIO()
        torch.save(past, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is Past
    assert other.length == past.length
    expected = step(model, past, 1)
    got = step(model, other, 1)
    assert address(got.past) != address(expected.past)
    assert torch.equal(got.logits, expected.logits)


def test_two_threads_may_continue_one_past():
    model = model_of(n_positions=64)
    torch.set_num_threads(1)
    for _ in range(5):
        past = first(model)
        expected = [step(model, past, seed).logits for seed in range(8)]
        past = first(model)
        got, barrier = [None] * 8, threading.Barrier(8)

        def work(seed, past=past, got=got, barrier=barrier):
            barrier.wait()
            got[seed] = step(model, past, seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for seed in range(8):
            assert torch.equal(got[seed].logits, expected[seed])
            again = step(model, got[seed].past, 99).logits
            fresh = model(
                torch.cat((ids_of(model, 2, 4), ids_of(model, 2, 1, seed=seed), ids_of(model, 2, 1, seed=99)), 1)
            )
            torch.testing.assert_close(again[:, -1], fresh.logits[:, -1])
        assert len({address(out.past) for out in got}) == 8


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("order", ["narrow then wide", "wide then narrow"])
def test_a_past_from_autocast_may_be_continued_without_it(order, mode):
    model = model_of(dtype=torch.float32)
    ids = ids_of(model, 2, 8)
    with mode():
        whole = model(ids).logits
        narrow = order == "narrow then wide"
        past = None
        for at in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow == (at < 4)):
                out = model(ids[:, at : at + 1], past)
            past = out.past
        torch.testing.assert_close(out.logits[:, 0].float(), whole[:, 7], rtol=0.1, atol=0.1)


def test_a_cache_of_transformers_is_a_past():
    transformers = pytest.importorskip("transformers")
    model = model_of()
    ids = ids_of(model, 2, 8)
    with torch.no_grad():
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(model(ids[:, :5]).past):
            cache.update(key, value, layer)
        torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:])


def test_a_past_of_no_positions_is_no_past() -> None:
    model = GPT2LMHeadModel(small_config()).eval()
    ids = ids_of(model, 2, 5)
    with torch.no_grad():
        plain = model(ids)
        again = model(ids, past=plain.past.crop(0))
    assert torch.equal(plain.logits, again.logits)


def test_heads_pruned_under_a_layer_named_in_text_stay_pruned() -> None:
    model = GPT2LMHeadModel(small_config(n_head=4, n_embd=16))
    model.prune_heads({0: [1]})
    model.prune_heads({"0": [2]})
    assert model.config.pruned_heads == {0: (1, 2)}
