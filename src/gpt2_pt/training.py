"""The arithmetic of training in PyTorch: what `gpt2_core.training` calls a backend, alone or among several processes.

    model = build_model(recipe)
    backend = Trainer(model, recipe)
    Training(recipe, backend, batches, Run(folder), steps=1000).train()

Under torchrun the processes share the batch (DistributedDataParallel), or the weights as well (fully_shard, FSDP2). The
state is the same in all cases: whole tensors by name, so a run goes on with another number of processes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2_core import muon
from gpt2_core.adapters import A, B, Lora, adapter_table, layers_of, merged
from gpt2_core.checkpoints.tensors import Tensor as FileTensor
from gpt2_core.config import GPT2Config
from gpt2_core.data_batches import IGNORED, Batch
from gpt2_core.errors import ConfigError, InputError
from gpt2_core.parameters import Head, Parameter
from gpt2_core.recipe import Recipe, frozen
from gpt2_core.training import Update
from gpt2_core.training_state import About, Groups
from gpt2_pt.adapters import attach
from gpt2_pt.chunked import chunked_loss
from gpt2_pt.heads import GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2LMHeadModel, last_real
from gpt2_pt.muon import step as muon_step
from gpt2_pt.products import linear
from gpt2_pt.weights import DTYPES, PreTrainedModel

CLASSES: Mapping[Head, type[PreTrainedModel]] = {
    Head.LM: GPT2LMHeadModel,
    Head.DOUBLE: GPT2DoubleHeadsModel,
    Head.SEQUENCE: GPT2ForSequenceClassification,
}


def build_model(recipe: Recipe, config: GPT2Config, place: str | None = None) -> PreTrainedModel:
    """The model that a recipe begins with, its weights in float32.

    ``config`` is the recipe's, with its changes made. Raises: as ``from_pretrained``.
    """
    cls = CLASSES[recipe.head]
    device = torch.device(place or ("cuda" if torch.cuda.is_available() else "cpu"))
    if recipe.from_scratch:
        with device:
            return cls(config, seed=recipe.seed)
    model = cls.from_pretrained(recipe.model, config=config, dtype=torch.float32, device=device, seed=recipe.seed)
    # Weights in the mapped file itself would be copied a page at a time by the first update.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.tie_weights()
    return model


class Objective(nn.Module):
    """The model and its loss on a batch, in one forward pass: what is shared, sharded and compiled."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of losses of tokens or classes, and of choices (or zero), times ``weights`` (2,)."""
        model: Any = self.model
        none = torch.zeros((), device=next(iter(inputs.values())).device)
        if model.head is Head.SEQUENCE:
            out = model(inputs["input_ids"], attention_mask=inputs.get("attention_mask"), use_cache=False)
            loss = _cross_entropy(out.logits, inputs["labels"])
            return loss * weights[0], none
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if model.head is Head.DOUBLE:
            ids, mask = ids.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        x = model.transformer(ids, attention_mask=mask, use_cache=False).last_hidden_state
        flat = x.flatten(0, 1)
        if torch.is_autocast_enabled(flat.device.type):
            flat = flat.to(torch.get_autocast_dtype(flat.device.type))
        with torch.autocast(flat.device.type, enabled=False):
            loss = chunked_loss(flat, model.lm_head.weight, inputs["targets"].flatten(), weights[0])
        if model.head is Head.LM:
            return loss, none
        B, N = inputs["input_ids"].shape[:2]
        index = inputs.get("mc_token_ids")
        at = last_real(ids, mask, model.config.pad_token_id, x) if index is None else index.flatten()
        scores = model.multiple_choice_head(x, at).view(B, N)
        return loss, _cross_entropy(scores, inputs["mc_labels"]) * weights[1]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")


