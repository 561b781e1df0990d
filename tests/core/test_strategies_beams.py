"""Beam search over the reference model: against all texts there are, against a twin without a cache, and by chance."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from gpt2_core.engine import Candidates
from gpt2_core.errors import GenerationError
from gpt2_core.generation import generate
from gpt2_core.plan import prepare
from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig, apply_rules, draw_several, log_softmax, softmax
from gpt2_core.strategies_beams import Beam, BeamSearch, Pool
from gpt2_core.uniforms import BEAM_DRAW, uniforms
from models import ordinary_parameters, random_ids, small_config


def model_of(seed: int = 0, **changes) -> ReferenceModel:
    config = small_config(**({"n_positions": 40} | changes))
    return ReferenceModel(config, ordinary_parameters(config, "lm", seed))


MODEL = model_of()


def log_probs(model: ReferenceModel, prompt: list[int], new: list[int]) -> np.ndarray:
    logits = model([[*prompt, *new]]).logits[0]
    return np.array([log_softmax(logits[len(prompt) - 1 + i])[token] for i, token in enumerate(new)])


# -- against everything --------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
def test_with_enough_beams_the_best_of_all_texts_are_found(penalty):
    model = model_of(vocab_size=4, bos_token_id=None, eos_token_id=None)
    prompt, eos, n = [2, 3], 0, 4
    texts = [
        new
        for length in range(1, n + 1)
        for new in itertools.product(range(4), repeat=length)
        if eos not in new[:-1] and (length == n or new[-1] == eos)
    ]
    scores = {new: log_probs(model, prompt, list(new)).sum() / len(new) ** penalty for new in texts}
    ranked = sorted(texts, key=lambda new: -scores[new])
    out = generate(
        model, [prompt], num_beams=120, num_return_sequences=6, eos_token_id=eos, max_new_tokens=n, pad_token_id=3,
        length_penalty=penalty, early_stopping="never", return_dict=True,
    )  # fmt: skip
    for row, new in enumerate(ranked[:6]):
        assert out.sequences[row, 2 : 2 + len(new)].tolist() == list(new)
        assert out.sequences_scores[row] == pytest.approx(scores[new], rel=1e-12)
        np.testing.assert_allclose(out.log_probs[row, : len(new)], log_probs(model, prompt, list(new)), rtol=1e-10)
        assert out.finish_reasons[row] == ("end" if new[-1] == eos else "length")


# -- against a twin ------------------------------------------------------------------------------------------


def twin(model, prompt, n, size, eos, *, groups=1, diversity=0.0, penalty=1.0, early=False, **rules):
    """Beam search of one prompt with lists alone: every group's beams, then the merged result, the best first."""
    settings = GenerationConfig(**rules)
    each = size // groups
    live = [[((), 0.0)] for _ in range(groups)]
    done: list[list[tuple[tuple[int, ...], float]]] = [[] for _ in range(groups)]
    open_ = [True] * groups
    for made in range(n):
        taken: Counter[int] = Counter()
        for g in range(groups):
            if not open_[g]:
                continue
            offers = []
            for new, score in live[g]:
                own = log_softmax(model([[*prompt, *new]]).logits[0, -1])
                own = apply_rules(own, [*prompt, *new], settings, made, eos, n)
                offers += [((*new, t), score + own[t] - diversity * taken[t]) for t in range(len(own))]
            offers = [offer for offer in sorted(offers, key=lambda offer: -offer[1]) if np.isfinite(offer[1])]
            offers = offers[: max(2, 1 + len(eos)) * each]
            ends = [new[-1] in eos or made + 1 == n for new, _ in offers]
            ended = [offer for offer, end in zip(offers[:each], ends[:each], strict=True) if end]
            done[g] += [(new, score / len(new) ** penalty) for new, score in ended]
            done[g] = sorted(done[g], key=lambda text: -text[1])[:each]
            live[g] = [offer for offer, end in zip(offers, ends, strict=True) if not end][:each]
            taken.update(new[-1] for new, _ in live[g] or offers[:each] if new[-1] not in eos)
            if not live[g]:
                open_[g] = False
            elif len(done[g]) == each:
                length = n if early == "never" and penalty > 0 else made + 1
                better = live[g][0][1] / length**penalty > done[g][-1][1]
                open_[g] = early is not True and better
    return sorted((text for group in done for text in group), key=lambda text: -text[1])


