"""What a framework adds to the rules, held to the numpy twins: places among the new tokens, the best, draws, drafts.

The rules that shape a distribution are held to them in tests/pt and tests/tf.
"""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest

from gpt2_core import sampling as core
from gpt2_core.errors import GenerationError
from gpt2_core.sampling import GenerationConfig
from sampling_cases import RULES as ADVERSARIAL_RULES
from sampling_cases import adversarial, histories


class Ours:
    """A framework's sampling module, fed with numpy and read as numpy."""

    def __init__(self, framework):
        self.module = import_module(f"gpt2_{framework.name}.sampling")
        self.put = (getattr(framework, "torch", None) and framework.torch.from_numpy) or framework.tf.constant

    def __call__(self, name, *arguments):
        out = getattr(self.module, name)(*(self.put(a) if isinstance(a, np.ndarray) else a for a in arguments))
        return tuple(map(np.asarray, out)) if isinstance(out, tuple) else np.asarray(out)

    def rules(self, scores, history, config, made=0, eos_ids=(), limit=None, processors=()):
        out = self.module.apply_rules(self.put(scores), self.put(history), config, made, eos_ids, limit, processors)
        return np.asarray(out)


@pytest.fixture(scope="module")
def ours(framework):
    return Ours(framework)


COUNTED = [
    {"min_new_tokens": 3},
    {"begin_suppress_tokens": [1, 4]},
    {"forced_bos_token_id": 2},
    {"forced_tokens": {0: 3, 2: 1, 3: 0}},
    {"forced_eos_token_id": 4},
    {"min_new_tokens": 2, "suppress_tokens": [0], "begin_suppress_tokens": [1], "forced_tokens": {1: 0},
     "forced_eos_token_id": 4, "repetition_penalty": 1.5, "do_sample": True, "temperature": 0.5, "top_k": 3},
]  # fmt: skip


@pytest.mark.parametrize("settings", COUNTED, ids=str)
def test_rules_that_count_new_tokens_equal_their_twins_in_rows_of_any_count(ours, settings):
    config, scores, history = (
        GenerationConfig(**settings),
        np.random.default_rng(0).normal(size=(5, 7)),
        histories(5, 7, 4, 1),
    )
    for made, limit in ((0, 4), (2, 4), (3, 4), (np.array([0, 1, 2, 3, 4]), np.array([4, 2, 9, 4, 5]))):
        got = ours.rules(scores, history, config, made, (1, 6), limit)
        for row in range(5):
            own = [int(np.broadcast_to(each, 5)[row]) for each in (made, limit)]
            real = history[row][history[row] >= 0]
            expected = core.apply_rules(scores[row], real, config, own[0], (1, 6), own[1])
            np.testing.assert_allclose(got[row], expected, rtol=1e-15)
    assert np.isfinite(ours.rules(scores, history, GenerationConfig(forced_eos_token_id=4), 3)).all()


BANS = [
    {"bad_words_ids": [[0]]},
    {"bad_words_ids": [[0, 0], [1, 0, 0], [2]]},
    {"suppress_tokens": [0]},
    {"begin_suppress_tokens": [0]},
    {"min_new_tokens": 2},
    {"forced_bos_token_id": 0},
    {"forced_tokens": {0: 0, 1: 0}},
    {"forced_eos_token_id": 0},
]


def twins(config, scores, history, *rest):
    """What core makes of every row."""
    rows = [core.apply_rules(row, ids[ids >= 0], config, *rest) for row, ids in zip(scores, history, strict=True)]
    return np.stack(rows)


@pytest.mark.parametrize("settings", BANS, ids=str)
def test_rules_that_ban_equal_their_twins_on_adversarial_scores(ours, settings):
    config = GenerationConfig(**settings)
    for case, scores in enumerate(adversarial(1e-300)):
        V = scores.shape[1]
        words = settings.get("bad_words_ids")
        if words and V < 3:
            continue
        for n, made in ((1, 0), (2, 2), (9, 1), (9, 0)):
            history = histories(*scores.shape, n, seed=case + n)
            got = ours.rules(scores, history, config, made, (0, V - 1), 3)
            np.testing.assert_array_equal(got, twins(config, scores, history, made, (0, V - 1), 3))


@pytest.mark.parametrize("settings", [*ADVERSARIAL_RULES, *BANS], ids=str)
def test_a_row_without_any_way_on_stays_so_and_leaves_its_neighbours_alone(ours, settings):
    config, scores = GenerationConfig(**settings), np.random.default_rng(1).normal(size=(3, 9))
    scores[1] = -np.inf
    history = histories(3, 9, 6, 2)
    got = ours.rules(scores, history, config, 0, (4,), 1)
    with np.errstate(invalid="ignore"):
        expected = twins(config, scores, history, 0, (4,), 1)
    np.testing.assert_allclose(got[[0, 2]], expected[[0, 2]], rtol=1e-15)
    forced = any(name.startswith("forced") for name in settings)
    assert ours("problem", got).tolist() == [0, 0 if forced else 2, 0]
    assert np.isneginf(expected[1]).all() != forced


