"""Several tokens in one go: the search's side, with an engine that does so over the reference model."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from gpt2_core import generation, strategies
from gpt2_core.engine import Chosen
from gpt2_core.errors import GenerationError
from gpt2_core.generation import generate, stream
from gpt2_core.reference import ReferenceModel
from gpt2_core.reference_engine import ReferenceEngine
from models import ordinary_parameters, random_ids, small_config

CONFIG = small_config(n_positions=40)
MODEL = ReferenceModel(CONFIG, ordinary_parameters(CONFIG, "lm", 0))
ENDLESS = {"eos_token_id": ()}
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 1.5}
ENDING = {"eos_token_id": [3, 4, 5, 6], "pad_token_id": 0, **SAMPLED}


class Hasty(ReferenceEngine):
    """Writes as many tokens in one go as it may, and notes how many it was allowed and how many it gave."""

    at_once = 7
    goes: ClassVar[list[tuple[int, int]]] = []

    def write(self, last, moment, uniforms, open_, n, *, log_probs=False):
        ids, noted = [], []
        made, going = moment.made.copy(), open_.copy()
        while going.any() and len(ids) < n:
            self.read(last[:, None])
            history = moment.history
            if history is not None and ids:
                history = np.concatenate((history, np.stack(ids, axis=1)), axis=1)
            now = dataclasses.replace(moment, made=made, history=history)
            at = len(ids)
            last = self.choose([now], None if uniforms is None else uniforms[:, at : at + 1])[:, 0]
            ids.append(last)
            noted.append(self.log_probs(last.clip(0)[:, None])[:, 0])
            made = made + 1
            going = going & (last >= 0) & ~np.isin(last, self.eos_ids) & (made < moment.limits)
            last = last.clip(0)
        self.goes.append((n, len(ids)))
        return Chosen(np.stack(ids, axis=1), np.stack(noted, axis=1) if log_probs else None)


@pytest.fixture
def goes(monkeypatch):
    monkeypatch.setattr(generation, "ReferenceEngine", Hasty)
    monkeypatch.setattr(Hasty, "goes", [])
    return Hasty.goes


CALLS = [
    {"max_new_tokens": 20, **ENDLESS},
    {"max_new_tokens": 20, **ENDLESS, **SAMPLED},
    {"max_new_tokens": 30, **ENDING},
    {"max_new_tokens": 9, "num_return_sequences": 3, **ENDING},
    {"max_length": 31, **ENDING},
    {"max_new_tokens": 20, "best_of": 3, **ENDING},
    {"max_new_tokens": 20, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, **ENDLESS},
    {"max_new_tokens": 12, "min_new_tokens": 6, "forced_eos_token_id": 4, **ENDING},
    {"max_new_tokens": 60, "sliding_window": 30, **ENDLESS, **SAMPLED},
]


@pytest.mark.parametrize("settings", CALLS, ids=str)
def test_tokens_written_in_one_go_are_those_written_one_by_one(monkeypatch, settings):
    prompts = [random_ids(CONFIG, n, seed=n).tolist() for n in (2, 9, 5)]
    one_by_one = generate(MODEL, prompts, return_dict=True, **settings)
    monkeypatch.setattr(generation, "ReferenceEngine", Hasty)
    monkeypatch.setattr(Hasty, "goes", [])
    together = generate(MODEL, prompts, return_dict=True, **settings)
    assert together.sequences.tolist() == one_by_one.sequences.tolist()
    assert together.finish_reasons == one_by_one.finish_reasons
    np.testing.assert_allclose(together.log_probs, one_by_one.log_probs, atol=1e-12)
    assert max(given for _, given in Hasty.goes) > 1


def test_what_looks_at_single_tokens_gets_them_one_by_one(goes):
    def text(**more):
        return generate(MODEL, [[1, 2, 3]], max_new_tokens=10, **ENDLESS, **more)

    seen = []
    expected = text().tolist()
    assert [n for n, _ in goes] == [7, 2]
    for more in ({"on_token": seen.append}, {"max_time": 1e6}, {"return_dict": True, "output_scores": True}):
        goes.clear()
        out = text(**more)
        assert (out.sequences if "return_dict" in more else out).tolist() == expected
        assert {n for n, _ in goes} == {1}
    assert [int(each[0]) for each in seen] == expected[0][3:]
    goes.clear()
    assert len(list(stream(MODEL, [[1, 2, 3]], max_new_tokens=10, **ENDLESS))) == 10
    assert {n for n, _ in goes} == {1}


def test_no_more_is_asked_for_than_the_texts_may_get_or_the_window_holds(goes):
    generate(MODEL, [[1, 2, 3]], max_new_tokens=4, **ENDLESS)
    assert goes == [(3, 3)]  # the first token is chosen after the prompt
    goes.clear()
    generate(MODEL, random_ids(CONFIG, 1, 37), max_new_tokens=6, sliding_window=30, **ENDLESS)
    assert goes[0] == (3, 3)


def test_goes_grow_while_they_are_quick(goes, monkeypatch):
    monkeypatch.setattr(strategies, "_FIRST_GO", 2)
    generate(MODEL, [[1, 2, 3]], max_new_tokens=25, **ENDLESS)
    assert [n for n, _ in goes] == [2, 4, 7, 7, 4]
    goes.clear()
    monkeypatch.setattr(strategies, "_PATIENCE", 0.0)
    generate(MODEL, [[1, 2, 3]], max_new_tokens=9, **ENDLESS)
    assert [n for n, _ in goes] == [2, 2, 2, 2]


def test_a_text_without_a_way_on_is_named_with_its_row_and_step(goes):
    def banning(ids, scores):
        return np.where((ids.shape[1] >= 5) & (ids[:, :1] == 7), -np.inf, scores)

    with pytest.raises(GenerationError, match=r"every token of row 1 is banned at new token 3"):
        generate(MODEL, [[1, 2], [7, 2]], max_new_tokens=9, logits_processors=[banning], **ENDLESS)
