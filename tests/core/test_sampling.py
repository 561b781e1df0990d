"""Sampling: each rule with its edge cases, their order, and the draws."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core import sampling
from gpt2_core.errors import GenerationError
from gpt2_core.sampling import RULES, GenerationConfig, active_rules, apply_rules, choose, draw, log_softmax, softmax

INF = np.inf


def scores_of(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def kept(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(scores > -INF).tolist()


# -- rules ---------------------------------------------------------------------------------------------------


def test_repetition_penalty_counts_a_token_once_and_pushes_both_signs_down():
    scores = np.array([2.0, -2.0, 0.0, 5.0])
    out = sampling.repetition_penalty(scores, np.array([0, 1, 0, 0, 2]), 2.0)
    assert out.tolist() == [1.0, -4.0, 0.0, 5.0]
    assert scores.tolist() == [2.0, -2.0, 0.0, 5.0]
    assert sampling.repetition_penalty(scores, np.array([0, 1]), 0.5).tolist() == [4.0, -1.0, 0.0, 5.0]
    assert sampling.repetition_penalty(np.array([-INF, 1.0]), np.array([0]), 2.0).tolist() == [-INF, 1.0]


@pytest.mark.parametrize(
    ("history", "size", "banned"),
    [
        ([], 1, []),
        ([0, 3], 1, [0, 3]),
        ([0], 2, []),
        ([0, 1], 2, []),
        ([0, 1, 0], 2, [1]),
        ([0, 0], 2, [0]),
        ([0, 1, 0, 2, 0], 2, [1, 2]),
        ([0, 1, 2, 0, 1], 3, [2]),
        ([0, 1, 2, 0], 3, []),
        ([0, 1], 3, []),
        ([4, 4, 4], 3, [4]),
        ([0, 1, 2], 9, []),
    ],
)
def test_no_repeat_ngram_bans_what_would_repeat_one(history, size, banned):
    out = sampling.no_repeat_ngram_size(np.zeros(5), np.array(history, np.int64), size)
    assert kept(out) == [token for token in range(5) if token not in banned]


def test_no_text_written_under_the_ngram_rule_repeats_one():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3):
        text: list[int] = []
        while len(text) < 60:
            out = sampling.no_repeat_ngram_size(generator.normal(size=6), np.array(text, np.int64), size)
            if not kept(out):
                break
            text.append(choose(out))
        grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
        assert len(grams) == len(set(grams))
        assert len(text) > 5


def test_bad_words_are_banned_where_they_would_be_completed():
    words = [[4], [0, 1], [2, 3, 1], [0, 0, 0, 0]]
    assert kept(sampling.bad_words_ids(np.zeros(5), np.array([], np.int64), words)) == [0, 1, 2, 3]
    assert kept(sampling.bad_words_ids(np.zeros(5), np.array([0]), words)) == [0, 2, 3]
    assert kept(sampling.bad_words_ids(np.zeros(5), np.array([2, 3]), words)) == [0, 2, 3]
    assert kept(sampling.bad_words_ids(np.zeros(5), np.array([3, 2]), words)) == [0, 1, 2, 3]
    assert kept(sampling.bad_words_ids(np.zeros(5), np.array([0, 0, 0]), words)) == [2, 3]


def test_end_of_text_is_banned_until_there_are_enough_new_tokens():
    config = GenerationConfig(min_new_tokens=2)
    assert [kept(apply_rules(np.zeros(3), [0], config, made, (1, 2))) for made in range(4)] == [
        [0],
        [0],
        [0, 1, 2],
        [0, 1, 2],
    ]


def test_suppressed_tokens_are_banned_everywhere():
    assert kept(apply_rules(np.zeros(4), [], GenerationConfig(suppress_tokens=[1, 3]))) == [0, 2]
    assert active_rules(GenerationConfig(suppress_tokens=[], bad_words_ids=[])) == ()


def test_what_may_not_begin_a_text_may_follow():
    config = GenerationConfig(begin_suppress_tokens=[0, 2])
    assert [kept(apply_rules(np.zeros(3), [0], config, made)) for made in range(2)] == [[1], [0, 1, 2]]


def test_forced_tokens_stand_at_their_places_and_cost_nothing():
    config = GenerationConfig(
        forced_bos_token_id=1, forced_tokens={2: 3}, forced_eos_token_id=0, suppress_tokens=[0, 1, 3], max_new_tokens=5
    )
    out = [apply_rules(np.full(4, -7.0), [], config, made, limit=5) for made in range(5)]
    assert [kept(scores) for scores in out] == [[1], [2], [3], [2], [0]]
    assert [float(scores.max()) for scores in out] == [0.0, -7.0, 0.0, -7.0, 0.0]
    # Where no limit is known, nothing is the last token.
    assert kept(apply_rules(np.zeros(4), [], config, 4)) == [2]


def test_processors_of_the_caller_come_between_the_bans_and_the_shape():
    seen = []

    def prefer_the_second(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append((ids.tolist(), scores.tolist()))
        scores[0, 1] += 10  # its own copy
        return scores

    config = GenerationConfig(do_sample=True, suppress_tokens=[0], temperature=2.0, top_k=1)
    scores = np.array([4.0, 1.0, 2.0])
    out = apply_rules(scores, [2, 1], config, processors=[prefer_the_second])
    assert seen == [([[2, 1]], [[-INF, 1.0, 2.0]])]
    assert out.tolist() == [-INF, 5.5, -INF]
    assert scores.tolist() == [4.0, 1.0, 2.0]


def test_a_processor_that_changes_the_shape_is_named():
    def halve(ids, scores):
        return scores[:, :2]

    with pytest.raises(GenerationError, match=r"processor halve returned scores of shape \(1, 2\), expected \(1, 4\)"):
        apply_rules(np.zeros(4), [], GenerationConfig(), processors=[halve])


def test_temperature_divides():
    assert sampling.temperature(np.array([1.0, -INF]), 0.5).tolist() == [2.0, -INF]


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1.0, 3.0, 2.0], 1, [1]),
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([1.0, 3.0, 2.0], 9, [0, 1, 2]),
        ([2.0, 2.0, 2.0, 2.0], 2, [0, 1]),
        ([1.0, 2.0, 2.0, 3.0], 2, [1, 3]),
        ([-INF, 1.0, -INF], 2, [1]),
    ],
)
def test_top_k_keeps_the_highest_and_of_equal_ones_the_lower_ids(scores, k, expected):
    assert kept(sampling.top_k(np.array(scores), k)) == expected


@pytest.mark.parametrize(
    ("probabilities", "p", "expected"),
    [
        ([0.5, 0.25, 0.125, 0.125], 0.5, [0]),  # exactly reached: no more is needed
        ([0.5, 0.25, 0.125, 0.125], 0.51, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.75, [0, 1]),
        ([0.5, 0.25, 0.125, 0.125], 0.8, [0, 1, 2]),  # of the two equal ones the lower id
        ([0.125, 0.125, 0.25, 0.5], 0.8, [0, 2, 3]),
        ([0.5, 0.25, 0.125, 0.125], 1e-9, [0]),  # one always stays
        ([0.25, 0.25, 0.25, 0.25], 0.5, [0, 1]),
        ([0.0, 0.5, 0.5], 0.9, [1, 2]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(probabilities, p, expected):
    assert kept(sampling.top_p(scores_of(*probabilities), p)) == expected


def test_top_p_is_smallest_and_reaches_on_random_distributions():
    generator = np.random.default_rng(0)
    for _ in range(200):
        scores = generator.normal(0, 2, 20)
        p = float(generator.uniform(0.05, 0.99))
        probabilities = softmax(scores)
        ids = kept(sampling.top_p(scores, p))
        assert probabilities[ids].sum() >= p - 1e-12
        assert probabilities[ids].sum() - probabilities[ids].min() < p
        out = [token for token in range(20) if token not in ids]
        assert not out or probabilities[ids].min() >= probabilities[out].max()


@pytest.mark.parametrize(
    ("probabilities", "p", "expected"),
    [
        ([0.5, 0.25, 0.125, 0.125], 1.0, [0]),
        ([0.4, 0.4, 0.2], 1.0, [0, 1]),
        ([0.5, 0.26, 0.24], 0.5, [0, 1]),
        ([0.5, 0.3, 0.2], 0.01, [0, 1, 2]),
        ([0.0, 0.5, 0.5], 0.01, [1, 2]),
    ],
)
def test_min_p_keeps_what_is_likely_beside_the_likeliest(probabilities, p, expected):
    assert kept(sampling.min_p(scores_of(*probabilities), p)) == expected


def test_typical_p_ranks_by_distance_from_the_entropy():
    probabilities = [0.5, 0.2, 0.15, 0.1, 0.05]
    entropy = -sum(p * np.log(p) for p in probabilities)
    order = sorted(range(5), key=lambda i: (abs(-np.log(probabilities[i]) - entropy), i))
    assert order[0] == 1  # the likeliest token is not the most typical here
    assert kept(sampling.typical_p(scores_of(*probabilities), 0.19)) == [1]
    assert kept(sampling.typical_p(scores_of(*probabilities), 0.3)) == sorted(order[:2])
    assert kept(sampling.typical_p(scores_of(*probabilities), 0.999)) == [0, 1, 2, 3, 4]
    assert kept(sampling.typical_p(scores_of(0.25, 0.25, 0.25, 0.25), 0.5)) == [0, 1]
    assert kept(sampling.typical_p(scores_of(0.5, 0.0, 0.5), 0.9)) == [0, 2]


def test_a_rule_never_changes_the_scores_it_is_given():
    scores, history = np.random.default_rng(0).normal(size=8), np.array([1, 2, 1])
    before = scores.copy()
    config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_k=6,
        top_p=0.9,
        min_p=0.01,
        typical_p=0.9,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        bad_words_ids=[[3]],
        suppress_tokens=[4],
        min_new_tokens=2,
        begin_suppress_tokens=[6],
        forced_bos_token_id=0,
        forced_tokens={7: 1},
        forced_eos_token_id=1,
    )
    assert active_rules(config) == RULES
    config = config.replace(forced_bos_token_id=None)
    out = apply_rules(scores, history, config, 0, (5,))
    assert np.array_equal(scores, before)
    assert not {2, 3, 4, 5, 6} & set(kept(out))


# -- their order ---------------------------------------------------------------------------------------------


def test_banned_tokens_take_no_place_among_the_top_k():
    config = GenerationConfig(do_sample=True, top_k=2, suppress_tokens=[0])
    assert kept(apply_rules([5.0, 4.0, 3.0, 2.0], [], config)) == [1, 2]


def test_the_penalty_comes_before_the_temperature_and_both_before_top_p():
    scores = scores_of(0.6, 0.3, 0.1)
    # At temperature 1 the first token alone reaches 0.55; flattened, it takes two.
    assert kept(apply_rules(scores, [], GenerationConfig(do_sample=True, top_p=0.55))) == [0]
    assert kept(apply_rules(scores, [], GenerationConfig(do_sample=True, top_p=0.55, temperature=5.0))) == [0, 1]


def test_top_p_sees_only_what_top_k_left():
    # Of all, 0.4 + 0.3 are needed to reach 0.55; of the two that top_k leaves, 0.4 / 0.7 reaches it alone.
    scores = scores_of(0.4, 0.3, 0.2, 0.1)
    assert kept(apply_rules(scores, [], GenerationConfig(do_sample=True, top_p=0.55))) == [0, 1]
    assert kept(apply_rules(scores, [], GenerationConfig(do_sample=True, top_p=0.55, top_k=2))) == [0]


def test_the_rules_apply_in_the_documented_order():
    assert RULES == (
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "min_new_tokens",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_tokens",
        "forced_eos_token_id",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    )


# -- the draw ------------------------------------------------------------------------------------------------


def test_the_draw_takes_the_first_token_whose_cumulative_sum_exceeds_the_number():
    probabilities = np.array([0.25, 0.25, 0.5])
    uniform = [0.0, 0.2499, 0.25, 0.4999, 0.5, 0.9999999999999999]
    assert [draw(probabilities, u) for u in uniform] == [0, 0, 1, 1, 2, 2]


def test_tokens_of_probability_zero_are_never_drawn():
    probabilities = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert {draw(probabilities, u) for u in np.linspace(0, 1, 1000, endpoint=False)} == {1, 3}
    assert draw(probabilities, 0.0) == 1
    assert draw(probabilities, 1 - 2**-53) == 3


def test_rounding_cannot_leave_the_draw_without_a_token():
    generator = np.random.default_rng(0)
    for _ in range(300):
        probabilities = softmax(generator.normal(0, 5, 1000))
        assert 0 <= draw(probabilities, 1 - 2**-53) < 1000
        assert probabilities[draw(probabilities, 1 - 2**-53)] > 0


def test_draws_at_even_steps_come_out_in_proportion():
    probabilities = softmax(np.random.default_rng(1).normal(size=7))
    drawn = [draw(probabilities, (i + 0.5) / 20_000) for i in range(20_000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=7) / 20_000, probabilities, atol=1e-4)


def test_without_a_number_the_likeliest_token_is_taken_and_of_equal_ones_the_lower_id():
    assert choose(np.array([1.0, 3.0, 3.0])) == 1
    assert choose(np.array([-INF, -INF, -5.0])) == 2
    assert choose(np.array([0.0, 0.0]), 0.75) == 1


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.0, np.nan], "row 3 at new token 7 hold nan or +inf"),
        ([0.0, INF], "hold nan or +inf"),
        ([-INF, -INF], "every token of row 3 is banned at new token 7"),
    ],
)
def test_there_must_be_numbers_and_something_to_choose(scores, words):
    with pytest.raises(GenerationError) as caught:
        sampling.check_scores(np.array(scores), 3, 7)
    assert words in str(caught.value)
    sampling.check_scores(np.array([0.0, -INF]), 0, 0)


# -- several draws, and drafts -------------------------------------------------------------------------------


def test_log_softmax_is_the_logarithm_of_softmax_and_survives_large_scores():
    scores = np.array([1.0, -INF, 700.0, 699.0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_softmax(scores)[1:], np.log(softmax(scores))[1:], rtol=1e-13)
    assert log_softmax(scores + 1e6)[1] == -INF
    assert log_softmax(np.array([5.0])).tolist() == [0.0]


def test_the_best_come_in_order_and_of_equal_ones_the_lower_id_first():
    assert sampling.best(np.array([1.0, 3.0, 2.0, 3.0, -INF]), 3).tolist() == [1, 3, 2]
    assert sampling.best(np.array([1.0, 3.0]), 9).tolist() == [1, 0]


def test_draws_without_putting_back_have_the_distribution_of_one_after_the_other():
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    grid = (np.arange(200) + 0.5) / 200
    pairs = {}
    for first in grid:
        for second in grid:
            ids, masses = sampling.draw_several(probabilities, [first, second])
            pairs[tuple(ids.tolist())] = pairs.get(tuple(ids.tolist()), 0) + 1 / len(grid) ** 2
            assert masses.tolist() == [1.0, 1.0 - probabilities[ids[0]]]
    for (one, other), share in pairs.items():
        assert one != other
        assert share == pytest.approx(probabilities[one] * probabilities[other] / (1 - probabilities[one]), abs=2e-3)
    assert len(pairs) == 12


def test_where_nothing_is_left_to_draw_the_mass_says_so():
    ids, masses = sampling.draw_several(np.array([0.0, 1.0, 0.0]), [0.5, 0.5])
    assert masses.tolist() == [1.0, 0.0]
    assert ids[0] == 1 and 0 <= ids[1] < 3


def test_a_draft_that_is_kept_or_drawn_again_leaves_the_models_own_distribution():
    # Chi-square over two places of a vocabulary of three: drafts are drawn from q, what comes out is p's.
    generator = np.random.default_rng(0)
    p = [np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.2, 0.6])]
    q = [np.array([0.2, 0.3, 0.5])]
    counts, kept_drafts, n = np.zeros((3, 3)), 0, 60_000
    for numbers in generator.random((n, 4)):
        drafted = draw(q[0], numbers[0])
        count, token = sampling.verify(p, q, [drafted], [numbers[1]], [numbers[2]], numbers[3])
        kept_drafts += count
        first = drafted if count else token
        counts[first, token if count else draw(p[1], numbers[3])] += 1
    expected = n * p[0][:, None] * p[1][None]
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # chance of more: 0.001 at 8 degrees of freedom
    assert kept_drafts / n == pytest.approx(np.minimum(p[0], q[0]).sum(), abs=0.01)


def test_a_draft_from_the_models_own_distribution_is_always_kept():
    p = [softmax(np.random.default_rng(i).normal(size=5)) for i in range(3)]
    assert sampling.verify(p, p[:2], [1, 4], [1 - 2**-53] * 2, [0.0, 0.0], 0.5) == (2, draw(p[2], 0.5))
    # What could not be drawn by the model is never kept, and never drawn instead.
    count, token = sampling.verify([np.array([0.0, 1.0]), p[0]], [np.array([0.5, 0.5])], [0], [0.0], [0.9], 0.0)
    assert (count, token) == (0, 1)