def test_min_p_keeps_a_token_exactly_at_its_edge(ours):
    edge = np.log(0.25)
    scores, history = np.array([[0.0, edge, np.nextafter(edge, -np.inf)]]), np.zeros((1, 1), np.int64)
    config = GenerationConfig(do_sample=True, min_p=0.25)
    for kept in (ours.rules(scores, history, config), twins(config, scores, history)):
        assert np.isfinite(kept).tolist() == [[True, True, False]]


def test_processors_get_rows_of_equal_length_without_padding(ours):
    seen = []

    def likes_the_last(ids, scores):
        rows, given = np.asarray(ids.tolist()), np.asarray(scores.tolist())
        seen.append(rows.tolist())
        given[np.arange(len(rows)), rows[:, -1]] += rows.shape[1]
        return given

    def as_ours(ids, scores):
        return ours.put(likes_the_last(np.asarray(ids), np.asarray(scores)))

    scores = np.random.default_rng(0).normal(size=(4, 6))
    history = np.array([[-1, 1, 2], [3, 4, 5], [-1, 0, 3], [-1, -1, 4]])
    config = GenerationConfig(suppress_tokens=[0], do_sample=True, top_k=2)
    got = ours.rules(scores, history, config, processors=[as_ours])
    assert sorted(seen) == [[[1, 2], [0, 3]], [[3, 4, 5]], [[4]]]
    for row in range(4):
        real = history[row][history[row] >= 0]
        np.testing.assert_allclose(got[row], core.apply_rules(scores[row], real, config, processors=[likes_the_last]))
    with pytest.raises(GenerationError, match=r"processor half returned scores of shape \(1, 3\), expected \(1, 6\)"):

        def half(ids, scores):
            return scores[:, :3]

        ours.rules(scores, history, config, processors=[half])


@pytest.mark.parametrize("k", [1, 2, 5, 99])
def test_the_best_equal_their_twins(ours, k):
    for scores in adversarial(1e-300):
        got = ours("best", scores, k)
        assert got.shape == (len(scores), min(k, scores.shape[1]))
        for row, ids in zip(scores, got, strict=True):
            assert ids.tolist() == core.best(row, k).tolist()


def test_log_softmax_equals_its_twin(ours):
    for scores in adversarial(1e-300):
        for row, got in zip(scores, ours("log_softmax", scores), strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                np.testing.assert_allclose(got, core.log_softmax(row), rtol=1e-13, atol=1e-13)


def test_draws_without_putting_back_equal_their_twins(ours):
    pick = np.random.default_rng(0)
    p = pick.random((6, 9)) * (pick.random((6, 9)) < 0.5)
    p[0] = 0
    p[0, 3] = 1.0
    p[1:, 0] += 0.1
    for _ in range(20):
        numbers = pick.random((6, 5))
        ids, masses = ours("draw_several", p, numbers)
        for row in range(6):
            expected, sums = core.draw_several(p[row], numbers[row])
            np.testing.assert_allclose(masses[row], sums, rtol=1e-12)
            real = sums > 0
            assert ids[row][real].tolist() == expected[real].tolist()
            assert len(set(ids[row][real].tolist())) == real.sum()


def test_drafts_are_kept_and_redrawn_as_by_the_twin(ours):
    pick = np.random.default_rng(0)
    kept = set()
    for _ in range(60):
        p, q = (pick.dirichlet(np.full(6, 0.7), (4, size)) for size in (4, 3))
        q[0] = p[0, :3]  # one row agrees
        drafted = np.array([[core.draw(q[row, i], pick.random()) for i in range(3)] for row in range(4)])
        drafted[2, 2:] = drafted[3, :] = -1  # shorter drafts
        accept, redraws, draws = pick.random((4, 3)), pick.random((4, 3)), pick.random((4, 4))
        counts, tokens = ours("verify", p, q, drafted, accept, redraws, draws)
        for row in range(4):
            n = int((drafted[row] >= 0).sum())
            expected = core.verify(p[row], q[row], drafted[row, :n], accept[row], redraws[row], float(draws[row, n]))
            assert (counts[row], tokens[row]) == expected
            kept.add((row, int(counts[row])))
    assert {(0, 3), (1, 0), (1, 1), (1, 3), (2, 2), (3, 0)} <= kept
