"""`gpt2 info` tells what is in a checkpoint, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_process import TINY, Run

from gpt2_app.info_view import size
from gpt2_app.inspection import PARTS
from gpt2_core.checkpoints import save_checkpoint
from gpt2_core.config import GPT2Config
from gpt2_core.initialization import initial_values
from gpt2_core.parameters import Head, count_parameters
from gpt2_core.tokenizer import GPT2Tokenizer

# Radford et al. 2019 as released: the counts that the project holds to everywhere.
RELEASED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


def write(folder: Path, config: GPT2Config = TINY, head: Head = Head.LM, **changes: Any) -> Path:
    """A checkpoint with initial values; ``changes`` replace tensors, None leaves them out."""
    values: dict[str, Any] = dict(initial_values(config, head))
    values.update({name.replace("__", "."): value for name, value in changes.items()})
    save_checkpoint(folder, {name: value for name, value in values.items() if value is not None})
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_are_known_without_files_and_said_to_be(gpt2_json: Run, name: str) -> None:
    found = gpt2_json("info", name)
    assert found["parameters"]["total"] == RELEASED[name]
    assert sum(found["parameters"]["parts"].values()) == RELEASED[name]
    assert set(found["parameters"]["parts"]) == {part for part, _ in PARTS} - {"head"}
    assert found["checkpoint"] is None
    assert "configuration" in found["notes"][0]


def test_a_folder_is_described_in_full(gpt2_json: Run, tiny: str) -> None:
    found = gpt2_json("info", tiny)
    file = Path(tiny) / "model.safetensors"
    assert found["config"]["n_embd"] == TINY.n_embd
    assert found["parameters"]["total"] == count_parameters(TINY)
    assert found["tokenizer"] is None
    checkpoint = found["checkpoint"]
    assert checkpoint["format"] == "safetensors"
    assert checkpoint["files"] == [{"path": str(file), "bytes": file.stat().st_size}]
    assert checkpoint["dtypes"] == {"float32": {"tensors": 28, "bytes": 4 * count_parameters(TINY)}}
    assert checkpoint["fits"] is True
    assert checkpoint["tying"] == "tied by configuration; the file holds no lm_head.weight"
    assert "tensors" not in checkpoint


def test_tensors_are_listed_when_asked_for(gpt2: Run, gpt2_json: Run, tiny: str) -> None:
    tensors = gpt2_json("info", tiny, "--tensors")["checkpoint"]["tensors"]
    assert len(tensors) == 28
    assert tensors[0] == {
        "name": "transformer.wte.weight",
        "shape": [50257, 16],
        "dtype": "float32",
        "bytes": 50257 * 16 * 4,
    }
    lines = gpt2("info", tiny, "--tensors").stdout.splitlines()
    assert f"transformer.wte.weight\t50257 x 16\tfloat32\t{50257 * 16 * 4}" in lines


@pytest.mark.parametrize("width", [40, 80, 200])
def test_people_are_shown_what_matters_at_any_width(gpt2: Run, tiny: str, width: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = gpt2("info", tiny).stdout
    assert all(len(line) <= width for line in shown.splitlines() if tiny not in line)
    flat = " ".join(shown.split())
    for text in ("n_embd 16", f"all {count_parameters(TINY):,}", "format safetensors", "fits yes"):
        assert text in flat


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_shards_of_both_formats_are_counted_together(gpt2_json: Run, tmp_path: Path, format: str) -> None:
    save_checkpoint(tmp_path, initial_values(TINY), format=format, max_shard_bytes=10_000)
    TINY.save_pretrained(tmp_path)
    checkpoint = gpt2_json("info", tmp_path)["checkpoint"]
    assert checkpoint["format"] == format
    assert len(checkpoint["files"]) > 2
    assert checkpoint["bytes"] == 4 * count_parameters(TINY)
    assert checkpoint["fits"] is True


def test_one_file_is_described_with_the_configuration_beside_it(gpt2_json: Run, tiny: str) -> None:
    found = gpt2_json("info", Path(tiny) / "model.safetensors")
    assert found["checkpoint"]["fits"] is True
    assert found["config_source"] == str(Path(tiny) / "config.json")


def test_without_a_configuration_nothing_is_said_to_fit(gpt2: Run, gpt2_json: Run, tmp_path: Path) -> None:
    write(tmp_path, TINY)
    (tmp_path / "config.json").unlink()
    found = gpt2_json("info", tmp_path)
    assert found["checkpoint"]["fits"] is None
    assert found["config"] is None
    assert found["parameters"]["total"] == count_parameters(TINY)
    assert "unknown" in gpt2("info", tmp_path).stdout


def test_a_configuration_file_alone_gives_its_figures(gpt2_json: Run, tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    assert gpt2_json("info", tmp_path / "config.json")["parameters"]["total"] == RELEASED["gpt2"]


def test_what_does_not_fit_is_named_and_exit_code_4(gpt2: Run, tmp_path: Path) -> None:
    write(
        tmp_path,
        transformer__ln_f__bias=None,
        transformer__ln_f__weight=np.zeros(3, np.float32),
        stranger=np.zeros(1, np.float32),
    )
    result = gpt2("info", tmp_path, "--json")
    assert result.exit_code == 4
    checkpoint = json.loads(result.stdout)["checkpoint"]
    assert checkpoint["fits"] is False
    assert checkpoint["missing"] == ["transformer.ln_f.bias"]
    assert checkpoint["unexpected"] == ["stranger"]
    assert checkpoint["misshaped"] == [{"name": "transformer.ln_f.weight", "in_file": [3], "expected": [16]}]
    shown = gpt2("info", tmp_path)
    assert shown.exit_code == 4
    assert "transformer.ln_f.weight: 3 in the file, expected 16" in shown.stdout


def test_a_head_that_differs_from_a_tied_table_does_not_fit(gpt2: Run, tmp_path: Path) -> None:
    write(tmp_path, lm_head__weight=np.zeros((50257, 16), np.float32))
    result = gpt2("info", tmp_path, "--json")
    assert result.exit_code == 4
    checkpoint = json.loads(result.stdout)["checkpoint"]
    assert "tie_word_embeddings" in checkpoint["reason"]
    assert "different from transformer.wte.weight" in checkpoint["tying"]
    assert "tie_word_embeddings" in gpt2("info", tmp_path).stdout


def test_untied_models_count_their_head(gpt2_json: Run, tmp_path: Path) -> None:
    config = TINY.replace(tie_word_embeddings=False)
    found = gpt2_json("info", write(tmp_path, config))
    assert found["parameters"]["parts"]["head"] == 50257 * 16
    assert found["checkpoint"]["tying"].startswith("untied by configuration")


def test_buffers_of_old_releases_are_listed_as_ignored(gpt2: Run, gpt2_json: Run, tmp_path: Path) -> None:
    buffers = {f"transformer__h__{layer}__attn__bias": np.zeros((1, 1, 4, 4), np.float32) for layer in (0, 1)}
    write(tmp_path, **buffers)
    ignored = gpt2_json("info", tmp_path)["checkpoint"]["ignored"]
    assert list(ignored) == ["transformer.h.0.attn.bias", "transformer.h.1.attn.bias"]
    assert "transformer.h.0.attn.bias and 1 like it" in " ".join(gpt2("info", tmp_path).stdout.split())


@pytest.mark.parametrize("head", [Head.DOUBLE, Head.SEQUENCE, Head.TOKEN, Head.QA])
def test_the_head_is_told_by_the_names_in_the_file(gpt2_json: Run, tmp_path: Path, head: Head) -> None:
    found = gpt2_json("info", write(tmp_path, TINY, head))
    assert found["parameters"]["head"] == head.value
    assert found["parameters"]["total"] == count_parameters(TINY, head)
    assert found["checkpoint"]["fits"] is True


def test_tokenizer_files_are_listed(gpt2_json: Run, tmp_path: Path) -> None:
    write(tmp_path)
    GPT2Tokenizer().save_pretrained(tmp_path)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= set(gpt2_json("info", tmp_path)["tokenizer"]["files"])


def test_a_truncated_checkpoint_is_exit_code_3(gpt2: Run, tmp_path: Path) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    result = gpt2("info", tmp_path, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["type"] == "CheckpointFormatError"


def test_an_impossible_configuration_is_exit_code_3(gpt2: Run, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text('{"n_embd": 10, "n_head": 3}')
    assert gpt2("info", tmp_path).exit_code == 3


def test_a_folder_without_a_checkpoint_is_exit_code_3(gpt2: Run, tmp_path: Path) -> None:
    assert gpt2("info", tmp_path).exit_code == 3


@pytest.mark.parametrize("name", ["no-such-model", "./missing"])
def test_a_name_that_is_not_found_is_exit_code_6(gpt2: Run, name: str) -> None:
    result = gpt2("info", name)
    assert result.exit_code == 6
    assert name in result.stderr


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (497_759_232, "498 MB"),
        (6_230_000_000, "6.23 GB"),
    ],
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("format", ["kerashub", "ctranslate2", "keras"])
def test_the_configuration_is_read_where_the_format_keeps_it(gpt2_json: Run, tmp_path: Path, format: str) -> None:
    from gpt2_core.conversion import carry_out, open_source, plan_conversion

    config = TINY.replace(n_positions=24, vocab_size=97, bos_token_id=96, eos_token_id=96)
    with open_source(str(write(tmp_path / "source", config))) as source:
        carry_out(plan_conversion(source, tmp_path / "result", format, verify="none"))
    found = gpt2_json("info", str(tmp_path / "result"))
    assert (found["config"]["n_positions"], found["config"]["vocab_size"]) == (24, 97)
    assert found["config"]["n_layer"] == config.n_layer and found["checkpoint"]["fits"] is True
