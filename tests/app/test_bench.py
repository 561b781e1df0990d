"""`gpt2 bench`: figures that fit each other, in a table and as JSON."""

from __future__ import annotations

import pytest
from app_process import TINY

from gpt2_app import bench
from gpt2_core import PRESETS
from gpt2_core.parameters import count_parameters

QUICK = ("--new", 3, "--rounds", 1, "--framework", "numpy")


@pytest.fixture(autouse=True)
def _little_memory_to_read(monkeypatch):
    monkeypatch.setattr(bench, "_STREAM", 2**20)


def test_every_size_has_figures_that_fit_each_other(tiny, gpt2_json):
    found = gpt2_json("bench", "--model", tiny, "--batch", "1,3", "--prompt", "2, 4", *QUICK)
    assert [(row["rows"], row["prompt"]) for row in found["results"]] == [(1, 2), (1, 4), (3, 2), (3, 4)]
    assert (found["framework"], found["dtype"], found["device"], found["new"]) == ("numpy", "float64", "cpu", 3)
    for row in found["results"]:
        assert row["tokens_per_second"] == pytest.approx(row["rows"] / row["ms_a_step"] * 1e3)
        used = bench.weight_bytes(TINY, "float64") / (row["ms_a_step"] / 1e3)
        assert row["share_of_bandwidth"] == pytest.approx(used / found["bandwidth"])
        assert row["ms_prompt"] > 0


def test_the_table_names_model_format_and_every_size(tiny, gpt2):
    shown = gpt2("bench", "--model", tiny, "--batch", "2", "--prompt", "3", *QUICK)
    assert shown.exit_code == 0
    assert "float64 on cpu" in " ".join(shown.stdout.split())
    assert "tokens/s" in shown.stdout
    assert "GB/s" in shown.stdout


def test_pytorch_measures_the_prepared_form_in_the_format_asked_for(tiny, gpt2_json):
    pytest.importorskip("torch")
    found = gpt2_json("bench", "--model", tiny, "--batch", 1, "--prompt", 2, "--new", 3, "--rounds", 1,
                      "--framework", "pt", "--dtype", "bfloat16")  # fmt: skip
    assert found["dtype"] == "bfloat16"
    assert found["threads"] >= 1


def test_a_step_reads_every_weight_but_the_positions():
    config = PRESETS["gpt2"]
    read = count_parameters(config) - 1024 * 768
    assert bench.weight_bytes(config, "float32") == 4 * read
    assert bench.weight_bytes(config, "int8") == read


@pytest.mark.parametrize(("option", "value"), [("--batch", "1,x"), ("--prompt", "0"), ("--batch", "")])
def test_sizes_that_are_no_numbers_are_refused(tiny, gpt2, option, value):
    refused = gpt2("bench", "--model", tiny, option, value, *QUICK)
    assert refused.exit_code == 2
    assert f"{option} is {value!r}, expected whole numbers" in " ".join(refused.stderr.split())


def test_a_text_longer_than_the_window_is_refused(tiny, gpt2):
    refused = gpt2("bench", "--model", tiny, "--prompt", TINY.n_positions, *QUICK)
    assert refused.exit_code == 2
    assert f"expected at most the {TINY.n_positions} positions" in " ".join(refused.stderr.split())
