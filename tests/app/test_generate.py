"""`gpt2 generate`: the same text from the same seed, streamed or not, in every framework, and clean ends."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_process import TINY, Run, child, environment

from gpt2_app import backends, generate_settings, terminal, writing
from gpt2_app.backends import Runner
from gpt2_core.checkpoints import Tensor
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import InputError
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import Head
from gpt2_core.pretrained import save_pretrained
from gpt2_core.reference import ReferenceModel
from gpt2_core.sampling import GenerationConfig
from gpt2_core.tokenizer import GPT2Tokenizer

PROMPT = "Once upon a time"
TOKENIZER = GPT2Tokenizer()
# What the command draws by, and the seed of most tests.
STORY = {"do_sample": True, "temperature": generate_settings.TEMPERATURE, "top_k": generate_settings.TOP_K, "seed": 5}
needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def of(model: str, *arguments: object, framework: str = "numpy") -> list[object]:
    """The arguments that generate with a tiny model."""
    return ["generate", "--model", model, "--tokenizer", "gpt2", "--framework", framework, *arguments]


# -- what it writes ------------------------------------------------------------------------------------------


def test_the_text_is_the_librarys_for_the_same_settings(gpt2_json: Run, tiny: str) -> None:
    found = gpt2_json(*of(tiny, PROMPT, "--seed", 5, "-n", 12, "--top-p", 0.9, "--min-p", 0.01, "-t", 1.1))
    settings = {
        "do_sample": True,
        "temperature": 1.1,
        "top_k": generate_settings.TOP_K,
        "top_p": 0.9,
        "min_p": 0.01,
        "seed": 5,
    }
    prompt = TOKENIZER.encode(PROMPT)
    rows = ReferenceModel.from_pretrained(tiny).generate([prompt], max_new_tokens=12, **settings)
    new = rows[0, len(prompt) :].tolist()
    assert found["ids"] == new
    assert found["text"] == TOKENIZER.decode(new)
    assert found["prompt"] == PROMPT
    assert found["prompt_ids"] == prompt
    assert found["settings"] == {"max_new_tokens": 12, **{key: settings[key] for key in settings if key != "seed"}}
    assert (found["seed"], found["model"], found["framework"], found["finish"]) == (5, tiny, "numpy", "length")
    assert found["seconds"] > 0
    assert found["tokens_per_second"] > 0


def test_what_is_streamed_is_the_prompt_and_the_text(gpt2: Run, gpt2_json: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "--seed", 5, "-n", 15)
    text = gpt2_json(*arguments)["text"]
    result = gpt2(*arguments)
    assert result.stdout == PROMPT + text + "\n"
    assert result.stderr == ""
    assert gpt2(*arguments, "--no-prompt").stdout == text + "\n"


@pytest.mark.parametrize(
    "chosen", [["--greedy"], ["--seed", 3], ["--seed", 4, "--repetition-penalty", 1.5, "--top-k", 0]]
)
def test_both_frameworks_write_the_same_text(gpt2_json: Run, tiny: str, chosen: list[object], one_thread: None) -> None:
    ours = [
        gpt2_json(*of(tiny, PROMPT, "-n", 12, *chosen, *extra, framework=framework))
        for framework, extra in (("numpy", []), ("pt", ["--dtype", "float64"]), ("pt", []))
    ]
    assert [found["framework"] for found in ours] == ["numpy", "pt", "pt"]
    assert [found["dtype"] for found in ours] == ["float64", "float64", "float32"]
    assert ours[0]["ids"] == ours[1]["ids"] == ours[2]["ids"]


def test_greedy_text_has_no_seed_and_repeats_itself(gpt2: Run, gpt2_json: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "--greedy", "-n", 8)
    assert gpt2_json(*arguments)["seed"] is None
    result = gpt2(*arguments)
    assert result.stdout == gpt2(*arguments).stdout
    assert result.stderr == ""


def test_a_drawn_seed_is_shown_and_gives_the_text_again(gpt2: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "-n", 10)
    first = gpt2(*arguments)
    word, seed = first.stderr.split()
    assert word == "seed"
    assert gpt2(*arguments, "--seed", seed).stdout == first.stdout
    assert gpt2(*arguments, "--quiet").stderr == ""


def test_each_sample_has_the_next_seed_and_can_be_had_alone(gpt2: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "-n", 6)
    lines = gpt2(*arguments, "--seed", 7, "--samples", 3, "--json").stdout.splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["seed"] for sample in samples] == [7, 8, 9]
    assert len({sample["text"] for sample in samples}) == 3
    alone = json.loads(gpt2(*arguments, "--seed", 8, "--json").stdout)
    assert alone["ids"] == samples[1]["ids"]
    shown = gpt2(*arguments, "--seed", 7, "--samples", 3).stdout
    assert shown == "\n".join(
        f"=== SAMPLE {number} of 3, seed {sample['seed']} ===\n{PROMPT}{sample['text']}\n"
        for number, sample in enumerate(samples, 1)
    )


def test_the_seed_after_the_last_is_the_first() -> None:
    assert writing.seed_of(2**64 - 1, 1) == 0


# -- where the prompt comes from -----------------------------------------------------------------------------


def test_prompts_come_from_an_argument_a_file_or_standard_input(gpt2_json: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(PROMPT.encode() + b"\n")
    chosen = ["--seed", 1, "-n", 2]
    expected = TOKENIZER.encode(PROMPT)
    assert gpt2_json(*of(tiny, PROMPT, *chosen))["prompt_ids"] == expected
    assert gpt2_json(*of(tiny, "--file", tmp_path / "prompt", *chosen))["prompt_ids"] == expected
    assert gpt2_json(*of(tiny, *chosen), input=PROMPT.encode() + b"\r\n")["prompt_ids"] == expected


def test_one_line_feed_at_the_end_of_a_file_is_dropped_and_no_more(gpt2_json: Run, tiny: str) -> None:
    assert gpt2_json(*of(tiny, "--seed", 1, "-n", 1), input=b"a \n\n")["prompt"] == "a \n"
    assert gpt2_json(*of(tiny, "a\n", "--seed", 1, "-n", 1))["prompt"] == "a\n"


def test_an_empty_prompt_begins_with_the_token_between_texts(gpt2_json: Run, tiny: str) -> None:
    assert gpt2_json(*of(tiny, "", "--seed", 1, "-n", 1))["prompt_ids"] == [50256]
    assert gpt2_json(*of(tiny, "--seed", 1, "-n", 1), input=b"")["prompt_ids"] == [50256]


def test_an_empty_prompt_needs_a_token_to_begin_with() -> None:
    config = GPT2Config(bos_token_id=None, eos_token_id=None)
    with pytest.raises(InputError, match="the prompt is empty"):
        writing.prompt_ids(Runner("numpy", config, "cpu", "float64", None, print, list), TOKENIZER, "")


def test_a_models_own_tokenizer_is_used_where_it_has_one(gpt2_json: Run, tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(tiny).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    GPT2Tokenizer(add_prefix_space=True).save_pretrained(folder)
    arguments = ["generate", "Once", "--model", folder, "--framework", "numpy", "-n", 1, "--seed", 1]
    assert gpt2_json(*arguments)["prompt_ids"] == TOKENIZER.encode(" Once")


def test_the_tokenizer_inside_a_file_is_used(gpt2_json: Run, tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    tokenizer = GPT2Tokenizer(add_prefix_space=False)
    tokenizer.add_tokens(["time"])  # no id of its own in the model, but one that shows whose tokenizer it is
    values = {name: Tensor.of(value) for name, value in initial_values(TINY.replace(vocab_size=50258)).items()}
    save_pretrained(folder, TINY.replace(vocab_size=50258), Head.LM, values, architecture="GPT2LMHeadModel")
    tokenizer.save_pretrained(folder)
    with open_source(folder) as source:
        carry_out(plan_conversion(source, tmp_path / "alone", "gguf", verify="tensors"))
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["model.gguf"]
    for model in (tmp_path / "alone", tmp_path / "alone" / "model.gguf"):
        arguments = ["generate", PROMPT, "--model", model, "--framework", "numpy", "-n", 1]
        assert gpt2_json(*arguments)["prompt_ids"] == tokenizer.encode(PROMPT) != TOKENIZER.encode(PROMPT)
    assert gpt2_json(*arguments, "--tokenizer", "gpt2")["prompt_ids"] == TOKENIZER.encode(PROMPT)


# -- how long it gets ----------------------------------------------------------------------------------------


def test_without_a_length_the_text_ends_with_the_window(gpt2_json: Run, tiny: str) -> None:
    room = TINY.n_positions - len(TOKENIZER.encode(PROMPT))
    assert len(gpt2_json(*of(tiny, PROMPT, "--seed", 1))["ids"]) == room < generate_settings.LENGTH
    assert len(gpt2_json(*of(tiny, PROMPT, "--seed", 1, "--length", -1))["ids"]) == room
    assert len(gpt2_json(*of(tiny, PROMPT, "--seed", 1, "--max-new-tokens", 3))["ids"]) == 3


@pytest.mark.parametrize(
    ("prompt", "chosen", "message"),
    [
        (PROMPT, ["-n", "46"], "this model has 48 positions; ask for at most -n 44"),
        ("a " * 60, [], "48 positions"),
        (PROMPT, ["-n", "0"], "-n is 0, expected a whole number of at least 1"),
        (PROMPT, ["-n0"], "-n is 0"),
        (PROMPT, ["--length=0"], "--length is 0"),
        (PROMPT, ["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (PROMPT, ["--top-p", "3"], "--top-p is 3.0"),
        (PROMPT, ["--top-k", "-3"], "--top-k is -3"),
        (PROMPT, ["--min-p", "2"], "--min-p is 2.0"),
        (PROMPT, ["--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
        (PROMPT, ["--temperature", "-1"], "--temperature is -1.0, expected a number above 0 (for the likeliest token "),
        (PROMPT, ["--temperature", "-1"], "every time, use --greedy)"),
        (PROMPT, ["--seed", "-1"], "--seed is -1, expected a whole number"),
        (PROMPT, ["--greedy", "--samples", "2"], "--greedy writes the same text every time"),
        (PROMPT, ["--temperature", "0"], "--greedy"),
        (PROMPT, ["--greedy", "--top-k", "3"], "--top-k cannot change"),
        (PROMPT, ["--stop", ""], "--stop is an empty text"),
        (PROMPT, ["--samples", "0"], "samples"),
        (PROMPT, ["--framework", "tensorbow"], "--framework 'tensorbow' is not known"),
        (PROMPT, ["--dtype", "float8"], "--dtype is 'float8'"),
        (PROMPT, ["--device", "tpu"], "--device is 'tpu'"),
        (PROMPT, ["--file", "x"], "give one of them"),
        (PROMPT, ["--stop", "<|endoftext|>"], "is a special token, which is no text; use --eos 50256"),
        (PROMPT, ["--greedy", "--beams", "2"], "--greedy and --beams choose in two ways"),
        (PROMPT, ["--greedy", "--sample"], "--greedy and --sample choose in two ways"),
        (PROMPT, ["--beams", "2", "--top-p", "0.5"], "--top-p cannot change what --beams takes; leave out one or the"),
        (PROMPT, ["--beams", "2", "--top-p", "0.5"], "or add --sample"),
        (PROMPT, ["--beams", "2", "--samples", "2"], "for several texts use --num-return-sequences"),
        (PROMPT, ["--penalty-alpha", "2"], "--penalty-alpha is 2.0, expected a number above 0 and up to 1"),
        (PROMPT, ["--penalty-alpha", "0.5", "--top-k", "1"], "expected at least 2 candidates to weigh; pass --top-k"),
        (PROMPT, ["--beam-groups", "2"], "--beam-groups 2 has no effect without beams; pass --beams, or leave"),
        (
            PROMPT,
            ["--num-beams", "4", "--num-beam-groups", "3"],
            "--num-beams 4 does not divide into --num-beam-groups",
        ),
        (
            PROMPT,
            ["--best-of", "2", "--num-return-sequences", "3"],
            "--num-return-sequences 3 is more than --best-of 2",
        ),
        (PROMPT, ["--greedy", "--num-return-sequences", "3"], "leave out --greedy, or pass --beams"),
        (PROMPT, ["--early-stopping", "perhaps"], "expected yes, no or never"),
        (PROMPT, ["--sliding-window", "whole"], "expected half, or a whole number"),
        (PROMPT, ["--sliding-window", "48"], "--sliding-window 48 leaves no room to write"),
        (PROMPT, ["-n", "60"], "or use --sliding-window half"),
        (PROMPT, ["--assistant-tokens", "3"], "--assistant-tokens 3 has no effect without --assistant; pass one"),
        (PROMPT, ["--max-matching-ngram", "3"], "--max-matching-ngram 3 has no effect without drafts from the text"),
        (PROMPT, ["--suppress", "50257"], "--suppress names token 50257, expected ids from 0 to 50256"),
        (PROMPT, ["--eos", "-1"], "--eos holds -1"),
        (PROMPT, ["--bad-words", ""], "--bad-words is an empty text"),
        (PROMPT, ["--min-new-tokens", "9", "-n", "3"], "--min-new-tokens 9 is more than -n 3"),
        (PROMPT, ["--max-time", "0"], "--max-time is 0.0, expected a number of seconds above 0"),
        (PROMPT, ["--batch-size", "0"], "batch-size"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_shown(
    gpt2: Run, tiny: str, prompt: str, chosen: list[str], message: str, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = gpt2(*of(tiny, prompt, *chosen))
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


# -- stopping ------------------------------------------------------------------------------------------------


def test_generation_ends_at_the_stop_text(gpt2: Run, gpt2_json: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "--seed", 5, "-n", 30)
    whole = gpt2_json(*arguments)
    stop = whole["text"][20:24]
    found = gpt2_json(*arguments, "--stop", stop, "--stop", "never-there")
    assert found["text"] == whole["text"].partition(stop)[0]
    assert found["finish"] == "stop"
    assert found["ids"] == whole["ids"][: len(found["ids"])]
    assert len(found["ids"]) < 30
    assert gpt2(*arguments, "--stop", stop).stdout == PROMPT + found["text"] + "\n"


def test_an_end_of_text_ends_the_text_and_is_not_shown(gpt2_json: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "--seed", 5, "-n", 30)
    ids = gpt2_json(*arguments)["ids"]
    found = gpt2_json(*arguments, "--eos", ids[4], "--eos", 50256)
    assert (found["ids"], found["finish"]) == (ids[: ids.index(ids[4]) + 1], "end")
    later = gpt2_json(*arguments, "--eos", ids[4], "--min-new-tokens", 30)
    assert (len(later["ids"]), later["finish"]) == (30, "length")


def test_time_ends_a_text(gpt2_json: Run, tiny: str) -> None:
    found = gpt2_json(*of(tiny, PROMPT, "--max-time", 1e-9))
    assert (len(found["ids"]), found["finish"]) == (1, "time")


def test_a_text_may_go_on_beyond_the_window(gpt2_json: Run, tiny: str) -> None:
    for window in ("half", "20"):
        found = gpt2_json(*of(tiny, PROMPT, "--seed", 5, "-n", 60, "--sliding-window", window))
        assert len(found["ids"]) == 60 > TINY.n_positions
    assert found["settings"]["sliding_window"] == 20


def test_the_default_length_is_cut_to_what_fits_only_where_it_must_fit(gpt2_json: Run, tiny: str, monkeypatch) -> None:
    monkeypatch.setattr(generate_settings, "LENGTH", 50)
    arguments = of(tiny, PROMPT, "--seed", 5)
    assert len(gpt2_json(*arguments, "--min-new-tokens", 50)["ids"]) == TINY.n_positions - 4
    assert len(gpt2_json(*arguments, "--sliding-window", "half")["ids"]) == 50


# -- every search --------------------------------------------------------------------------------------------


reference = functools.cache(ReferenceModel.from_pretrained)


def library(tiny: str, prompts: Sequence[str], **settings: Any) -> Any:
    """What the library writes."""
    model = reference(tiny)
    ids = [TOKENIZER.encode(prompt) for prompt in prompts]
    return model.generate(ids, tokenizer=TOKENIZER, return_dict=True, max_new_tokens=6, **settings)


SEARCHES: dict[str, tuple[list[object], dict[str, Any]]] = {
    "beams": (["--beams", 3], {"num_beams": 3}),
    "several beams": (
        ["--num-beams", 3, "--num-return-sequences", 2, "--length-penalty", 0.5, "--early-stopping", "never"],
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": "never"},
    ),
    "groups": (
        ["--beams", 4, "--beam-groups", 2, "--diversity-penalty", 0.7],
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    ),
    "drawn beams": (["--beams", 2, "--sample", "-s", 5], {"num_beams": 2, **STORY}),
    "contrastive": (["--penalty-alpha", 0.6], {"penalty_alpha": 0.6, "top_k": generate_settings.CANDIDATES}),
    "contrastive among few": (["--penalty-alpha", 0.6, "--top-k", 2], {"penalty_alpha": 0.6, "top_k": 2}),
    "best of": (["--best-of", 3, "-s", 5], {"best_of": 3, **STORY}),
    "several": (["--num-return-sequences", 3, "-s", 5], {"num_return_sequences": 3, **STORY}),
    "looked up": (
        ["--greedy", "--prompt-lookup", 4, "--max-matching-ngram", 1],
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
    ),
    "typical": (["--typical-p", 0.5, "-s", 5], {"typical_p": 0.5, **STORY}),
    "ruled": (
        ["--greedy", "--no-repeat-ngram-size", 2, "--suppress", 11, "--suppress", 13, "--begin-suppress", 262],
        {"no_repeat_ngram_size": 2, "suppress_tokens": [11, 13], "begin_suppress_tokens": [262]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES)
def test_every_search_of_the_library_is_an_option_away(gpt2: Run, tiny: str, search: str) -> None:
    options, settings = SEARCHES[search]
    expected = library(tiny, [PROMPT], **settings)
    found = [json.loads(line) for line in gpt2(*of(tiny, PROMPT, "-n", 6, *options), "--json").stdout.splitlines()]
    assert [text["text"] for text in found] == list(expected.texts)
    assert [text["finish"] for text in found] == list(expected.finish_reasons)
    assert [text["row"] for text in found] == list(range(len(found)))
    assert found[0]["settings"] == {
        name: value for name, value in settings.items() if name != "seed"
    } | {"max_new_tokens": 6}  # fmt: skip
    if expected.sequences_scores is None:
        assert "score" not in found[0]
    else:
        assert [text["score"] for text in found] == expected.sequences_scores.tolist()


def test_texts_that_come_together_stand_under_headings(gpt2: Run, tiny: str) -> None:
    one, other = (PROMPT + text for text in library(tiny, [PROMPT], num_return_sequences=2, **STORY).texts)
    shown = gpt2(*of(tiny, PROMPT, "-n", 6, "--num-return-sequences", 2, "-s", 5)).stdout
    assert shown == f"=== TEXT 1 of 2 ===\n{one}\n\n=== TEXT 2 of 2 ===\n{other}\n"
    out = library(tiny, [PROMPT], num_beams=2, num_return_sequences=2)
    shown = gpt2(*of(tiny, PROMPT, "-n", 6, "--beams", 2, "--num-return-sequences", 2, "--no-prompt")).stdout
    assert shown == "\n".join(
        f"=== TEXT {i + 1} of 2, score {out.sequences_scores[i]:.4f} ===\n{out.texts[i]}\n" for i in range(2)
    )
    assert gpt2(*of(tiny, PROMPT, "-n", 6, "--beams", 2)).stdout == f"{PROMPT}{out.texts[0]}\n"


def test_an_assistant_drafts_and_changes_nothing_of_greedy_text(gpt2_json: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "-n", 12, "--greedy")
    found = gpt2_json(*arguments, "--assistant", tiny, "--assistant-tokens", 3)
    assert found["ids"] == gpt2_json(*arguments)["ids"]
    assert found["settings"]["num_assistant_tokens"] == 3


def test_an_assistant_with_another_vocabulary_is_refused_before_anything_is_shown(
    gpt2: Run, tiny: str, tmp_path: Path
) -> None:
    config = TINY.replace(vocab_size=50304)
    values = {name: Tensor.of(value) for name, value in initial_values(config).items()}
    save_pretrained(tmp_path, config, Head.LM, values, architecture="GPT2LMHeadModel")
    result = gpt2(*of(tiny, PROMPT, "--assistant", tmp_path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--assistant has a vocabulary of 50304 tokens, expected the model's 50257" in result.stderr


def test_bad_words_are_not_written_within_or_at_the_beginning_of_words(gpt2_json: Run, tiny: str) -> None:
    arguments = of(tiny, PROMPT, "-n", 12, "--greedy")
    word = TOKENIZER.decode([gpt2_json(*arguments)["ids"][3]]).strip()
    found = gpt2_json(*arguments, "--bad-words", word)
    for form in (word, f" {word}"):
        ids = TOKENIZER.encode(form)
        assert not any(found["ids"][i : i + len(ids)] == ids for i in range(12))
        assert ids in found["settings"]["bad_words_ids"]


def test_log_probabilities_come_on_request(gpt2_json: Run, gpt2: Run, tiny: str) -> None:
    expected = library(tiny, [PROMPT], **STORY)
    found = gpt2_json(*of(tiny, PROMPT, "-n", 6, "-s", 5, "--log-probs"))
    np.testing.assert_allclose(found["log_probs"], expected.log_probs[0], atol=1e-6)
    assert "log_probs" not in gpt2_json(*of(tiny, PROMPT, "-n", 6, "-s", 5))
    assert "--log-probs has no effect without --json" in gpt2(*of(tiny, PROMPT, "--log-probs")).stderr


def test_settings_come_from_a_file_and_options_take_their_place(gpt2_json: Run, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "top_p": 0.8, "max_new_tokens": 3, "transformers_version": "5.0"}')
    arguments = of(tiny, PROMPT, "--settings", file, "-s", 5)
    assert gpt2_json(*arguments)["settings"] == {"do_sample": True, "top_p": 0.8, "max_new_tokens": 3}
    changed = gpt2_json(*arguments, "--top-p", 0.5, "-n", 2)["settings"]
    assert changed == {"do_sample": True, "top_p": 0.5, "max_new_tokens": 2}
    assert gpt2_json(*arguments, "--greedy")["settings"] == {"max_new_tokens": 3}
    file.write_text('{"max_length": 9, "forced_bos_token_id": 7}')
    found = gpt2_json(*arguments[:-2])
    assert (found["ids"][0], len(found["ids"]) + len(found["prompt_ids"]), found["seed"]) == (7, 9, None)
    assert len(gpt2_json(*arguments[:-2], "-n", 2)["ids"]) == 2


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("{}", [], {"max_new_tokens": 3}),
        ("{}", ["--top-p", 0.5], {"do_sample": True, "top_p": 0.5}),
        ('{"num_beams": 2}', [], {"num_beams": 2}),
        ('{"num_beams": 2, "do_sample": true, "top_k": 5}', [], {"num_beams": 2, "do_sample": True, "top_k": 5}),
        ('{"penalty_alpha": 0.5, "top_k": 3}', [], {"penalty_alpha": 0.5, "top_k": 3}),
        ('{"do_sample": true, "top_k": 9, "top_p": 0.9}', ["--penalty-alpha", 0.5], {"penalty_alpha": 0.5, "top_k": 4}),
        (
            '{"do_sample": true, "top_k": 9}',
            ["--beams", 2, "--sample"],
            {"do_sample": True, "top_k": 9, "num_beams": 2},
        ),
        ('{"do_sample": true, "top_k": 9}', ["--beams", 2], {"num_beams": 2}),
    ],
)
def test_a_file_of_settings_and_options_together_say_which_search(
    gpt2_json: Run, tiny: str, tmp_path: Path, content: str, options: list[object], expected: dict[str, Any]
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(content)
    found = gpt2_json(*of(tiny, PROMPT, "--settings", file, "-n", 3, *options))
    assert found["settings"] == {"max_new_tokens": 3} | expected
    assert (found["seed"] is None) == (not expected.get("do_sample"))


def test_greedy_does_not_go_with_the_search_of_a_file(gpt2: Run, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text('{"num_beams": 2}')
    result = gpt2(*of(tiny, PROMPT, "--settings", file, "--greedy"))
    assert result.exit_code == 2
    assert "--greedy and the search of --settings choose in two ways" in " ".join(
        result.stderr.replace("│", "").split()
    )


def test_texts_of_a_model_without_an_end_of_text_may_end_at_different_places(gpt2: Run, tmp_path: Path) -> None:
    config = TINY.replace(bos_token_id=None, eos_token_id=None)
    values = {name: Tensor.of(value) for name, value in initial_values(config).items()}
    save_pretrained(tmp_path, config, Head.LM, values, architecture="GPT2LMHeadModel")
    arguments = of(str(tmp_path), PROMPT, "-n", 6, "-s", 5, "--num-return-sequences", 3)
    whole = [json.loads(line) for line in gpt2(*arguments, "--json").stdout.splitlines()]
    result = gpt2(*arguments, "--json", "--stop", whole[0]["text"][4:7])
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [text["finish"] for text in found] == ["stop", "length", "length"]
    assert found[0]["ids"] == whole[0]["ids"][: len(found[0]["ids"])]
    assert [text["ids"] for text in found[1:]] == [text["ids"] for text in whole[1:]]


# -- several prompts -----------------------------------------------------------------------------------------


def test_prompts_of_a_file_are_written_in_batches(gpt2: Run, tiny: str, tmp_path: Path) -> None:
    beginnings = ["Once upon a time", "The", "A wolf and a fox"]
    (tmp_path / "prompts.txt").write_text("\n".join(beginnings[:2]) + "\r\n\n  \n" + beginnings[2] + "\n")
    (tmp_path / "prompts.jsonl").write_text(
        f"{json.dumps(beginnings[0])}\n{json.dumps({'prompt': beginnings[1], 'id': 7})}\n{json.dumps(beginnings[2])}"
    )
    for name in ("prompts.txt", "prompts.jsonl"):
        arguments = of(tiny, "--prompts", tmp_path / name, "-n", 6, "-s", 5)
        whole = [json.loads(line) for line in gpt2(*arguments, "--json").stdout.splitlines()]
        assert [text["prompt"] for text in whole] == beginnings
        assert [text["text"] for text in whole] == list(library(tiny, beginnings, **STORY).texts)
        assert [(text["seed"], text["row"]) for text in whole] == [(5, 0), (5, 1), (5, 2)]
        # Each batch has the seed of its first prompt: the seed plus its number.
        pairs = [json.loads(line) for line in gpt2(*arguments, "--json", "--batch-size", 2).stdout.splitlines()]
        assert [(text["seed"], text["row"]) for text in pairs] == [(5, 0), (5, 1), (7, 0)]
        assert [text["text"] for text in pairs[:2]] == [text["text"] for text in whole[:2]]
        assert pairs[2]["text"] == library(tiny, beginnings[2:], **STORY | {"seed": 7}).texts[0]
    shown = gpt2(*arguments).stdout
    assert shown == "\n".join(
        f"=== PROMPT {i + 1} of 3 ===\n{text['prompt']}{text['text']}\n" for i, text in enumerate(whole)
    )
    alone = gpt2(*arguments, "--batch-size", 1).stdout.split("\n\n=== ")
    assert (
        alone[1]
        == f"PROMPT 2 of 3 ===\n{beginnings[1]}{library(tiny, [beginnings[1]], **STORY | {'seed': 6}).texts[0]}"
    )


def test_prompts_of_standard_input_may_have_several_texts_each(gpt2: Run, tiny: str) -> None:
    arguments = of(tiny, "--prompts", "-", "-n", 3, "-s", 5, "--num-return-sequences", 2)
    found = [json.loads(line) for line in gpt2(*arguments, "--json", input="a\nb\n").stdout.splitlines()]
    assert [(text["prompt"], text["row"]) for text in found] == [("a", 0), ("a", 1), ("b", 2), ("b", 3)]
    assert "=== PROMPT 2 of 2, TEXT 1 of 2 ===\nb" in gpt2(*arguments, input="a\nb\n").stdout


@pytest.mark.parametrize(
    ("name", "content", "chosen", "message"),
    [
        ("p.txt", "\n \n", [], "holds no prompt; expected one on each line"),
        ("p.jsonl", '"a"\n{"text": 3}\n', [], "line 2 of"),
        ("p.jsonl", "{\n", [], "line 1 of"),
        ("p.txt", "a\n", ["b"], "got both a prompt and --prompts"),
        ("p.txt", "a\n", ["--samples", "2"], "use --num-return-sequences"),
        ("p.txt", "a\n" + "b " * 60, [], "48 positions"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    gpt2: Run, tiny: str, tmp_path: Path, name: str, content: str, chosen: list[str], message: str, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / name).write_text(content)
    result = gpt2(*of(tiny, "--prompts", tmp_path / name, *chosen))
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


# -- frameworks and files ------------------------------------------------------------------------------------


def test_a_framework_that_is_not_installed_says_how_to_get_it(gpt2: Run, tiny: str, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "numpy" else None)
    result = gpt2(*of(tiny, PROMPT, framework="pt"))
    assert result.exit_code == 2
    assert "pip install 'gpt2-duet[pt]'" in result.stderr
    assert backends.choose(None).name == "numpy"


def test_the_default_framework_is_the_first_that_is_installed(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert backends.choose(None).name == "pt"


def test_a_device_that_is_not_there_is_refused(gpt2: Run, tiny: str) -> None:
    pytest.importorskip("torch")
    for device in ("cuda:99", "abacus"):
        result = gpt2(*of(tiny, PROMPT, "--device", device, framework="pt"))
        assert result.exit_code == 2
        assert f"device '{device}' cannot be used" in result.stderr


def test_a_model_is_prepared_for_writing_in_the_number_format_asked_for(
    gpt2_json: Run, tiny: str, one_thread: None, monkeypatch
) -> None:
    from gpt2_pt import GPT2LMHeadModel

    real, asked = GPT2LMHeadModel.prepare_for_generation, []

    def watched(model: Any, dtype: Any = None, compile: bool = False) -> Any:
        asked.append((str(model.dtype), dtype, compile))
        return real(model, dtype)

    monkeypatch.setattr(GPT2LMHeadModel, "prepare_for_generation", watched)
    arguments = of(tiny, PROMPT, "-n", 4, "--greedy", framework="pt")
    expected = [("float32", ("torch.float32", None, False)), ("bfloat16", ("torch.bfloat16", None, False)),
                ("int8", ("torch.float32", "int8", False))]  # fmt: skip
    for dtype, passed in expected:
        found = gpt2_json(*arguments, "--dtype", dtype)
        assert (found["dtype"], len(found["ids"]), asked.pop()) == (dtype, 4, passed)
    gpt2_json(*arguments, "--compile")
    assert asked == [("torch.float32", None, True)]


def test_tensorflow_writes_the_same_streamed_or_at_once(gpt2: Run, gpt2_json: Run, tiny: str) -> None:
    pytest.importorskip("tensorflow")
    streamed, beams = (of(tiny, PROMPT, "-n", 6, *chosen, framework="tf") for chosen in (["-s", 5], ["--beams", 2]))
    assert gpt2(*streamed).stdout == PROMPT + library(tiny, [PROMPT], **STORY).texts[0] + "\n"
    found = gpt2_json(*beams)
    assert (found["framework"], found["dtype"], found["device"]) == ("tf", "float32", "cpu")
    out = library(tiny, [PROMPT], num_beams=2)
    assert found["text"] == out.texts[0]
    assert found["score"] == pytest.approx(out.sequences_scores[0], abs=1e-4)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler here")
def test_tensorflow_writes_in_eight_bits_by_the_step_in_c_plus_plus(
    gpt2_json: Run, tiny: str, monkeypatch: Any
) -> None:
    pytest.importorskip("tensorflow")
    from gpt2_tf import TFGPT2LMHeadModel

    real, asked = TFGPT2LMHeadModel.prepare_for_generation, []

    def watched(model: Any, **how: Any) -> Any:
        asked.append(how)
        return real(model, **how)

    monkeypatch.setattr(TFGPT2LMHeadModel, "prepare_for_generation", watched)
    found = gpt2_json(*of(tiny, PROMPT, "-n", 4, "--greedy", "--dtype", "int8", framework="tf"))
    assert (found["framework"], found["dtype"], len(found["ids"])) == ("tf", "int8", 4)
    assert asked == [{"dtype": "int8", "compile": "c++"}]


def test_number_formats_and_compilation_that_a_framework_lacks_are_refused(gpt2: Run, tiny: str) -> None:
    for option, message in (
        (["--dtype", "int8"], "--dtype is 'int8', but --framework numpy computes in float64"),
        (["--compile"], "--compile is asked for, but the numpy reference has nothing to compile"),
    ):
        result = gpt2(*of(tiny, PROMPT, *option))
        assert result.exit_code == 2
        assert message in result.stderr


def test_files_that_cannot_be_used_are_exit_code_3(gpt2: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((Path(tiny) / "model.safetensors").read_bytes()[:-3])
    result = gpt2(*of(str(tmp_path), PROMPT), "--json")
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert (error["type"], error["exit_code"]) == ("CheckpointFormatError", 3)
    assert error["message"] in result.stderr
    (tmp_path / "config.json").unlink()
    assert gpt2(*of(str(tmp_path), PROMPT)).exit_code == 3


def test_a_folder_without_a_vocabulary_is_exit_code_3_and_the_option_that_helps_is_named(gpt2: Run, tiny: str) -> None:
    for arguments, option in (
        (("generate", PROMPT, "--framework", "numpy"), "--tokenizer gpt2"),
        (("encode", PROMPT), "--model gpt2"),
        (("decode", "64"), "--model gpt2"),
    ):
        result = gpt2(*arguments, "--model", tiny)
        assert result.exit_code == 3
        assert "holds no tokenizer" in result.stderr
        assert f"use {option} for GPT-2's own vocabulary" in result.stderr


def test_words_of_the_library_that_stand_in_names_and_paths_stay_as_they_are(
    gpt2: Run, tiny: str, tmp_path: Path
) -> None:
    folder = tmp_path / "seed max_new_tokens"
    folder.mkdir()
    result = gpt2("generate", PROMPT, "--model", folder, "--tokenizer", "gpt2", "--framework", "numpy")
    assert str(folder) in result.stderr
    as_json = gpt2(*of(tiny, PROMPT, "-n", "0", "--json"))
    assert json.loads(as_json.stdout)["error"]["message"].startswith("-n is 0")


def test_ids_beyond_the_tokenizer_are_shown_as_what_they_are_not(gpt2: Run, gpt2_json: Run, tmp_path: Path) -> None:
    """Vocabularies are padded to a round number for speed: a model may write ids that have no text."""
    config = TINY.replace(vocab_size=50304)
    values = {name: Tensor.of(value) for name, value in initial_values(config).items()}
    # The table's last rows are so long that these tokens are the likeliest by far, whichever way the stream points.
    table = initial_values(config)["transformer.wte.weight"].copy()
    table[50300:] *= 1000
    values["transformer.wte.weight"] = Tensor.of(table)
    save_pretrained(tmp_path, config, Head.LM, values, architecture="GPT2LMHeadModel")
    arguments = of(str(tmp_path), PROMPT, "-n", 5, "--greedy")
    found = gpt2_json(*arguments)
    assert max(found["ids"]) > 50256
    assert found["text"].count("\ufffd") >= sum(index > 50256 for index in found["ids"])
    assert gpt2(*arguments).stdout == f"{PROMPT}{found['text']}\n"


def test_a_model_that_is_not_found_is_exit_code_6(gpt2: Run) -> None:
    assert gpt2("generate", PROMPT, "--model", "nobody/nothing", "--framework", "numpy").exit_code == 6


def test_nothing_but_json_is_on_stdout(gpt2: Run, tiny: str) -> None:
    result = gpt2(*of(tiny, PROMPT, "-n", 2, "-N", 2), "--json")
    assert [json.loads(line)["framework"] for line in result.stdout.splitlines()] == ["numpy", "numpy"]
    assert result.stderr == ""


# -- the embedded model --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (Path(backends.__file__).parents[1] / "gpt2_core/assets/gpt2-tales/model.safetensors").exists(),
    reason="the embedded model is not there yet",
)
def test_the_embedded_model_writes_without_any_option(gpt2: Run) -> None:
    result = gpt2("generate", "The king said", "-n", 8, "--seed", 1, "--framework", "numpy")
    assert result.exit_code == 0
    assert result.stdout.startswith("The king said")
    assert len(result.stdout.split()) > 6


# -- terminals and signals -----------------------------------------------------------------------------------


def on_a_terminal(*arguments: object, **changes: str) -> str:
    """What the command shows on a terminal."""
    import pty

    main, side = pty.openpty()
    command = [sys.executable, "-m", "gpt2_app", *map(str, arguments)]
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment(TERM="xterm", **changes)):
        os.close(side)
        shown = b""
        try:
            while data := os.read(main, 1 << 16):
                shown += data
        except OSError:  # Linux reports the end of a terminal so
            pass
    os.close(main)
    return shown.decode()


@needs_pty
def test_a_terminal_shows_the_prompt_in_bold_and_how_fast_it_was(tiny: str) -> None:
    shown = on_a_terminal(*of(tiny, PROMPT, "-n", 4, "--seed", 1))
    assert f"\x1b[1m{PROMPT}\x1b[0m" in shown
    assert "4 tokens in " in shown
    assert "seed 1" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # a hidden cursor comes back


@needs_pty
def test_no_color_is_respected(tiny: str) -> None:
    shown = on_a_terminal(*of(tiny, PROMPT, "-n", 4, "--seed", 1), NO_COLOR="1")
    assert "\x1b[3" not in shown
    assert "\x1b[3" not in on_a_terminal("info", tiny, NO_COLOR="1")
    assert "\x1b[3" in on_a_terminal("info", tiny, COLORTERM="truecolor")


def test_text_cannot_steer_the_terminal() -> None:
    assert terminal.harmless("a\x1b[2J\r\x07\x7f\x9b\tb\n") == "a␛[2J␍␇␡\ufffd\tb\n"


@needs_pty
def test_decoding_to_a_terminal_ends_the_line() -> None:
    assert on_a_terminal("decode", "64") == "a\r\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_an_interrupt_ends_cleanly(tiny: str) -> None:
    command = [sys.executable, "-m", "gpt2_app", *map(str, of(tiny, PROMPT, "-N", "1000"))]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        # Shells start what runs in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"=== SAMPLE 1 of 1000, seed ")
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        complaint = process.stderr.read()
        assert process.wait(60) == 130
    assert complaint.startswith(b"seeds ")
    assert b"Traceback" not in complaint


def test_no_framework_is_imported_for_help_and_version() -> None:
    program = (
        "import sys\nfrom gpt2_app.cli import app\n"
        "for arguments in (['--help'], ['--version'], ['generate', '--help']):\n"
        "    try:\n        app(arguments)\n    except SystemExit:\n        pass\n"
        "print({'torch', 'tensorflow', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=True)
    assert done.stdout.rstrip().endswith(b"set()")


def test_the_numpy_reference_runs_without_torch(tiny: str) -> None:
    arguments = [*map(str, of(tiny, PROMPT, "-n", 3, "--seed", 1))]
    program = f"import sys\nsys.modules['torch'] = None\nfrom gpt2_app.cli import app\napp({arguments!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith(PROMPT)


def test_usage_errors_are_json_too_where_json_was_asked_for(gpt2: Run) -> None:
    result = gpt2("generate", "--no-such-option", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "UsageError"
    assert gpt2("generate", "--no-such-option").stdout == ""


def test_debug_shows_the_traceback(tiny: str) -> None:
    assert b"Traceback" in child("--debug", "info", "no-such-model").stderr
    assert b"Traceback" in child("info", "no-such-model", GPT2_DEBUG="1").stderr
    plain = child("info", "no-such-model")
    assert plain.returncode == 6
    assert b"Traceback" not in plain.stderr
    assert plain.stderr.startswith(b"error: ")


def test_help_names_the_exit_codes_and_every_command(gpt2: Run) -> None:
    shown = " ".join(gpt2("--help").stdout.split())
    for text in ("generate", "encode", "decode", "info", "3 unreadable checkpoint", "6 model not found"):
        assert text in shown


def test_the_version_is_the_packages(gpt2: Run) -> None:
    from gpt2_core import __version__

    assert gpt2("--version").stdout == f"gpt2-duet {__version__}\n"


def test_ids_given_to_a_backend_come_back_in_front(tiny: str) -> None:
    for name in backends.BACKENDS:
        if backends.BACKENDS[name].is_installed():
            rows = backends.load(name, tiny, "cpu").generate([[1, 2, 3]], GenerationConfig(max_new_tokens=2), None)
            assert np.array(rows).shape == (1, 5)
            assert rows[0][:3] == [1, 2, 3]
