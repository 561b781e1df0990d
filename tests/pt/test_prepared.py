"""The form for generation: the text of the model it was made from, a cache that stays, eight bits that stay near."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt2_core import GenerationConfig, GPT2Tokenizer, native
from gpt2_core.errors import GenerationError
from gpt2_pt import GPT2DoubleHeadsModel, GPT2LMHeadModel, prepared
from gpt2_pt.block import ACTIVATIONS
from gpt2_pt.compiled import Graphs
from gpt2_pt.prepared import PreparedModel
from models import random_ids
from pt.helpers import ids_of, model_of, torch

ENDLESS = {"eos_token_id": (), "pad_token_id": 0}
DRAWN = {"do_sample": True, "seed": 3, "temperature": 1.5}
ENDING = {"eos_token_id": [3, 4, 5, 6], "pad_token_id": 0, **DRAWN}
SEARCHES = {
    "greedy": ENDLESS,
    "drawn": {**ENDLESS, **DRAWN},
    "drawn by rules": {**ENDLESS, **DRAWN, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "ending": {**ENDING, "num_return_sequences": 3},
    "history": {**ENDLESS, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[3], [5, 6]]},
    "best of": {**ENDING, "best_of": 3},
    "beams": {**ENDLESS, "num_beams": 3},
    "beams that end": {"eos_token_id": [3, 4, 5, 6], "pad_token_id": 0, "num_beams": 4},
    "groups of beams": {**ENDLESS, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "drawn beams": {**ENDLESS, **DRAWN, "num_beams": 3},
    "contrastive": {**ENDLESS, "penalty_alpha": 0.5, "top_k": 4},
    "looked up": {**ENDLESS, "prompt_lookup_num_tokens": 3},
    "sliding": {**ENDLESS, **DRAWN, "sliding_window": 30, "max_new_tokens": 60},
    "max_length": {**ENDLESS, "max_length": 30, "max_new_tokens": None},
    "scores": {**ENDLESS, "output_scores": True},
}


def model_and_prompts(*lengths, **changes):
    model = model_of(dtype=torch.float32, **{"n_positions": 48, **changes})
    return model, [random_ids(model.config, n, seed=n).tolist() for n in lengths]


def texts(model, prompts, **settings):
    given = {key: value for key, value in ({"max_new_tokens": 20} | settings).items() if value is not None}
    out = model.generate(prompts, return_dict=True, **given)
    return out.sequences.tolist(), out.finish_reasons, out.log_probs


def same(one, other, atol=1e-4):
    assert one[:2] == other[:2]
    np.testing.assert_allclose(one[2], other[2], atol=atol)


def logits_of(model, ids, mask=None):
    """The logits (R, T, V) that an engine of the model keeps."""
    engine = model._engine(GenerationConfig())
    engine.read(np.asarray(ids), mask, every=True)
    return engine.logits.clone()


# -- the same text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_writes_the_text_of_the_model_it_was_made_from(search):
    model, prompts = model_and_prompts(2, 9, 5)
    fast = model.prepare_for_generation()
    for some in (prompts, prompts[1:2]):
        same(texts(fast, some, **SEARCHES[search]), texts(model, some, **SEARCHES[search]))


def test_prompts_with_a_common_beginning_read_it_once_and_write_the_same():
    model, (beginning,) = model_and_prompts(36)
    prompts = [[*beginning, 1], [*beginning, 2, 3], [*beginning, 4]]
    same(texts(model.prepare_for_generation(), prompts, max_new_tokens=8, **ENDLESS),
         texts(model, prompts, max_new_tokens=8, **ENDLESS))  # fmt: skip


def test_a_past_is_taken_for_one_row_or_for_each_and_stays_as_it_is():
    model, _ = model_and_prompts()
    fast = model.prepare_for_generation()
    for rows in (1, 2):
        beginning = ids_of(model, rows, 6)
        with torch.no_grad():
            past = model(beginning).past
        before = past[0][0].clone()
        prompts = [beginning[row % rows].tolist() + rest for row, rest in enumerate(([3], [4, 5]))]
        same(texts(fast, prompts, past=past, **ENDLESS), texts(model, prompts, **ENDLESS))
        assert torch.equal(past[0][0], before)


def test_it_drafts_for_others_and_others_for_it():
    model, prompts = model_and_prompts(4, 7)
    small = model_of(dtype=torch.float32, n_positions=48, n_layer=1, seed=5)
    expected = texts(model, prompts, assistant_model=small, **ENDLESS)
    fast, fast_small = model.prepare_for_generation(), small.prepare_for_generation()
    for one, other in ((fast, fast_small), (fast, small), (model, fast_small)):
        same(texts(one, prompts, assistant_model=other, **ENDLESS), expected)


def test_listeners_stop_strings_time_limits_and_processors_are_heeded():
    model, prompts = model_and_prompts(4, 4)
    fast, seen = model.prepare_for_generation(), []
    whole = model.generate(prompts, max_new_tokens=15, **ENDLESS)
    assert torch.equal(fast.generate(prompts, max_new_tokens=15, on_token=seen.append, **ENDLESS), whole)
    assert torch.equal(torch.stack(seen, dim=1), whole[:, 4:])
    assert torch.equal(torch.stack(list(fast.stream(prompts, max_new_tokens=15, **ENDLESS)), dim=1), whole[:, 4:])
    tokenizer = GPT2Tokenizer()
    stop = {"tokenizer": tokenizer, "stop_strings": [tokenizer.decode(whole[0, 8:10].tolist())]}
    same(texts(fast, prompts, **stop, **ENDLESS), texts(model, prompts, **stop, **ENDLESS))
    assert fast.generate(prompts, max_new_tokens=15, max_time=1e-9, **ENDLESS).shape == (2, 5)

    def even(ids, scores):
        return scores.masked_fill(torch.arange(scores.size(1)) % 2 == 1, -math.inf)

    rules = {"logits_processors": [even], **ENDLESS}
    same(texts(fast, prompts, **rules), texts(model, prompts, **rules))


def test_padding_on_the_right_changes_nothing():
    model, _ = model_and_prompts()
    ids, mask = ids_of(model, 2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    fast = model.prepare_for_generation()
    assert torch.equal(fast.generate(ids, mask, **ENDLESS), model.generate(ids, mask, **ENDLESS))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_is_the_models_own(activation):
    model, prompts = model_and_prompts(7, activation_function=activation)
    expected = logits_of(model, prompts)
    np.testing.assert_allclose(logits_of(model.prepare_for_generation(), prompts), expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
        {"n_inner": 20},
    ],
    ids=lambda value: next(iter(value)),
)
def test_every_variant_of_the_architecture_is_followed(changes):
    model, prompts = model_and_prompts(7, **changes)
    np.testing.assert_allclose(logits_of(model.prepare_for_generation(), prompts), logits_of(model, prompts), atol=1e-5)


def test_pruned_heads_and_double_heads():
    model, prompts = model_and_prompts(3, 6)
    model.prune_heads({1: [0]})
    same(texts(model.prepare_for_generation(), prompts, **ENDLESS), texts(model, prompts, **ENDLESS))
    double = model_of(GPT2DoubleHeadsModel, torch.float32, n_positions=48)
    same(texts(double.prepare_for_generation(), prompts, **ENDLESS), texts(double, prompts, **ENDLESS))


def test_nothing_to_choose_from_is_said_as_the_model_says_it():
    model, prompts = model_and_prompts(3)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(math.nan)
    fast = model.prepare_for_generation()
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
        with pytest.raises(GenerationError) as ours:
            fast.generate(prompts, **settings, **ENDLESS)
        with pytest.raises(GenerationError) as theirs:
            model.generate(prompts, **settings, **ENDLESS)
        assert str(ours.value) == str(theirs.value)


# -- number formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-4), ("float16", 0.01), ("bfloat16", 0.06)])
def test_other_number_formats_stay_near(dtype, atol):
    model, prompts = model_and_prompts(9)
    fast = model.prepare_for_generation(dtype)
    assert fast.dtype is getattr(torch, dtype)
    expected = logits_of(model, prompts)
    np.testing.assert_allclose(logits_of(fast, prompts).float(), expected, atol=atol * expected.abs().max().item())
    assert fast.generate(prompts, **ENDLESS).shape == (1, 29)
    same(texts(model.prepare_for_generation(getattr(torch, dtype)), prompts), texts(fast, prompts))


def test_without_a_format_it_is_the_models_own():
    for dtype in (torch.float64, torch.bfloat16):
        assert model_of(dtype=dtype).prepare_for_generation().dtype is dtype


def test_without_onednn_products_are_pytorchs_own(monkeypatch):
    model, prompts = model_and_prompts(3, 6)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False, raising=False)
    monkeypatch.setattr(prepared._Packed, "serves", staticmethod(lambda device, dtype: False))
    same(texts(model.prepare_for_generation(), prompts, **ENDLESS), texts(model, prompts, **ENDLESS))


@pytest.fixture(scope="module")
def tales():
    return GPT2LMHeadModel.from_pretrained("gpt2-tales")


@pytest.fixture(scope="module")
def story(tales):
    """Some text of the embedded model's own, (2, 200)."""
    return tales.generate([[464], [1212]], max_new_tokens=199, do_sample=True, seed=1, eos_token_id=()).numpy()


