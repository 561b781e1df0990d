"""Assisted decoding over the reference model: the same text in fewer passes, or the same distribution."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from gpt2_core.errors import GenerationError
from gpt2_core.generation import generate
from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig, apply_rules, softmax
from gpt2_core.strategies_assisted import PromptLookup
from models import ordinary_parameters, random_ids, small_config


def model_of(seed: int = 0, **changes) -> ReferenceModel:
    config = small_config(**({"n_positions": 60} | changes))
    return ReferenceModel(config, ordinary_parameters(config, "lm", seed))


def near(model: ReferenceModel, noise: float, seed: int = 0) -> ReferenceModel:
    """A model that mostly agrees."""
    pick = np.random.default_rng(seed)
    values = {name: value + pick.normal(0, noise, value.shape) for name, value in model.parameters.items()}
    return ReferenceModel(model.config, values)


MODEL = model_of()
HELPERS = {
    "itself": MODEL,
    "a near one": near(MODEL, 0.05),
    "another": model_of(9, n_layer=1),
    "a short one": model_of(9, n_positions=20),
}
PROMPTS = [random_ids(MODEL.config, n, seed=n).tolist() for n in (3, 12, 1, 6)]
SETTINGS = [
    {},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3},
    {"eos_token_id": [2, 4, 8, 16], "pad_token_id": 0, "min_new_tokens": 4},
    {"max_length": 20, "pad_token_id": 0},
    {"forced_tokens": {3: 7, 9: 8}, "forced_eos_token_id": 5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("ahead", [1, 4, 30])
def test_greedy_text_is_the_same_with_any_assistant(helper, ahead, settings):
    settings = {"eos_token_id": ()} | ({} if "max_length" in settings else {"max_new_tokens": 25}) | settings
    expected = generate(MODEL, PROMPTS, **settings, return_dict=True)
    out = generate(
        MODEL, PROMPTS, **settings, assistant_model=HELPERS[helper], num_assistant_tokens=ahead, return_dict=True
    )
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.finish_reasons == expected.finish_reasons
    np.testing.assert_allclose(out.log_probs, expected.log_probs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [*SETTINGS, {"do_sample": True, "seed": 3, "temperature": 0.4}], ids=str)
@pytest.mark.parametrize(("ahead", "size"), [(1, 1), (4, 2), (20, 5)])
def test_text_is_the_same_with_drafts_from_itself_drawn_or_not(ahead, size, settings):
    settings = {"eos_token_id": ()} | ({} if "max_length" in settings else {"max_new_tokens": 25}) | settings
    expected = generate(MODEL, PROMPTS, **settings, return_dict=True)
    out = generate(
        MODEL, PROMPTS, **settings, prompt_lookup_num_tokens=ahead, max_matching_ngram_size=size, return_dict=True
    )
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.finish_reasons == expected.finish_reasons
    np.testing.assert_allclose(out.log_probs, expected.log_probs, rtol=1e-10, atol=1e-12)


def passes(monkeypatch, **settings) -> int:
    count = 0
    real = ReferenceModel.__call__

    def call(model, *arguments, **named):
        nonlocal count
        count += model is MODEL
        return real(model, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceModel, "__call__", call)
        generate(MODEL, [[1, 2, 3]], max_new_tokens=25, eos_token_id=(), **settings)
    return count


def test_an_assistant_that_agrees_saves_passes_and_none_costs_more(monkeypatch):
    assert passes(monkeypatch) == 25
    # The prompt gives one token, then each pass gives five.
    twin = ReferenceModel(MODEL.config, MODEL.parameters)
    assert passes(monkeypatch, assistant_model=twin, num_assistant_tokens=4) == 1 + 5
    assert passes(monkeypatch, assistant_model=twin, num_assistant_tokens=4, do_sample=True, seed=1) == 1 + 5
    assert passes(monkeypatch, assistant_model=near(MODEL, 0.05), num_assistant_tokens=4) < 25
    assert passes(monkeypatch, assistant_model=HELPERS["another"]) <= 25
    # A text in a loop is what a look-up is best at.
    assert passes(monkeypatch, prompt_lookup_num_tokens=4) < 25


def test_a_row_of_an_assisted_batch_is_the_text_it_would_be_alone():
    settings = {
        "assistant_model": HELPERS["a near one"], "do_sample": True, "seed": 5, "temperature": 1.2, "top_k": 20,
        "eos_token_id": [2, 4, 8], "pad_token_id": 0, "max_new_tokens": 20, "num_assistant_tokens": 3,
    }  # fmt: skip
    whole = generate(MODEL, PROMPTS, **settings)
    strangers = [random_ids(MODEL.config, n, seed=50 + n).tolist() for n in (5, 2, 9, 4)]
    for row in range(4):
        other = generate(MODEL, [*strangers[:row], PROMPTS[row]], **settings)[row]
        new = other[len(other) - (other.shape[0] - max(map(len, [*strangers[:row], PROMPTS[row]]))) :].tolist()
        mine = whole[row, 12:].tolist()
        shorter = min(len(new), len(mine))
        assert mine[:shorter] == new[:shorter]
        assert not any(mine[shorter:]) and not any(new[shorter:])


# -- by chance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [{}, {"top_k": 3, "temperature": 0.7, "repetition_penalty": 1.3}], ids=str)
def test_drawn_texts_have_the_distribution_that_they_have_without_an_assistant(rules):
    small = {"vocab_size": 4, "bos_token_id": None, "eos_token_id": None}
    model, helper = model_of(1, **small), model_of(2, **small)
    settings = GenerationConfig(do_sample=True, **rules)
    prompt, length = [1, 2], 4
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(length):
        grown = {}
        for new, chance in expected.items():
            p = softmax(apply_rules(model([[*prompt, *new]]).logits[0, -1], [*prompt, *new], settings, place))
            grown |= {(*new, token): chance * p[token] for token in range(4)}
        expected = grown
    n = 6000
    out = generate(
        model, [prompt], assistant_model=helper, num_assistant_tokens=2, num_return_sequences=n, seed=7,
        max_new_tokens=length, generation_config=settings, pad_token_id=0,
    )  # fmt: skip
    found = Counter(map(tuple, out[:, 2:].tolist()))
    assert set(found) <= {new for new, chance in expected.items() if chance > 0}
    # Chi-square over all texts, the rare ones as one.
    common = [new for new in itertools.product(range(4), repeat=length) if expected[new] * n >= 5]
    pairs = [(found[new], expected[new] * n) for new in common]
    rest = sum(chance for new, chance in expected.items() if new not in common) * n
    if rest >= 5:
        pairs.append((n - sum(found[new] for new in common), rest))
    freedom = len(pairs) - 1
    chi = sum((got - want) ** 2 / want for got, want in pairs)
    # Wilson & Hilferty 1931: the value that chance exceeds once in a thousand.
    assert chi < freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3
    assert freedom > 20


def test_with_itself_as_assistant_even_the_drawn_text_is_the_same():
    # The draft is drawn by the numbers by which the model would draw, and all of it stays.
    settings = {"do_sample": True, "seed": 4, "max_new_tokens": 20, "eos_token_id": ()}
    assert (
        generate(MODEL, PROMPTS, assistant_model=MODEL, **settings).tolist()
        == generate(MODEL, PROMPTS, **settings).tolist()
    )


# -- drafts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "most", "longest", "expected"),
    [
        ([1, 2, 3, 1, 2], 3, 2, [3, 1, 2]),
        ([1, 2, 3, 1, 2], 1, 2, [3]),
        ([1, 2, 3, 9, 2], 3, 2, [3, 9, 2]),  # no pair, but the single token stood before
        ([1, 2, 3, 4], 3, 2, []),
        ([1, 2, 8, 1, 2, 9, 1, 2], 2, 2, [9, 1]),  # the last place wins
        ([2, 8, 1, 2, 9, 2], 2, 1, [9, 2]),
        ([1, 2, 8, 2, 9, 1, 2], 2, 2, [8, 2]),  # and the longest match before it
        ([5, 5, 5], 4, 2, [5]),
        ([5], 4, 2, []),
        ([1, 1], 0, 2, []),
    ],
)
def test_a_look_up_drafts_what_followed_before(tokens, most, longest, expected):
    assert PromptLookup(9, longest).look_up(np.array(tokens), most).tolist() == expected


def test_wrong_assistants_are_refused_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(ReferenceModel, "__call__", lambda *_, **__: pytest.fail("the model ran"))
    cases = (
        (
            {"assistant_model": model_of(vocab_size=38)},
            "assistant_model has a vocabulary of 38 tokens, expected",
        ),
        ({"assistant_model": "gpt2"}, "assistant_model is a str, expected a language model of the same framework"),
        ({"assistant_model": MODEL, "num_beams": 2}, "got both assistant_model and num_beams=2"),
        ({"assistant_model": MODEL, "sliding_window": True}, "got both assistant_model and sliding_window=True"),
        ({"assistant_model": MODEL, "prompt_lookup_num_tokens": 2}, "got both assistant_model and prompt_lookup_num"),
        ({"assistant_model": MODEL, "output_scores": True, "return_dict": True}, "assistant_model and output_scores"),
        ({"assistant_model": model_of(n_positions=4)}, "a prompt of 5 tokens is longer than the 4 positions of assis"),
    )
    for settings, words in cases:
        with pytest.raises(GenerationError) as caught:
            generate(MODEL, [[1, 2, 3, 4, 5]], **settings)
        assert words in str(caught.value)
