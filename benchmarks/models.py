"""Loading, one forward pass, and cached decoding of a 124M checkpoint: ours beside transformers, in one run.

    python benchmarks/models.py [--size gpt2] [--rounds 5] [--json FILE]

The checkpoint is random weights of the released size, written once to a temporary folder. Loading is timed in fresh
processes, imports included, because that is what a user waits for; peak memory is the whole process's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import fresh_process, interleaved, machine, show, summary, versions, write_json

OURS = """
from gpt2_pt import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained({folder!r})
"""
THEIRS = """
from transformers import GPT2LMHeadModel
model = GPT2LMHeadModel.from_pretrained({folder!r}).eval()
"""
USE = """
import torch
with torch.no_grad():
    model(torch.zeros(1, 8, dtype=torch.int64))
"""
PROCESSES = {
    "import torch": "import torch\n",
    "gpt2_pt, loaded": OURS,
    "gpt2_pt, loaded and run once": OURS + USE,
    "transformers, loaded": THEIRS,
    "transformers, loaded and run once": THEIRS + USE,
}


def loading(folder: str, rounds: int) -> list[dict[str, Any]]:
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in PROCESSES}
    for _ in range(rounds):
        for name, code in PROCESSES.items():
            try:
                measured[name].append(fresh_process(code.format(folder=folder), {"HF_HUB_OFFLINE": "1"}))
            except RuntimeError as error:
                print(f"  {name}: left out ({error})")
    return [
        {
            "fresh process": name,
            "seconds": statistics.median(run["seconds"] for run in runs),
            "min": min(run["seconds"] for run in runs),
            "max": max(run["seconds"] for run in runs),
            "peak MB": statistics.median(run["peak_mb"] for run in runs),
        }
        for name, runs in measured.items()
        if runs
    ]


def running(folder: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    import torch

    from gpt2_pt import GPT2LMHeadModel

    models: dict[str, Any] = {"gpt2_pt": GPT2LMHeadModel.from_pretrained(folder)}
    try:
        import transformers

        models["transformers"] = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    except ImportError:
        pass
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 50000, (1, 32), generator=generator)
    text = torch.randint(0, 50000, (1, 512), generator=generator)

    def forward(model: Any) -> None:
        with torch.no_grad():
            model(text, use_cache=False)

    def decode(model: Any, steps: int = 32) -> None:
        with torch.no_grad():
            out = model(prompt, use_cache=True)
            for _ in range(steps):
                new = out.logits[:, -1:].argmax(-1)
                out = model(new, past_key_values=out.past_key_values, use_cache=True)

    def train(model: Any) -> None:
        model(text[:, :128], labels=text[:, :128]).loss.backward()
        model.zero_grad(set_to_none=True)

    tables = {}
    for title, run in (
        ("forward, 512 tokens, s", forward),
        ("prompt of 32 and 32 cached steps, s", decode),
        ("forward and backward, 128 tokens, s", train),
    ):
        times = interleaved({name: lambda m=model, r=run: r(m) for name, model in models.items()}, rounds)
        base = statistics.median(times["gpt2_pt"])
        tables[title] = [
            {"model": name, **summary(seconds), "ratio to gpt2_pt": statistics.median(seconds) / base}
            for name, seconds in times.items()
        ]
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="gpt2", help="a preset: gpt2, distilgpt2, gpt2-medium, ...")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    args = parser.parse_args()

    from gpt2_core import PRESETS
    from gpt2_core.checkpoints import Tensor
    from gpt2_core.initialization import initial_values
    from gpt2_core.pretrained import save_pretrained

    print(machine())
    print(versions("torch", "transformers", "numpy", "safetensors"))
    with tempfile.TemporaryDirectory() as folder:
        config = PRESETS[args.size]
        tensors = {name: Tensor.of(value) for name, value in initial_values(config).items()}
        save_pretrained(Path(folder), config, "lm", tensors, architecture="GPT2LMHeadModel")
        del tensors
        results: dict[str, Any] = {"machine": machine(), "loading": loading(folder, args.rounds)}
        show(f"loading {args.size}", results["loading"])
        for title, rows in running(folder, args.rounds).items():
            results[title] = rows
            show(title, rows)
    write_json(args.json, results)


if __name__ == "__main__":
    main()