def bits(model, ids):
    """The mean bits of each token after the first."""
    logits = logits_of(model, ids)[:, :-1].double()
    own = torch.log_softmax(logits, -1).gather(2, torch.from_numpy(ids[:, 1:]).unsqueeze(2))
    return -own.mean().item() / math.log(2)


needs_int8 = pytest.mark.skipif(
    not {"x86", "fbgemm"} & set(torch.backends.quantized.supported_engines), reason="no int8 kernels here"
)


@needs_int8
def test_eight_bits_cost_less_than_half_a_percent(tales, story):
    assert bits(tales.prepare_for_generation("int8"), story) == pytest.approx(bits(tales, story), rel=0.005)


@needs_int8
def test_eight_bits_bear_channels_that_are_much_larger_than_others(story):
    model = GPT2LMHeadModel.from_pretrained("gpt2-tales")
    whole = bits(model, story)
    with torch.no_grad():
        for block in model.transformer.h:
            for norm, weight in ((block.ln_1, block.attn.c_attn.weight), (block.ln_2, block.mlp.c_fc.weight)):
                norm.weight[[7, 55, 133]] *= 20
                norm.bias[[7, 55, 133]] *= 20
                weight[[7, 55, 133]] /= 20
    assert bits(model, story) == pytest.approx(whole, rel=1e-5)
    assert bits(model.prepare_for_generation("int8"), story) == pytest.approx(whole, rel=0.005)


