"""Generation over the reference model: the plan, the loop, and that a text depends on nothing but its own key."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.config import GPT2Config
from gpt2_core.errors import GenerationError, InputError
from gpt2_core.generation import generate, left_padded, prepare
from gpt2_core.parameters import parameter_table
from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig, apply_rules, draw, softmax
from gpt2_core.uniforms import uniforms

CONFIG = GPT2Config(
    vocab_size=23,
    n_positions=24,
    n_embd=8,
    n_layer=2,
    n_head=2,
    bos_token_id=1,
    eos_token_id=1,
    tie_word_embeddings=False,
)


def model_of(config: GPT2Config = CONFIG, head: str = "lm", seed: int = 0) -> ReferenceModel:
    generator = np.random.default_rng(seed)
    values = {row.name: generator.normal(0, 0.5, row.shape) for row in parameter_table(config, head)}
    return ReferenceModel(config, values, head)


MODEL = model_of()
ENDLESS = {"eos_token_id": ()}
SAMPLED = {"do_sample": True, "seed": 11, "top_k": 12, "temperature": 1.3}


def texts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, 23, n).tolist() for n in lengths]


def padded(texts: list[list[int]], side: str = "left", pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, texts))
    ids, mask = np.full((len(texts), width), pad), np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        at = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, at], mask[row, at] = text, 1
    return ids, mask


def ends_after(model: ReferenceModel, prompt: list[int], n: int) -> int:
    """A token that, as end-of-text, ends the greedy text after ``n`` new tokens."""
    new = generate(model, [prompt], max_new_tokens=20, **ENDLESS)[0, len(prompt) :].tolist()
    token = new[n - 1]
    assert token not in new[: n - 1]
    return token


# -- the loop ------------------------------------------------------------------------------------------------


def test_greedy_text_is_the_likeliest_token_again_and_again():
    (prompt,) = texts_of(4)
    text = list(prompt)
    for _ in range(10):
        text.append(int(MODEL([text]).logits[0, -1].argmax()))
    assert generate(MODEL, [prompt], max_new_tokens=10, **ENDLESS).tolist() == [text]


def test_sampled_text_is_the_rules_and_the_draw_without_a_cache():
    (prompt,) = texts_of(3)
    settings = GenerationConfig(**SAMPLED, top_p=0.9, repetition_penalty=1.4, max_new_tokens=12, eos_token_id=[])
    text, numbers = list(prompt), uniforms(11, [0], range(12))[0]
    for step in range(12):
        scores = apply_rules(MODEL([text]).logits[0, -1], text, settings, step)
        text.append(draw(softmax(scores), numbers[step]))
    assert generate(MODEL, [prompt], generation_config=settings).tolist() == [text]
    assert MODEL.generate([prompt], generation_config=settings).tolist() == [text]


def test_the_same_seed_writes_the_same_text_and_another_one_another():
    prompts = texts_of(4)
    once = generate(MODEL, prompts, **SAMPLED)
    assert np.array_equal(generate(MODEL, prompts, **SAMPLED), once)
    assert not np.array_equal(generate(MODEL, prompts, **{**SAMPLED, "seed": 12}), once)
    fresh = [generate(MODEL, prompts, do_sample=True, **ENDLESS).tolist() for _ in range(3)]
    assert fresh[0] != fresh[1] or fresh[1] != fresh[2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_ragged_batch_is_the_text_it_would_be_alone(side):
    texts = texts_of(3, 7, 1, 5)
    ids, mask = padded(texts, side, pad=6)  # padded with a token the model likes, which must not count as repeated
    for settings in ({}, SAMPLED, {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}):
        out = generate(MODEL, ids, mask, max_new_tokens=9, **ENDLESS, **settings)
        assert out.shape == (4, 16)
        for row, text in enumerate(texts):
            assert out[row, 7 - len(text) : 7].tolist() == text  # padding comes back on the left
            if not settings.get("do_sample"):
                alone = generate(MODEL, [text], max_new_tokens=9, **ENDLESS, **settings)
                assert out[row, 7:].tolist() == alone[0, len(text) :].tolist()
    whole = generate(MODEL, ids, mask, max_new_tokens=9, **ENDLESS, **SAMPLED)
    for rows in ([0], [0, 1], [0, 1, 2]):  # a row's draws are keyed by its place in the batch
        part = generate(MODEL, ids[rows], mask[rows], max_new_tokens=9, **ENDLESS, **SAMPLED)
        assert np.array_equal(part, whole[rows])


def test_rows_before_and_after_do_not_change_a_row():
    ids, mask = padded(texts_of(4, 4, 4))
    other = ids.copy()
    other[0], other[2] = texts_of(4, 4, seed=8)
    one, two = generate(MODEL, ids, mask, **SAMPLED), generate(MODEL, other, mask, **SAMPLED)
    width = min(one.shape[1], two.shape[1])
    assert np.array_equal(one[1, :width], two[1, :width])


def test_several_texts_of_each_prompt_are_keyed_one_after_the_other():
    prompts = texts_of(3, 3)
    out = generate(MODEL, prompts, **SAMPLED, num_return_sequences=3, max_new_tokens=6, **ENDLESS)
    assert out.shape == (6, 9)
    assert [row[:3] for row in out.tolist()] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert len({tuple(row[3:]) for row in out.tolist()[:3]}) > 1
    repeated = generate(MODEL, [p for p in prompts for _ in range(3)], **SAMPLED, max_new_tokens=6, **ENDLESS)
    assert np.array_equal(out, repeated)


# -- where texts end -----------------------------------------------------------------------------------------


def test_a_text_ends_with_its_end_of_text_token_and_the_loop_stops():
    (prompt,) = texts_of(4)
    token = ends_after(MODEL, prompt, 5)
    calls = []
    out = generate(MODEL, [prompt], max_new_tokens=20, eos_token_id=token, on_token=calls.append)
    assert out.shape == (1, 9)
    assert out[0, -1] == token
    assert len(calls) == 5


def test_ended_rows_go_on_with_the_pad_token_until_all_have_ended():
    ids, mask = padded([*texts_of(4), *texts_of(6, seed=5)])
    token = ends_after(MODEL, ids[0, 2:].tolist(), 5)
    endless = generate(MODEL, ids, mask, max_new_tokens=11, **ENDLESS)
    assert token not in endless[1, 6:]
    out = generate(MODEL, ids, mask, max_new_tokens=11, eos_token_id=[token, 22], pad_token_id=5)
    assert out[0, 6:].tolist() == [*endless[0, 6:11].tolist(), *[5] * 6]
    assert out[1].tolist() == endless[1].tolist()
    # Without a pad token the first end-of-text token serves; the model's own pad token comes before it.
    assert generate(MODEL, ids, mask, max_new_tokens=11, eos_token_id=token)[0, 11:].tolist() == [token] * 6
    padding = ReferenceModel(CONFIG.replace(pad_token_id=9), MODEL.parameters)
    assert generate(padding, ids, mask, max_new_tokens=11, eos_token_id=token)[0, 11:].tolist() == [9] * 6


def test_the_models_own_end_of_text_tokens_serve_where_none_are_given():
    (prompt,) = texts_of(4)
    token = ends_after(MODEL, prompt, 5)
    several = ReferenceModel(CONFIG.replace(eos_token_id=[token, 22]), MODEL.parameters)
    assert generate(several, [prompt], max_new_tokens=20).shape == (1, 9)
    assert generate(several, [prompt], max_new_tokens=20, eos_token_id=[]).shape == (1, 24)
    # One outside a small vocabulary just never comes up.
    outside = ReferenceModel(CONFIG.replace(eos_token_id=50256), MODEL.parameters)
    assert generate(outside, [prompt], max_new_tokens=20, min_new_tokens=3).shape == (1, 24)


def test_a_minimum_of_new_tokens_holds_back_the_end():
    (prompt,) = texts_of(4)
    token = ends_after(MODEL, prompt, 5)
    out = generate(MODEL, [prompt], max_new_tokens=20, min_new_tokens=8, eos_token_id=token)
    assert out.shape[1] >= 4 + 8
    assert token not in out[0, 4:11]


def test_max_length_counts_each_rows_own_prompt():
    texts = texts_of(3, 7)
    ids, mask = padded(texts)
    out = generate(MODEL, ids, mask, max_length=9, eos_token_id=(), pad_token_id=0)
    assert out.shape == (2, 7 + 6)
    for row, text in enumerate(texts):
        alone = generate(MODEL, [text], max_length=9, **ENDLESS)
        assert alone.shape == (1, 9)
        assert out[row, 7 : 7 + 9 - len(text)].tolist() == alone[0, len(text) :].tolist()
    assert (out[1, 9:] == 0).all()


def test_twenty_new_tokens_are_the_default_and_all_positions_can_be_used():
    (prompt,) = texts_of(4)
    assert generate(MODEL, [prompt], **ENDLESS).shape == (1, 24)
    ids, mask = padded(texts_of(1, 23))
    assert generate(MODEL, ids, mask, max_length=24, eos_token_id=(), pad_token_id=0).shape == (2, 23 + 23)
    # Padding takes no positions: a batch may be padded wider than the model is long.
    wide, wide_mask = np.pad(ids[:, -3:], ((0, 0), (40, 0))), np.pad(mask[:, -3:], ((0, 0), (40, 0)))
    assert generate(MODEL, wide, wide_mask, max_new_tokens=21, **ENDLESS).shape == (2, 43 + 21)


def test_each_step_is_reported_as_it_is_made():
    ids, mask = padded(texts_of(2, 4))
    columns: list[np.ndarray] = []
    out = generate(MODEL, ids, mask, max_new_tokens=5, on_token=columns.append, **ENDLESS)
    assert np.array_equal(np.stack(columns, axis=1), out[:, 4:])


def test_what_the_listener_does_to_its_array_does_not_change_the_text():
    def spoil(new: np.ndarray) -> None:
        new[:] = 0

    prompts = texts_of(4)
    expected = generate(MODEL, prompts, max_new_tokens=5, **ENDLESS)
    assert np.array_equal(generate(MODEL, prompts, max_new_tokens=5, on_token=spoil, **ENDLESS), expected)


def test_a_double_heads_model_writes_as_its_language_model_does():
    double = model_of(head="double")
    prompts = texts_of(4)
    assert np.array_equal(generate(double, prompts, **SAMPLED), generate(double.language_model(), prompts, **SAMPLED))
    with pytest.raises(GenerationError, match="head is 'token', expected 'lm' or 'double'"):
        generate(model_of(head="token"), prompts)


# -- the plan ------------------------------------------------------------------------------------------------


def test_padding_moves_to_the_left_and_the_text_keeps_its_order():
    ids = np.array([[1, 2, 0, 0], [0, 0, 3, 4], [0, 5, 0, 6], [7, 8, 9, 1]])
    moved, mask = left_padded(ids, ids != 0)
    assert moved.tolist() == [[0, 0, 1, 2], [0, 0, 3, 4], [0, 0, 5, 6], [7, 8, 9, 1]]
    assert np.array_equal(mask, moved != 0)


def test_the_plan_holds_what_a_framework_needs():
    ids, mask = padded([[2, 3], [4, 5, 6]], "right")
    ids, mask = np.pad(ids, ((0, 0), (0, 2))), np.pad(mask, ((0, 0), (0, 2)))
    settings = {"do_sample": True, "seed": 5, "num_return_sequences": 2, "max_length": 8}
    plan = prepare(CONFIG, ids, mask, None, settings)
    assert plan.ids.tolist() == [[0, 0, 0, 2, 3], [0, 0, 4, 5, 6]]
    assert plan.rows.tolist() == [0, 0, 1, 1]
    assert plan.lengths.tolist() == [2, 2, 3, 3]
    assert plan.limits.tolist() == [6, 6, 5, 5]
    assert plan.steps == 6
    assert plan.eos_ids == (1,)
    assert plan.pad_id == 1
    assert np.array_equal(plan.uniforms, uniforms(5, range(4), range(6)))
    assert plan.prompt_limits.tolist() == [6, 5]
    assert plan.prompt_of(1).tolist() == plan.context(1).tolist() == [4, 5, 6]
    assert (plan.n_positions, plan.window) == (24, None)


def test_a_greedy_plan_has_no_numbers_and_a_sampled_one_says_its_seed():
    assert prepare(CONFIG, [[2]]).uniforms is None
    plan = prepare(CONFIG, [[2]], settings={"do_sample": True})
    assert plan.settings.seed is not None
    assert np.array_equal(plan.uniforms, uniforms(plan.settings.seed, [0], range(20)))


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "words"),
    [
        (([[2, 3], [4]], [[1, 1], [1, 0]]), {}, InputError, "rows of different lengths and attention_mask marks"),
        (([[2, 3], []],), {}, InputError, "row 1 of input_ids is empty, expected at least one token"),
        (([[2, 3], [[4]]],), {}, InputError, "row 1 of input_ids has shape (1, 1), expected 1 axes: (position,)"),
        (([[2, 3], [23]],), {}, InputError, "row 1 of input_ids holds 23"),
        ((["Once", "upon"],), {}, InputError, "input_ids holds text, expected token ids"),
        (("Once",), {}, InputError, "input_ids holds text, expected token ids"),
        (([2, 3],), {}, InputError, "input_ids has shape (2,), expected 2 axes"),
        (([[]],), {}, InputError, "the input is empty"),
        (([[23]],), {}, InputError, "input_ids holds 23, expected ids from 0 to 22"),
        (([[0.5]],), {}, InputError, "input_ids has dtype float64"),
        (([[2, 3]], [[1]]), {}, InputError, "attention_mask has shape (1, 1), expected (1, 2)"),
        (([[2], [3]], [[1], [0]]), {}, InputError, "row 1 of attention_mask marks no real token"),
        (([[2] * 25],), {}, InputError, "25 tokens long but this model has 24 positions"),
        (([[2] * 5],), {}, GenerationError, "25 tokens long, prompt of 5 included, but this model has 24 positions"),
        (([[2] * 5],), {"max_new_tokens": 20}, GenerationError, "at most max_new_tokens=19, or shorten the prompt, or"),
        (([[2] * 5],), {"max_new_tokens": 20}, GenerationError, "or pass sliding_window=True"),
        (([[2] * 5],), {"sliding_window": 24}, GenerationError, "sliding_window=24 leaves no room to write in the 24"),
        (([[2] * 24],), {"max_new_tokens": 1}, GenerationError, "24 positions; shorten the prompt"),
        (([[2] * 5],), {"max_length": 25}, GenerationError, "at most max_new_tokens=19"),
        (([[2] * 5],), {"max_length": 5}, GenerationError, "max_length=5 leaves no room after a prompt of 5 tokens"),
        (([[2] * 5],), {"max_length": 8, "min_new_tokens": 4}, GenerationError, "more than the 3 new tokens"),
        (([[2]],), {"bad_words_ids": [[2, 23]]}, GenerationError, "bad_words_ids names token 23"),
        (([[2]],), {"suppress_tokens": [23]}, GenerationError, "suppress_tokens names token 23"),
        (([[2]],), {"begin_suppress_tokens": [23]}, GenerationError, "begin_suppress_tokens names token 23"),
        (([[2]],), {"forced_bos_token_id": 23}, GenerationError, "forced_bos_token_id names token 23"),
        (([[2]],), {"forced_tokens": {1: 23}}, GenerationError, "forced_tokens names token 23"),
        (([[2]],), {"forced_eos_token_id": 23}, GenerationError, "forced_eos_token_id names token 23"),
        (([[2]],), {"eos_token_id": 23}, GenerationError, "eos_token_id names token 23"),
        (([[2]],), {"pad_token_id": 23}, GenerationError, "pad_token_id names token 23"),
        (([[2]],), {"temperature": 0.5}, GenerationError, "temperature=0.5 has no effect without sampling"),
        (([[2]],), {"tempurature": 0.5}, GenerationError, "did you mean 'temperature'?"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(arguments, settings, error, words, monkeypatch):
    monkeypatch.setattr(ReferenceModel, "__call__", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(error) as caught:
        generate(MODEL, *arguments, **settings)
    assert words in str(caught.value)


def test_texts_of_different_lengths_need_something_to_fill_up_with():
    ids, mask = padded(texts_of(2, 4))
    config = CONFIG.replace(eos_token_id=None)
    with pytest.raises(GenerationError, match="pass pad_token_id"):
        prepare(config, ids, mask, None, {"max_length": 9})
    assert prepare(config, ids, mask, None, {"max_length": 9, "pad_token_id": 3}).pad_id == 3
    assert prepare(config, ids, mask, None, {"max_new_tokens": 9}).steps == 9


def test_rules_that_leave_nothing_and_weights_that_are_no_numbers_are_reported():
    with pytest.raises(GenerationError, match="every token of row 0 is banned at new token 0"):
        generate(MODEL, [[2]], suppress_tokens=range(23))
    with pytest.raises(GenerationError, match="every token of row 0 is banned at new token 1"):
        generate(MODEL, [[2]], suppress_tokens=range(3, 23), no_repeat_ngram_size=1, eos_token_id=0, min_new_tokens=2)
    broken = {name: value.copy() for name, value in MODEL.parameters.items()}
    broken["transformer.ln_f.bias"][0] = np.nan
    with pytest.raises(GenerationError, match="logits of row 0 at new token 0 hold nan"):
        generate(ReferenceModel(CONFIG, broken), [[2]])