class Trainer:
    """One process of a run in PyTorch: gradients, AdamW, EMA, and the state in and out.

    Raises: ConfigError, where the recipe freezes everything or nothing that there is.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, *, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size, self.recipe, self.model = rank, world_size, recipe, model
        self._device = model.device
        lora = Lora(recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets, recipe.lora_dropout)
        self._lora = lora if recipe.lora_rank else None
        self.about = About(model.config, type(model).__name__, self._lora, recipe.model)
        self._table: dict[str, Parameter] = {row.name: row for row in model.parameter_table()}
        self._freeze(recipe)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        objective = Objective(model)
        self._parallel = _parallel(recipe, world_size)
        self._wrapped: Any = _shared(objective, self._parallel, recipe, self._device)
        self._run: Any = self._wrapped
        self._names = [name for name in self._trained_table() if model.get_parameter(name).requires_grad]
        table = self._trained_table()
        by_muon = [name for name in self._names if recipe.optimizer == "muon" and muon.is_for(table[name])]
        self._momenta = {name: torch.zeros_like(self._parameter(name).detach()) for name in by_muon}
        self._optimizer = self._adamw()
        self._ema = {name: self._parameter(name).detach().clone() for name in self._names} if recipe.ema_decay else {}
        if recipe.compile:
            self._run = torch.compile(self._run)

    # -- building --------------------------------------------------------------------------------------------

    def _freeze(self, recipe: Recipe) -> None:
        if self._lora is not None:
            attach(self.model, self._lora, recipe.seed)
            return
        for name in frozen(list(self._table), recipe.freeze):
            self.model.get_parameter(name).requires_grad_(False)

    def _trained_table(self) -> dict[str, Parameter]:
        """The rows of what a state holds: the model's own, or the adapter's."""
        if self._lora is None:
            return self._table
        return {row.name: row for row in adapter_table(self.model.config, self.model.head, self._lora)}

    def _parameter(self, name: str) -> Tensor:
        return self.model.get_parameter(name)

    def _adamw(self) -> torch.optim.AdamW:
        table = self._trained_table()
        names = [name for name in self._names if name not in self._momenta]
        groups = [
            {"params": [self._parameter(name) for name in names if table[name].decay is decay], "decay": decay}
            for decay in (True, False)
        ]
        recipe = self.recipe
        settings: dict[str, Any] = {"lr": recipe.lr, "betas": (recipe.beta1, recipe.beta2), "eps": recipe.eps}
        # Nothing may be left to it; it wants something nevertheless.
        groups = [group for group in groups if group["params"]] or [{"params": [torch.zeros(0)], "decay": False}]
        try:  # one pass over memory; not every device and version has it
            return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True, **settings)
        except (RuntimeError, ValueError, TypeError):
            return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, foreach=True, **settings)

    # -- a step ----------------------------------------------------------------------------------------------

    def gradients(self, batch: Batch, weights: tuple[float, float], seed: int, last: bool = True) -> Tensor:
        """Add the gradients of one micro-batch to those held; its weighted loss, on the device."""
        torch.manual_seed(seed)
        # The engines take the mean over processes of what are sums here.
        share = torch.tensor(weights, device=self._device) * self.world_size
        with self._without_exchange(last):
            with self._autocast():
                first, second = self._run(self._inputs(batch), share)
            loss: Tensor = first + second
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() / self.world_size

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        given = batch.inputs()
        if batch.targets is not None:
            given["targets"] = batch.targets
            given.pop("labels", None)
        out = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in given.items()}
        if self._device.type == "cuda":
            return {name: value.pin_memory().to(self._device, non_blocking=True) for name, value in out.items()}
        return {name: value.to(self._device) for name, value in out.items()}

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, DTYPES[self.recipe.dtype])

    def _without_exchange(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Between micro-batches of one step the processes need not meet, where each holds all gradients anyway.

        With FSDP they do: without, each would hold them whole from one micro-batch to the next.
        """
        if self._parallel == "ddp" and not last:
            return self._wrapped.no_sync()  # type: ignore[no-any-return]
        return contextlib.nullcontext()

    def update(self, settings: Update) -> float:
        """One update of AdamW, or of Muon and AdamW, and the EMA; the global norm of the gradients before clipping."""
        parameters = [self._parameter(name) for name in self._names]
        held = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(_norm(held)) / settings.scale
        if np.isfinite(norm):
            shrink = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
            if (factor := shrink / settings.scale) != 1.0:
                torch._foreach_mul_(held, factor)
            for group in self._optimizer.param_groups:
                group["lr"] = settings.lr
                group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps
                group["weight_decay"] = settings.weight_decay if group["decay"] else 0.0
            self._optimizer.step()
            for name, momentum in self._momenta.items():
                parameter = self._parameter(name)
                if parameter.grad is not None:
                    _move(parameter, parameter.grad, momentum, settings, self._table[name].decay)
            if self._ema:
                values = [parameter.detach() for parameter in parameters]
                torch._foreach_lerp_(list(self._ema.values()), values, 1 - settings.ema_decay)
        for parameter in parameters:
            if self._parallel == "ddp" and parameter.grad is not None:
                parameter.grad.zero_()  # it is a part of what is sent, and stays so between micro-batches
            else:
                parameter.grad = None
        return norm

    @torch.no_grad()
    def losses(self, batch: Batch) -> tuple[float, float]:
        """The sums of losses of a batch, without dropout, by the EMA if there is one."""
        self.model.eval()
        try:
            with self._averaged(), self._autocast():
                first, second = self._run(self._inputs(batch), torch.ones(2, device=self._device))
                if self._parallel == "fsdp":  # which keeps some weights whole until a backward pass that does not come
                    self._wrapped.reshard()
        finally:
            self.model.train()
        return float(first), float(second)

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        together = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(together)
        return [float(number) for number in together]

    # -- the state -------------------------------------------------------------------------------------------

    def shapes(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """The names and shapes of each group of a state."""
        table = self._trained_table()
        trained = {name: table[name].shape for name in self._names}
        whole = {row.name: row.shape for row in table.values()}
        of_adamw = {name: shape for name, shape in trained.items() if name not in self._momenta}
        out = {"model" if self._lora is None else "adapter": whole, "exp_avg": trained, "exp_avg_sq": of_adamw}
        return out | ({"ema": trained} if self._ema else {})

    def export(self) -> Groups:
        """The tensors of the state, float32, each fetched when asked for."""
        weights = {name: _to_file(self._parameter(name)) for name in self._trained_table()}
        out = {"model" if self._lora is None else "adapter": weights}
        for moment in ("exp_avg", "exp_avg_sq"):
            names = [name for name in self._names if moment == "exp_avg" or name not in self._momenta]
            out[moment] = {name: _to_file(self._moment(name, moment)) for name in names}
        if self._ema:
            out["ema"] = {name: _to_file(value) for name, value in self._ema.items()}
        return out

    def _moment(self, name: str, moment: str) -> Tensor:
        if name in self._momenta:
            return self._momenta[name]
        parameter = self._parameter(name)
        held: Tensor | None = self._optimizer.state.get(parameter, {}).get(moment)
        return torch.zeros_like(parameter) if held is None else held

    @torch.no_grad()
    def restore(self, groups: Groups, updates: int) -> None:
        """Take the tensors of a state, after so many updates: what the moments are corrected by."""
        for name, tensor in groups["model" if self._lora is None else "adapter"].items():
            _fill(self._parameter(name), tensor)
        for name, tensor in groups["ema"].items():
            _fill(self._ema[name], tensor)
        for name, momentum in self._momenta.items():
            _fill(momentum, groups["exp_avg"][name])
        for name in self._names:
            if name in self._momenta:
                continue
            parameter = self._parameter(name)
            state = self._optimizer.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter)
                _fill(state[moment], groups[moment][name])
            state["step"] = torch.tensor(float(updates), device=self._step_device())

    def _step_device(self) -> torch.device:
        fused = self._optimizer.defaults.get("fused")
        return self._device if fused else torch.device("cpu")

    def final(self) -> dict[str, FileTensor]:
        """The finished model's parameters by name: of the EMA if there is one, an adapter merged."""
        out = {name: _to_file(self._ema.get(name, self._parameter(name))) for name in self._table}
        if self._lora is not None:
            for layer in layers_of(self._names):
                parts = [self._ema.get(each, self._parameter(each)) for each in (layer + A, layer + B)]
                out[f"{layer}.weight"] = _merged(self._parameter(f"{layer}.weight"), parts, self._lora.scale)
        return out

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The EMA in the place of the weights."""
        if not self._ema:
            yield
            return
        now = {name: self._parameter(name).detach().clone() for name in self._ema}
        for name, value in self._ema.items():
            self._parameter(name).data.copy_(value)
        try:
            yield
        finally:
            for name, value in now.items():
                self._parameter(name).data.copy_(value)

    # -- beside training -------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, ids: Sequence[int], count: int, seed: int) -> list[int]:
        """The ids with up to ``count`` more, drawn from the 40 likeliest; empty where the weights are shared out."""
        if self._parallel == "fsdp" or not isinstance(self.model, GPT2LMHeadModel):
            return []
        room = self.model.config.n_positions - len(ids)
        self.model.eval()
        try:
            with self._averaged(), self._autocast():
                made = self.model.generate(
                    torch.tensor([list(ids)], device=self._device), max_new_tokens=min(count, room), do_sample=True,
                    top_k=40, seed=seed,
                )  # fmt: skip
        finally:
            self.model.train()
        return [int(each) for each in made[0]]

    def peak_flops(self, seconds: float = 0.5) -> float:
        """Multiplications and additions a second of this process's large products, measured."""
        size = 1024 if self._device.type == "cpu" else 8192
        kind = DTYPES[self.recipe.dtype]
        left, right = (torch.randn(size, size, device=self._device).to(kind) for _ in range(2))
        best, until = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            _wait(self._device)
            began = time.perf_counter()
            for _ in range(4):
                linear(left, right)  # by the library that trains
            _wait(self._device)
            best = max(best, 8 * size**3 / (time.perf_counter() - began))
        return best


