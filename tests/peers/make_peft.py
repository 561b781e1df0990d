"""What peft saves of an adapter and computes with it, for tests that run without it.

Runs in an environment of its own, which has peft, transformers and torch (and not this project):

    pip install peft transformers torch
    python make_peft.py make peft/                # the archive beside this file
    python make_peft.py answer jobs.json          # for tests/core/test_adapters_peft.py

`make` writes adapters.zip: base/, a small model; for each of CASES the folder of an adapter beside it; and answers.npz,
the ids, the logits of the model alone ("base"), and those with each adapter ("classifier": of three classes). `answer`
takes a list of {"base", "adapter", "ids", "answers"}: the folders of a model and of an adapter that somebody else
wrote, ids as .npy, and where to put the logits: of tokens, of classes, or of two choices, as the model is.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2LMHeadModel

CONFIG = {"vocab_size": 37, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "two": {"target_modules": ["attn.c_attn", "c_fc"]},
    "all": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*h\.0\.(attn|mlp)\.c_proj"},
    "layers": {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    "rslora": {"target_modules": ["c_fc"], "use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 3}},
    "classifier": {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"},
}
MODELS = {each.__name__: each for each in (GPT2LMHeadModel, GPT2DoubleHeadsModel, GPT2ForSequenceClassification)}


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    given, model = torch.from_numpy(ids), model.eval()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, GPT2ForSequenceClassification):
        # It asks by its number where a text ends: one that is in none.
        inner.config.pad_token_id = next(number for number in range(37) if number not in ids)
    with torch.no_grad():
        if isinstance(inner, GPT2DoubleHeadsModel):
            return model(given[None], mc_token_ids=torch.full((1, len(ids)), ids.shape[1] - 1)).mc_logits.numpy()
        return model(given).logits.numpy()


def make(out: Path) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**CONFIG, bos_token_id=1, eos_token_id=1))
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.4)
    ids = np.random.default_rng(0).integers(0, 37, (2, 9))
    answers = {"ids": ids, "base": logits(base, ids)}
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base.save_pretrained(root / "base")
        for case, settings in CASES.items():
            settings = {"task_type": "CAUSAL_LM"} | settings
            if settings["task_type"] == "SEQ_CLS":
                model = GPT2ForSequenceClassification.from_pretrained(root / "base", num_labels=3)
            else:
                model = GPT2LMHeadModel.from_pretrained(root / "base")
            wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=5, **settings))
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    torch.nn.init.normal_(parameter, 0.0, 0.4)
            answers[case] = logits(wrapped, ids)
            wrapped.peft_config["default"].base_model_name_or_path = "base"
            wrapped.save_pretrained(root / case)
            (root / case / "README.md").unlink(missing_ok=True)
        np.savez(root / "answers.npz", **answers)
        with zipfile.ZipFile(out / "adapters.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(each for each in root.rglob("*") if each.is_file()):
                entry = zipfile.ZipInfo(str(file.relative_to(root)), (2026, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())


def answer(jobs: Path) -> None:
    for job in json.loads(jobs.read_text()):
        kind = json.loads((Path(job["base"]) / "config.json").read_text())["architectures"][0]
        base = MODELS[kind].from_pretrained(job["base"])
        np.save(job["answers"], logits(PeftModel.from_pretrained(base, job["adapter"]), np.load(job["ids"])))


if __name__ == "__main__":
    {"make": make, "answer": answer}[sys.argv[1]](Path(sys.argv[2]))
