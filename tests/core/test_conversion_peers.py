"""Conversions held to transformers 5 in PyTorch, and done where nothing but numpy is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import Tensor, formats, holds_of
from gpt2_core.checkpoints.holds import objections
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.pretrained import save_pretrained
from gpt2_core.verification import FIXED_IDS, outputs

CONFIG = GPT2Config(
    vocab_size=37, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1, num_labels=3
)
#: What transformers calls a model with each head.
CLASSES = {
    Head.NONE: "GPT2Model",
    Head.LM: "GPT2LMHeadModel",
    Head.DOUBLE: "GPT2DoubleHeadsModel",
    Head.SEQUENCE: "GPT2ForSequenceClassification",
    Head.TOKEN: "GPT2ForTokenClassification",
    Head.QA: "GPT2ForQuestionAnswering",
}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def parameters(config: GPT2Config, head: Head) -> dict[str, Tensor]:
    chance = np.random.default_rng(0)
    return {
        row.name: Tensor.of(chance.normal(0.1, 0.4, row.shape).astype(np.float32))
        for row in parameter_table(config, head)
    }


def fits(format: str, config: GPT2Config, head: Head) -> bool:
    return not objections(format, holds_of(formats()[format]), config, head, ["float32"])


def convert(source: Path, target: Path, to: str, head: Head) -> None:
    with open_source(source, head=head) as opened:
        carry_out(plan_conversion(opened, target, to, verify="none", tokenizer=False))


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def answer(transformers: Any, folder: Path, head: Head) -> dict[str, np.ndarray]:
    """What the model in a folder computes in transformers, under the names of `verification.outputs`."""
    torch = pytest.importorskip("torch")
    model, told = getattr(transformers, CLASSES[head]).from_pretrained(folder, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    ids = torch.tensor(FIXED_IDS[:16])[None] % 37
    with torch.no_grad():
        out = model.eval()(ids[:, None] if head is Head.DOUBLE else ids)
    found = {name: value.numpy() for name, value in out.items() if hasattr(value, "numpy")}
    if head is Head.DOUBLE:
        return {"logits": found["logits"][0]}
    return {
        name: found[name] for name in ("last_hidden_state", "logits", "start_logits", "end_logits") if name in found
    }


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("format", list(formats()))
def test_transformers_computes_the_same_from_what_went_through_a_format(
    tmp_path: Path, transformers: Any, format: str, head: Head
) -> None:
    if not fits(format, CONFIG, head):
        pytest.skip(f"{format} has no place for it")
    values = parameters(CONFIG, head)
    save_pretrained(tmp_path / "a", CONFIG, head, values, architecture=CLASSES[head])
    convert(tmp_path / "a", tmp_path / "b", format, head)
    convert(tmp_path / "b", tmp_path / "c", "safetensors", head)
    expected = outputs(CONFIG, head, values)
    for name, value in answer(transformers, tmp_path / "c", head).items():
        mine = expected[name][:, -1] if head is Head.SEQUENCE else expected[name]
        assert np.abs(value - mine).max() < 1e-4 * (1 + np.abs(mine).max()), name


@pytest.mark.parametrize("format", list(formats()))
def test_what_transformers_saved_goes_through_every_format(tmp_path: Path, transformers: Any, format: str) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(CONFIG.to_dict()))
    theirs.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", format, Head.LM)
    convert(tmp_path / "b", tmp_path / "c", "bin" if format == "safetensors" else "safetensors", Head.LM)
    with open_source(tmp_path / "c") as source:
        state = theirs.state_dict()
        assert all(np.array_equal(tensor.array(), state[name].numpy()) for name, tensor in source.tensors().items())


ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[3].split(","):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from gpt2_core.conversion import carry_out, open_source, plan_conversion
for to in sys.argv[4:]:
    with open_source(sys.argv[1]) as source:
        carry_out(plan_conversion(source, sys.argv[2] + "/" + to, to, tokenizer=False))
    with open_source(sys.argv[2] + "/" + to) as source:
        carry_out(plan_conversion(source, sys.argv[2] + "/" + to + "-back", "safetensors", tokenizer=False))
"""
OTHERS = (
    "torch", "tensorflow", "keras", "keras_hub", "jax", "flax", "msgpack", "gguf", "transformers", "safetensors",
    "h5py", "huggingface_hub", "tokenizers", "tiktoken",
)  # fmt: skip


@pytest.mark.parametrize("absent", [("torch",), ("tensorflow", "keras"), ("torch", "tensorflow", "keras"), OTHERS])
def test_every_format_is_converted_without_torch_tensorflow_both_or_anything_but_numpy(
    tmp_path: Path, absent: tuple[str, ...]
) -> None:
    save_pretrained(tmp_path / "a", CONFIG, Head.LM, parameters(CONFIG, Head.LM), architecture="GPT2LMHeadModel")
    wanted = [name for name in formats() if fits(name, CONFIG, Head.LM)]
    script = [sys.executable, "-c", ALONE, str(tmp_path / "a"), str(tmp_path), ",".join(absent), *wanted]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    original = (tmp_path / "a" / "model.safetensors").read_bytes()
    for name in wanted:
        assert (tmp_path / f"{name}-back" / "model.safetensors").read_bytes() == original, name