CASES = [
    {"size": 2},
    {"size": 5, "early": True},
    {"size": 3, "early": "never", "penalty": 2.0},
    {"size": 3, "penalty": 0.0},
    {"size": 4, "penalty": -0.5, "early": "never"},
    {"size": 3, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {"size": 2, "min_new_tokens": 5},
    {"size": 4, "groups": 2, "diversity": 0.7},
    {"size": 6, "groups": 3, "diversity": 2.0, "early": True},
    {"size": 4, "groups": 4, "diversity": 5.0, "penalty": 0.5},
    {"size": 6, "groups": 2, "diversity": 0.3, "suppress_tokens": [1, 2, 3]},
]
NAMES = {"size": "num_beams", "groups": "num_beam_groups", "diversity": "diversity_penalty", "early": "early_stopping",
         "penalty": "length_penalty"}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_every_row_of_a_batch_is_what_a_twin_without_a_cache_finds(case, seed):
    model = model_of(seed)
    prompts = [random_ids(model.config, n, seed=10 * seed + n).tolist() for n in (3, 6, 1)]
    eos = (1, 5, 9)
    settings = {NAMES.get(name, name): value for name, value in case.items()}
    size = case["size"]
    out = generate(
        model, prompts, max_new_tokens=8, eos_token_id=eos, pad_token_id=0, num_return_sequences=size,
        return_dict=True, **settings,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        expected = twin(model, prompt, 8, eos=eos, **case)
        for place, (new, score) in enumerate(expected):
            mine = out.sequences[row * size + place, 6:].tolist()
            assert mine == [*new, *[0] * (len(mine) - len(new))]
            assert out.sequences_scores[row * size + place] == pytest.approx(score, rel=1e-12)


def test_groups_write_more_different_texts_than_plain_beams():
    prompt = random_ids(MODEL.config, 1, 4)
    settings = {"num_beams": 6, "num_return_sequences": 6, "max_new_tokens": 6, "eos_token_id": ()}
    plain = generate(MODEL, prompt, **settings)
    groups = generate(MODEL, prompt, num_beam_groups=3, diversity_penalty=10.0, **settings)
    assert len({row[4] for row in groups.tolist()}) >= 3 > 0
    assert len({tuple(row[4:6]) for row in groups.tolist()}) >= len({tuple(row[4:6]) for row in plain.tolist()})


def test_one_beam_is_greedy_and_beams_score_at_least_as_well():
    prompt = random_ids(MODEL.config, 1, 4)
    settings = {"max_new_tokens": 8, "eos_token_id": (), "return_dict": True}
    greedy = generate(MODEL, prompt, **settings)
    beams = generate(MODEL, prompt, num_beams=5, **settings)
    assert beams.sequences_scores[0] * 8 == pytest.approx(beams.log_probs.sum(), rel=1e-12)
    assert beams.log_probs.sum() >= greedy.log_probs.sum()


def test_a_small_vocabulary_or_harsh_rules_leave_fewer_beams_but_no_nonsense():
    model = model_of(vocab_size=3, bos_token_id=None, eos_token_id=None)
    out = generate(model, [[0, 1]], num_beams=5, num_return_sequences=4, max_new_tokens=2, pad_token_id=0)
    assert len({tuple(row) for row in out.tolist()}) == 4
    with pytest.raises(GenerationError, match="beam search found 3 different texts for prompt 0, expected"):
        generate(model, [[0, 1]], num_beams=5, num_return_sequences=4, max_new_tokens=1, pad_token_id=0)
    with pytest.raises(GenerationError, match="every token of row 1 is banned at new token 1"):
        generate(model, [[0], [0, 1]], num_beams=2, max_new_tokens=3, no_repeat_ngram_size=1, pad_token_id=0)


# -- by chance -----------------------------------------------------------------------------------------------


def test_drawn_beams_are_the_same_for_the_same_seed_alone_and_in_a_batch():
    ids = random_ids(MODEL.config, 3, 4)
    settings = {"num_beams": 3, "do_sample": True, "temperature": 1.5, "seed": 5, "max_new_tokens": 7}
    out = generate(MODEL, ids, **settings)
    assert generate(MODEL, ids, **settings).tolist() == out.tolist()
    part = generate(MODEL, ids[:2], **settings)
    assert part.tolist() == out[:2, : part.shape[1]].tolist()
    assert generate(MODEL, ids, **(settings | {"seed": 6})).tolist() != out.tolist()
    # With next to no temperature the draws are the best.
    cold = generate(MODEL, ids, **(settings | {"temperature": 1e-4, "eos_token_id": ()}))
    assert cold.shape == (3, 11)


def test_drawn_beams_go_on_the_same_when_those_before_them_have_ended():
    def ends_at_once_after_4(ids, scores):
        return np.where((ids[:, :1] == 4) == (np.arange(37) == 9), scores, -np.inf)

    settings = {"num_beams": 3, "do_sample": True, "seed": 5, "max_new_tokens": 9, "eos_token_id": 9, "pad_token_id": 0}
    texts = {}
    for first in (4, 5):
        out = generate(
            MODEL, [[first], [1, 2, 3]], **settings, logits_processors=[ends_at_once_after_4], return_dict=True
        )
        assert out.new_tokens == (1 if first == 4 else 9, 9)
        texts[first] = out.sequences[1].tolist()
    assert texts[4] == texts[5]


def successive(weights: np.ndarray) -> dict[tuple[int, int], float]:
    """The chances of the first two that are drawn one after the other without putting back."""
    p = weights / weights.sum()
    return {(a, b): p[a] * p[b] / (1 - p[a]) for a in range(len(p)) for b in range(len(p)) if a != b}


def test_continuations_are_drawn_from_all_beams_together_in_proportion():
    # Two beams of three tokens each: the merged draws must be those of drawing from all six without putting back.
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 1.5, (2, 3))
    own = np.stack([log_softmax(row) for row in logits])
    running = np.array([-1.0, -1.7])
    expected = successive(np.exp(running[:, None] + own).reshape(-1))
    counts: Counter[tuple[int, int]] = Counter()
    n = 3000
    for seed in range(n):
        settings = {"do_sample": True, "num_beams": 2, "seed": seed, "eos_token_id": ()}
        plan = prepare(MODEL.config, [[2]], settings=settings)
        search = BeamSearch(plan)
        rows = []
        for row in range(2):
            numbers = uniforms(seed, [row], range(search.keep, 2 * search.keep), BEAM_DRAW)[0]
            ids, masses = draw_several(softmax(own[row]), numbers)
            rows.append((ids, own[row][ids], own[row][ids], masses, 0.0))
        found = Candidates(*(np.stack(part) for part in zip(*rows, strict=True)))
        pool = Pool(0, 0, 2, [Beam(row, (row,), running[row]) for row in range(2)])
        offers = search._draw(pool, found)
        assert len({(beam.row, beam.ids[-1]) for beam in offers}) == len(offers) == 4
        counts[tuple(3 * beam.row + beam.ids[-1] for beam in offers[:2])] += 1
    chi = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in expected.items())
    assert chi < 58.3  # chance of more: 0.001 at 29 degrees of freedom


def test_the_first_texts_of_drawn_beams_have_the_models_distribution():
    model = model_of(vocab_size=4, bos_token_id=None, eos_token_id=None)
    prompt = [1, 2]
    p = np.exp(log_softmax(model([prompt]).logits[0, -1]))
    pairs = {}
    for (a, b), chance in successive(p).items():
        key = (min(a, b), max(a, b))
        pairs[key] = pairs.get(key, 0) + chance
    # All prompts of a batch draw by numbers of their own.
    n = 1500
    out = generate(model, [prompt] * n, num_beams=2, num_return_sequences=2, do_sample=True, seed=1, max_new_tokens=1,
                   pad_token_id=0)  # fmt: skip
    found = Counter(tuple(sorted(pair)) for pair in out[:, -1].reshape(n, 2).tolist())
    chi = sum((found[pair] - n * chance) ** 2 / (n * chance) for pair, chance in pairs.items())
    assert chi < 20.5  # chance of more: 0.001 at 5 degrees of freedom
