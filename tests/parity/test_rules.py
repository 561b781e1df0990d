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
