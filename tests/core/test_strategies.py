"""The searches over the reference model: each against a slow twin that knows no cache, and what costs nothing twice."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core import strategies
from gpt2_core.errors import GenerationError, InputError
from gpt2_core.generation import GenerationOutput, Run, generate
from gpt2_core.plan import prepare
from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig, apply_rules, best, draw, log_softmax, softmax
from gpt2_core.uniforms import uniforms
from models import ordinary_parameters, random_ids, small_config


def model_of(seed: int = 0, **changes) -> ReferenceModel:
    config = small_config(**({"n_positions": 40} | changes))
    return ReferenceModel(config, ordinary_parameters(config, "lm", seed))


MODEL = model_of()
ENDLESS = {"eos_token_id": ()}
SAMPLED = {"do_sample": True, "seed": 3, "temperature": 1.5}


class Watched:
    """The reference model, and the shapes that it was run on."""

    def __init__(self, monkeypatch, model=MODEL):
        self.model, self.shapes = model, []
        real = ReferenceModel.__call__

        def call(model, ids, *rest, **named):
            self.shapes.append(tuple(np.shape(ids)))
            return real(model, ids, *rest, **named)

        monkeypatch.setattr(ReferenceModel, "__call__", call)


# -- contrastive search --------------------------------------------------------------------------------------


def contrastive(model, prompt, n, k, alpha, **rules):
    """The paper's section 3.2, without a cache."""
    settings = GenerationConfig(**rules)
    text = list(prompt)
    for made in range(n):
        logits = model([text]).logits[0, -1]
        probabilities = softmax(apply_rules(logits, text, settings, made))
        values = []
        for token in best(probabilities, k):
            hidden = model([[*text, int(token)]], output_hidden_states=True).hidden_states[-1][0]
            unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
            values.append((1 - alpha) * probabilities[token] - alpha * (unit[:-1] @ unit[-1]).max())
        text.append(int(best(probabilities, k)[int(np.argmax(values))]))
    return text


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.1, 3), (1.0, 9), (0.6, 99)])
def test_contrastive_search_is_the_papers(alpha, k):
    prompt = random_ids(MODEL.config, 5).tolist()
    out = generate(MODEL, [prompt], max_new_tokens=8, penalty_alpha=alpha, top_k=k, **ENDLESS)
    assert out.tolist() == [contrastive(MODEL, prompt, 8, min(k, 37), alpha)]


def test_contrastive_search_obeys_the_rules_and_differs_from_greedy():
    prompt = random_ids(MODEL.config, 5).tolist()
    rules = {"repetition_penalty": 1.3, "suppress_tokens": [3, 4]}
    out = generate(MODEL, [prompt], max_new_tokens=8, penalty_alpha=0.6, top_k=5, **ENDLESS, **rules)
    assert out.tolist() == [contrastive(MODEL, prompt, 8, 5, 0.6, **rules)]
    assert out.tolist() != generate(MODEL, [prompt], max_new_tokens=8, **ENDLESS, **rules).tolist()


def test_a_row_of_a_contrastive_batch_is_the_text_it_would_be_alone():
    prompts = [random_ids(MODEL.config, n, seed=n).tolist() for n in (2, 7, 4)]
    settings = {
        "max_new_tokens": 9,
        "penalty_alpha": 0.5,
        "top_k": 4,
        "eos_token_id": [5, 6, 7, 8, 9],
        "pad_token_id": 0,
    }
    out = generate(MODEL, prompts, **settings)
    for row, prompt in zip(out, prompts, strict=True):
        alone = generate(MODEL, [prompt], **settings)[0, len(prompt) :].tolist()
        assert row[7:].tolist() == alone + [0] * (len(row) - 7 - len(alone))


# -- what is read once ---------------------------------------------------------------------------------------


def test_equal_prompts_are_read_once(monkeypatch):
    watched = Watched(monkeypatch)
    prompt, other = random_ids(MODEL.config, 2, 6).tolist()
    generate(MODEL, [prompt, other, prompt], max_new_tokens=2, **ENDLESS)
    assert watched.shapes == [(2, 6), (3, 1)]


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 3}], ids=str)
def test_a_beginning_that_prompts_share_is_read_once(monkeypatch, settings):
    beginning = random_ids(MODEL.config, 17).tolist()
    prompts = [beginning + random_ids(MODEL.config, n, seed=n).tolist() for n in (2, 1, 5)]
    alone = [generate(MODEL, prompts[:i], max_new_tokens=4, **ENDLESS, **settings)[-1, -4:].tolist() for i in (1, 2, 3)]
    watched = Watched(monkeypatch)
    out = generate(MODEL, prompts, max_new_tokens=4, **ENDLESS, **settings)
    assert watched.shapes[:2] == [(1, 17), (3, 5)]
    assert out[:, -4:].tolist() == alone
    monkeypatch.setattr(strategies, "_SHARED_TOKENS", 10**9)
    assert generate(MODEL, prompts, max_new_tokens=4, **ENDLESS, **settings).tolist() == out.tolist()


