"""The one loop of training: steps, the log, evaluation, saved states, early stopping, signals. No framework.

    train(recipe, backend, batches, run, evaluation=...) -> Progress

What a framework does is `Backend`: gradients of a micro-batch, one update of AdamW, losses, its state in and out. Every
other decision is made here once, so that a run is the same run in both.

A step takes ``accumulation`` micro-batches. Its loss is the mean over all that they have to learn, in all processes:
each micro-batch is weighted by what it holds, so that neither accumulation nor the number of processes changes the sum.

Randomness is no state: whatever a step draws for dropout follows from (seed, step, micro-batch, rank), by `drawn_seed`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpt2_core.config import GPT2Config
from gpt2_core.data_batches import IGNORED, Batch
from gpt2_core.errors import ConfigError, InputError, TrainingError
from gpt2_core.recipe import Recipe, differences
from gpt2_core.schedule import rate, steps_of
from gpt2_core.training_log import Log, finite
from gpt2_core.training_state import (
    About,
    Groups,
    Progress,
    Saved,
    check_groups,
    folder_of,
    open_state,
    prune,
    remove,
    save_state,
    steps_in,
)

# How the scale of the loss follows float16's range: halved when gradients overflow, doubled after so many steps without
# (Micikevicius et al. 2018, section 3.2; the numbers are those of the frameworks' own scalers).
GROW_AFTER = 2000
LEAST_SCALE = 2.0**-14
_TAIL = 100  # rows of the log that a state keeps


@dataclass(frozen=True)
class Update:
    """What one update is told: ``number`` counts from 1; gradients are divided by ``scale`` first.

    AdamW: p <- p - lr * weight_decay * p, then p <- p - lr * m' / (sqrt(v') + eps), with m' and v' the moments
    corrected for their start at zero; ``clip`` is the largest global norm, 0 for none. (Loshchilov & Hutter 2019,
    algorithm 2.) ``momentum`` is Muon's.
    """

    number: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    weight_decay: float
    clip: float
    scale: float
    ema_decay: float


class Backend(Protocol):
    """What a framework does in a run. Every process of a run calls the same methods in the same order."""

    rank: int
    world_size: int
    about: About

    def gradients(self, batch: Batch, weights: tuple[float, float], seed: int, last: bool) -> Any:
        """Add the gradients of one micro-batch to those held, and give its loss, which `float` waits for.

        The loss is the sum over what there is to learn times ``weights[0]``, and for the choices of the double-heads
        task ``weights[1]`` times theirs. ``last`` says that an update follows.
        """

    def update(self, settings: Update) -> float:
        """One update by the gradients held, which are dropped; the global norm before clipping.

        Where the norm is no finite number nothing changes but that.
        """

    def losses(self, batch: Batch) -> tuple[float, float]:
        """The sums of losses of a batch, without dropout: what `gradients` weights, unweighted. By the EMA if any."""

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""

    def shapes(self) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """The names and shapes of each group of a state."""

    def export(self) -> Groups:
        """The tensors of the state, float32, fetched one at a time; every process has to fetch all, in order."""

    def restore(self, groups: Groups, updates: int) -> None:
        """Take the tensors of a state, after so many updates."""

    def final(self) -> Mapping[str, Any]:
        """The finished model's parameters by name: of the EMA if any, with an adapter merged."""

    def sample(self, ids: Sequence[int], count: int, seed: int) -> list[int]:
        """The ids with ``count`` more, drawn from what the model has learnt; empty where it is no language model."""


