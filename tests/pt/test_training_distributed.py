"""Several processes under torchrun: the losses of one, a killed one ends the run, another number of them goes on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2_core.errors import ConfigError
from gpt2_core.training_log import Log
from gpt2_core.training_state import steps_in
from gpt2_pt.training import processes
from pt.helpers import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package"),
    pytest.mark.skipif(sys.platform != "linux", reason="local processes over gloo are tried on Linux"),
]
SETTINGS = {
    "model": "gpt2", "from_scratch": "true", "config.n_layer": 2, "config.n_head": 2, "config.n_embd": 8,
    "config.n_positions": 32, "block_size": 16, "batch_size": 4, "accumulation": 2, "device": "cpu", "lr": 0.01,
    "sample_every": 0, "dropout": 0.0, "log_every": 1, "eval_every": 3, "save_every": 3, "ema_decay": 0.5,
    "warmup_steps": 0,
}  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started(text, out, processes, *more, **settings):
    given = [part for name, value in (SETTINGS | settings).items() for part in ("--set", f"{name}={value}")]
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={free_port()}", "-m"]
    command = [*python, "gpt2_app", "train", str(text), "--out", str(out), "-F", "pt", *given, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def losses(out):
    return [row.get("loss", row.get("validation_loss")) for row in Log.read(out)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "jack.txt"
    path.write_text("\n".join(f"There was once a king who had {number} sons." for number in range(200)))
    return path


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    ended(started(text, out, 1, steps=6))
    return out


def close(one, other):
    return len(one) == len(other) and all(abs(a - b) <= 1e-4 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(text, alone, tmp_path, parallel):
    ended(started(text, tmp_path / "run", 2, steps=6, parallel=parallel))
    assert close(losses(tmp_path / "run"), losses(alone))
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["n_embd"] == 8


def test_a_killed_process_ends_the_run_and_another_number_of_them_goes_on(text, alone, tmp_path):
    out = tmp_path / "run"
    both = started(text, out, 2, steps=100000)
    until = time.monotonic() + 200
    while not steps_in(out / "states") and both.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    children = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
    os.kill(int(children[-1]), 9)
    errors = both.communicate(timeout=200)[1]
    assert both.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    reached = steps_in(out / "states")[-1]
    ended(started(text, out, 1, "--resume", steps=reached + 3, parallel="auto"))
    assert steps_in(out / "states")[-1] == reached + 3
    ended(started(text, out, 2, "--resume", steps=reached + 4, parallel="fsdp"))
    found = [row["loss"] for row in Log.read(out) if "loss" in row]
    assert len(found) == reached + 4


def test_weights_that_are_shared_out_end_with_an_adapter(text, tmp_path):
    out = tmp_path / "run"
    ended(started(text, out, 2, steps=2, parallel="fsdp", lora_rank=2, ema_decay=0))
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "final" / "model.safetensors").is_file()


# What the processes of three runs see of their trainers, as JSON: of one, of two with DDP, of two with FSDP2. They are
# forked, so that PyTorch is imported once.
WITHIN = """
import json, multiprocessing, os, sys
import torch, torch.distributed.fsdp
from gpt2_core.config import GPT2Config
from gpt2_core.data_batches import Batch
from gpt2_core.recipe import Recipe
from gpt2_core.training import Update
from gpt2_pt.training import Trainer, build_model, processes

if hasattr(torch.nn.utils, "get_total_norm"):  # which PyTorch has from 2.6 on
    del torch.nn.utils.get_total_norm
config = GPT2Config(
    n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=50, bos_token_id=0, eos_token_id=0,
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
)

def within(parallel, number, count, port, pipe):
    os.environ.update(RANK=str(number), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    recipe = Recipe(from_scratch=True, batch_size=4, accumulation=2, parallel=parallel, device="cpu")
    out = {"losses": [], "norms": [], "held": [], "storages": []}
    with processes("cpu") as (rank, count, place):
        trainer = Trainer(build_model(recipe, config, place), recipe, rank=rank, world_size=count)
        for step in range(3):
            for micro in range(2):
                ids = (torch.arange(4 * 9).view(4, 9).numpy()[rank::count] + micro + step) % 50
                loss = trainer.gradients(Batch(ids[:, :-1], ids[:, :-1], ids[:, 1:]), (1 / 64, 0.0), 5, micro == 1)
                out["losses"] += trainer.total(float(loss))
                grads = [each.grad for each in trainer.model.parameters() if each.grad is not None]
                here = [each.to_local() if hasattr(each, "to_local") else each for each in grads]
                out["held"].append(sum(each.numel() for each in here))
                out["storages"].append(len({each.untyped_storage().data_ptr() for each in here}))
            out["norms"].append(trainer.update(Update(step + 1, 0.1, 0.9, 0.95, 1e-8, 0.95, 0.0, 1.0, 1.0, 0.0)))
        out["all"] = sum(each.numel() for each in trainer.model.parameters()) if parallel == "none" else 0
    pipe.send(out)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")  # a forked child may wait for a thread that it does not have
    for (parallel, count), port in zip((("none", 1), ("ddp", 2), ("fsdp", 2)), sys.argv[1:]):
        here, there = context.Pipe()
        both = [context.Process(target=within, args=(parallel, each, count, port, there)) for each in range(count)]
        [each.start() for each in both]
        [each.join() for each in both]
        assert all(each.exitcode == 0 for each in both)
        print(json.dumps(here.recv()))
"""


def test_gradients_are_held_once_and_shared_out_between_micro_batches_of_losses_and_norms_of_one(tmp_path):
    script = tmp_path / "within.py"
    script.write_text(WITHIN)
    command = [sys.executable, str(script), *(free_port() for _ in range(3))]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    one, ddp, fsdp = (json.loads(line) for line in done.stdout.splitlines())
    assert one["held"] == ddp["held"] == [one["all"]] * 6
    assert max(ddp["storages"][1:]) <= 2  # the buckets that are sent, and nothing beside them
    assert all(0 < held <= 0.6 * one["all"] for held in fsdp["held"])
    assert one["losses"][0] != one["losses"][-1] and all(one["norms"])
    for other in (ddp, fsdp):
        assert close(other["losses"], one["losses"])
        assert close(other["norms"], one["norms"])


def test_several_processes_are_not_given_one_numbered_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(ConfigError, match=r"device is 'cuda:0', and there are 2 processes; .* set it to 'cuda'"),
        processes("cuda:0"),
    ):
        pass
