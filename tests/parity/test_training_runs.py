"""Whole runs: the same losses in every framework and in plain PyTorch, stopped and gone on, in one and in the other."""

from __future__ import annotations

import importlib
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core import muon
from gpt2_core import training as loop
from gpt2_core.config import GPT2Config
from gpt2_core.data_batches import Batch
from gpt2_core.errors import CheckpointMismatchError, TrainingError
from gpt2_core.parameters import parameter_table
from gpt2_core.recipe import Recipe
from gpt2_core.training import Run, Training
from gpt2_core.training_state import folder_of, open_state
from models import random_ids, small_config
from tolerances import error

QUIET = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "summary_first_dropout": 0.0}
CONFIG = small_config(vocab_size=67, n_embd=16, n_head=4, n_layer=2, n_positions=24, **QUIET)
# Where one block shows all that two would: what TensorFlow compiles for a run takes longer than the run.
ONE = CONFIG.replace(n_layer=1)
MODULES = {"pt": "gpt2_pt.training", "tf": "gpt2_tf.training"}


class Source:
    """Rows with something to learn, by their number; the same in every framework."""

    def __init__(self, config: GPT2Config = CONFIG, task: str = "lm", rows: int = 4, T: int = 12, padded: bool = False):
        self.config, self.task, self.rows, self.T, self.padded, self.number = config, task, rows, T, padded, 0

    def __next__(self) -> Batch:
        shape = (self.rows, 2, self.T) if self.task == "double_heads" else (self.rows, self.T)
        ids = random_ids(self.config, *shape, seed=self.number)
        ids[..., 1::2] = (ids[..., ::2] + 1) % self.config.vocab_size
        self.number += 1
        targets = np.roll(ids, -1, axis=-1)
        mask = np.ones_like(ids)
        if self.padded:
            mask[-1, ..., 8:] = 0
            targets[-1, ..., 7:] = -100
        first = ids.reshape(self.rows, -1)[:, 0]
        if self.task == "classification":
            return Batch(ids, first % 2, None, mask)
        if self.task == "double_heads":
            at = np.full(shape[:2], self.T - 1) if not self.padded else mask.sum(-1) - 1
            return Batch(ids, ids, targets, mask, at, first % 2)
        return Batch(ids, ids, targets, mask if self.padded else None)

    def state(self) -> dict[str, Any]:
        return {"samples": self.number}

    def restore(self, state: Any) -> None:
        self.number = state["samples"]


def recipe_of(**settings: Any) -> Recipe:
    return Recipe(**({"from_scratch": True, "lr": 2**-7, "beta2": 0.99, "warmup_steps": 3, "device": "cpu"} | settings))


def prepared(
    name: str, recipe: Recipe, steps: int, run: Run | None = None, source: Any = None, **named: Any
) -> Training:
    """A run of one framework, ready to begin."""
    module = importlib.import_module(MODULES[name])
    config = named.pop("config", CONFIG)
    model = module.build_model(recipe, config)
    return Training(recipe, module.Trainer(model, recipe), source or Source(config), run or Run(), steps=steps, **named)


def ran(name: str, recipe: Recipe, steps: int, **named: Any) -> tuple[list[float], dict[str, np.ndarray], Training]:
    """The losses of a run, its parameters in the end, and the run."""
    losses: list[float] = []
    run = Run(on_row=lambda row: losses.append(row["loss"]) if "loss" in row else None)
    one = prepared(name, recipe, steps, run, **named)
    one.train()
    return losses, weights_of(one), one


def weights_of(one: Training, group: str | None = None) -> dict[str, np.ndarray]:
    tensors = one.backend.final() if group is None else one.backend.export()[group]
    return {name: np.array(tensor.array()) for name, tensor in tensors.items()}


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(one[name].tobytes() == other[name].tobytes() for name in one)