@needs_int8
def test_a_row_in_eight_bits_is_its_single_run(tales):
    fast = tales.prepare_for_generation("int8")
    prompts = [random_ids(tales.config, 12, seed=seed).tolist() for seed in range(3)]
    together = fast.generate(prompts, max_new_tokens=30, **ENDLESS)
    alone = torch.cat([fast.generate([prompt], max_new_tokens=30, **ENDLESS) for prompt in prompts])
    assert torch.equal(together, alone)


@needs_int8
def test_both_int8_kernels_multiply_the_same_numbers():
    rows, x = torch.randn(40, 24), torch.randn(3, 24)
    x = x / x.abs().amax(1, keepdim=True)
    values, scales = prepared._rounded(rows)
    exact = (x * 127).round() / 127 @ (values * scales).t()
    values = values.t().contiguous().t()  # in any order
    for make in (prepared._fbgemm_product, prepared._onednn_product):
        engine = torch.backends.quantized.engine
        try:
            product = make(values, scales.squeeze(1))
        except (RuntimeError, AttributeError):
            continue
        np.testing.assert_allclose(product(x), exact, atol=1e-5)
        assert torch.backends.quantized.engine == engine


@needs_int8
def test_eight_bits_write_with_every_kind_of_search(tales):
    fast = tales.prepare_for_generation("int8")
    for settings in ({"num_beams": 2}, DRAWN, {"prompt_lookup_num_tokens": 3}, {"assistant_model": fast}):
        assert fast.generate([[464, 257], [1212]], max_new_tokens=6, **settings, **ENDLESS).shape == (2, 8)