def test_a_prompt_that_is_the_beginning_of_another_keeps_a_token_to_read(monkeypatch):
    text = random_ids(MODEL.config, 36).tolist()
    watched = Watched(monkeypatch)
    out = generate(MODEL, [text[:34], text], max_new_tokens=2, **ENDLESS)
    assert watched.shapes[:2] == [(1, 33), (2, 3)]
    assert out[0, -2:].tolist() == generate(MODEL, [text[:34]], max_new_tokens=2, **ENDLESS)[0, -2:].tolist()


@pytest.mark.parametrize("settings", [{}, SAMPLED, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_past_of_the_beginning_spares_reading_it(monkeypatch, rows, settings):
    beginning = random_ids(MODEL.config, rows, 6).tolist()
    prompts = [beginning[i % rows] + random_ids(MODEL.config, n, seed=n).tolist() for i, n in enumerate((3, 1))]
    expected = generate(MODEL, prompts, max_new_tokens=5, **ENDLESS, **settings)
    past = MODEL(beginning, use_cache=True).past
    watched = Watched(monkeypatch)
    out = generate(MODEL, prompts, past=past, max_new_tokens=5, **ENDLESS, **settings)
    assert out.tolist() == expected.tolist()
    assert watched.shapes[0] == (2, 3)


def test_a_past_that_is_no_beginning_of_the_prompts_is_refused():
    past = MODEL(random_ids(MODEL.config, 1, 4), use_cache=True).past
    with pytest.raises(InputError, match=r"past holds 4 tokens, but the shortest prompt has 4; .* at least one token"):
        generate(MODEL, [[1, 2, 3, 4]], past=past)
    past = MODEL(random_ids(MODEL.config, 2, 4), use_cache=True).past
    with pytest.raises(InputError, match=r"past has 2 rows, expected 1 .* or 3 \(one for each\)"):
        generate(MODEL, random_ids(MODEL.config, 3, 6), past=past)
    with pytest.raises(InputError, match="past has 1 layers, expected 2"):
        generate(MODEL, random_ids(MODEL.config, 2, 6), past=past[:1])
    with pytest.raises(GenerationError, match="penalty_alpha compares with the hidden states of the whole text"):
        generate(MODEL, random_ids(MODEL.config, 2, 6), past=past, penalty_alpha=0.6, top_k=4)


# -- rows that end -------------------------------------------------------------------------------------------


def test_rows_that_ended_stop_costing(monkeypatch):
    ids = random_ids(MODEL.config, 9, 4)
    settings = {"eos_token_id": list(range(8)), "pad_token_id": 0, "max_new_tokens": 16, **SAMPLED}
    watched = Watched(monkeypatch)
    out = generate(MODEL, ids, **settings, return_dict=True)
    lengths = np.array(out.new_tokens)
    assert lengths.tolist() == (out.log_probs != 0).sum(axis=1).tolist()
    rows = [shape[0] for shape in watched.shapes[1:]]
    going = [int((lengths > i).sum()) for i in range(1, lengths.max())]
    assert len(set(lengths.tolist())) > 4
    assert rows == sorted(rows, reverse=True)
    # Those that have ended are dropped as soon as they are one in eight.
    assert all((n - left) / n < 1 / 8 for n, left in zip(rows, going, strict=True))


def test_columns_that_only_rows_that_ended_had_are_dropped(monkeypatch):
    ids, mask = random_ids(MODEL.config, 2, 20), np.ones((2, 20), np.int64)
    mask[1, :15] = 0
    first = int(generate(MODEL, ids[:1], max_new_tokens=1)[0, -1])
    widths = []
    real = ReferenceModel.__call__

    def call(model, ids, past=None, mask=None, **named):
        widths.append((past[0][0].shape[2] if past else 0) + np.shape(ids)[1])
        return real(model, ids, past, mask, **named)

    expected = generate(MODEL, ids[1:, 15:], max_new_tokens=6, eos_token_id=first).tolist()[0][5:]
    monkeypatch.setattr(ReferenceModel, "__call__", call)
    out = generate(MODEL, ids, mask, max_new_tokens=6, eos_token_id=first)
    assert out[1, 20:].tolist() == expected
    assert widths[:3] == [20, 6, 7]


# -- texts longer than the model -----------------------------------------------------------------------------


def slid(model, prompt, n, window, pick):
    """A text of any length, each token from the model run on the last ones alone."""
    text, P = list(prompt), model.config.n_positions
    for made in range(n):
        start = 0
        while len(text) - start > P:
            start += P - window
        text.append(pick(model([text[start:]]).logits[0, -1], text, made))
    return text


@pytest.mark.parametrize("window", [True, 1, 5, 15])
@pytest.mark.parametrize("length", [3, 16, 45])
def test_a_sliding_window_reads_the_last_tokens_by_strides(window, length):
    model = model_of(n_positions=16)
    prompt = random_ids(model.config, length).tolist()
    out = generate(model, [prompt], max_new_tokens=30, sliding_window=window, **ENDLESS)
    size = 8 if window is True else window
    assert out.tolist() == [slid(model, prompt, 30, size, lambda logits, *_: int(logits.argmax()))]
    numbers = uniforms(3, [0], range(30))[0]
    settings = GenerationConfig(**SAMPLED, repetition_penalty=1.2)

    def drawn(logits, text, made):
        return draw(softmax(apply_rules(logits, text, settings, made)), numbers[made])

    out = generate(model, [prompt], max_new_tokens=30, sliding_window=window, **ENDLESS, generation_config=settings)
    assert out.tolist() == [slid(model, prompt, 30, size, drawn)]


@pytest.mark.parametrize("settings", [{}, {"penalty_alpha": 0.5, "top_k": 3}, {"num_beams": 3}, SAMPLED], ids=str)
def test_rows_slide_one_by_one_and_each_is_what_it_would_be_alone(settings):
    model = model_of(n_positions=16)
    prompts = [random_ids(model.config, n, seed=n).tolist() for n in (2, 14, 9, 40)]
    settings = settings | {"max_new_tokens": 17, "sliding_window": 6, "eos_token_id": [3, 4], "pad_token_id": 0}
    out = generate(model, prompts, **settings)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [*prompts[:i], prompt], **settings)[-1]
        alone = alone[max(len(each) for each in prompts[: i + 1]) :].tolist()
        assert out[i, 40:].tolist() == alone + [0] * (out.shape[1] - 40 - len(alone))


def test_a_text_that_is_continued_goes_on_as_if_it_had_been_written_at_once():
    model = model_of(n_positions=16)
    settings = {"sliding_window": 6, **ENDLESS}
    whole = generate(model, [[5, 6, 7]], max_new_tokens=40, **settings)
    part = generate(model, [[5, 6, 7]], max_new_tokens=19, **settings)
    assert generate(model, part, max_new_tokens=21, **settings).tolist() == whole.tolist()


def test_the_window_of_a_plan_holds_what_fits_and_at_least_what_was_asked_for():
    config = small_config(n_positions=16)
    for window in (1, 6, 8, 15):
        plan = prepare(config, [[1]], settings={"sliding_window": window})
        for length in range(1, 100):
            start = plan.window_start(length)
            assert length - start <= 16
            assert start == 0 or length - start > window
            assert start % (16 - window) == 0


# -- what comes back -----------------------------------------------------------------------------------------


def test_the_output_holds_reasons_log_probabilities_and_scores():
    ids = random_ids(MODEL.config, 3, 4)
    settings = {"eos_token_id": [2, 3, 5, 8, 13], "pad_token_id": 0, "max_new_tokens": 7, "top_k": 9, **SAMPLED}
    plain = generate(MODEL, ids, **settings)
    out = generate(MODEL, ids, **settings, return_dict=True, output_scores=True)
    assert isinstance(out, GenerationOutput)
    assert out.sequences.tolist() == plain.tolist()
    assert set(out.finish_reasons) == {"end", "length"}
    assert out.keys() == ("sequences", "finish_reasons", "log_probs", "scores", "new_tokens")
    assert len(out.scores) == plain.shape[1] - 4
    config = GenerationConfig(**settings)
    for row in range(3):
        for i in range(plain.shape[1] - 4):
            text = plain[row, : 4 + i].tolist()
            if set(text[4:]) & {2, 3, 5, 8, 13}:
                assert out.log_probs[row, i] == 0
                continue
            logits = MODEL([text]).logits[0, -1]
            np.testing.assert_allclose(out.log_probs[row, i], log_softmax(logits)[plain[row, 4 + i]], rtol=1e-12)
            np.testing.assert_allclose(out.scores[i][row], apply_rules(logits, text, config, i), rtol=1e-12)
    assert out.finish_reasons == tuple(
        "end" if set(row) & {2, 3, 5, 8, 13} else "length" for row in plain[:, 4:].tolist()
    )


def test_best_of_returns_the_likeliest_of_those_that_are_drawn():
    ids = random_ids(MODEL.config, 2, 4)
    settings = {"eos_token_id": [2, 3, 5, 8, 13], "pad_token_id": 0, "max_new_tokens": 7, **SAMPLED}
    every = generate(MODEL, ids, **settings, num_return_sequences=6, return_dict=True)
    for penalty in (1.0, 0.0, 2.5):
        out = generate(
            MODEL, ids, **settings, best_of=6, num_return_sequences=2, length_penalty=penalty, return_dict=True
        )
        for prompt in range(2):
            rows = range(6 * prompt, 6 * prompt + 6)
            counts = (every.log_probs != 0).sum(axis=1)
            scores = {row: every.log_probs[row].sum() / counts[row] ** penalty for row in rows}
            ranked = sorted(rows, key=lambda row: -scores[row])
            for place in range(2):
                row, mine = ranked[place], 2 * prompt + place
                new = out.sequences[mine, 4:].tolist()
                assert every.sequences[row, 4 : 4 + len(new)].tolist() == new
                assert out.sequences_scores[mine] == pytest.approx(scores[row], rel=1e-12)
    plain = generate(MODEL, ids, **settings, best_of=6)
    assert plain.shape[0] == 2


def test_forced_tokens_and_processors_reach_every_search():
    def only_even(ids, scores):
        assert (ids >= 0).all()
        return np.where(np.arange(37) % 2 == 0, scores, -np.inf)

    prompts = [random_ids(MODEL.config, n, seed=n).tolist() for n in (2, 5)]
    forced = {"forced_bos_token_id": 8, "forced_tokens": {2: 10}, "forced_eos_token_id": 12, "max_new_tokens": 6}
    searches = [{}, SAMPLED, {"num_beams": 3}, {"num_beams": 3, **SAMPLED}, {"penalty_alpha": 0.5, "top_k": 3}]
    searches += [{"prompt_lookup_num_tokens": 2}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}]
    for search in searches:
        out = generate(MODEL, prompts, logits_processors=[only_even], **forced, **search)[:, 5:].tolist()
        for row in out:
            assert (row[0], row[2], row[-1]) == (8, 10, 12), search
            assert all(token % 2 == 0 for token in row), search


