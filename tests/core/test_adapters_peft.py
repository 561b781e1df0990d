"""Adapters that peft saved (tests/peers/peft), and ours as peft reads them.

The test at the end asks peft itself, where the environment variable GPT2_DUET_PEFT names the Python of an environment
that has it; see tests/peers.
"""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.adapters import Lora, adapted, adapter_table, fitted, merge_all, read_adapter, write_adapter
from gpt2_core.checkpoints import bin as pickled
from gpt2_core.checkpoints.tensors import Tensor
from gpt2_core.conversion import open_source
from gpt2_core.errors import CheckpointError, CheckpointMismatchError
from gpt2_core.parameters import Head
from gpt2_core.pretrained import save_pretrained
from gpt2_core.reference import ReferenceModel
from models import random_parameters, small_config

PEERS = Path(__file__).parent.parent / "peers"
PLAIN = ("default", "two", "all", "pattern", "layers", "rslora")
KERNELS = {"default": 2, "two": 4, "all": 8, "pattern": 2, "layers": 1, "rslora": 2}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    with zipfile.ZipFile(PEERS / "peft" / "adapters.zip") as archive:
        archive.extractall(folder)
    return folder


def computed(base: Path, adapter: Path, ids: np.ndarray) -> np.ndarray:
    with open_source(base) as opened:
        source = adapted(opened, adapter)
        values = {name: tensor.array() for name, tensor in source.tensors().items()}
        return np.asarray(ReferenceModel(source.config, values, source.head)(ids).logits)


@pytest.mark.parametrize("case", PLAIN)
def test_the_model_with_peft_s_adapter_merged_computes_what_peft_computed(theirs: Path, case: str) -> None:
    with np.load(theirs / "answers.npz") as answers:
        expected, alone, ids = answers[case], answers["base"], answers["ids"]
    assert np.abs(expected - alone).max() > 0.1
    assert np.abs(computed(theirs / "base", theirs / case, ids) - expected).max() < 2e-5 * np.abs(expected).max()
    saved = read_adapter(theirs / case)
    assert saved.base == "base" and len(saved.arrays) == 2 * KERNELS[case]


def test_a_classifier_that_peft_trained_is_made_of_the_model_without_a_head(theirs: Path) -> None:
    with np.load(theirs / "answers.npz") as answers:
        expected, ids = answers["classifier"], answers["ids"]
    assert expected.shape == (2, 3)
    assert (
        np.abs(computed(theirs / "base", theirs / "classifier", ids) - expected).max() < 2e-5 * np.abs(expected).max()
    )
    with open_source(theirs / "base") as opened:
        source = adapted(opened, theirs / "classifier")
        assert (source.head, source.config.num_labels) == (Head.SEQUENCE, 3)


@pytest.mark.parametrize(("case", "word"), [("dora", "use_dora"), ("ranks", "rank_pattern")])
def test_what_is_not_plain_lora_is_refused_by_the_setting_s_name(theirs: Path, case: str, word: str) -> None:
    with pytest.raises(CheckpointError, match=f"not of plain LoRA.*{word}"):
        read_adapter(theirs / case)


def test_a_pickled_adapter_of_an_older_peft_is_read(theirs: Path, tmp_path: Path) -> None:
    saved = read_adapter(theirs / "two")
    renamed = {f"base_model.model.{name}.weight": Tensor.of(array) for name, array in saved.arrays.items()}
    pickled.write(tmp_path / "adapter_model.bin", renamed)
    (tmp_path / "adapter_config.json").write_bytes((theirs / "two" / "adapter_config.json").read_bytes())
    again = read_adapter(tmp_path)
    assert all((again.arrays[name] == array).all() for name, array in saved.arrays.items())


def test_an_adapter_that_lacks_layers_of_its_targets_is_another_model_s(theirs: Path) -> None:
    config = small_config(n_layer=3)
    with pytest.raises(CheckpointMismatchError, match=r"(?s)trained beside base.*missing \(2\).*h\.2\.attn\.c_attn"):
        fitted(read_adapter(theirs / "default"), config, Head.LM)


LIVE = {
    "ours": (Lora(3, 7.0, ("attn.c_attn", "mlp.c_proj")), "GPT2LMHeadModel"),
    "one": (Lora(2, 2.0, ("h.1.mlp.c_fc",), 0.1), "GPT2LMHeadModel"),
    "classifier": (Lora(3, 7.0, ("attn.c_attn",)), "GPT2ForSequenceClassification"),
    "choices": (Lora(3, 7.0, ("attn.c_attn",)), "GPT2DoubleHeadsModel"),
}
HEADS = {
    "GPT2LMHeadModel": Head.LM, "GPT2ForSequenceClassification": Head.SEQUENCE, "GPT2DoubleHeadsModel": Head.DOUBLE,
}  # fmt: skip
INTERPRETER = os.environ.get("GPT2_DUET_PEFT", "")


@pytest.mark.skipif(not INTERPRETER, reason="GPT2_DUET_PEFT names no Python that has peft")
def test_peft_computes_our_logits_from_the_adapters_that_we_write(tmp_path: Path) -> None:
    config = small_config()
    ids, jobs, pick = np.random.default_rng(1).integers(0, 37, (2, 9)), [], np.random.default_rng(2)
    np.save(tmp_path / "ids.npy", ids)
    expected = {}
    for name, (lora, architecture) in LIVE.items():
        head = HEADS[architecture]
        values = {each: array.astype(np.float32) for each, array in random_parameters(config, head).items()}
        tensors = {each: Tensor.of(array) for each, array in values.items()}
        save_pretrained(tmp_path / architecture, config, head, tensors, architecture=architecture)
        arrays = {
            row.name: pick.normal(0, 0.4, row.shape).astype(np.float32) for row in adapter_table(config, head, lora)
        }
        (tmp_path / name).mkdir()
        tensors = {each: Tensor.of(array) for each, array in arrays.items()}
        # The names of classes are where peft does not look.
        write_adapter(tmp_path / name, lora, tensors, architecture, architecture, {0: "no", 1: "yes"})
        together = merge_all({each: array.astype(np.float64) for each, array in values.items()}, arrays, lora.scale)
        model = ReferenceModel(config, together, head)
        if head is Head.DOUBLE:
            expected[name] = np.asarray(model(ids[None], mc_token_ids=np.full((1, 2), 8)).mc_logits)
        else:
            expected[name] = np.asarray(model(ids).logits)
        places = {"base": architecture, "adapter": name, "ids": "ids.npy", "answers": f"{name}.npy"}
        jobs.append({key: str(tmp_path / file) for key, file in places.items()})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [INTERPRETER, str(PEERS / "make_peft.py"), "answer", str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, logits in expected.items():
        difference = np.abs(np.load(f"{tmp_path / name}.npy") - logits).max()
        assert difference < 2e-5 * np.abs(logits).max(), (name, difference)
