"""Each rule on the device against its numpy twin, on random and on adversarial scores."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from gpt2_core import sampling as core  # noqa: E402
from gpt2_core.sampling import GenerationConfig  # noqa: E402
from gpt2_pt import sampling as ours  # noqa: E402

INF = math.inf


def adversarial() -> list[np.ndarray]:
    """Scores (R, V): ties, banned tokens, one token, one survivor, huge gaps, equal probabilities, signed zeros."""
    pick = np.random.default_rng(0)
    rows = [
        np.zeros((1, 1)),
        np.array([[-INF, -INF, 2.0]]),
        np.zeros((2, 8)),
        np.array([[0.0, -0.0, 0.0, -0.0]]),
        np.array([[1e300, -1e300, 0.0, 700.0]]),
        np.array([[-1e-320, 1e-320, 0.0, 5e-324]]),
        np.array([[3.0, 3.0, 1.0, 1.0, 1.0, 2.0, 2.0]]),
        np.array([[-INF, 1.0, 1.0, -INF, 1.0], [5.0, -INF, -INF, -INF, -INF], [0.0, 1.0, 2.0, 3.0, -INF]]),
        np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]])),
        np.repeat(np.array([[1.0, -2.0]]), 6, axis=1),
    ]
    rows += [pick.normal(0, scale, (4, 23)) for scale in (0.01, 1.0, 30.0)]
    ties = pick.integers(-2, 3, (6, 19)).astype(float)
    ties[pick.random(ties.shape) < 0.2] = -INF
    ties[:, 0] = 1.0
    return [*rows, ties]


def histories(rows: int, V: int, n: int, seed: int) -> np.ndarray:
    """Tokens (R, n) from few ids, so that they repeat; -1 where a row has padding, on the left."""
    pick = np.random.default_rng(seed)
    found = pick.integers(0, min(V, 4), (rows, n))
    for row, padding in enumerate(pick.integers(0, n, rows)):
        found[row, :padding] = -1
    return found


def same(config: GenerationConfig, scores: np.ndarray, history: np.ndarray, made: int = 0, eos_ids=()) -> None:
    got = ours.apply_rules(torch.from_numpy(scores), torch.from_numpy(history), config, made, eos_ids).numpy()
    for row in range(len(scores)):
        real = history[row][history[row] >= 0]
        expected = core.apply_rules(scores[row], real, config, made, eos_ids)
        np.testing.assert_array_equal(np.isneginf(got[row]), np.isneginf(expected), err_msg=f"{config} row {row}")
        np.testing.assert_allclose(got[row], expected, rtol=1e-15, atol=0)


RULES = (
    [{"repetition_penalty": value} for value in (0.5, 1.3, 100.0)]
    + [{"no_repeat_ngram_size": value} for value in (1, 2, 3, 7, 50)]
    + [{"do_sample": True, "temperature": value} for value in (1e-3, 0.7, 100.0)]
    + [{"do_sample": True, "top_k": value} for value in (1, 2, 3, 5, 1000)]
    + [{"do_sample": True, "top_p": value} for value in (1e-9, 0.3, 0.61, 0.9, 0.999999)]
    + [{"do_sample": True, "min_p": value} for value in (1e-9, 0.11, 0.9, 1.0)]
    + [{"do_sample": True, "typical_p": value} for value in (1e-9, 0.31, 0.77, 0.999)]
)


@pytest.mark.parametrize("settings", RULES, ids=str)
@pytest.mark.parametrize("case", range(len(adversarial())))
def test_each_rule_equals_its_numpy_twin(settings, case):
    scores = adversarial()[case]
    for n in (1, 2, 9):
        same(GenerationConfig(**settings), scores, histories(*scores.shape, n, seed=case + n))


@pytest.mark.parametrize("words", [[[0]], [[0, 1]], [[1, 0], [2, 2, 1], [3]], [[0] * 30]])
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


@pytest.mark.parametrize(("p", "kept"), [(0.125, 1), (0.25, 2), (0.250001, 3), (0.5, 4), (0.999, 8), (1e-12, 1)])
def test_a_sum_that_reaches_p_exactly_is_enough(p, kept):
    # Eight equal scores: probabilities are exactly 1/8, and so are their sums.
    for rule in ("top_p", "typical_p"):
        config = GenerationConfig(do_sample=True, **{rule: p})
        scores = np.zeros((1, 8))
        same(config, scores, np.zeros((1, 1), np.int64))
        got = ours.apply_rules(torch.from_numpy(scores), torch.zeros(1, 1, dtype=torch.int64), config)
        assert torch.isfinite(got).nonzero()[:, 1].tolist() == list(range(kept))


def test_min_p_keeps_a_token_exactly_at_its_edge():
    scores = np.array([[0.0, math.log(0.25), math.nextafter(math.log(0.25), -INF)]])
    config = GenerationConfig(do_sample=True, min_p=0.25)
    same(config, scores, np.zeros((1, 1), np.int64))
    got = ours.apply_rules(torch.from_numpy(scores), torch.zeros(1, 1, dtype=torch.int64), config)
    assert torch.isfinite(got).tolist() == [[True, True, False]]


@pytest.mark.parametrize("seed", range(30))
def test_all_rules_together_equal_the_numpy_twins_in_their_order(seed):
    pick = np.random.default_rng(seed)
    settings = {
        "repetition_penalty": float(pick.uniform(0.5, 2)),
        "no_repeat_ngram_size": int(pick.integers(0, 4)),
        "bad_words_ids": [[int(pick.integers(0, 4))], [1, 2]],
        "min_new_tokens": 2,
        "suppress_tokens": [3],
        "do_sample": True,
        "temperature": float(pick.uniform(0.3, 3)),
        "top_k": int(pick.integers(0, 12)),
        "top_p": float(pick.uniform(0.3, 1)),
        "min_p": float(pick.uniform(0, 0.2)),
        "typical_p": float(pick.uniform(0.3, 1)),
    }
    keep = pick.permutation(list(settings))[: pick.integers(1, len(settings) + 1)]
    chosen = {name: settings[name] for name in keep} | {"do_sample": True}
    scores = pick.normal(0, 2, (5, 17))
    same(GenerationConfig(**chosen), scores, histories(5, 17, 8, seed), made=int(pick.integers(0, 4)), eos_ids=(5,))


@pytest.mark.parametrize("case", range(len(adversarial())))
def test_the_likeliest_and_the_drawn_token_equal_the_numpy_twins(case):
    scores = adversarial()[case]
    numbers = np.array([0.0, 1e-300, 0.25, 0.5, 0.999999, 1 - 2**-53])
    got = ours.choose(torch.from_numpy(scores))
    assert got.tolist() == [core.choose(row) for row in scores]
    for number in numbers:
        got = ours.choose(torch.from_numpy(scores), torch.full((len(scores),), number, dtype=torch.float64))
        assert got.tolist() == [core.choose(row, float(number)) for row in scores]
        assert all(np.isfinite(scores[row, token]) for row, token in enumerate(got.tolist()))


def test_a_draw_at_each_edge_falls_on_the_right_side():
    probabilities = torch.tensor([[0.25, 0.0, 0.25, 0.5, 0.0]], dtype=torch.float64)
    edges = {0.0: 0, 0.2499: 0, 0.25: 2, 0.4999: 2, 0.5: 3, 1 - 2**-53: 3}
    for uniform, token in edges.items():
        assert ours.draw(probabilities, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]
        assert core.draw(probabilities[0].numpy(), uniform) == token


def test_rows_that_are_no_numbers_or_all_banned_are_told_apart():
    scores = torch.tensor([[1.0, INF], [1.0, math.nan], [-INF, -INF], [-INF, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert ours.problem(scores).tolist() == [1, 1, 2, 0, 0]


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