def test_zeros_are_fine_in_eight_bits():
    try:
        zero = prepared._Int8(torch.zeros(16, 8), torch.ones(8))
    except GenerationError:
        pytest.skip("no int8 kernels here")
    assert torch.equal(zero(torch.zeros(2, 16)), torch.ones(2, 8))


# -- a snapshot, and what it holds ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_model_stays_as_it_is_and_may_change_afterwards(dtype):
    model, prompts = model_and_prompts(5)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = model.prepare_for_generation(dtype)
    expected = fast.generate(prompts, **ENDLESS)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast.generate(prompts, **ENDLESS), expected)


def test_the_cache_is_allocated_once_with_room_for_the_whole_text(monkeypatch):
    model, prompts = model_and_prompts(5, 9)
    fast, places = model.prepare_for_generation(), []
    run = prepared.PreparedEngine._run

    def watched(self, *arguments):
        run(self, *arguments)
        places.append((self.past.buffer.data_ptr(), tuple(self.past.buffer.shape)))

    monkeypatch.setattr(prepared.PreparedEngine, "_run", watched)
    monkeypatch.setattr(prepared, "_COLUMNS", 1)
    fast.generate(prompts, max_new_tokens=20, **ENDLESS)
    assert len(places) == 20
    assert len(set(places)) == 1
    assert places[0][1][3] == 9 + 20


def test_a_cache_that_is_too_small_grows():
    model, prompts = model_and_prompts(7)
    fast, ids = model.prepare_for_generation(), np.array(prompts)
    engine = fast._engine(GenerationConfig(max_new_tokens=1))
    for column in range(7):
        engine.read(ids[:, column : column + 1])
    for _ in range(80):
        engine.reject(np.array([1]))
        engine.read(ids[:, -1:])
    engine.past.extend(100)
    np.testing.assert_allclose(engine.past.buffer[:, :, :, :7], cached(fast, ids), atol=1e-6)
    np.testing.assert_allclose(engine.logits[:, -1], logits_of(model, ids)[:, -1], atol=1e-5)


def cached(model, ids):
    engine = model._engine(GenerationConfig())
    engine.read(ids)
    return engine.past.buffer[:, :, :, : ids.shape[1]]


@pytest.mark.parametrize("rows", [[1, 2], [0, 0, 1, 1, 2, 2], [2, 0, 1], [1, 1, 0], [2], [0, 0, 0, 2], [1, 1, 2]])
@pytest.mark.parametrize("lead", [0, 2])
@torch.inference_mode()
def test_rows_are_moved_repeated_and_dropped(rows, lead):
    model, _ = model_and_prompts()
    fast, ids = model.prepare_for_generation(), random_ids(model.config, 3, 6)
    engine = fast._engine(GenerationConfig())
    engine.read(ids)
    before = engine.past.buffer[:, :, :, :6].clone()
    for _ in range(2):  # the second time there is room for rows that were there before
        engine.past.take(np.array(rows), lead)
        after = engine.past.views()[1][0]
        assert torch.equal(after, before[0][rows][:, :, lead:])
        engine.past.take(np.zeros(3, np.int64), 0)
        engine.past.buffer = before.clone()
        engine.past.start = engine.past.stop = 6
        engine.past.rows = 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_a_thousand_calls_leave_nothing_behind():
    model, prompts = model_and_prompts(3)
    fast = model.prepare_for_generation()

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def call():
        fast.generate(prompts, max_new_tokens=2, do_sample=True, seed=1, **ENDLESS)

    for _ in range(100):
        call()
    before = resident()
    for _ in range(900):
        call()
    assert resident() - before < 8e6
    kinds = (prepared._Cache, prepared.PreparedEngine)
    assert not [each for each in gc.get_objects() if type(each) in kinds]


