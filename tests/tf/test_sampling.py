"""Each rule on the device against its numpy twin, on random and on adversarial scores."""

from __future__ import annotations

import numpy as np
import pytest

import sampling_cases as cases
from gpt2_core import sampling as core
from gpt2_core.sampling import GenerationConfig
from gpt2_tf import sampling as ours
from sampling_cases import RULES, histories
from tf.helpers import tf

#: TensorFlow's kernels take numbers below 2.2e-308 for zero; no logits are that small.
ADVERSARIAL = cases.adversarial(least=1e-300)


def rules(scores, history, *settings):
    return ours.apply_rules(tf.constant(scores), tf.constant(history), *settings).numpy()


def same(*arguments, **options):
    return cases.same(rules, *arguments, **options)


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_each_rule_equals_its_numpy_twin(settings):
    for case, scores in enumerate(ADVERSARIAL):
        for n in (1, 9):
            same(GenerationConfig(**settings), scores, histories(*scores.shape, n, seed=case + n))


@pytest.mark.parametrize("words", cases.BAD_WORDS)
def test_bad_words_equal_their_numpy_twin(words):
    for seed in range(4):
        scores = np.random.default_rng(seed).normal(size=(6, 5))
        for n in (1, 2, 12):
            same(GenerationConfig(bad_words_ids=words), scores, histories(6, 5, n, seed))


def test_suppressed_and_early_end_tokens_equal_their_numpy_twin():
    scores, history = np.zeros((2, 9)), histories(2, 9, 3, 0)
    same(GenerationConfig(suppress_tokens=[0, 8, 0]), scores, history)
    for made in range(5):
        for eos_ids in ((2, 7), ()):
            same(GenerationConfig(min_new_tokens=3), scores, history, made, eos_ids=eos_ids)


@pytest.mark.parametrize(("p", "kept"), cases.REACHED_EXACTLY)
def test_a_sum_that_reaches_p_exactly_is_enough(p, kept):
    for rule in ("top_p", "typical_p"):
        got = same(GenerationConfig(do_sample=True, **{rule: p}), np.zeros((1, 8)), np.zeros((1, 1), np.int64))
        assert np.isfinite(got).nonzero()[1].tolist() == list(range(kept))


@pytest.mark.parametrize("few", [1, 3, 6])
def test_sums_that_need_more_than_the_tokens_looked_at_first_are_the_same(monkeypatch, few):
    monkeypatch.setattr(ours, "_FEW", few)
    for scores in ADVERSARIAL:
        for p in (0.1, 0.5, 0.75, 0.9375, 0.999):
            for rule in ("top_p", "typical_p"):
                same(GenerationConfig(do_sample=True, **{rule: p}), scores, histories(*scores.shape, 1, seed=0))


@pytest.mark.parametrize("seed", range(15))
def test_all_rules_together_equal_the_numpy_twins_in_their_order(seed):
    config, scores, made = cases.combined(seed)
    same(config, scores, histories(5, 17, 8, seed), made=made, eos_ids=(5,))


@pytest.mark.parametrize("case", range(len(ADVERSARIAL)))
def test_the_likeliest_and_the_drawn_token_equal_the_numpy_twins(case):
    scores = ADVERSARIAL[case]
    assert ours.choose(tf.constant(scores)).numpy().tolist() == [core.choose(row) for row in scores]
    for number in cases.UNIFORMS:
        got = ours.choose(tf.constant(scores), tf.fill((len(scores),), tf.constant(number, tf.float64))).numpy()
        assert got.tolist() == [core.choose(row, float(number)) for row in scores]
        assert all(np.isfinite(scores[row, token]) for row, token in enumerate(got.tolist()))


def test_a_draw_at_each_edge_falls_on_the_right_side():
    probabilities, edges = cases.EDGES_OF
    for uniform, token in edges.items():
        drawn = ours.draw(*(tf.constant([each], tf.float64) for each in (probabilities, uniform)))
        assert drawn.numpy().tolist() == [token]


def test_rows_that_are_no_numbers_or_all_banned_are_told_apart():
    scores, expected = zip(*cases.PROBLEMS, strict=True)
    assert ours.problem(tf.constant(scores, tf.float64)).numpy().tolist() == list(expected)


def test_rules_are_the_same_inside_a_function():
    config, scores, _ = cases.combined(3)
    history = histories(5, 17, 8, 3)
    inside = tf.function(lambda scores, history: ours.apply_rules(scores, history, config), autograph=False)
    np.testing.assert_allclose(inside(scores, history), rules(scores, history, config), rtol=1e-15)


def test_both_halves_know_the_same_rules():
    assert list(ours._BY_NAME) == list(core.RULES) == list(core._BY_NAME)
