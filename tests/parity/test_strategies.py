"""Every search writes in each framework what it writes with the reference model, token by token, and fails alike."""

from __future__ import annotations

import asyncio
import gc
import math

import numpy as np
import pytest

from gpt2_core import GPT2Tokenizer
from gpt2_core.errors import GenerationError, Gpt2Error, InputError
from gpt2_core.reference import ReferenceModel
from models import ordinary_parameters, random_ids, small_config

PROMPTS = [random_ids(small_config(), n, seed=n).tolist() for n in (3, 7, 1)]
ENDS = {"eos_token_id": [2, 5, 7, 11, 13], "pad_token_id": 0}
SAMPLED = {"do_sample": True, "seed": 5, "temperature": 1.5}
SEARCHES = {
    "greedy": {},
    "drawn": SAMPLED,
    "three each": {**SAMPLED, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without end": {"num_beams": 4, "eos_token_id": (), "repetition_penalty": 1.3},
    "patient beams": {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.5, "num_return_sequences": 4},
    "drawn beams": {**SAMPLED, "num_beams": 3, "top_k": 20, "num_return_sequences": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "best of": {**SAMPLED, "best_of": 4, "num_return_sequences": 2},
    "looked up": {"prompt_lookup_num_tokens": 4, "eos_token_id": ()},
    "looked up and drawn": {**SAMPLED, "prompt_lookup_num_tokens": 4, "temperature": 0.3, "eos_token_id": ()},
    "sliding": {"sliding_window": True, "max_new_tokens": 20},
    "sliding beams": {"sliding_window": 4, "max_new_tokens": 14, "num_beams": 2},
    "sliding and contrastive": {"sliding_window": 4, "max_new_tokens": 14, "penalty_alpha": 0.5, "top_k": 3},
    "forced": {"forced_bos_token_id": 9, "forced_tokens": {3: 8}, "forced_eos_token_id": 5},
}  # fmt: skip


def models(framework, seed=0, head="lm", dtype="float64", **changes):
    config = small_config(**changes)
    values = ordinary_parameters(config, head, seed)
    return ReferenceModel(config, values, head), framework.build(config, head, values, dtype)


@pytest.fixture(scope="module")
def pair(framework):
    return models(framework, 1)


@pytest.fixture(scope="module")
def wordy(framework):
    """The smallest model with the vocabulary of GPT-2."""
    return models(framework, 2, vocab_size=50257, n_embd=4, n_head=1, n_layer=1, n_positions=40)


def equal(got, expected, tolerance=1e-9):
    """Two outputs say the same."""
    assert np.asarray(got.sequences).tolist() == expected.sequences.tolist()
    assert got.keys() == expected.keys()
    assert got.finish_reasons == expected.finish_reasons
    assert got.texts == expected.texts
    np.testing.assert_allclose(np.asarray(got.log_probs), expected.log_probs, rtol=tolerance, atol=tolerance)
    if expected.sequences_scores is not None:
        np.testing.assert_allclose(np.asarray(got.sequences_scores), expected.sequences_scores, rtol=tolerance)
    for one, other in zip(got.scores or (), expected.scores or (), strict=True):
        np.testing.assert_allclose(np.asarray(one), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_writes_what_the_reference_writes(pair, search):
    ours, model = pair
    settings = {"max_new_tokens": 8, "return_dict": True} | ENDS | SEARCHES[search]
    equal(model.generate(PROMPTS, **settings), ours.generate(PROMPTS, **settings))


@pytest.mark.parametrize("settings", [{}, SAMPLED, {**SAMPLED, "top_k": 9, "repetition_penalty": 1.2}], ids=str)
def test_assistants_of_the_same_framework_help(framework, pair, settings):
    ours, model = pair
    small, assistant = models(framework, 4, n_layer=1, n_positions=12)
    settings = {"max_new_tokens": 8, "return_dict": True, "num_assistant_tokens": 3} | ENDS | settings
    got = model.generate(PROMPTS, assistant_model=assistant, **settings)
    equal(got, ours.generate(PROMPTS, assistant_model=small, **settings))
    if not settings.get("do_sample"):
        alone = {name: value for name, value in settings.items() if name != "num_assistant_tokens"}
        equal(got, ours.generate(PROMPTS, **alone))


def test_scores_of_each_step_come_on_request(pair):
    ours, model = pair
    settings = {"max_new_tokens": 6, "return_dict": True, "output_scores": True, "top_p": 0.9, **SAMPLED, **ENDS}
    got, expected = (each.generate(PROMPTS, **settings) for each in (model, ours))
    assert len(got.scores) == len(expected.scores) > 2
    equal(got, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_past_of_a_beginning_may_be_given(framework, pair, rows):
    ours, model = pair
    beginning = random_ids(small_config(), rows, 5)
    prompts = [
        beginning[i % rows].tolist() + random_ids(small_config(), n, seed=n).tolist() for i, n in enumerate((2, 4, 1))
    ]
    expected = ours.generate(prompts, max_new_tokens=5, **ENDS).tolist()
    past = framework.run(model, input_ids=beginning, use_cache=True).past
    for _ in range(2):  # a past is a value: giving it twice is right both times
        assert np.asarray(model.generate(prompts, past=past, max_new_tokens=5, **ENDS)).tolist() == expected
    with pytest.raises(InputError, match="past holds 5 tokens, but the shortest prompt has 5"):
        model.generate(beginning.tolist(), past=past, max_new_tokens=5)
    with pytest.raises(InputError, match="past is a int, expected 2 pairs"):
        model.generate(prompts, past=3, max_new_tokens=5)


def test_a_shared_beginning_changes_nothing(pair):
    ours, model = pair
    beginning = random_ids(small_config(), 9).tolist()
    prompts = [[*beginning, *more] for more in ([1], [2, 3], [4], [5, 6, 7], [1])]
    assert (
        np.asarray(model.generate(prompts, max_new_tokens=4)).tolist()
        == ours.generate(prompts, max_new_tokens=4).tolist()
    )


def test_processors_are_the_callers_own_rules(framework, pair):
    ours, model = pair
    bias = np.random.default_rng(0).normal(0, 3, (1, 37))
    tensor = framework.past(model, [(bias, bias)])[0][0]
    for search in ({}, SAMPLED, {"num_beams": 2}):
        settings = {"max_new_tokens": 7, "eos_token_id": ()} | search
        got = model.generate(PROMPTS, logits_processors=[lambda ids, scores: scores + tensor], **settings)
        expected = ours.generate(PROMPTS, logits_processors=[lambda ids, scores: scores + bias], **settings)
        assert np.asarray(got).tolist() == expected.tolist()


def test_texts_stop_at_stop_strings_and_stream_in_pieces(wordy):
    ours, model = wordy
    tokenizer = GPT2Tokenizer()
    settings = {"tokenizer": tokenizer, "return_dict": True, "max_new_tokens": 15, "eos_token_id": (), **SAMPLED}
    prompts = [tokenizer.encode("The old man"), tokenizer.encode("A")]
    stop = ours.generate(prompts, **settings).texts[0][8:11]
    expected = ours.generate(prompts, stop_strings=stop, pad_token_id=0, **settings)
    assert expected.finish_reasons[0] == "stop"
    equal(model.generate(prompts, stop_strings=stop, pad_token_id=0, **settings), expected)
    stream = model.stream(prompts, stop_strings=stop, pad_token_id=0, **settings)
    pieces = list(stream)
    assert tuple("".join(column) for column in zip(*pieces, strict=True)) == expected.texts
    equal(stream.output, expected)


def test_a_stream_without_a_tokenizer_gives_the_tensors_of_each_step(pair):
    ours, model = pair
    columns = [np.asarray(column) for column in model.stream(PROMPTS, max_new_tokens=6, eos_token_id=(), **SAMPLED)]
    expected = ours.generate(PROMPTS, max_new_tokens=6, eos_token_id=(), **SAMPLED)
    assert np.stack(columns, axis=1).tolist() == expected[:, 7:].tolist()


def test_an_event_loop_gets_the_same_pieces(wordy):
    _, model = wordy
    tokenizer = GPT2Tokenizer()
    settings = {"tokenizer": tokenizer, "max_new_tokens": 9, "eos_token_id": (), **SAMPLED}
    prompt = [tokenizer.encode("The old man")]

    async def walk():
        return [piece async for piece in model.stream(prompt, **settings)]

    pieces = asyncio.run(walk())
    assert len(pieces) > 4
    assert pieces == list(model.stream(prompt, **settings))


@pytest.mark.parametrize("search", ["greedy", "drawn", "beams", "contrastive", "looked up"])
def test_a_time_limit_ends_every_search_with_a_token_at_least(pair, search):
    _, model = pair
    settings = {"max_new_tokens": 9, "return_dict": True, "eos_token_id": ()} | SEARCHES[search]
    out = model.generate([[1, 2, 3]], max_time=1e-9, **settings | {"num_return_sequences": 1})
    assert (np.asarray(out.sequences).shape, out.finish_reasons, out.new_tokens) == ((1, 4), ("time",), (1,))


@pytest.mark.parametrize("search", ["greedy", "drawn", "beams", "drawn beams", "contrastive", "looked up", "sliding"])
def test_every_text_of_a_search_is_what_it_would_be_alone(pair, search):
    _, model = pair
    settings = {"max_new_tokens": 8} | ENDS | SEARCHES[search]
    whole = model.generate(PROMPTS, return_dict=True, **settings)
    texts = whole_texts(whole, max(map(len, PROMPTS)))
    each = len(texts) // len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        # Draws are keyed by the row, so what stands before stays; all else may go.
        beginning = [[3] * (1 + other) for other in range(row)] if settings.get("do_sample") else []
        alone = model.generate([*beginning, prompt], return_dict=True, **settings)
        width = max(map(len, [*beginning, prompt]))
        assert whole_texts(alone, width)[-each:] == texts[row * each : (row + 1) * each]


def whole_texts(out, width):
    """The new tokens of each text."""
    rows = np.asarray(out.sequences)[:, width:].tolist()
    return [row[:count] for row, count in zip(rows, out.new_tokens, strict=True)]


def test_the_window_slides_behind_the_last_position_when_asked_and_raises_when_not(framework):
    ours, model = models(framework, 3, n_positions=1024)
    prompts = [random_ids(small_config(), n, seed=n).tolist() for n in (1021, 1019)]
    for each in (ours, model):
        assert np.asarray(each.generate(prompts[:1], max_new_tokens=3, eos_token_id=())).shape == (1, 1024)
        with pytest.raises(GenerationError, match=r"may get 1025 tokens long.*1024 positions.*sliding_window=True"):
            each.generate(prompts, max_new_tokens=4)
    settings = {"max_new_tokens": 6, "sliding_window": True, "eos_token_id": (), **SAMPLED}
    assert np.asarray(model.generate(prompts, **settings)).tolist() == ours.generate(prompts, **settings).tolist()


# -- wrong use -----------------------------------------------------------------------------------------------


def broken(framework, poison):
    ours, _ = models(framework, 0, tie_word_embeddings=False)
    values = {name: value.copy() for name, value in ours.parameters.items()}
    values["lm_head.weight"][5] = poison
    return ReferenceModel(ours.config, values), framework.build(ours.config, "lm", values)


WRONG = {
    "an empty batch": ([], {}),
    "an empty row": ([[1], []], {}),
    "text": (["Once upon"], {}),
    "a prompt longer than the window": ([[1] * 17], {}),
    "a text longer than the window": ([[1] * 9], {"max_new_tokens": 8}),
    "a window of all positions": ([[1]], {"sliding_window": 16}),
    "an id outside the vocabulary": ([[37]], {}),
    "all tokens banned": ([[1]], {"suppress_tokens": range(37)}),
    "all tokens banned for beams": ([[1]], {"suppress_tokens": range(37), "num_beams": 2}),
    "all tokens banned of candidates": ([[1]], {"suppress_tokens": range(37), "penalty_alpha": 0.5, "top_k": 2}),
    "a stop string without a tokenizer": ([[1]], {"stop_strings": "."}),
    "a special token as stop string": ([[1]], {"stop_strings": "<|endoftext|>", "tokenizer": GPT2Tokenizer()}),
    "an assistant that is none": ([[1]], {"assistant_model": "distilgpt2"}),
    "an unknown setting": ([[1]], {"tempratur": 1.0}),
    "a setting of another search": ([[1]], {"num_beam_groups": 2}),
    "searches that exclude each other": ([[1]], {"num_beams": 2, "penalty_alpha": 0.6, "top_k": 4}),
    "more texts than beams": ([[1]], {"num_beams": 2, "num_return_sequences": 3}),
    "more texts than there are": ([[1]], {"num_beams": 40, "num_return_sequences": 40, "max_new_tokens": 1}),
    "a processor that is none": ([[1]], {"logits_processors": [3]}),
    "a processor that changes the shape": ([[1]], {"logits_processors": [lambda ids, scores: scores[:, :3]]}),
    "a streamer that is none": ([[1]], {"streamer": 3}),
    "listening to beams": ([[1]], {"num_beams": 2, "on_token": print}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_the_same_clear_error_everywhere(pair, case):
    prompts, settings = WRONG[case]
    said = []
    for model in pair:
        with pytest.raises(Gpt2Error) as caught:
            model.generate(prompts, **({"max_new_tokens": 3} | settings))
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]
    assert len(said[0][1]) > 40


def test_a_stop_string_that_never_comes_up_leaves_the_text_to_its_length(wordy):
    for model in wordy:
        settings = {"tokenizer": GPT2Tokenizer(), "stop_strings": ["never", "\x00"], "return_dict": True}
        out = model.generate([[464, 1468]], max_new_tokens=5, eos_token_id=(), **settings)
        assert (out.finish_reasons, out.new_tokens) == (("length",), (5,))


def test_an_assistant_with_another_vocabulary_is_refused(framework, pair):
    said = []
    for model, assistant in zip(pair, models(framework, vocab_size=38), strict=True):
        with pytest.raises(GenerationError, match="assistant_model has a vocabulary of 38 tokens") as caught:
            model.generate([[1]], assistant_model=assistant, max_new_tokens=3)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("search", ["greedy", "drawn", "beams", "drawn beams", "contrastive", "looked up"])
def test_logits_that_are_no_numbers_are_reported_by_every_search(framework, search, poison):
    said = []
    for model in broken(framework, poison):
        with pytest.raises(GenerationError, match=r"the logits of row 0 at new token 0 hold nan or \+inf") as caught:
            model.generate([[1, 2]], max_new_tokens=3, **SEARCHES[search])
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_or_a_callback_that_fails_leaves_the_model_usable(pair, error):
    ours, model = pair
    heard = []

    def fail(new):
        heard.append(new)
        if len(heard) == 3:
            raise error

    expected = ours.generate(PROMPTS, max_new_tokens=6, eos_token_id=()).tolist()
    with pytest.raises(error):
        model.generate(PROMPTS, max_new_tokens=6, eos_token_id=(), on_token=fail)
    assert np.asarray(model.generate(PROMPTS, max_new_tokens=6, eos_token_id=())).tolist() == expected


# -- many calls ----------------------------------------------------------------------------------------------


def test_calls_leave_no_objects_behind(pair):
    _, model = pair

    def call(seed):
        model.generate(PROMPTS, max_new_tokens=2, num_beams=2)
        model.generate(PROMPTS, max_new_tokens=3, **(SAMPLED | {"seed": seed}))
        next(iter(model.stream(PROMPTS, max_new_tokens=3, eos_token_id=())))

    for seed in range(5):
        call(seed)
    gc.collect()
    before = len(gc.get_objects())
    for seed in range(5, 20):
        call(seed)
    gc.collect()
    assert len(gc.get_objects()) - before < 15 * 3


@pytest.mark.slow
@pytest.mark.parametrize("form", ["the model", "prepared"])
def test_a_thousand_calls_leave_memory_and_traces_flat(framework, pair, form):
    import resource

    _, model = pair
    model = model if form == "the model" else model.prepare_for_generation()

    def calls(n):
        for seed in range(n):
            prompts = [random_ids(small_config(), 1 + (seed + i) % 7, seed=seed).tolist() for i in range(1 + seed % 3)]
            search = list(SEARCHES.values())[seed % len(SEARCHES)]
            model.generate(prompts, **({"max_new_tokens": 2 + seed % 3} | ENDS | search))

    def traces():
        """What TensorFlow has traced: of the model itself; a prepared one has programs of fixed sizes."""
        found = getattr(model, "_passes", None) or ()
        if isinstance(found, dict):
            return len(found)
        return sum(each.experimental_get_tracing_count() for each in found)

    calls(16 * 3 * 7)  # every search with every number and length of prompts
    memory, traced = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, traces()
    calls(1000)
    assert traces() == traced
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 10_000  # KiB: one leaked past would be more
