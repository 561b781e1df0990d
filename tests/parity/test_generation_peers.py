"""Searches against someone else's: transformers 5 here and now, and what 4.45 wrote with those that 5 no longer has."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.generation import generate
from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig, apply_rules
from models import ordinary_parameters, padded_mask, random_ids, small_config

OLDER = json.loads((Path(__file__).parent.parent / "peers" / "generation" / "searches.json").read_text("utf-8"))
#: Scores in beams: theirs are float32.
SCORES = 1e-4


def older(kind):
    return [pytest.param(case, id=f"{case['seed']}-{case['settings']}") for case in OLDER[kind]]


def model_of(seed):
    config = small_config(n_positions=40)
    return ReferenceModel(config, ordinary_parameters(config, "lm", seed))


@pytest.mark.parametrize("case", older("groups"))
def test_groups_of_beams_are_those_of_transformers_4_45(case):
    settings = case["settings"] | ({"eos_token_id": ()} if case["settings"]["eos_token_id"] is None else {})
    out = generate(
        model_of(case["seed"]), case["ids"], max_new_tokens=9, pad_token_id=0, return_dict=True,
        num_return_sequences=settings["num_beams"], **settings,
    )  # fmt: skip
    assert out.sequences.tolist() == case["sequences"]
    np.testing.assert_allclose(out.sequences_scores, case["scores"], atol=SCORES)


@pytest.mark.parametrize("case", older("contrastive"))
def test_contrastive_search_is_that_of_transformers_4_45(case):
    settings = case["settings"] | ({"eos_token_id": ()} if case["settings"]["eos_token_id"] is None else {})
    out = generate(model_of(case["seed"]), case["ids"], max_new_tokens=9, pad_token_id=0, **settings)
    assert out.tolist() == case["sequences"]


@pytest.mark.parametrize("kind", ["groups", "contrastive"])
def test_what_4_45_wrote_in_float32_does_not_hang_on_rounding(kind):
    pick = np.random.default_rng(0)
    for case in OLDER[kind]:
        model = model_of(case["seed"])
        # Ten times what rounding to float32 changes.
        near = {name: value * (1 + pick.normal(0, 1e-6, value.shape)) for name, value in model.parameters.items()}
        settings = case["settings"] | ({"eos_token_id": ()} if case["settings"]["eos_token_id"] is None else {})
        several = {"num_return_sequences": settings["num_beams"]} if "num_beams" in settings else {}
        out = generate(
            ReferenceModel(model.config, near), case["ids"], max_new_tokens=9, pad_token_id=0, **settings, **several
        )
        assert out.tolist() == case["sequences"]


# -- transformers 5 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(framework):
    """Models of one seed: ours, theirs."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch = pytest.importorskip("torch")
    transformers.logging.set_verbosity_error()
    made = {}

    def pair(seed):
        if seed not in made:
            config = small_config(n_positions=40)
            values = ordinary_parameters(config, "lm", seed)
            settings = {key: value for key, value in config.to_dict().items() if key not in ("n_ctx", "pruned_heads")}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).double().eval()
            state = {name: torch.from_numpy(value) for name, value in values.items()}
            model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
            made[seed] = framework.build(config, "lm", values), model
        return made[seed]

    def run(seed, ids, mask, **settings):
        ours, model = pair(seed)
        settings = {"max_new_tokens": 10, "pad_token_id": 36} | settings
        mine = ours.generate(ids, mask, return_dict=True, **settings)
        eos = settings.pop("eos_token_id", None)
        if eos != ():
            settings["eos_token_id"] = eos
        else:
            model.generation_config.eos_token_id = None
        out = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), return_dict_in_generate=True,
            output_scores=True, do_sample=False, **settings,
        )  # fmt: skip
        return mine, out

    return run


BEAMS = [
    {},
    {"length_penalty": 0.0, "early_stopping": "never"},
    {"length_penalty": 2.0},
    {"length_penalty": -1.0, "early_stopping": True},
    {"early_stopping": "never", "length_penalty": 1.5},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"suppress_tokens": [3, 4], "bad_words_ids": [[7], [8, 9]], "forced_eos_token_id": 6},
]


@pytest.mark.parametrize("eos", [(), 5, [1, 5, 9]], ids=str)
@pytest.mark.parametrize("rules", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}], ids=["plain", "rules"])
def test_greedy_texts_are_those_of_transformers_5(theirs, rules, eos):
    for seed in range(3):
        ids, mask = random_ids(small_config(), 4, 6, seed=seed), padded_mask(4, 6, seed=seed)
        ids[mask == 0] = 0
        if rules:
            mask[:] = 1  # their rules read the padding as text
        mine, out = theirs(seed, ids, mask, eos_token_id=eos, **rules)
        assert np.asarray(mine.sequences).tolist() == out.sequences.tolist()


