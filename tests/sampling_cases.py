"""What a framework's sampling rules are tried on, and how they are held to their numpy twins in core."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gpt2_core import sampling as core
from gpt2_core.sampling import GenerationConfig

INF = math.inf

#: A framework's rules: scores (R, V), history (R, n), settings, tokens made so far, end-of-text ids -> scores (R, V).
Rules = Callable[..., np.ndarray]


def adversarial(least: float = 5e-324) -> list[np.ndarray]:
    """Scores (R, V): ties, banned tokens, one token, one survivor, huge gaps, equal probabilities, signed zeros.

    ``least`` is the smallest number among them.
    """
    pick = np.random.default_rng(0)
    rows = [
        np.zeros((1, 1)),
        np.array([[-INF, -INF, 2.0]]),
        np.zeros((2, 8)),
        np.array([[0.0, -0.0, 0.0, -0.0]]),
        np.array([[1e300, -1e300, 0.0, 700.0]]),
        np.array([[-2000 * least, 2000 * least, 0.0, least]]),
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


def same(
    rules: Rules, config: GenerationConfig, scores: np.ndarray, history: np.ndarray, made: int = 0, eos_ids: tuple = ()
) -> np.ndarray:
    """Hold ``rules`` to their numpy twins; returns what they made of ``scores``."""
    got = rules(scores, history, config, made, eos_ids)
    for row in range(len(scores)):
        real = history[row][history[row] >= 0]
        expected = core.apply_rules(scores[row], real, config, made, eos_ids)
        np.testing.assert_array_equal(np.isneginf(got[row]), np.isneginf(expected), err_msg=f"{config} row {row}")
        np.testing.assert_allclose(got[row], expected, rtol=1e-15, atol=0)
    return got


RULES = (
    [{"repetition_penalty": value} for value in (0.5, 1.3, 100.0)]
    + [{"no_repeat_ngram_size": value} for value in (1, 2, 3, 7, 50)]
    + [{"do_sample": True, "temperature": value} for value in (1e-3, 0.7, 100.0)]
    + [{"do_sample": True, "top_k": value} for value in (1, 2, 3, 5, 1000)]
    + [{"do_sample": True, "top_p": value} for value in (1e-9, 0.3, 0.61, 0.9, 0.999999)]
    + [{"do_sample": True, "min_p": value} for value in (1e-9, 0.11, 0.9, 1.0)]
    + [{"do_sample": True, "typical_p": value} for value in (1e-9, 0.31, 0.77, 0.999)]
)

BAD_WORDS = ([[0]], [[0, 1]], [[1, 0], [2, 2, 1], [3]], [[0] * 30])

#: Eight equal scores have probabilities of exactly 1/8, and so are their sums: p, and how many tokens reach it.
REACHED_EXACTLY = ((0.125, 1), (0.25, 2), (0.250001, 3), (0.5, 4), (0.999, 8), (1e-12, 1))

UNIFORMS = (0.0, 1e-300, 0.25, 0.5, 0.999999, 1 - 2**-53)

#: Of these probabilities a uniform number draws this token.
EDGES_OF = ((0.25, 0.0, 0.25, 0.5, 0.0), {0.0: 0, 0.2499: 0, 0.25: 2, 0.4999: 2, 0.5: 3, 1 - 2**-53: 3})

#: Rows of scores, and what is wrong with each: 0 nothing, 1 nan or +inf, 2 every token banned.
PROBLEMS = (
    ((1.0, INF), 1), ((1.0, math.nan), 1), ((-INF, -INF), 2), ((-INF, 0.0), 0), ((0.0, 1.0), 0),
)  # fmt: skip


def combined(seed: int) -> tuple[GenerationConfig, np.ndarray, int]:
    """Some rules of random strength, scores (5, 17), and how many tokens were made."""
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
    return GenerationConfig(**chosen), pick.normal(0, 2, (5, 17)), int(pick.integers(0, 4))