def test_a_time_limit_ends_all_texts_with_a_token_each(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("gpt2_core.texts.time.monotonic", lambda: next(now))
    out = generate(MODEL, random_ids(MODEL.config, 2, 4), max_new_tokens=20, max_time=3, return_dict=True, **ENDLESS)
    assert out.sequences.shape == (2, 4 + 3)
    assert out.finish_reasons == ("time", "time")
    for search in ({"num_beams": 3}, {"penalty_alpha": 0.5, "top_k": 3}, {"prompt_lookup_num_tokens": 2}):
        out = generate(MODEL, [[1, 2, 3]], max_new_tokens=20, max_time=1e-3, return_dict=True, **ENDLESS, **search)
        assert (out.sequences.shape, out.finish_reasons) == ((1, 4), ("time",)), search


def test_what_is_passed_on_step_by_step_is_the_result():
    prompts = [random_ids(MODEL.config, n, seed=n).tolist() for n in (2, 5, 4)]
    settings = {"eos_token_id": [2, 3, 5, 8, 13], "pad_token_id": 0, "max_new_tokens": 12}
    for search in ({}, SAMPLED, {"penalty_alpha": 0.5, "top_k": 3}, {"prompt_lookup_num_tokens": 3}):
        columns = []
        out = generate(MODEL, prompts, on_token=columns.append, **settings, **search)
        assert np.stack(columns, axis=1).tolist() == out[:, 5:].tolist(), search


def test_texts_that_are_known_only_at_the_end_cannot_be_listened_to():
    for search, name in (({"num_beams": 2}, "num_beams"), ({"do_sample": True, "best_of": 2}, "best_of")):
        with pytest.raises(GenerationError, match=f"on_token passes tokens on .* but with {name}"):
            generate(MODEL, [[1]], on_token=print, **search)


def test_a_run_checks_before_it_computes(monkeypatch):
    monkeypatch.setattr(ReferenceModel, "__call__", lambda *_, **__: pytest.fail("the model ran"))
    for arguments, words in (
        ({"logits_processors": lambda ids, scores: scores}, "logits_processors is a function, expected a list"),
        ({"logits_processors": [3]}, "logits_processors holds a int, expected functions"),
        ({"settings": {"stop_strings": "."}}, "needs the tokenizer"),
        ({"settings": {"num_assistant_tokens": 3}}, "num_assistant_tokens=3 has no effect without assistant_model"),
    ):
        with pytest.raises(GenerationError, match=words):
            Run(MODEL, [[1]], **arguments)
    with pytest.raises(GenerationError, match=r"streamer is a list, expected an object with put\(ids\) and end\(\)"):
        generate(MODEL, [[1]], streamer=[])
