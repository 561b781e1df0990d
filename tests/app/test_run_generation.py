"""`scripts/run_generation.py` behaves as the users of the field's script of this name expect."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from app_process import TINY, environment

from gpt2_app import run_generation, writing
from gpt2_core.reference import ReferenceModel
from gpt2_core.tokenizer import GPT2Tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_generation.py"
PROMPT = "Once upon a time"
TOKENIZER = GPT2Tokenizer()


@pytest.fixture(scope="module")
def model(tiny: str) -> str:
    """The tiny model with a tokenizer beside it, as models of the field come."""
    TOKENIZER.save_pretrained(tiny + "-complete")
    for file in Path(tiny).iterdir():
        (Path(tiny + "-complete") / file.name).write_bytes(file.read_bytes())
    return tiny + "-complete"


def run(capsys: pytest.CaptureFixture[str], model: str, *arguments: object) -> list[str]:
    """The sequences that it prints."""
    given = ["--model_name_or_path", model, "--framework", "numpy", *map(str, arguments)]
    assert run_generation.main(given) == 0
    shown = capsys.readouterr().out
    parts = re.split(r"^=== GENERATED SEQUENCE (\d+) ===\n", shown, flags=re.MULTILINE)
    assert parts[1::2] == [str(number) for number in range(1, len(parts) // 2 + 1)]
    return [text.removesuffix("\n") for text in parts[2::2]]


def test_the_script_takes_the_options_its_users_know(model: str) -> None:
    options = (
        "--model_type gpt2 --length 6 --temperature 0.7 --k 10 --p 0.9 --repetition_penalty 1.2 --stop_token ### "
        "--seed 3 --num_return_sequences 2 --no_cuda --framework numpy"
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options.split(), "--model_name_or_path", model, "--prompt", PROMPT],
        capture_output=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode()
    assert lines.startswith(f"=== GENERATED SEQUENCE 1 ===\n{PROMPT}")
    assert f"=== GENERATED SEQUENCE 2 ===\n{PROMPT}" in lines


def test_its_defaults_are_those_of_the_field(model: str, capsys) -> None:
    prompt = TOKENIZER.encode(PROMPT)
    rows = ReferenceModel.from_pretrained(model).generate(
        [prompt], max_new_tokens=20, do_sample=True, top_p=0.9, seed=42
    )
    assert run(capsys, model, "--prompt", PROMPT) == [TOKENIZER.decode(rows[0])]


def test_both_frameworks_print_the_same(model: str, capsys, one_thread: None) -> None:
    chosen = ["--prompt", PROMPT, "--num_return_sequences", 2, "--length", 10]
    one = run(capsys, model, *chosen)
    other = run(capsys, model, *chosen, "--framework", "pt", "--no_cuda")
    assert one == other
    assert one[0] != one[1]


def test_temperature_zero_takes_the_likeliest(model: str, capsys) -> None:
    prompt = TOKENIZER.encode(PROMPT)
    rows = ReferenceModel.from_pretrained(model).generate([prompt], max_new_tokens=9)
    assert run(capsys, model, "--prompt", PROMPT, "--temperature", 0, "--length", 9) == [TOKENIZER.decode(rows[0])]


def test_several_samples_at_temperature_zero_are_the_same_and_that_is_said(model: str, capsys) -> None:
    given = ["--model_name_or_path", model, "--framework", "numpy", "--prompt", PROMPT, "--temperature", "0"]
    assert run_generation.main([*given, "--num_return_sequences", "3", "--length", "5"]) == 0
    captured = capsys.readouterr()
    first, second, third = re.split(r"=== GENERATED SEQUENCE \d ===\n", captured.out)[1:]
    assert first == second == third != ""
    assert "all sequences are the same" in captured.err
    assert run_generation.main([*given, "--num_return_sequences", "0"]) == 2
    assert "--num_return_sequences is 0, expected" in capsys.readouterr().err


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {}])
@pytest.mark.parametrize("way", ["typed", "--prompt", "--prefix"])
def test_text_is_utf8_whatever_the_locale(model: str, locale: dict[str, str], way: str) -> None:
    prompt = "naïve 🐉"
    command = [sys.executable, str(SCRIPT), "--model_name_or_path", model, "--framework", "numpy", "--length", "1"]
    if way != "typed":
        command += [way, prompt]
    done = subprocess.run(
        command, input=f"{prompt}\n".encode(), capture_output=True, env=environment(**locale), check=False
    )
    assert done.returncode == 0, done.stderr
    assert prompt in done.stdout.decode("utf-8")


def test_a_typed_prompt_that_is_not_utf8_is_refused(model: str) -> None:
    command = [sys.executable, str(SCRIPT), "--model_name_or_path", model, "--framework", "numpy"]
    done = subprocess.run(command, input=b"a\xff\n", capture_output=True, env=environment(), check=False)
    assert done.returncode == 2
    assert b"prompt is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
    done = subprocess.run([*command, "--prompt", b"a\xff"], capture_output=True, env=environment(), check=False)
    assert done.returncode == 2
    assert b"--prompt is not valid UTF-8" in done.stderr


def test_it_asks_for_a_prompt_when_none_was_given(model: str, capsys, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or PROMPT)
    assert run(capsys, model, "--length", 2)[0].startswith(PROMPT)
    assert asked == ["Model prompt >>> "]


def test_ending_the_input_instead_of_a_prompt_is_an_interrupt(model: str, monkeypatch) -> None:
    def end(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert run_generation.main(["--model_name_or_path", model, "--framework", "numpy"]) == 130


@pytest.mark.parametrize("option", ["--padding_text", "--prefix"])
def test_text_before_the_prompt_counts_but_is_not_printed(model: str, capsys, option: str) -> None:
    found = run(capsys, model, "--prompt", " a time", option, "Once upon", "--length", 10)
    assert found == [text.removeprefix("Once upon") for text in run(capsys, model, "--prompt", PROMPT, "--length", 10)]


def test_the_stop_token_cuts_the_text_and_its_absence_cuts_nothing(model: str, capsys) -> None:
    whole = run(capsys, model, "--prompt", PROMPT)[0]
    stop = whole[len(PROMPT) + 10 : len(PROMPT) + 13]
    assert run(capsys, model, "--prompt", PROMPT, "--stop_token", stop) == [
        PROMPT + whole[len(PROMPT) :].partition(stop)[0]
    ]
    assert run(capsys, model, "--prompt", PROMPT, "--stop_token", "not there") == [whole]


def test_length_minus_one_fills_the_window(model: str, capsys) -> None:
    room = TINY.n_positions - len(TOKENIZER.encode(PROMPT))
    expected = run(capsys, model, "--prompt", PROMPT, "--length", room)
    assert run(capsys, model, "--prompt", PROMPT, "--length", -1) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_type", "xlnet"], "this program runs GPT-2 alone"),
        (["--xlm_language", "fr"], "a language for XLM"),
        (["--length", "many"], "invalid int value"),
    ],
)
def test_what_only_other_models_have_is_refused(capsys, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_generation.main(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--p", "2"], 2, "--p is 2.0"),
        (["--k", "-1"], 2, "--k is -1"),
        (["--length", "0"], 2, "--length is 0, expected a whole number"),
        (["--length", "45"], 2, "at most --length 44"),
        (["--num_return_sequences", "0"], 2, "--num_return_sequences is 0"),
        (["--temperature", "-1"], 2, "use --temperature 0)"),
        (["--seed", "-1"], 2, "--seed is -1"),
        (["--model_name_or_path", "./missing"], 6, "./missing"),
    ],
)
def test_library_errors_are_one_message_in_the_words_that_were_typed(
    model: str, capsys, arguments: list[str], code: int, told: str
) -> None:
    given = ["--model_name_or_path", model, "--framework", "numpy", "--prompt", PROMPT, *arguments]
    assert run_generation.main(given) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error


def test_ids_beyond_the_tokenizer_do_not_stop_it() -> None:
    assert writing.text_of(TOKENIZER, [64, 50300, 65, 50256]) == "a\ufffdb"
    assert writing.text_of(TOKENIZER, TOKENIZER.encode("🐉")[:-1]) == "\ufffd"