@pytest.mark.parametrize("settings", BEAMS, ids=str)
@pytest.mark.parametrize("size", [2, 5])
def test_beams_are_those_of_transformers_5(theirs, size, settings):
    for seed in range(2):
        ids, mask = random_ids(small_config(), 3, 6, seed=seed), np.ones((3, 6), np.int64)
        mine, out = theirs(
            seed, ids, mask, num_beams=size, num_return_sequences=size, eos_token_id=[1, 5, 9], **settings
        )
        width = min(mine.sequences.shape[1], out.sequences.shape[1])
        assert np.asarray(mine.sequences)[:, :width].tolist() == out.sequences[:, :width].tolist()
        assert (np.asarray(mine.sequences)[:, width:] == 36).all() and (out.sequences[:, width:] == 36).all()
        np.testing.assert_allclose(np.asarray(mine.sequences_scores), out.sequences_scores.numpy(), atol=SCORES)


def test_beams_of_padded_prompts_are_those_of_transformers_5(theirs):
    ids, mask = random_ids(small_config(), 4, 6), padded_mask(4, 6)
    ids[mask == 0] = 0
    for eos in ((), [5, 9]):
        mine, out = theirs(1, ids, mask, num_beams=3, eos_token_id=eos)
        assert np.asarray(mine.sequences).tolist() == out.sequences.tolist()


# -- rules ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processors():
    """Their rule of a name: ids (n,) and scores (V,) -> scores (V,)."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch = pytest.importorskip("torch")
    made = importlib.import_module("transformers.generation.logits_process")
    assert transformers

    def of(name, *arguments, **options):
        rule = getattr(made, name)(*arguments, **options)

        def run(ids, scores):
            return rule(torch.tensor([list(map(int, ids))]), torch.from_numpy(np.array([scores])))[0].numpy()

        return run

    return of


#: Our settings, and their rule.
RULES = [
    ({"repetition_penalty": 1.3}, ("RepetitionPenaltyLogitsProcessor", 1.3)),
    ({"repetition_penalty": 0.6}, ("RepetitionPenaltyLogitsProcessor", 0.6)),
    ({"no_repeat_ngram_size": 1}, ("NoRepeatNGramLogitsProcessor", 1)),
    ({"no_repeat_ngram_size": 2}, ("NoRepeatNGramLogitsProcessor", 2)),
    ({"no_repeat_ngram_size": 3}, ("NoRepeatNGramLogitsProcessor", 3)),
    ({"bad_words_ids": [[4], [1, 2], [2, 0, 1]]}, ("NoBadWordsLogitsProcessor", [[4], [1, 2], [2, 0, 1]], [5])),
    ({"suppress_tokens": [3, 8]}, ("SuppressTokensLogitsProcessor", [3, 8])),
    ({"do_sample": True, "temperature": 0.6}, ("TemperatureLogitsWarper", 0.6)),
    *(({"do_sample": True, "top_k": k}, ("TopKLogitsWarper", k)) for k in (1, 5, 60)),
    *(({"do_sample": True, "top_p": p}, ("TopPLogitsWarper", p)) for p in (0.05, 0.5, 0.9, 0.999)),
    *(({"do_sample": True, "min_p": p}, ("MinPLogitsWarper", p)) for p in (0.01, 0.2, 1.0)),
    *(({"do_sample": True, "typical_p": p}, ("TypicalLogitsWarper", p)) for p in (0.05, 0.5, 0.95)),
]


@pytest.mark.parametrize(("settings", "rule"), RULES, ids=str)
def test_rules_keep_what_those_of_transformers_5_keep(processors, settings, rule):
    name, *arguments = rule
    theirs, config, pick = processors(name, *arguments), GenerationConfig(**settings), np.random.default_rng(0)
    for scale in (0.1, 1.0, 5.0):
        for _ in range(20):
            scores, ids = pick.normal(0, scale, 37), pick.integers(0, 5, 12)
            mine, expected = apply_rules(scores, ids, config), theirs(ids, scores)
            assert np.isneginf(mine).tolist() == np.isneginf(expected).tolist()
            np.testing.assert_allclose(mine, expected, rtol=1e-12)


def test_where_rules_differ_from_those_of_transformers_5_it_is_as_the_page_says(processors):
    """docs/decisions/0012-searches-over-an-engine.md lists these."""
    tied = np.array([1.0, 2.0, 2.0, 2.0, 0.0])

    def kept(scores):
        return np.flatnonzero(np.isfinite(scores)).tolist()

    def ours(scores, ids=(0,), **settings):
        return kept(apply_rules(scores, list(ids), GenerationConfig(**settings)))

    # A threshold keeps all that are tied at it; we keep the k that were asked for, the lower ids.
    assert kept(processors("TopKLogitsWarper", 2)([0], tied)) == [1, 2, 3]
    assert ours(tied, do_sample=True, top_k=2) == [1, 2]
    # So it is among the typical ones.
    assert kept(processors("TypicalLogitsWarper", 0.1)([0], np.zeros(4))) == [0, 1, 2, 3]
    assert ours(np.zeros(4), do_sample=True, typical_p=0.1) == [0]
    # They may take any of those that are tied; we take the lower ids.
    assert len(kept(processors("TopPLogitsWarper", 0.5)([0], np.zeros(8)))) == 4
    assert ours(np.zeros(8), do_sample=True, top_p=0.5) == [0, 1, 2, 3]
    # A banned end of text stays possible with them.
    assert kept(processors("NoBadWordsLogitsProcessor", [[2], [3]], [2])([0], tied)) == [0, 1, 2, 4]
    assert ours(tied, bad_words_ids=[[2], [3]], eos_token_id=2) == [0, 1, 4]
