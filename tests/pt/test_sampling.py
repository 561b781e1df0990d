"""Each rule on the device against its numpy twin, on random and on adversarial scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import sampling_cases as cases  # noqa: E402
from gpt2_core import sampling as core  # noqa: E402
from gpt2_core.sampling import GenerationConfig  # noqa: E402
from gpt2_pt import sampling as ours  # noqa: E402
from sampling_cases import RULES, adversarial, histories  # noqa: E402

INF = math.inf


def rules(scores, history, *settings):
    return ours.apply_rules(torch.from_numpy(scores), torch.from_numpy(history), *settings).numpy()


def same(*arguments, **options):
    return cases.same(rules, *arguments, **options)


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("case", range(len(adversarial())))
def test_each_rule_equals_its_numpy_twin(settings, case):
    scores = adversarial()[case]
    for n in (1, 2, 9):
        same(GenerationConfig(**settings), scores, histories(*scores.shape, n, seed=case + n))


@pytest.mark.parametrize("words", cases.BAD_WORDS)
@pytest.mark.parametrize("seed", range(8))
def test_bad_words_equal_their_numpy_twin(words, seed):
    scores = np.random.default_rng(seed).normal(size=(6, 5))
    for n in (1, 2, 12):
        same(GenerationConfig(bad_words_ids=words), scores, histories(6, 5, n, seed))


def test_suppressed_and_early_end_tokens_equal_their_numpy_twin():
    scores, history = np.zeros((2, 9)), histories(2, 9, 3, 0)
    same(GenerationConfig(suppress_tokens=[0, 8, 0]), scores, history)
    config = GenerationConfig(min_new_tokens=3)
    for made in range(5):
        same(config, scores, history, made, eos_ids=(2, 7))
        same(config, scores, history, made, eos_ids=())


@pytest.mark.parametrize(("p", "kept"), cases.REACHED_EXACTLY)
def test_a_sum_that_reaches_p_exactly_is_enough(p, kept):
    for rule in ("top_p", "typical_p"):
        got = same(GenerationConfig(do_sample=True, **{rule: p}), np.zeros((1, 8)), np.zeros((1, 1), np.int64))
        assert np.isfinite(got).nonzero()[1].tolist() == list(range(kept))


def test_min_p_keeps_a_token_exactly_at_its_edge():
    scores = np.array([[0.0, math.log(0.25), math.nextafter(math.log(0.25), -INF)]])
    got = same(GenerationConfig(do_sample=True, min_p=0.25), scores, np.zeros((1, 1), np.int64))
    assert np.isfinite(got).tolist() == [[True, True, False]]


@pytest.mark.parametrize("seed", range(30))
def test_all_rules_together_equal_the_numpy_twins_in_their_order(seed):
    config, scores, made = cases.combined(seed)
    same(config, scores, histories(5, 17, 8, seed), made=made, eos_ids=(5,))


@pytest.mark.parametrize("case", range(len(adversarial())))
def test_the_likeliest_and_the_drawn_token_equal_the_numpy_twins(case):
    scores = adversarial()[case]
    got = ours.choose(torch.from_numpy(scores))
    assert got.tolist() == [core.choose(row) for row in scores]
    for number in cases.UNIFORMS:
        got = ours.choose(torch.from_numpy(scores), torch.full((len(scores),), number, dtype=torch.float64))
        assert got.tolist() == [core.choose(row, float(number)) for row in scores]
        assert all(np.isfinite(scores[row, token]) for row, token in enumerate(got.tolist()))


def test_a_draw_at_each_edge_falls_on_the_right_side():
    probabilities, edges = cases.EDGES_OF
    for uniform, token in edges.items():
        drawn = ours.draw(*(torch.tensor([each], dtype=torch.float64) for each in (probabilities, uniform)))
        assert drawn.tolist() == [token]
        assert core.draw(np.array(probabilities), uniform) == token


def test_rows_that_are_no_numbers_or_all_banned_are_told_apart():
    scores, expected = zip(*cases.PROBLEMS, strict=True)
    assert ours.problem(torch.tensor(scores, dtype=torch.float64)).tolist() == list(expected)


def test_scores_are_left_as_they_were():
    scores = torch.randn(3, 9, dtype=torch.float64)
    before = scores.clone()
    settings = {
        "repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "bad_words_ids": [[1]], "suppress_tokens": [2],
        "do_sample": True, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5,
    }  # fmt: skip
    ours.apply_rules(scores, torch.zeros(3, 4, dtype=torch.int64), GenerationConfig(**settings))
    assert torch.equal(scores, before)


def test_both_halves_know_the_same_rules():
    assert list(ours._BY_NAME) == list(core.RULES) == list(core._BY_NAME)
