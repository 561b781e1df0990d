"""Training on two processes equals training on one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pt.helpers import torch

SCRIPT = """
import os, sys
rank, port, tests = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE="2")
sys.path.insert(0, tests)
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from pt.helpers import ids_of, model_of

torch.set_num_threads(1)
dist.init_process_group("gloo")
quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
for checkpointing in (False, True):
    alone, ours = model_of(**quiet).train(), model_of(**quiet).train()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    ids = ids_of(alone, 4, 6)
    alone(ids, labels=ids).loss.backward()
    wrapped = DistributedDataParallel(ours, find_unused_parameters=not checkpointing)
    part = ids[2 * rank : 2 * rank + 2]
    out = wrapped(part, labels=part)
    assert type(out).__name__ == "LMOutput"
    out.loss.backward()
    for (name, one), other in zip(alone.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    state = {name.removeprefix("module."): value for name, value in wrapped.state_dict().items()}
    alone.load_state_dict(state)

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None
if fully_shard is not None:
    alone, ours = model_of(**quiet).train(), model_of(**quiet).train()
    for block in ours.transformer.h:
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (2,)) if hasattr(dist, "init_device_mesh") else None)
    fully_shard(ours, mesh=dist.init_device_mesh("cpu", (2,)) if hasattr(dist, "init_device_mesh") else None)
    alone(ids, labels=ids).loss.backward()
    ours(part, labels=part).loss.backward()
    for (name, one), other in zip(alone.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad.full_tensor(), msg=name)
dist.barrier()
dist.destroy_process_group()
sys.stderr.flush()
os._exit(0)  # gloo's threads, if they still run when the interpreter goes, can end the process with an abort
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
@pytest.mark.skipif(sys.platform != "linux", reason="two local processes over gloo are tried on Linux")
def test_gradients_of_two_processes_are_those_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", SCRIPT]
    both = [
        subprocess.Popen([*command, str(rank), port, tests], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