@torch.no_grad()
def _move(kernel: Tensor, slope: Tensor, momentum: Tensor, settings: Update, decay: bool) -> None:
    """One update of Muon, in place."""
    way, after = muon_step(slope.to(momentum.dtype), momentum, settings.momentum)
    if decay:
        kernel.mul_(1 - settings.lr * settings.weight_decay)
    kernel.sub_(way, alpha=settings.lr)
    momentum.copy_(after)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that several processes share."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all numbers together: torch.nn.utils.get_total_norm, which PyTorch has from 2.6 on."""
    if not tensors:
        return torch.zeros(())
    is_shared = hasattr(tensors[0], "full_tensor")
    each = [torch.linalg.vector_norm(one) for one in tensors] if is_shared else torch._foreach_norm(tensors)
    return _whole(torch.linalg.vector_norm(torch.stack(tuple(each))))


def _to_file(tensor: Tensor) -> FileTensor:
    def load() -> np.ndarray[Any, Any]:
        array: np.ndarray[Any, Any] = _whole(tensor.detach()).to("cpu", torch.float32).contiguous().numpy()
        return array

    return FileTensor("float32", tuple(tensor.shape), load)


def _merged(kernel: Tensor, parts: Sequence[Tensor], scale: float) -> FileTensor:
    def load() -> np.ndarray[Any, Any]:
        arrays = [_to_file(each).raw() for each in (kernel, *parts)]
        return merged(arrays[0], arrays[1], arrays[2], scale)

    return FileTensor("float32", tuple(kernel.shape), load)


