"""GenerationConfig: every setting validated, contradictions refused by name, and files of the field."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from gpt2_core.errors import GenerationError
from gpt2_core.generation_config import DEFAULTS, SETTINGS, GenerationConfig, resolve
from gpt2_core.sampling import active_rules, apply_rules

INF = np.inf


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
        ({"num_beam": 4}, "no setting 'num_beam'; did you mean 'num_beams'?"),
        ({"stop": "."}, "no setting 'stop'; did you mean 'stop_strings'?"),
        ({"forced_decoder_ids": []}, "did you mean 'forced_tokens'?"),
        ({"return_dict_in_generate": True}, "did you mean 'return_dict'?"),
        ({"logits_processor": []}, "did you mean 'logits_processors'?"),
        ({"assistant_model": None}, "assistant_model is an argument of generate(), not a setting"),
        ({"streamer": None}, "streamer is an argument of generate()"),
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
        ({"max_time": 0}, "max_time is 0, expected None or a number of seconds above 0"),
        ({"max_time": True}, "max_time is True"),
        ({"stop_strings": ""}, "stop_strings holds an empty text"),
        ({"stop_strings": ["a", 3]}, "stop_strings holds 3, expected a text or a list of texts"),
        ({"stop_strings": 3}, "stop_strings holds 3"),
        ({"sliding_window": 0}, "sliding_window is 0, expected True, False, or the least number"),
        ({"sliding_window": 2.0}, "sliding_window is 2.0"),
        ({"begin_suppress_tokens": [-1]}, "begin_suppress_tokens holds -1"),
        ({"forced_bos_token_id": -1}, "forced_bos_token_id is -1, expected None or a token id"),
        ({"forced_eos_token_id": [3]}, "forced_eos_token_id is [3]"),
        ({"forced_tokens": 3}, "forced_tokens is 3, expected {place among the new tokens, from 0: token id}"),
        ({"forced_tokens": [3]}, "forced_tokens holds 3"),
        ({"forced_tokens": {-1: 3}}, "forced_tokens holds (-1, 3)"),
        ({"forced_tokens": {"a": 3}}, "forced_tokens holds ('a', 3)"),
        ({"forced_tokens": [(0, 1), (0, 2)]}, "forced_tokens names two tokens for place 0"),
        ({"num_beams": 0}, "num_beams is 0, expected a whole number of at least 1"),
        ({"num_beams": True}, "num_beams is True"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping is 'always', expected True, False or 'never'"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1"),
        ({"num_beams": 2, "length_penalty": INF}, "length_penalty is inf, expected a finite number"),
        ({"diversity_penalty": -1}, "diversity_penalty is -1, expected a number of at least 0"),
        ({"do_sample": True, "best_of": 0}, "best_of is 0"),
        ({"penalty_alpha": 0}, "penalty_alpha is 0, expected None or a number above 0 and up to 1"),
        ({"penalty_alpha": 1.5}, "penalty_alpha is 1.5"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens is 0"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens is 0"),
        ({"return_dict": 1}, "return_dict is 1, expected true or false"),
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
        ({"num_return_sequences": 2}, "num_return_sequences=2 has no effect without sampling or beams"),
        ({"best_of": 2}, "best_of=2 has no effect without sampling"),
        ({"num_beam_groups": 2}, "num_beam_groups=2 has no effect without beams; pass num_beams"),
        ({"early_stopping": True}, "early_stopping=True has no effect without beams"),
        ({"num_beams": 2, "diversity_penalty": 1.0}, "diversity_penalty=1.0 has no effect without groups of beams"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without texts to weigh; pass num_beams or best_of"),
        ({"max_matching_ngram_size": 3}, "has no effect without drafts from the text itself"),
        ({"output_scores": True}, "output_scores=True has no effect without an output"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 with top_k=0, expected at least 2 candidates"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": True}, "contrastive search draws nothing"),
        ({"penalty_alpha": 0.6, "top_k": 4, "num_beams": 2}, "contrastive search follows one beginning"),
        ({"penalty_alpha": 0.6, "top_k": 4, "top_p": 0.5}, "top_p=0.5 has no effect without sampling"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1, "do_sample": True},
            "diverse beam search draws",
        ),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups=2 with diversity_penalty=0 would follow the same"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1}, "does not divide into num_beam_groups=3"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_beams": 2, "num_return_sequences": 3, "do_sample": True}, "is more than num_beams=2"),
        ({"do_sample": True, "best_of": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than best_of=2"),
        ({"do_sample": True, "best_of": 2, "num_beams": 3}, "got both best_of=2 and num_beams=3, which exclude"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "a draft is of one"),
        ({"num_beams": 2, "return_dict": True, "output_scores": True}, "beams change places"),
        ({"prompt_lookup_num_tokens": 2, "return_dict": True, "output_scores": True}, "several tokens are chosen"),
        ({"penalty_alpha": 0.6, "top_k": 4, "return_dict": True, "output_scores": True}, "weighs more than scores"),
        ({"do_sample": True, "best_of": 2, "return_dict": True, "output_scores": True}, "be those of all drafts"),
        ({"prompt_lookup_num_tokens": 2, "sliding_window": True}, "where the window slides"),
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
        bad_words_ids=[[1, np.int64(2)], (3,)],
        eos_token_id=[np.int32(4)],
        suppress_tokens=range(2),
        top_k=np.int64(0),
        forced_tokens={3: np.int64(1), 0: 2},
        stop_strings="The end",
        max_time=np.float32(2),
        return_dict=np.bool_(True),
    )
    assert config.forced_tokens == ((0, 2), (3, 1))
    assert config.stop_strings == ("The end",)
    assert (type(config.max_time), type(config.return_dict)) == (float, bool)
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
    config = GenerationConfig(
        do_sample=True, top_p=0.9, seed=2**63, bad_words_ids=[[1, 2]], eos_token_id=[], forced_tokens={2: 3},
        stop_strings=["a", "b"], num_beams=3, early_stopping="never", sliding_window=7, return_dict=True,
    )  # fmt: skip
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
        "output_scores": False,
        "return_dict_in_generate": False,
        "remove_invalid_values": False,
        "top_k": None,
    }
    path.write_text(json.dumps(released))
    assert GenerationConfig.from_json_file(path) == GenerationConfig(eos_token_id=50256)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"eta_cutoff": 0.1}', "eta_cutoff is 0.1, which this version does not have; expected 0.0"),
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


def test_contrastive_search_reads_top_k_as_its_number_of_candidates():
    assert active_rules(GenerationConfig(penalty_alpha=0.6, top_k=4)) == ()
    assert active_rules(GenerationConfig(do_sample=True, top_k=4)) == ("top_k",)


def test_all_that_the_interface_promises_is_there():
    promised = (
        "max_new_tokens max_length do_sample temperature top_k top_p min_p typical_p repetition_penalty "
        "no_repeat_ngram_size bad_words_ids num_beams num_beam_groups diversity_penalty length_penalty early_stopping "
        "num_return_sequences penalty_alpha stop_strings eos_token_id min_new_tokens seed max_time return_dict"
    )
    assert set(promised.split()) <= set(SETTINGS) == set(DEFAULTS)
    assert DEFAULTS["max_new_tokens"] is None and DEFAULTS["num_beams"] == 1 and DEFAULTS["length_penalty"] == 1.0
