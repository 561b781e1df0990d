"""The commands of docs/formats.md, each run as it stands there, on small models that other programs saved."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from app_process import TINY, Run

from gpt2_core.checkpoints import open_checkpoint
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.tokenizer import GPT2Tokenizer

ROOT = Path(__file__).parent.parent.parent
PEERS = ROOT / "tests" / "peers"
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
COMMANDS = [each.strip() for each in dict.fromkeys(re.findall(r"gpt2 convert [^\n`#]*", PAGE)) if "FORMAT" not in each]
#: What the page takes for granted, and what it is here: made by the program itself, kept in tests/peers.
ARCHIVES = {
    "my-tf-model": "transformers4/lm.zip",
    "checkpoint/run1": "openai/trained.zip",
    "preset": "keras_hub/lm.zip",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Path:
    """A folder with every source that a recipe names."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, archive in ARCHIVES.items():
        with zipfile.ZipFile(PEERS / archive) as packed:
            packed.extractall(folder / name)
    for name in ("gpt2", "openai-community/gpt2", "my-model", "SRC"):
        shutil.copytree(tiny, folder / name)
        GPT2Tokenizer().save_pretrained(folder / name)
    for name, format in (("out/ckpt.pt", "nanogpt"), ("best.keras", "keras"), ("run.weights.h5", "keras")):
        with open_source(tiny) as opened:
            carry_out(plan_conversion(opened, folder / name, format, verify="none"))
    TINY.save_pretrained(folder / "saved")
    (folder / "saved" / "config.json").rename(folder / "my-config.json")
    return folder


def test_the_page_has_recipes() -> None:
    assert len(COMMANDS) > 10 and any("checkpoint/run1" in each for each in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_runs_as_it_stands_on_the_page(
    command: str, sources: Path, gpt2: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shlex.split(command)[2:]
    here = tmp_path / "here"
    shutil.copytree(sources, here)
    source, target = (here / name for name in arguments[:2])
    if target.exists():
        shutil.rmtree(target)
    monkeypatch.chdir(here)
    done = gpt2("convert", *arguments)
    assert done.exit_code == 0, done.output
    with open_checkpoint(target) as opened:
        assert opened.format == arguments[arguments.index("--to") + 1] and len(opened) > 20
        file = target / "config.json" if target.is_dir() else None
    if file is not None and opened.format not in ("kerashub", "ctranslate2"):  # whose config.json is their own
        assert GPT2Config.from_json_file(file).n_layer >= 1
    assert source.exists()
