"""`generate` writes what core's `generate` writes with the reference model, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig
from models import ordinary_parameters, padded_mask, random_config, random_ids, small_config

SETTINGS = [
    {},
    {"max_new_tokens": 1},
    {"max_length": 14},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7, "max_new_tokens": 12},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "max_new_tokens": 15},
    {"bad_words_ids": [[3], [4, 5], [1, 2, 6], [7, 8, 9, 10, 2, 3, 4, 5]]},
    {"suppress_tokens": [0, 5, 9]},
    {"min_new_tokens": 6, "eos_token_id": [2, 5, 7, 11, 13]},
    {"eos_token_id": [2, 5, 7, 11, 13], "pad_token_id": 3},
    {"eos_token_id": ()},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "temperature": 4.0, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 1},
    {"do_sample": True, "top_k": 4},
    {"do_sample": True, "top_k": 999},
    {"do_sample": True, "top_p": 0.6},
    {"do_sample": True, "min_p": 0.2},
    {"do_sample": True, "typical_p": 0.5},
    {
        "do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95,
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 4, "suppress_tokens": [8], "eos_token_id": [2, 5],
        "min_new_tokens": 3, "num_return_sequences": 2,
    },
]  # fmt: skip


def models(framework, config, seed=0, head="lm"):
    values = ordinary_parameters(config, head, seed)
    return ReferenceModel(config, values, head), framework.build(config, head, values)


def write(model, ids, mask=None, **settings):
    """What the framework writes, as lists; ids and mask go in as numpy."""
    return np.asarray(model.generate(ids, mask, **settings)).tolist()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "defaults")
def test_the_same_text_as_the_reference(framework, settings, side):
    config = small_config(n_positions=40)
    ours, model = models(framework, config, 1)
    ids = random_ids(config, 4, 7)
    mask = None if side is None else padded_mask(4, 7, side, seed=5)
    settings = {"max_new_tokens": 8, "seed": 11} | settings
    if "max_length" in settings:
        del settings["max_new_tokens"]
    assert write(model, ids, mask, **settings) == ours.generate(ids, mask, **settings).tolist()


@pytest.mark.parametrize("seed", range(10))
def test_the_same_text_on_any_config(framework, seed):
    config = random_config(seed, n_positions=24, pad_token_id=0, eos_token_id=5)
    ours, model = models(framework, config, seed)
    ids, mask = random_ids(config, 3, 6, seed=seed), padded_mask(3, 6, "left", seed)
    settings = {"max_new_tokens": 18, "do_sample": True, "top_p": 0.95, "seed": seed, "num_return_sequences": 2}
    assert write(model, ids, mask, **settings) == ours.generate(ids, mask, **settings).tolist()


def test_the_double_heads_model_writes_what_its_language_model_writes(framework):
    config = small_config()
    ours, model = models(framework, config, 3, "double")
    ids = random_ids(config, 2, 5)
    assert write(model, ids, max_new_tokens=6) == ours.generate(ids, max_new_tokens=6).tolist()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 12, "seed": 4}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_row_is_what_it_would_be_alone(framework, settings, side):
    config = small_config(n_positions=40)
    _, model = models(framework, config, 2)
    ids, mask = random_ids(config, 5, 9), padded_mask(5, 9, side, seed=8)
    settings = settings | {"max_new_tokens": 12, "eos_token_id": [3, 9], "pad_token_id": 0}
    batch = write(model, ids, mask, **settings)
    steps = len(batch[0]) - 9
    for row in range(5):
        prompt = ids[row, mask[row] == 1]
        if settings.get("do_sample"):
            # The draws of row i are those of row i in any batch: put it there, among strangers.
            strangers = random_ids(config, row + 1, len(prompt), seed=77)
            strangers[row] = prompt
            alone = write(model, strangers, **settings)[row]
        else:
            alone = write(model, prompt[None], **settings)[0]
        made = alone[len(prompt) :]
        made += [0] * (steps - len(made))
        assert batch[row][9:] == made[:steps]
        assert all(token == 0 for token in made[steps:])


def test_the_whole_context_can_be_filled_and_no_more(framework):
    from gpt2_core.errors import GenerationError

    config = small_config(n_positions=16, eos_token_id=None)
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 10)
    assert write(model, ids, max_length=16) == ours.generate(ids, max_length=16).tolist()
    with pytest.raises(GenerationError, match=r"may get 17 tokens long.* but this model has 16 positions"):
        model.generate(ids, max_length=17)


def test_short_rows_go_on_to_the_end_of_the_context_beside_long_ones(framework):
    config = small_config(n_positions=16)
    ours, model = models(framework, config, 5)
    ids, mask = random_ids(config, 3, 12), np.ones((3, 12), np.int64)
    mask[1, :10] = 0
    settings = {"max_length": 16, "eos_token_id": (), "pad_token_id": 0}
    assert write(model, ids, mask, **settings) == ours.generate(ids, mask, **settings).tolist()


def test_settings_may_come_as_a_config_and_be_overridden(framework):
    config = small_config()
    ours, model = models(framework, config)
    ids = random_ids(config, 2, 4)
    settings = GenerationConfig(do_sample=True, seed=5, max_new_tokens=7)
    for more in ({}, {"seed": 6}, {"max_length": 9}, {"num_return_sequences": 2}):
        got = write(model, ids, generation_config=settings, **more)
        assert got == ours.generate(ids, generation_config=settings, **more).tolist()


def test_without_a_seed_each_call_draws_anew(framework):
    config = small_config(n_positions=40)
    _, model = models(framework, config)
    ids = random_ids(config, 1, 3)
    texts = {str(write(model, ids, do_sample=True, temperature=5.0, max_new_tokens=30)) for _ in range(3)}
    assert len(texts) == 3


def test_lists_are_prompts_too(framework):
    config = small_config()
    ours, model = models(framework, config)
    assert write(model, [[3, 4]], max_new_tokens=4) == ours.generate([[3, 4]], max_new_tokens=4).tolist()
