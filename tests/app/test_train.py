"""`gpt2 train`: what a run leaves behind, that it survives being killed, and what it says about bad input."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_process import Run, environment

from gpt2_app.train import TimeLeft, in_words
from gpt2_core.checkpoints import Tensor, open_checkpoint
from gpt2_core.config import GPT2Config
from gpt2_core.initialization import initial_value, initial_values
from gpt2_core.parameters import parameter_table
from gpt2_core.pretrained import save_pretrained
from gpt2_core.recipe import read_recipe
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.training_log import Log
from gpt2_core.training_state import steps_in

# The whole vocabulary, which GPT-2's own tokenizer needs, on the smallest of transformers.
SMALL = {
    "model": "gpt2", "from_scratch": "true", "config.n_layer": "1", "config.n_head": "2", "config.n_embd": "8",
    "config.n_positions": "32", "block_size": "16", "batch_size": "2", "device": "cpu", "sample_every": "0",
}  # fmt: skip
TEXT = "\n".join(
    f"There was once a king who had {number} sons, and the youngest was called Jack." for number in range(90)
)

LABELLED = [{"text": f"this is {word}", "label": word} for word in ("good", "bad") * 6]
CHOICES = [{"context": f"Count {n}", "candidates": [f" {n}", " no"], "label": 0} for n in range(12)]
BASE = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=32)


def options(**settings: Any) -> list[str]:
    merged = SMALL | {name.replace("__", "."): str(value) for name, value in settings.items()}
    return [part for name, value in merged.items() for part in ("--set", f"{name}={value}")]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "jack.txt"
    path.write_text(TEXT)
    return path


def weights(folder: Path) -> dict[str, bytes]:
    with open_checkpoint(folder) as file:
        return {name: np.array(tensor.array()).tobytes() for name, tensor in file.items()}


def rows_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def test_a_text_becomes_a_model(gpt2: Run, text: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "run"
    done = gpt2("train", text, "--out", out, *options(steps=6, eval_every=3, save_every=3, sample_every=6, lr=0.01))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split() == [str(out / "final")]
    for name in ("recipe.toml", "metrics.jsonl", "metrics.csv", "samples.txt", "final/vocab.json", "final/config.json"):
        assert (out / name).is_file(), name
    assert "step 6: validation loss" in done.stderr
    assert (out / "samples.txt").read_text().startswith("=== step 6 ===\n")
    assert [row["step"] for row in Log.read(out) if "validation_loss" in row] == [3, 6]
    assert steps_in(out / "states") == [3, 6]
    recipe = read_recipe(out / "recipe.toml")
    assert (recipe.data, recipe.steps, dict(recipe.config)["n_layer"]) == (str(text), 6, 1)
    told = gpt2("generate", "There", "--model", out / "final", "--greedy", "--length", "3", "--framework", "pt")
    assert told.exit_code == 0, told.stderr


def test_a_recipe_s_file_is_followed_and_rows_are_json(gpt2: Run, text: Path, tmp_path: Path, one_thread: None) -> None:
    recipe = tmp_path / "jack.toml"
    lines = [f"{name} = {value}" for name, value in {"lr": 0.01, "steps": 3, "eval_every": 2}.items()]
    recipe.write_text(f'data = "{text}"\n' + "\n".join(lines) + "\n")
    done = gpt2("train", recipe, "--out", tmp_path / "run", "--json", *options(steps=2))
    assert done.exit_code == 0, done.stderr
    rows = rows_of(done.stdout)
    assert [row["step"] for row in rows] == [1, 2, 2, 2]
    assert {"loss", "lr", "norm", "tokens_per_s", "share_of_peak"} <= set(rows[0])
    assert rows[2]["validation_loss"] > 0
    last = rows[-1]
    assert (last["done"], last["step"], last["framework"], last["model"]) == (
        True,
        2,
        "pt",
        str(tmp_path / "run/final"),
    )


def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pick = random.Random(3)
    settings = options(steps=24, save_every=2, eval_every=6, dropout=0.1, ema_decay=0.9, lr=0.01)

    def started(out: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "gpt2_app",
            "train",
            str(text),
            "--out",
            str(out),
            "-F",
            "pt",
            *settings,
            *more,
        ]
        return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    whole = started(tmp_path / "whole")
    assert whole.wait(300) == 0
    out, kills = tmp_path / "killed", 0
    while True:
        before = steps_in(out / "states")
        one = started(out, *(["--resume"] if before else []))
        if kills < 3:  # after its next state, and a little more or less
            until = time.monotonic() + 120
            while steps_in(out / "states") == before and one.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(pick.uniform(0, 0.05))
            one.kill()
            kills += 1
        code = one.wait(300)
        assert one.stderr is not None
        said = one.stderr.read().decode()
        one.stderr.close()
        assert steps_in(out / "states")[-1:] >= before[-1:]
        if code == 0:
            break
        assert code == -9, said
    assert weights(out / "final") == weights(tmp_path / "whole" / "final")
    rows, expected = Log.read(out), Log.read(tmp_path / "whole")
    assert [(row["step"], row.get("loss"), row.get("validation_loss")) for row in rows] == [
        (row["step"], row.get("loss"), row.get("validation_loss")) for row in expected
    ]


def test_ctrl_c_saves_and_the_other_framework_goes_on(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "gpt2_app",
        "train",
        str(text),
        "--out",
        str(out),
        *options(steps=400, warmup_steps=0),
    ]
    first = subprocess.Popen([*command, "-F", "pt"], env=environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not Log.read(out) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(2)
    said = first.communicate(timeout=120)[1].decode()
    assert first.returncode == 130, said
    assert "stopped: told to by SIGINT" in said
    (reached,) = steps_in(out / "states")
    assert 0 < reached < 400
    more = [
        sys.executable,
        "-m",
        "gpt2_app",
        "train",
        str(out),
        "--resume",
        "-F",
        "tf",
        "--set",
        f"steps={reached + 2}",
    ]
    done = subprocess.run(more, env=environment(), capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {reached}" in done.stderr.decode()
    assert [row["step"] for row in Log.read(out) if row["step"] > reached]
    assert steps_in(out / "states")[-1] == reached + 2


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("instruction", [{"prompt": f"Say {n}:", "response": f" {n}"} for n in range(12)]),
        ("classification", LABELLED),
        ("double_heads", CHOICES),
    ],
)
def test_tasks_are_learnt_from_lines_of_json(
    gpt2: Run, task: str, lines: list[dict[str, Any]], tmp_path: Path, one_thread: None
) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "run"
    done = gpt2("train", path, "--out", out, "--json", *options(task=task, steps=8, eval_every=4, lr=0.01))
    assert done.exit_code == 0, done.stderr
    rows = [row for row in rows_of(done.stdout) if "loss" in row and "norm" in row]
    assert all(np.isfinite(row["loss"]) for row in rows)
    config = json.loads((out / "final" / "config.json").read_text())
    kinds = {"instruction": "LMHead", "classification": "ForSequenceClassification", "double_heads": "DoubleHeads"}
    assert kinds[task] in config["architectures"][0]


def test_classes_with_numbers_here_and_names_there_are_told(gpt2: Run, tmp_path: Path) -> None:
    numbers, names = tmp_path / "numbers.jsonl", tmp_path / "names.jsonl"
    numbers.write_text("".join(json.dumps(line | {"label": n % 2}) + "\n" for n, line in enumerate(LABELLED)))
    names.write_text("".join(json.dumps(line) + "\n" for line in LABELLED))
    told = options(task="classification", validation=names, steps=1)
    done = gpt2("train", numbers, "--out", tmp_path / "run", *told)
    assert done.exit_code == 2
    assert "names its classes ('bad', 'good'), but those of" in " ".join(done.stderr.split())


def test_examples_of_one_class_alone_are_told(gpt2: Run, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(line | {"label": "good"}) + "\n" for line in LABELLED))
    done = gpt2("train", path, "--out", tmp_path / "run", *options(task="classification", steps=1))
    assert done.exit_code == 2
    assert "every example has the label 'good', expected at least two classes" in " ".join(done.stderr.split())


def test_an_adapter_is_written_alone_and_merged(gpt2: Run, text: Path, tmp_path: Path, one_thread: None) -> None:
    out = tmp_path / "run"
    done = gpt2("train", text, "--out", out, *options(steps=3, lr=0.1, lora_rank=2))
    assert done.exit_code == 0, done.stderr
    with open_checkpoint(out / "final") as final:
        names = set(final)
    assert not any("lora" in name for name in names)
    from gpt2_core.adapters import read_adapter

    saved = read_adapter(out / "adapter")
    assert (saved.lora.rank, saved.base) == (2, "gpt2")
    assert all(array.any() for array in saved.arrays.values())


@pytest.mark.parametrize(
    ("task", "lines", "head"),
    [
        ("classification", LABELLED, ["score.weight"]),
        ("double_heads", CHOICES, ["multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"]),
    ],
)
def test_a_head_is_trained_with_an_adapter_and_both_make_the_model_again(
    gpt2: Run, task: str, lines: list[dict[str, Any]], head: list[str], tmp_path: Path, one_thread: None
) -> None:
    from gpt2_core.adapters import read_adapter
    from gpt2_core.conversion import open_source

    tensors = {name: Tensor.of(array) for name, array in initial_values(BASE, "lm", 1).items()}
    save_pretrained(tmp_path / "base", BASE, "lm", tensors, architecture="GPT2LMHeadModel")
    GPT2Tokenizer().save_pretrained(tmp_path / "base")
    path, out = tmp_path / "lines.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"model": tmp_path / "base", "task": task, "steps": 4, "lr": 0.1, "lora_rank": 2, "block_size": 16}
    told = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    done = gpt2("train", path, "--out", out, *told)
    assert done.exit_code == 0, done.stderr
    arrays = read_adapter(out / "adapter").arrays
    assert set(head) == {name for name in arrays if "lora" not in name}
    kind = "sequence" if task == "classification" else "double"
    drawn = {row.name: initial_value(row, 0) for row in parameter_table(BASE, kind)}
    assert (arrays[head[0]] != drawn[head[0]]).all()
    done = gpt2("convert", tmp_path / "base", tmp_path / "again", "--adapter", out / "adapter")
    assert done.exit_code == 0, done.output
    assert f"{', '.join(head)} {'is' if len(head) == 1 else 'are'} as trained with it" in " ".join(done.stdout.split())
    with open_source(tmp_path / "again") as again, open_source(out / "final") as final:
        assert again.head == final.head and again.config.num_labels == final.config.num_labels
        ours, theirs = again.tensors(), final.tensors()
        assert list(ours) == list(theirs)
        assert all((ours[name].array() == theirs[name].array()).all() for name in ours)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; expected some text"),
        (b"\xff\xfe\x00\x01binary\x00", "UTF-8"),
        (b"short", "expected at least"),
    ],
)
def test_a_text_that_cannot_be_used_is_reported(gpt2: Run, content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    done = gpt2("train", path, "--out", tmp_path / "run", *options(steps=2, val_fraction=0))
    assert done.exit_code == 2
    assert words in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.txt"], "none.txt is not there"),
        (["TEXT", "--set", "lerning_rate=1"], "no setting 'lerning_rate'"),
        (["TEXT", "--set", "weight_dcay=1"], "did you mean 'weight_decay'?"),
        (["TEXT", "--set", "lr"], "is no NAME=VALUE"),
        (["TEXT", "--set", "block_size=64"], "block_size=64 is more than the model's n_positions=32"),
        (["TEXT", "--framework", "numpy"], "cannot train"),
        (["TEXT", "--resume"], "holds no run to resume"),
        (["TEXT", "--set", "freeze=transformer.x.*"], "fits no parameter"),
        (["TEXT", "--set", "config.vocab_size=100"], "vocabulary of 50257 tokens, and the model has 100"),
    ],
)
def test_mistakes_are_named(gpt2: Run, text: Path, arguments: list[str], words: str, tmp_path: Path) -> None:
    given = [str(text) if each == "TEXT" else each for each in arguments]
    done = gpt2("train", given[0], "--out", tmp_path / "run", *options(steps=2), *given[1:])
    assert done.exit_code in (2, 3)
    assert words in done.stderr.replace("\n", " ")


def test_a_run_is_not_begun_over_another_and_not_gone_on_with_by_another_recipe(
    gpt2: Run, text: Path, tmp_path: Path, one_thread: None
) -> None:
    out = tmp_path / "run"
    assert gpt2("train", text, "--out", out, *options(steps=1)).exit_code == 0
    again = gpt2("train", text, "--out", out, *options(steps=1))
    assert again.exit_code == 2
    assert "holds a run of 1 steps; go on with it with --resume" in again.stderr.replace("\n", " ")
    changed = gpt2("train", text, "--out", out, "--resume", *options(steps=2, beta2=0.5))
    assert changed.exit_code == 3
    assert "beta2 is 0.5, and was 0.95" in changed.stderr.replace("\n", " ")
    assert gpt2("train", text, "--out", out, "--resume", *options(steps=2)).exit_code == 0


def test_shards_are_trained_on_as_they_are_and_may_have_nothing_to_evaluate_on(
    gpt2: Run, tmp_path: Path, one_thread: None
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    np.random.default_rng(0).integers(0, 50257, 900).astype("<u2").tofile(shards / "train.bin")
    alone = gpt2("train", shards / "train.bin", "--out", tmp_path / "one", "--json", *options(steps=2))
    assert alone.exit_code == 0, alone.stderr
    assert not any("validation_loss" in row for row in rows_of(alone.stdout))
    asked = gpt2("train", shards / "train.bin", "--out", tmp_path / "two", *options(steps=2, eval_every=1))
    assert asked.exit_code == 3
    assert "eval_every=1 has nothing to evaluate on" in asked.stderr.replace("\n", " ")
    np.random.default_rng(1).integers(0, 50257, 300).astype("<u2").tofile(shards / "val.bin")
    both = gpt2("train", shards, "--out", tmp_path / "three", "--json", *options(steps=2, eval_every=1))
    assert both.exit_code == 0, both.stderr
    assert [row["step"] for row in rows_of(both.stdout) if "validation_loss" in row] == [1, 2]


def test_the_recipes_of_configs_are_valid() -> None:
    folder = Path(__file__).parent.parent.parent / "configs"
    recipes = {path.stem: read_recipe(path) for path in folder.glob("*.toml")}
    assert {"tales", "gpt2", "gpt2-xl", "lora"} <= set(recipes)
    assert recipes["gpt2-xl"].parallel == "fsdp"


def test_a_large_text_is_said_to_be_tokenised_first(
    gpt2: Run, text: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2_app.train.LARGE", 1000)
    done = gpt2("train", text, "--out", tmp_path / "run", *options(steps=1, eval_every=0, save_every=0))
    assert done.exit_code == 0 and done.stderr.count("making token shards of 0 MB of text") == 1


def test_the_time_left_is_that_of_the_steps_so_far_without_the_first() -> None:
    left = TimeLeft()
    told = [
        left.after(step, 100, now) for step, now in ((21, 500.0), (22, 540.0), (23, 620.0), (99, 8300.0), (100, 8400.0))
    ]
    assert told == ["", "52 min left", "1 h 17 min left", "2 min left", "0 s left"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (91, "2 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (9600, "2 h 40 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_times_are_told_as_people_say_them(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_person_sees_every_step_and_the_time_left(text: Path, tmp_path: Path, one_thread: None) -> None:
    leader, follower = os.openpty()
    settings = options(steps=5, eval_every=0, save_every=0, log_every=2)
    command = [sys.executable, "-m", "gpt2_app", "train", str(text), "--out", str(tmp_path / "run"), *settings]
    environ = environment(TERM="xterm", COLUMNS="140")
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, env=environ)
    os.close(follower)
    shown = bytearray()
    while True:
        try:
            shown += (part := os.read(leader, 1 << 16))
        except OSError:  # what Linux says where others say that the terminal has ended
            break
        if not part:
            break
    os.close(leader)
    assert running.wait() == 0, shown.decode()
    assert b"5/5" in shown and b"loss" in shown and b"0 s left" in shown, shown.decode()