def test_an_interrupted_call_leaves_it_usable():
    model, prompts = model_and_prompts(3)
    fast = model.prepare_for_generation()

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast.generate(prompts, on_token=stop, **ENDLESS)
    assert torch.equal(fast.generate(prompts, **ENDLESS), model.generate(prompts, **ENDLESS))


# -- compiled -------------------------------------------------------------------------------------------------


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here"
)


@needs_compiler
@pytest.mark.parametrize("search", SEARCHES)
def test_a_compiled_step_writes_the_same_text(search):
    model, prompts = model_and_prompts(2, 9, 5)
    fast = model.prepare_for_generation(compile=True)
    same(texts(fast, prompts, **SEARCHES[search]), texts(model, prompts, **SEARCHES[search]))


@needs_compiler
@needs_int8
def test_a_compiled_step_in_eight_bits_has_the_numbers_of_the_kernels(tales, story):
    """The same roundings: what differs is the order of sums between them.

    Until one falls to the other side, which stays in the cache: on some texts sooner, on this one after 25 tokens.
    """
    plain, compiled = (tales.prepare_for_generation("int8", compile=compile) for compile in (False, True))
    ids = story[0, :24].tolist()
    expected = plain.generate([ids], max_new_tokens=25, output_scores=True, return_dict=True)
    found = compiled.generate([ids], max_new_tokens=25, output_scores=True, return_dict=True)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


@needs_compiler
def test_a_compiled_step_in_half_precision_is_near(tales, story):
    """As near as half precision is to float32, for as long as both write the same."""
    plain, compiled = (tales.prepare_for_generation("bfloat16", compile=compile) for compile in (False, True))
    steps = 0
    for start in range(0, 160, 20):
        ids = story[start % 40 // 20, start : start + 24].tolist()
        one, other = (
            each.generate([ids], max_new_tokens=12, output_scores=True, return_dict=True, eos_token_id=())
            for each in (plain, compiled)
        )
        for at, (ours, theirs) in enumerate(zip(other.scores, one.scores, strict=True)):
            if torch.equal(other.sequences[:, : 24 + at], one.sequences[:, : 24 + at]):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0.15)
                steps += at > 0
    assert steps > 20


@needs_compiler
def test_pruned_heads_and_odd_sizes_are_compiled_too():
    model, prompts = model_and_prompts(3, 6, n_embd=36, n_head=3, n_inner=50, vocab_size=67, activation_function="gelu")
    model.prune_heads({0: [1]})
    fast = model.prepare_for_generation(compile=True)
    same(texts(fast, prompts, **ENDLESS), texts(model, prompts, **ENDLESS))


