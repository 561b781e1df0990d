"""`gpt2 evaluate`: figures beside the paper's, as a table, JSON and a chart; wrong layouts with the expected one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from app_process import Run

from gpt2_core.evaluation import ReferenceScorer, evaluate
from gpt2_core.reference import ReferenceModel
from gpt2_core.tokenizer import GPT2Tokenizer

NUMPY = ("--framework", "numpy", "--tokenizer", "gpt2")


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    (tmp_path / "wiki.test.tokens").write_text(" \n = Cats = \n \n The cat , it was said , came home . \n")
    return tmp_path


def test_the_figures_are_the_librarys(gpt2_json: Run, tiny, wikitext):
    value = gpt2_json("evaluate", tiny, "--protocol", "wikitext103", "--data", wikitext, "--stride", "5", *NUMPY)
    scorer = ReferenceScorer(ReferenceModel.from_pretrained(tiny, head="lm"))
    report = evaluate(scorer, GPT2Tokenizer(), "wikitext103", wikitext, stride=5)
    assert value["figures"] == pytest.approx(dict(report.figures))
    assert value["counts"] == dict(report.counts)
    assert value["paper"]["perplexity_per_word"]["gpt2"] == 37.50
    assert (value["model"], value["stride"], value["framework"]) == (tiny, 5, "numpy")


@pytest.mark.parametrize("framework", ["pt", "tf"])
def test_both_frameworks_give_the_references_figures(gpt2_json: Run, tiny, wikitext, framework, one_thread):
    pytest.importorskip({"pt": "torch", "tf": "tensorflow"}[framework])
    asked = ("evaluate", tiny, "-p", "wikitext2", "-d", wikitext, "--tokenizer", "gpt2")
    value = gpt2_json(*asked, "--framework", framework, "--batch-size", "2")
    expected = gpt2_json(*asked, "--framework", "numpy")
    assert value["figures"] == pytest.approx(expected["figures"], rel=1e-5)


def test_people_get_a_table_with_the_papers_figures_and_the_details(gpt2: Run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "one two three"}\n' * 3)
    result = gpt2("evaluate", tiny, "-p", "lambada", "-d", tmp_path, "--limit", "2", *NUMPY)
    assert result.exit_code == 0, result.stderr
    for words in (
        "LAMBADA, test: 2 examples",
        "45.99",
        "8.63",
        "accuracy last token (%)",
        "lm-evaluation-harness, lambada_openai",
        "only the first 2",
        "Radford et al. 2019, table 3",
        "filter of stop words",
    ):
        assert words in result.stdout


def test_a_protocol_without_figures_in_the_paper_has_none_beside_it(gpt2: Run, tiny, tmp_path):
    value = {"ctx": "A man", "endings": ["sits.", "stands."], "label": 0}
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(value) + "\n")
    result = gpt2("evaluate", tiny, "-p", "hellaswag", "-d", tmp_path, *NUMPY)
    assert "paper: gpt2" not in result.stdout
    assert "29.55" in result.stdout


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_chart_is_drawn(gpt2: Run, tiny, wikitext, suffix):
    pytest.importorskip("matplotlib")
    chart = wikitext / f"chart{suffix}"
    result = gpt2("evaluate", tiny, "-p", "wikitext103", "-d", wikitext, "--chart", chart, *NUMPY)
    assert result.exit_code == 0, result.stderr
    assert chart.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-p", "wikitext", "-d", "."], 2, "--protocol is 'wikitext', expected one of"),
        (["-p", "ptb", "-d", "nothing"], 2, "expected Mikolov's ptb.test.txt"),
        (
            ["-p", "text", "-d", "a.txt", "--stride", "5000"],
            2,
            "--stride is 5000, expected a whole number from 1",
        ),
        (["-p", "text", "-d", "a.txt", "--chart", "a.xyz"], 2, "no picture's name"),
        (["-p", "text", "-d", "a.txt", "--device", "cuda"], 2, "runs on cpu alone"),
        (["-p", "text", "-d", "a.txt", "--dtype", "float16"], 2, "computes in float64"),
    ],
)
def test_what_cannot_be_done_is_refused(gpt2: Run, tiny, tmp_path, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    result = gpt2("evaluate", tiny, *options, *NUMPY)
    assert result.exit_code == code
    assert words in result.stderr


def test_a_model_that_is_not_there_and_a_tokenizer_that_is_too_large_are_reported(gpt2: Run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    assert gpt2("evaluate", "no/such", "-p", "text", "-d", "a.txt", "--framework", "numpy").exit_code == 6
    tokenizer = GPT2Tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "larger")
    options = ("-p", "text", "-d", "a.txt", "--framework", "numpy", "--tokenizer", tmp_path / "larger")
    result = gpt2("evaluate", "gpt2-tales", *options)
    assert result.exit_code == 2
    assert "the tokenizer has 50258 tokens and the model 50257" in result.stderr