def _fill(tensor: Tensor, saved: FileTensor) -> None:
    value = torch.from_numpy(np.array(saved.array())).to(tensor.device, tensor.dtype)
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        shared: Any = tensor
        value = distribute_tensor(value, shared.device_mesh, shared.placements)
    tensor.copy_(value)
    saved.release()


# -- several processes ---------------------------------------------------------------------------------------


def _parallel(recipe: Recipe, world_size: int) -> str:
    if world_size == 1:
        return "none"
    if recipe.parallel == "none":
        raise ConfigError(
            f"parallel is 'none', but there are {world_size} processes; set it to 'ddp' or 'fsdp', or start one process"
        )
    return "ddp" if recipe.parallel == "auto" else recipe.parallel


def _shared(objective: Objective, parallel: str, recipe: Recipe, device: torch.device) -> Any:
    """The objective as the processes share it."""
    if parallel == "none":
        return objective
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        ids = [device.index] if device.type == "cuda" else None
        # Gradients in the buckets that are sent; else those are a second copy of all of them.
        return DistributedDataParallel(objective, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError as cause:
        raise InputError(
            f"parallel='fsdp' needs fully_shard, which PyTorch has from 2.6 on, and this is {torch.__version__}; "
            "upgrade it, or set parallel='ddp'"
        ) from cause
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    half = None if recipe.dtype == "float32" else DTYPES[recipe.dtype]
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    for block in objective.model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(objective, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def processes(place: str | None = None) -> Iterator[tuple[int, int, str | None]]:
    """This process's number, how many there are, and its device: as torchrun says, else alone.

    With several, they are joined (nccl on GPUs, gloo else) for as long as the block runs. Raises: ConfigError, where
    all of them would be on one GPU.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1, place
        return
    if place is not None and (device := torch.device(place)).type != "cpu" and device.index is not None:
        raise ConfigError(
            f"device is {place!r}, and there are {world_size} processes; each takes the GPU of its own number: set it "
            f"to {device.type!r}"
        )
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and place in (None, "cuda")
    if on_gpu:
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield rank, world_size, f"cuda:{local}" if on_gpu else place
        # A thread of gloo's may still let go of the last exchange, for which it needs Python, while Python, taking the
        # group apart, waits for the thread: seen as a process that does not end, one run in six.
        with contextlib.suppress(RuntimeError):  # where another process has ended already
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