@needs_compiler
def test_a_compiled_step_is_a_snapshot():
    model, prompts = model_and_prompts(3, 6)
    fast = model.prepare_for_generation(compile=True)
    before = texts(fast, prompts, **ENDLESS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    same(texts(fast, prompts, **ENDLESS), before, 0)


@pytest.fixture
def recorded():
    """Prepares as for a GPU, but that the step is run again where a GPU replays it."""

    def prepare(model):
        fast = model.prepare_for_generation()
        fast._graphs = Graphs(fast._body, fast.device)
        return fast

    return prepare


@pytest.mark.parametrize("search", ["greedy", "drawn", "ending", "beams", "contrastive", "looked up", "sliding"])
def test_a_recorded_step_writes_the_same_text(recorded, search):
    model, prompts = model_and_prompts(2, 9, 5)
    fast = recorded(model)
    for _ in range(2):
        same(texts(fast, prompts, **SEARCHES[search]), texts(model, prompts, **SEARCHES[search]))
    assert all(len(free) <= 1 for free in fast._graphs.free.values())


def test_two_streams_at_once_record_one_step_each(recorded):
    model, prompts = model_and_prompts(4, 6)
    fast = recorded(model)
    streams = [fast.stream([prompt], max_new_tokens=9, **ENDLESS) for prompt in prompts]
    made = [[], []]
    for pair in zip(*streams, strict=True):
        for row, new in zip(made, pair, strict=True):
            row += new.tolist()
    for prompt, row in zip(prompts, made, strict=True):
        assert model.generate([prompt], max_new_tokens=9, **ENDLESS)[0, len(prompt) :].tolist() == row


# -- wrong use ------------------------------------------------------------------------------------------------


def test_an_unknown_format_is_refused_with_the_nearest():
    model, _ = model_and_prompts()
    with pytest.raises(GenerationError, match=r"dtype is 'int7', expected one of float32.*'int8'"):
        model.prepare_for_generation("int7")
    with pytest.raises(GenerationError, match=r"torch.int32, expected one of"):
        model.prepare_for_generation(torch.int32)


def test_eight_bits_elsewhere_than_on_a_cpu_are_refused():
    with torch.device("meta"):
        model = GPT2LMHeadModel(model_of().config, seed=None)
    with pytest.raises(GenerationError, match=r"int8, which has kernels on a CPU, but the model is on meta"):
        model.prepare_for_generation("int8")


def test_eight_bits_without_kernels_are_refused_with_both_reasons(monkeypatch):
    def missing(values, scales):
        raise RuntimeError("not built\nat some place")

    monkeypatch.setattr(prepared, "_fbgemm_product", missing)
    monkeypatch.setattr(prepared, "_onednn_product", missing)
    with pytest.raises(GenerationError, match=r"FBGEMM's \(not built\) nor oneDNN's \(not built\); prepare the model"):
        model_of().prepare_for_generation("int8")


@needs_int8
def test_eight_bits_without_the_first_kernel_use_the_other(monkeypatch, tales, story):
    def missing(values, scales):
        raise AttributeError("_make_per_channel_quantized_tensor")

    try:
        prepared._onednn_product(torch.ones(8, 8, dtype=torch.int8), torch.ones(8))(torch.ones(1, 8))
    except (RuntimeError, AttributeError):
        pytest.skip("no oneDNN here")
    monkeypatch.setattr(prepared, "_fbgemm_product", missing)
    assert bits(tales.prepare_for_generation("int8"), story) == pytest.approx(bits(tales, story), rel=0.005)


def test_compiling_without_a_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    native.load_step.cache_clear()
    with pytest.raises(GenerationError, match=r"needs a C\+\+ compiler.*CXX names 'no-such-comp.*leave compile"):
        model_of(dtype=torch.float32).prepare_for_generation(compile=True)


def test_compiling_doubles_is_refused():
    with pytest.raises(GenerationError, match=r"a step in float32, bfloat16, int8, but dtype is float64; choose one"):
        model_of().prepare_for_generation("float64", compile=True)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_copy_is_refused_with_what_to_do_instead(dtype):
    prepared = model_of(GPT2LMHeadModel).prepare_for_generation(dtype=dtype)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match=r"cannot be copied or pickled.*copy or save the model it was made from"):
            copied(prepared)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_defaults_of_the_moment_change_nothing(dtype):
    model = model_of(GPT2LMHeadModel)
    expected = model.prepare_for_generation(dtype=dtype)
    with torch.device("meta"):
        found = model.prepare_for_generation(dtype=dtype)
    assert type(found._body.head) is type(expected._body.head)
    ids = torch.tensor([[3, 4, 5]])
    assert found.generate(ids, max_new_tokens=5).tolist() == expected.generate(ids, max_new_tokens=5).tolist()


def test_preparing_twice_is_refused():
    fast = model_of().prepare_for_generation("float32")
    assert isinstance(fast, PreparedModel)
    with pytest.raises(GenerationError, match="prepared already, in float32; call"):
        fast.prepare_for_generation()