def worst(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(error(one[name], other[name]) for name in one)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """PyTorch on one thread: of a model this small, several would only wait for each other."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run_of():
    """What a framework makes of ten steps on padded rows of a task, or of any recipe; each computed once."""
    made: dict[Any, Any] = {}

    def get(name, recipe, steps=10, *, padded=False, **named):
        key = (name, recipe, steps, padded, *named.values())
        if key not in made:
            source = Source(named.get("config", CONFIG), task=recipe.task, padded=padded)
            made[key] = ran(name, recipe, steps, source=source, **named)
        return made[key]

    return get


@pytest.fixture(scope="module")
def of_pytorch(run_of):
    """What PyTorch makes of a recipe."""
    pytest.importorskip("torch")
    return lambda recipe, steps=10, **named: run_of("pt", recipe, steps, **named)[:2]


@pytest.fixture(scope="module")
def plain_curve():
    """The two hundred losses of plain PyTorch."""
    return plain_losses(CONFIG, CURVE, Source(), 200)


# -- against plain PyTorch -----------------------------------------------------------------------------------


def plain_losses(config: GPT2Config, recipe: Recipe, source: Any, steps: int) -> list[float]:
    """The run again, in the plainest PyTorch: one file's worth of GPT-2 with torch.optim.AdamW, as people write it."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    from gpt2_core.initialization import initial_values

    values = initial_values(config, "lm", recipe.seed)
    p = {name.removeprefix("transformer."): torch.tensor(value).requires_grad_() for name, value in values.items()}
    decayed = [value for value in p.values() if value.dim() > 1]
    rest = [value for value in p.values() if value.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps,
    )  # fmt: skip
    heads, width = config.n_head, config.n_embd

    def norm(x, name):
        return F.layer_norm(x, (width,), p[f"{name}.weight"], p[f"{name}.bias"], config.layer_norm_epsilon)

    def dense(x, name):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    losses = []
    for step in range(steps):
        batch = next(source)
        ids, targets = torch.tensor(batch.input_ids), torch.tensor(batch.targets)
        x = p["wte.weight"][ids] + p["wpe.weight"][: ids.size(1)]
        for layer in range(config.n_layer):
            h = f"h.{layer}"
            q, k, v = (
                part.view(*ids.shape, heads, width // heads).transpose(1, 2)
                for part in dense(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(width, dim=2)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + dense(y, f"{h}.attn.c_proj")
            x = x + dense(F.gelu(dense(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh"), f"{h}.mlp.c_proj")
        loss = F.cross_entropy((norm(x, "ln_f") @ p["wte.weight"].T).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), recipe.clip)
        for group in optimizer.param_groups:
            done = (step - recipe.warmup_steps) / (steps - recipe.warmup_steps)
            cosine = recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * done))
            group["lr"] = recipe.lr * (step + 1) / recipe.warmup_steps if step < recipe.warmup_steps else cosine
        optimizer.step()
        losses.append(loss.item())
    return losses


CURVE = recipe_of(warmup_steps=10, min_lr=2**-10, weight_decay=0.1, clip=1.0)


def test_two_hundred_steps_give_the_curve_of_plain_pytorch(framework, plain_curve):
    losses = ran(framework.name, CURVE, 200)[0]
    assert len(losses) == 200
    assert plain_curve[0] - plain_curve[-1] > 1
    assert max(abs(one - other) for one, other in zip(losses, plain_curve, strict=True)) <= 1e-4


# -- between frameworks --------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation and ema": {"accumulation": 2, "ema_decay": 0.75},
    "frozen and not clipped": {"freeze": ("transformer.wte.*", "transformer.h.0.*"), "clip": 0.0, "schedule": "linear"},
    "lora": {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": ("attn.c_attn", "mlp.c_proj")},
    "lora with a head": {"lora_rank": 3, "lora_alpha": 6.0, "task": "classification"},
    "checkpointing": {"gradient_checkpointing": True},
    "muon": {"optimizer": "muon", "momentum": 0.75, "ema_decay": 0.75},
    "muon on a part": {"optimizer": "muon", "freeze": ("transformer.wte.*", "transformer.h.0.*"), "weight_decay": 0.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ten_steps_of_every_kind_are_the_same(framework, of_pytorch, settings):
    if framework.name == "pt":
        pytest.skip("PyTorch is what the others are held to")
    recipe = recipe_of(**settings)
    expected_losses, expected = of_pytorch(recipe, 10)
    losses, weights, _ = ran(framework.name, recipe, 10, source=Source(CONFIG, task=recipe.task))
    assert error(losses, expected_losses) <= 1e-5
    assert worst(weights, expected) <= 1e-4


@pytest.mark.parametrize("task", ["lm", "classification", "double_heads"])
def test_ten_steps_of_every_task_are_the_same_with_padding(framework, run_of, of_pytorch, task):
    recipe = recipe_of(task=task)
    losses, weights, one = run_of(framework.name, recipe, padded=True)
    expected_losses, expected = of_pytorch(recipe, padded=True)
    assert error(losses, expected_losses) <= 1e-5
    of_choices = "multiple_choice_head.summary.bias"  # added to all choices alike: no gradient but rounding
    weights, expected = ({n: v for n, v in made.items() if n != of_choices} for made in (weights, expected))
    assert worst(weights, expected) <= 1e-4
    assert losses[-1] < losses[0]
    assert set(weights) | {of_choices} >= {row.name for row in parameter_table(CONFIG, recipe.head)}
    assert one.backend.losses(next(Source(task=task)))[0] > 0


@pytest.mark.parametrize("task", ["lm", "classification", "double_heads"])
def test_the_first_loss_is_that_of_the_model_itself(framework, run_of, task):
    batch = next(Source(task=task, padded=True))
    recipe = recipe_of(task=task)
    losses, _, _ = run_of(framework.name, recipe, padded=True)
    labels = batch.labels
    if batch.targets is not None:  # the models shift labels themselves, and do not know what follows the last place
        labels = np.roll(batch.targets, 1, axis=-1)
        labels[..., 0] = -100
    module = importlib.import_module(MODULES[framework.name])
    model = framework.run(
        module.build_model(recipe, CONFIG), input_ids=batch.input_ids, attention_mask=batch.attention_mask,
        labels=labels, **({} if batch.mc_labels is None else {"mc_labels": batch.mc_labels}),
    )  # fmt: skip
    if task == "classification":
        assert float(model.loss) == pytest.approx(losses[0], rel=1e-5)
    else:
        # Of the last places of whole rows the model's own loss knows nothing: the rest has to agree.
        logits = np.asarray(framework.numpy(model.logits))
        scored = logits - logits.max(-1, keepdims=True)
        of_all = -(scored - np.log(np.exp(scored).sum(-1, keepdims=True)))
        keep = batch.targets != -100
        picked = np.take_along_axis(of_all, np.where(keep, batch.targets, 0)[..., None], -1)[..., 0]
        expected = picked[keep].mean()
        if task == "double_heads":
            expected += float(model.loss) - float(model.lm_loss)
        assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_accumulating_is_a_larger_batch(framework):
    class Halves(Source):
        def __next__(self):
            number, part = divmod(self.number, 2)
            whole = Source(rows=4, padded=True)
            whole.number = number
            batch = next(whole)
            self.number += 1
            rows = slice(2 * part, 2 * part + 2)
            return Batch(*(None if each is None else each[rows] for each in vars(batch).values()))

    one = ran(framework.name, recipe_of(), 5, source=Source(ONE, padded=True), config=ONE)
    two = ran(framework.name, recipe_of(accumulation=2), 5, source=Halves(ONE), config=ONE)
    assert error(one[0], two[0]) <= 1e-6
    assert worst(one[1], two[1]) <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_nearly_the_same(framework, of_pytorch, dtype):
    expected, _ = of_pytorch(recipe_of(), config=ONE)
    losses, weights, one = ran(framework.name, recipe_of(dtype=dtype), 10, config=ONE)
    assert error(losses, expected) <= 2e-2
    assert all(value.dtype == np.float32 for value in weights.values())
    assert one.progress.updates == 10


def test_a_scale_that_overflows_float16_is_halved_until_it_does_not(framework):
    losses, _, one = ran(framework.name, recipe_of(dtype="float16", loss_scale=2.0**26), 12, config=ONE)
    assert 0 < one.progress.updates < 12
    assert one.progress.loss_scale < 2.0**26
    assert np.isfinite(losses).all()


# -- stopped and gone on -------------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_the_run_that_never_stopped_bit_for_bit(framework, tmp_path):
    recipe = recipe_of(accumulation=2, ema_decay=0.5, dropout=0.1)
    config = ONE.replace(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    whole_losses, whole, _ = ran(framework.name, recipe, 6, config=config)
    first = prepared(framework.name, recipe, 6, Run(tmp_path), config=config)
    first._between = lambda: first.progress.step == 3  # type: ignore[method-assign]
    first.train()
    losses: list[float] = []
    run = Run(tmp_path, on_row=lambda row: losses.append(row["loss"]))
    second = prepared(framework.name, recipe, 6, run, config=config)
    assert second.resume()
    second.train()
    assert losses == whole_losses[3:]
    assert same_bits(weights_of(second), whole)


@pytest.mark.parametrize(
    "settings",
    [{"ema_decay": 0.5}, {"lora_rank": 2, "lora_alpha": 4.0}, {"optimizer": "muon"}],
    ids=["ema", "lora", "muon"],
)
@pytest.mark.parametrize(("first", "second"), [("pt", "tf"), ("tf", "pt")])
def test_a_run_goes_on_in_the_other_framework(first, second, settings, of_pytorch, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    recipe = recipe_of(**settings)
    expected_losses, expected = of_pytorch(recipe, 8, config=ONE)
    losses: list[float] = []
    for name, until in ((first, 4), (second, 8)):
        run = Run(tmp_path, on_row=lambda row: losses.append(row["loss"]))
        one = prepared(name, recipe, 8, run, config=ONE)
        one.resume()
        one._between = lambda one=one, until=until: one.progress.step == until  # type: ignore[method-assign]
        one.train()
    assert error(losses, expected_losses) <= 1e-5
    assert worst(weights_of(one), expected) <= 1e-4
    with open_state(folder_of(tmp_path / "states", 8)) as saved:
        trained = saved.groups["adapter" if "lora_rank" in settings else "model"]
        assert saved.groups["exp_avg"].keys() == trained.keys()
        kernels = {row.name for row in parameter_table(ONE, recipe.head) if muon.is_for(row)}
        without = kernels if recipe.optimizer == "muon" else set()
        assert trained.keys() - saved.groups["exp_avg_sq"].keys() == without


def test_a_loss_that_is_no_number_changes_nothing(framework, tmp_path):
    class Poisoned(Source):
        def __next__(self):
            if self.number == 2:
                name = next(iter(one.backend.shapes()["model"]))
                poison(one.backend, name)
            return super().__next__()

    def poison(backend, name):
        bad = np.array(weights_of(one, "model")[name])
        bad[0, 0] = np.nan
        if framework.name == "pt":
            backend.model.get_parameter(name).data.copy_(framework.torch.from_numpy(bad))
        else:
            backend.model.get_parameter(name).assign(bad)

    one = prepared(framework.name, recipe_of(), 5, Run(tmp_path), source=Poisoned(ONE), config=ONE)
    with pytest.raises(TrainingError, match=r"step 2 has loss nan.*step-00000002"):
        one.train()
    moments = weights_of(one, "exp_avg")
    assert all(np.isfinite(value).all() for value in moments.values())


def test_muon_s_kernels_take_the_steps_of_pytorch_s_own_muon():
    """Which makes them orthogonal in bfloat16: a hundredth of a step apart."""
    torch = pytest.importorskip("torch", minversion="2.9")
    from gpt2_pt.muon import step

    pick = np.random.default_rng(0)
    for shape in ((16, 48), (64, 16)):
        start = pick.normal(size=shape).astype(np.float32)
        ours, momentum = torch.tensor(start), torch.zeros(shape)
        theirs = torch.nn.Parameter(torch.tensor(start))
        optimizer = torch.optim.Muon(
            [theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw", nesterov=True
        )
        for _ in range(5):
            slope = torch.tensor(pick.normal(size=shape).astype(np.float32))
            way, momentum = step(slope, momentum, 0.9)
            ours = ours * (1 - 0.02 * 0.1) - 0.02 * way
            theirs.grad = slope
            optimizer.step()
        moved = (theirs.detach() - torch.tensor(start)).abs().max()
        assert (ours - theirs.detach()).abs().max() < 0.02 * moved
    assert moved > 0.02


def test_both_frameworks_make_a_matrix_orthogonal_as_the_reference_does(framework):
    orthogonal = importlib.import_module(f"gpt2_{framework.name}.muon").orthogonal
    pick = np.random.default_rng(0)
    for shape in ((8, 24), (32, 8), (8, 8), (1, 5)):
        matrix = pick.normal(size=shape).astype(np.float32)
        made = framework.torch.from_numpy(matrix) if framework.name == "pt" else framework.tf.constant(matrix)
        assert np.abs(framework.numpy(orthogonal(made)) - muon.orthogonal(matrix)).max() < 1e-5


# -- the rest ------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_the_model_with_its_adapter_and_detaching_gives_the_model_back(framework):
    adapters = importlib.import_module(f"gpt2_{framework.name}.adapters")
    from gpt2_core.adapters import Lora

    ids = random_ids(CONFIG, 2, 7)
    lora = Lora(2, 6.0, ("c_attn", "c_fc"))
    module = importlib.import_module(MODULES[framework.name])
    model = module.build_model(recipe_of(), CONFIG)
    before = np.array(framework.numpy(framework.run(model, input_ids=ids).logits))
    parameters = adapters.attach(model, lora)
    assert set(adapters.adapter_parameters(model)) == set(parameters)
    pick = np.random.default_rng(0)
    arrays = {}
    for name, value in parameters.items():
        arrays[name] = pick.normal(0, 0.3, tuple(value.shape)).astype(np.float32)
        if framework.name == "pt":
            value.data.copy_(framework.torch.from_numpy(arrays[name]))
        else:
            value.assign(arrays[name])
    beside = np.array(framework.numpy(framework.run(model, input_ids=ids).logits))
    assert error(beside, before) > 1e-2
    adapters.merge(model)
    assert adapters.held_by(model) is None
    merged = np.array(framework.numpy(framework.run(model, input_ids=ids).logits))
    assert error(merged, beside) <= 1e-5
    adapters.unmerge(model, lora, arrays)
    assert error(np.array(framework.numpy(framework.run(model, input_ids=ids).logits)), before) <= 1e-5
    adapters.attach(model, lora)
    adapters.detach(model)
    assert error(np.array(framework.numpy(framework.run(model, input_ids=ids).logits)), before) <= 1e-5
    with pytest.raises(ValueError, match="no adapter to merge"):
        adapters.merge(model)


def test_a_saved_adapter_stands_beside_the_model_as_peft_has_it(framework, tmp_path):
    adapters = importlib.import_module(f"gpt2_{framework.name}.adapters")
    with zipfile.ZipFile(Path(__file__).parent.parent / "peers" / "peft" / "adapters.zip") as archive:
        archive.extractall(tmp_path)
    with np.load(tmp_path / "answers.npz") as answers:
        ids, alone, expected = answers["ids"], answers["base"], answers["two"]
    model = framework.classes["lm"].from_pretrained(tmp_path / "base")
    assert set(adapters.attach_saved(model, tmp_path / "two")) == set(adapters.adapter_parameters(model))
    assert error(framework.numpy(framework.run(model, input_ids=ids).logits), expected) <= 1e-5
    adapters.merge(model)
    assert error(framework.numpy(framework.run(model, input_ids=ids).logits), expected) <= 1e-5
    assert error(alone, expected) > 1e-2
    with pytest.raises(CheckpointMismatchError, match="trained beside base"):
        adapters.attach_saved(importlib.import_module(MODULES[framework.name]).build_model(recipe_of(), CONFIG),
                              tmp_path / "two")  # fmt: skip


def test_the_loss_in_slices_is_the_loss_in_one_piece(framework, monkeypatch):
    chunked = importlib.import_module(f"gpt2_{framework.name}.chunked")
    pick = np.random.default_rng(1)
    hidden, table = pick.normal(size=(11, 6)), pick.normal(size=(23, 6))
    targets = pick.integers(0, 23, 11)
    targets[[2, 5]] = -100
    logits = hidden @ table.T
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    keep = targets != -100
    slope = np.exp(logp)
    slope[np.arange(11)[keep], targets[keep]] -= 1
    slope *= keep[:, None] * 0.25
    expected = -logp[np.arange(11)[keep], targets[keep]].sum()
    for size in (23 * 4, 23 * 11, 1):
        monkeypatch.setattr(chunked, "LOGITS", size)
        loss, alone, d_hidden, d_table = differentiated(framework, chunked, hidden, table, targets)
        assert loss == pytest.approx(0.25 * expected, rel=1e-12)
        assert alone == pytest.approx(expected, rel=1e-12)
        assert error(d_hidden, 2 * slope @ table) <= 1e-12
        assert error(d_table, 2 * slope.T @ hidden) <= 1e-12


def differentiated(framework, chunked, hidden, table, targets):
    """The loss of weight 0.25, the sum alone, and the gradients of twice the loss."""
    if framework.name == "pt":
        torch = framework.torch
        x, w = (torch.tensor(each, requires_grad=True) for each in (hidden, table))
        loss = chunked.chunked_loss(x, w, torch.tensor(targets), torch.tensor(0.25))
        (2 * loss).backward()
        alone = chunked.chunked_sum(x.detach(), w.detach(), torch.tensor(targets))
        return loss.item(), alone.item(), x.grad.numpy(), w.grad.numpy()
    tf = framework.tf
    x, w = (tf.Variable(each) for each in (hidden, table))
    with tf.GradientTape() as tape:
        loss = chunked.chunked_loss(x, w, tf.constant(targets), tf.constant(0.25))
        twice = 2 * loss
    alone = chunked.chunked_sum(x, w, tf.constant(targets))
    return float(loss), float(alone), *(each.numpy() for each in tape.gradient(twice, (x, w)))


def test_the_ema_is_what_is_evaluated_and_kept(framework):
    _, final, one = ran(framework.name, recipe_of(ema_decay=0.5), 3, config=ONE)
    now, average = weights_of(one, "model"), weights_of(one, "ema")
    assert same_bits(final, average)
    assert worst(now, average) > 1e-4
    batch = next(Source())
    by_average = one.backend.losses(batch)[0]
    assert same_bits(weights_of(one, "model"), now)
    plain = prepared(framework.name, recipe_of(), 3, config=ONE)
    with_ema = {"model": one.backend.export()["ema"], "exp_avg": one.backend.export()["exp_avg"],
                "exp_avg_sq": one.backend.export()["exp_avg_sq"], "ema": {}}  # fmt: skip
    plain.backend.restore(with_ema, 3)
    assert plain.backend.losses(batch)[0] == pytest.approx(by_average, rel=1e-6)


def test_samples_are_the_same_in_every_framework(framework, run_of):
    pytest.importorskip("torch")
    one, other = (run_of(name, recipe_of(), padded=True)[2] for name in (framework.name, "pt"))
    assert one.backend.sample([1, 2], 6, 5) == other.backend.sample([1, 2], 6, 5)


def test_the_peak_is_measured(framework):
    assert prepared(framework.name, recipe_of(), 1).backend.peak_flops(0.02) > 1e6


@pytest.mark.parametrize("steps", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_steps_on_the_embedded_model_are_the_same(steps, record_property):
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    config = GPT2Config.from_pretrained("gpt2-tales").replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    recipe = Recipe(lr=1e-4, batch_size=1, device="cpu")
    made = [ran(name, recipe, steps, config=config, source=Source(config, rows=1, T=16)) for name in ("pt", "tf")]
    record_property("losses", error(made[1][0], made[0][0]))
    assert error(made[1][0], made[0][0]) <= 1e-4
    assert worst(made[1][1], made[0][1]) <= 1e-3
    assert loop.flops_per_token(config, 16) > 0


@pytest.mark.slow
def test_compiled_steps_are_the_same(framework, of_pytorch):
    losses, weights, _ = ran(framework.name, recipe_of(compile=True), 6)
    expected_losses, expected = of_pytorch(recipe_of(), 6)
    assert error(losses, expected_losses) <= 1e-5
    assert worst(weights, expected) <= 1e-4


def test_dropout_of_an_adapter_is_drawn_from_the_seed(framework):
    settings = {"lora_rank": 2, "lora_alpha": 4.0, "lora_dropout": 0.5}
    one, other = (ran(framework.name, recipe_of(**settings), 3, config=ONE) for _ in range(2))
    assert one[0] == other[0]
    assert same_bits(one[1], other[1])
    assert one[0] != ran(framework.name, recipe_of(**settings, seed=1), 3, config=ONE)[0]
    assert one[0][1:] != ran(framework.name, recipe_of(**settings | {"lora_dropout": 0.0}), 3, config=ONE)[0][1:]
