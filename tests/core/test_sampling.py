"""Sampling: the settings, each rule with its edge cases, their order, and the draw."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from gpt2_core import sampling
from gpt2_core.errors import GenerationError
from gpt2_core.sampling import RULES, GenerationConfig, active_rules, apply_rules, choose, draw, resolve, softmax

INF = np.inf


def scores_of(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities))


def kept(scores: np.ndarray) -> list[int]:
    return np.flatnonzero(scores > -INF).tolist()


# -- settings ------------------------------------------------------------------------------------------------


def test_the_defaults_switch_every_rule_off():
    config = GenerationConfig()
    assert active_rules(config) == ()
    assert config.to_dict() == {}
    scores = np.array([3.0, -INF, 0.5])
    assert np.array_equal(apply_rules(scores, [0, 1], config), scores)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temprature": 0.7}, "no setting 'temprature'; did you mean 'temperature'?"),
        ({"num_beams": 4}, "no setting 'num_beams'"),
        ({"xyzzy": 4}, "no setting 'xyzzy'; expected some of max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected None or a whole number of at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"max_length": True}, "max_length is True"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"do_sample": 1}, "do_sample is 1, expected true or false"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0, expected a number above 0 (for the likeliest"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature is inf"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1, expected a whole number of at least 0, where 0 keeps all"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5"),
        ({"do_sample": True, "top_p": 0}, "top_p is 0, expected a number above 0 and up to 1, where 1 keeps all"),
        ({"do_sample": True, "top_p": 1.1}, "top_p is 1.1"),
        ({"do_sample": True, "top_p": None}, "top_p is None"),
        ({"do_sample": True, "min_p": -0.1}, "min_p is -0.1"),
        ({"do_sample": True, "typical_p": 0.0}, "typical_p is 0.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0, where 1 changes nothing"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size is -2"),
        ({"bad_words_ids": [3]}, "bad_words_ids is [3], expected a list of words"),
        ({"bad_words_ids": 3}, "bad_words_ids is 3"),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids holds an empty word"),
        ({"bad_words_ids": [[-1]]}, "bad_words_ids holds -1"),
        ({"suppress_tokens": 3}, "suppress_tokens is 3, expected a list"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens holds 'a'"),
        ({"eos_token_id": "a"}, "eos_token_id holds 'a'"),
        ({"eos_token_id": -1}, "eos_token_id holds -1"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "expected None (a fresh one) or a whole number from 0 to 2**64 - 1"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(settings, words):
    with pytest.raises(GenerationError) as caught:
        GenerationConfig(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.7}, "temperature=0.7 has no effect without sampling; pass do_sample=True"),
        ({"top_k": 5}, "leave top_k at 0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect"),
        ({"min_p": 0.1}, "min_p=0.1 has no effect"),
        ({"typical_p": 0.1}, "typical_p=0.1 has no effect"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 has no effect without sampling"),
        ({"max_length": 9, "max_new_tokens": 3}, "both max_new_tokens=3 and max_length=9"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_new_tokens=4 is more than max_new_tokens=3"),
        ({"min_new_tokens": 21}, "min_new_tokens=21 is more than max_new_tokens=20"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(GenerationError) as caught:
        GenerationConfig(**settings)
    assert words in str(caught.value)


def test_lists_and_numpy_numbers_become_plain_frozen_values():
    config = GenerationConfig(
        bad_words_ids=[[1, np.int64(2)], (3,)], eos_token_id=[np.int32(4)], suppress_tokens=range(2), top_k=np.int64(0)
    )
    assert config.bad_words_ids == ((1, 2), (3,))
    assert config.eos_token_id == (4,)
    assert config.suppress_tokens == (0, 1)
    assert type(config.eos_token_id[0]) is int
    assert hash(config) == hash(copy.deepcopy(config))
    with pytest.raises(AttributeError):
        config.top_k = 3  # type: ignore[misc]


def test_replace_lets_one_length_take_the_place_of_the_other():
    assert GenerationConfig(max_length=50).replace(max_new_tokens=3) == GenerationConfig(max_new_tokens=3)
    assert GenerationConfig(max_new_tokens=3).replace(max_length=50) == GenerationConfig(max_length=50)
    with pytest.raises(GenerationError, match="both max_new_tokens"):
        GenerationConfig().replace(max_new_tokens=3, max_length=50)
    with pytest.raises(GenerationError, match="did you mean 'top_k'"):
        GenerationConfig().replace(topk=3)


def test_settings_survive_dict_json_and_pickle():
    config = GenerationConfig(do_sample=True, top_p=0.9, seed=2**63, bad_words_ids=[[1, 2]], eos_token_id=[])
    assert GenerationConfig.from_dict(config.to_dict()) == config
    assert GenerationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_released_generation_config_file_is_read(tmp_path):
    path = tmp_path / "generation_config.json"
    released = {
        "_from_model_config": True,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "transformers_version": "4.26.0",
        "num_beams": 1,
        "top_k": None,
    }
    path.write_text(json.dumps(released))
    assert GenerationConfig.from_json_file(path) == GenerationConfig(eos_token_id=50256)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"num_beams": 4}', "num_beams is 4, which this version does not have; expected 1"),
        ('{"some_day": 4}', "no setting 'some_day'"),
        ("[]", "holds a list, expected an object"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_generation_config_file_that_cannot_be_honoured_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(GenerationError) as caught:
        GenerationConfig.from_json_file(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(GenerationError, match="does not exist"):
        GenerationConfig.from_json_file(tmp_path / "none.json")
    with pytest.raises(GenerationError, match="is a folder, expected a file"):
        GenerationConfig.from_json_file(tmp_path)


def test_a_call_combines_a_config_and_its_own_settings():
    assert resolve(None, {"seed": 3}) == GenerationConfig(seed=3)
    base = GenerationConfig(do_sample=True, top_k=5, max_length=9)
    assert resolve(base, {}) is not None
    assert resolve(base, {"top_k": 7, "max_new_tokens": 2}) == GenerationConfig(
        do_sample=True, top_k=7, max_new_tokens=2
    )
    with pytest.raises(GenerationError, match=r"generation_config is a dict, .*GenerationConfig\.from_dict"):
        resolve({"seed": 3}, {})  # type: ignore[arg-type]


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
    )
    assert active_rules(config) == RULES
    out = apply_rules(scores, history, config, 0, (5,))
    assert np.array_equal(scores, before)
    assert not {2, 3, 4, 5} & set(kept(out))


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