class Source(Protocol):
    """Where micro-batches come from, and how to come back to a place."""

    def __next__(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""


@dataclass
class Run:
    """Where a run stands and who is told: all optional, so that a run can be in memory alone.

    Attributes:
        folder: for states/ and the log; None writes nothing.
        on_step: told how many steps are done, after each.
        on_row: told every row of the log: {"step", "loss", "lr", ...} or {"step", "validation_loss"}.
        on_text: told what the model wrote, (step, ids).
        on_save: told of each state.
        prompt: the ids that samples begin with.
        flops_per_token, peak_flops: for the share of the machine's peak; 0 where it is not known.
    """

    folder: Path | None = None
    on_step: Callable[[int], None] = lambda step: None
    on_row: Callable[[Mapping[str, Any]], None] = lambda row: None
    on_text: Callable[[int, list[int]], None] = lambda step, ids: None
    on_save: Callable[[Path], None] = lambda path: None
    prompt: Sequence[int] = ()
    flops_per_token: float = 0.0
    peak_flops: float = 0.0


@dataclass
class _Stop:
    """Why a run ends before its last step: ``asked`` of this process, ``reason`` once all processes know."""

    asked: str = ""
    reason: str = ""


def drawn_seed(*key: int) -> int:
    """A seed below 2**31 for one place of a run, from whole numbers that say which: (seed, step, micro-batch, rank)."""
    digest = hashlib.sha256(",".join(str(part) for part in key).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def flops_per_token(config: GPT2Config, tokens: int) -> float:
    """Multiplications and additions of training on one token of rows of ``tokens``: 6 N + 12 L C T.

    N are the numbers of the kernels and of the head; each takes part in two operations forward and four backward.
    Attention counts whole, as if no key were left out. Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    kernels = config.n_layer * config.n_embd * (4 * config.n_embd + 2 * config.inner_dim)
    return 6.0 * (kernels + config.vocab_size * config.n_embd) + 12.0 * config.n_layer * config.n_embd * tokens


def planned_steps(recipe: Recipe, tokens: int, block_size: int) -> int:
    """How many steps the recipe asks for, with so many ``tokens`` to train on.

    Raises: ConfigError, where it says neither steps nor epochs, or fewer steps than warming up takes.
    """
    if recipe.steps is None and recipe.epochs is None:
        raise ConfigError("the recipe says neither steps nor epochs; set one of them, as steps=1000")
    if recipe.steps is not None:
        return recipe.steps
    steps = steps_of(recipe.epochs or 0.0, tokens, recipe.batch_size * recipe.accumulation * block_size)
    if recipe.warmup_steps + recipe.cooldown_steps > steps:
        raise ConfigError(
            f"epochs={recipe.epochs} are {steps} steps here, fewer than warmup_steps={recipe.warmup_steps} and "
            f"cooldown_steps={recipe.cooldown_steps}; lower them"
        )
    return steps


class Training:
    """One run, from its first step or from a saved state on."""

    def __init__(
        self,
        recipe: Recipe,
        backend: Backend,
        batches: Source,
        run: Run,
        *,
        steps: int,
        evaluation: Callable[[], Iterable[Batch]] | None = None,
    ) -> None:
        self.recipe, self.backend, self.batches, self.run = recipe, backend, batches, run
        self.steps, self.evaluation = steps, evaluation
        half = recipe.dtype == "float16"
        self.progress = Progress(loss_scale=recipe.loss_scale if half else 1.0)
        self._scaled = half
        self._saved = -1  # the step whose state is written: every process knows, so that all fetch it or none
        self._log: Log | None = None
        self._stop = _Stop()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.backend.rank == 0

    @property
    def states(self) -> Path | None:
        """The folder of saved states."""
        return None if self.run.folder is None else self.run.folder / "states"

    # -- from one state to another ---------------------------------------------------------------------------

    def resume(self, folder: Path | None = None) -> bool:
        """Go on from the state in ``folder``, or the last there is; False where there is none.

        Raises: ConfigError, where the recipe is another one, saying in what; CheckpointError, where the state is
        damaged or belongs to another model; InputError, where the data are others.
        """
        if folder is None:
            found = [] if self.states is None else steps_in(self.states)
            if not found or self.states is None:
                return False
            folder = folder_of(self.states, found[-1])
        with open_state(folder) as saved:
            self._check(saved)
            self.batches.restore(saved.progress.data)
            self.backend.restore(saved.groups, saved.progress.updates)
            self.progress = saved.progress
        own = self.states is not None and folder.resolve() == folder_of(self.states, self.progress.step).resolve()
        self._saved = self.progress.step if own else -1
        return True

    def _check(self, saved: Saved) -> None:
        changed = differences(Recipe.from_dict(saved.recipe), self.recipe)
        if changed:
            raise ConfigError(
                f"the run in {saved.folder.parent.parent} was begun with another recipe: {'; '.join(changed)}; resume "
                "it with the recipe that it has, or begin another run"
            )
        check_groups(saved, self.backend.shapes())

    def save(self) -> Path | None:
        """Write the state as it is now; None where the run has no folder."""
        if self.states is None:
            return None
        progress, recipe = self.progress, self.recipe
        if self._saved == progress.step:
            return folder_of(self.states, progress.step) if self.is_first else None
        groups = self.backend.export()
        if not self.is_first:
            for group in groups.values():
                for tensor in group.values():
                    tensor.raw()  # what the processes hold together is put together by all of them
            self._saved = progress.step
            return None
        path = save_state(self.states, progress, groups, self.backend.about, recipe.to_dict())
        self._saved = progress.step
        prune(self.states, recipe.keep_last, keep=[step for _, step in progress.best[: recipe.keep_best]])
        self.run.on_save(path)
        return path

    # -- the loop --------------------------------------------------------------------------------------------

    def train(self) -> Progress:
        """Take the steps that are left. What ended the run early is in ``stopped``.

        States and rows of the log that came after where it begins are removed.

        Raises: TrainingError, where loss or gradients are no numbers, with the last good state saved; InputError, where
        the folder holds another run's states.
        """
        with contextlib.ExitStack() as ends:
            self._remove_later()
            if self.run.folder is not None and self.is_first:
                self._log = ends.enter_context(Log(self.run.folder, tensorboard=self.recipe.tensorboard))
            ends.enter_context(self._signals())
            clock = _Clock(self.run, self.backend.world_size)
            while self.progress.step < self.steps and not self._is_patience_over():
                self._one_step(clock)
                if self._between():
                    break
            if self.progress.step and self.states is not None:
                self.save()
        return self.progress

    def _remove_later(self) -> None:
        """What stands in the way of what will be written: of this run, if it goes on from an earlier state."""
        if self.run.folder is None or self.states is None:
            return
        step, there = self.progress.step, steps_in(self.states)
        if self._saved != step and there and there[-1] >= step:
            raise InputError(
                f"{self.run.folder} holds states of a run of {there[-1]} steps; go on with it by resume(), or begin "
                "another in a folder of its own"
            )
        if self.is_first:
            remove(self.states, [each for each in there if each > step])
            Log.cut(self.run.folder, step)

    @property
    def stopped(self) -> str:
        """Why the run ended before its last step: "" if it did not."""
        return self._stop.reason

    def _one_step(self, clock: _Clock) -> None:
        recipe, progress, backend = self.recipe, self.progress, self.backend
        before, began = self.batches.state(), time.perf_counter()
        micro = [next(self.batches) for _ in range(recipe.accumulation)]
        tokens, choices, real = backend.total(*np.sum([_counts(batch) for batch in micro], axis=0).tolist())
        if not tokens and not choices:
            raise InputError(
                f"the batch of step {progress.step} has nothing to learn: every label is {IGNORED}; check the data"
            )
        weights = (progress.loss_scale / max(tokens, 1.0), progress.loss_scale / max(choices, 1.0))
        made = [
            backend.gradients(
                batch,
                weights,
                drawn_seed(recipe.seed, progress.step, number, backend.rank),
                number == len(micro) - 1,
            )
            for number, batch in enumerate(micro)
        ]
        lr = rate(
            progress.step, peak=recipe.lr, steps=self.steps, kind=recipe.schedule, warmup=recipe.warmup_steps,
            least=recipe.min_lr, cooldown=recipe.cooldown_steps,
        )  # fmt: skip
        norm = backend.update(self._settings(lr))
        loss, stop = backend.total(
            sum(float(each) for each in made) / progress.loss_scale, float(bool(self._stop.asked))
        )
        good = math.isfinite(norm)
        if not math.isfinite(loss) or (not good and not self._scaled):
            self._fail(
                f"has loss {loss} and gradients of norm {norm}, expected finite numbers: nothing was changed by it",
                before,
            )
        if not good and progress.loss_scale / 2 < LEAST_SCALE:
            self._fail(
                f"has gradients of norm {norm} however small the scale of the loss, which would fall below "
                f"{LEAST_SCALE}: they are too large for float16, or no numbers",
                before,
            )
        if stop:
            self._stop.reason = self._stop.asked or "another process was told to end"
        progress.step += 1
        progress.updates += good
        progress.tokens += int(real)
        progress.data = self.batches.state()
        self._follow_scale(good)
        clock.add(int(real), time.perf_counter() - began)
        if self.is_first:
            self.run.on_step(progress.step)
        if progress.step % recipe.log_every == 0 or progress.step == self.steps:
            row = {"step": progress.step, "loss": loss, "lr": lr, "norm": norm, "tokens": progress.tokens}
            if self._scaled:
                row["loss_scale"] = progress.loss_scale
            self._tell(row | clock.read())

    def _settings(self, lr: float) -> Update:
        recipe, progress = self.recipe, self.progress
        return Update(
            progress.updates + 1, lr, recipe.beta1, recipe.beta2, recipe.eps, recipe.momentum,
            recipe.weight_decay, recipe.clip, progress.loss_scale, recipe.ema_decay,
        )  # fmt: skip

    def _follow_scale(self, good: bool) -> None:
        """Halve the scale of the loss where gradients overflowed, double it after many that did not."""
        progress = self.progress
        if not self._scaled:
            return
        progress.good_steps = progress.good_steps + 1 if good else 0
        if not good:
            progress.loss_scale /= 2
        elif progress.good_steps >= GROW_AFTER:
            progress.loss_scale, progress.good_steps = progress.loss_scale * 2, 0

    def _fail(self, what: str, data: Mapping[str, Any]) -> None:
        kept = self.save() if self.progress.step else None
        batch = data.get("samples", data)
        where = f"; the state before it is in {kept}" if kept is not None else ""
        raise TrainingError(
            f"step {self.progress.step} {what}{where}. Its batch begins at row {batch} of the data; lower lr, warm up "
            "longer, or set clip"
        )

    # -- between steps ---------------------------------------------------------------------------------------

    def _between(self) -> bool:
        """Evaluate, write, save, where it is time to; whether the run ends here."""
        recipe, progress = self.recipe, self.progress
        last = progress.step == self.steps
        is_kept = False
        if self.evaluation is not None and recipe.eval_every and (progress.step % recipe.eval_every == 0 or last):
            is_kept = self._evaluate()
            self._is_patience_over()
        ends = last or bool(self._stop.reason)
        is_time = recipe.save_every and progress.step % recipe.save_every == 0
        if ends or is_time or is_kept:
            self.save()
        if recipe.sample_every and (progress.step % recipe.sample_every == 0 or last):
            ids = self.backend.sample(self.run.prompt, recipe.sample_tokens, drawn_seed(recipe.seed, progress.step))
            if ids and self.is_first:
                self.run.on_text(progress.step, ids)
        return ends

    def _is_patience_over(self) -> bool:
        """Whether so many evaluations were worse than the best that the run ends, which `stopped` then says."""
        worse = self.progress.worse
        over = bool(self.recipe.patience) and worse >= self.recipe.patience
        if over:
            self._stop.reason = f"no better loss in {worse} evaluations"
        return over

    def _evaluate(self) -> bool:
        """Score the validation data; whether this is one of the best, whose states stay."""
        assert self.evaluation is not None
        loss = evaluate(self.backend, self.evaluation(), self.recipe.eval_batches)
        progress = self.progress
        better = math.isfinite(loss) and (not progress.best or loss < progress.best[0][0])
        progress.worse = 0 if better else progress.worse + 1
        if math.isfinite(loss):  # nothing is less than nan: it would stay the best
            progress.best = sorted([*progress.best, (loss, progress.step)])[: max(1, self.recipe.keep_best)]
        self._tell({"step": progress.step, "validation_loss": loss})
        return any(step == progress.step for _, step in progress.best[: self.recipe.keep_best])

    def _tell(self, row: Mapping[str, Any]) -> None:
        self.progress.metrics = [*self.progress.metrics, finite(row)][-_TAIL:]
        if self._log is not None:
            self._log.write(row)
        if self.is_first:
            self.run.on_row(row)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Told to end, finish the step and save; told again, end at once. Only a main thread can be told."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        told = [signal.SIGINT, signal.SIGTERM]
        before = {each: signal.getsignal(each) for each in told}

        def stop(number: int, frame: Any) -> None:
            self._stop.asked = f"told to by {signal.Signals(number).name}"
            for each in told:
                signal.signal(each, before[each])

        try:
            for each in told:
                signal.signal(each, stop)
            yield
        finally:
            for each in told:
                signal.signal(each, before[each])


def evaluate(backend: Backend, batches: Iterable[Batch], most: int = 0) -> float:
    """The mean loss over all that the batches have to learn, in nats; ``most`` batches, or all where that is 0."""
    sums = np.zeros(4)
    for number, batch in enumerate(batches):
        if most and number >= most:
            break
        sums += (*backend.losses(batch), *_counts(batch)[:2])
    first, second, tokens, choices = backend.total(*sums.tolist())
    if not tokens and not choices:
        raise InputError(f"the validation data have nothing to score: every label is {IGNORED}; check them")
    return first / max(tokens, 1.0) + second / max(choices, 1.0)


def _counts(batch: Batch) -> tuple[int, int, int]:
    """What a batch has to learn, tokens or classes and choices, and how many tokens it has."""
    choices = 0 if batch.mc_labels is None else int((batch.mc_labels != IGNORED).sum())
    return batch.predicted, choices, batch.tokens


class _Clock:
    """Speed of the steps since the last row of the log; evaluating and saving do not count."""

    def __init__(self, run: Run, processes: int) -> None:
        self._run, self._processes = run, processes
        self._seconds, self._tokens = 0.0, 0

    def add(self, tokens: int, seconds: float) -> None:
        self._tokens += tokens
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        speed = self._tokens / max(self._seconds, 1e-9)
        self._seconds, self._tokens = 0.0, 0
        row = {"tokens_per_s": round(speed, 1)}
        if self._run.peak_flops and self._run.flops_per_token:
            reached = speed * self._run.flops_per_token / self._processes
            # Measured while the machine did other things too, the peak may be too low: what was reached is possible.
            self._run.peak_flops = max(self._run.peak_flops, reached)
            row["share_of_peak"] = round(reached / self._run.peak_flops, 4)
        return row
