#!/usr/bin/env python3
"""Train the embedded model ``gpt2-tales`` on a folder of stories, from its seed, on a CPU or a GPU.

    python scripts/train_tales.py --data tales/ --out runs/tales

``--data`` holds ``train/*.txt`` and ``validation/*.txt``. The run can be killed at any moment and goes on from its
last state when the same command is given again. It ends with ``--out``/final: config, half-precision weights,
and a report of bits per byte.

Three things here are not ordinary; all are for the sake of a small machine, and none is left in the result.

Of GPT-2's 50,257 tokens the stories use fewer than half, and those they hardly use cannot be learned. Every token seen
fewer than ``--min-count`` times shares one row of the token table, which makes the softmax smaller without
approximating it: N tokens with one row between them add N * exp(h . row) to the sum. After training the row is given
to each of them, raised or lowered by how often it was seen, and the result is a plain GPT-2 with the whole vocabulary.

The softmax of a step runs over the frequent tokens, the targets of the batch and a random sample of the rest, which
stands for all of the rest (importance sampling: the sum it estimates is unbiased). The cool-down takes a larger sample.

Until the cool-down sequences are half as long as the context; half of them sit at its second half, so that all
positions are learned. The cool-down uses the whole length.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2_core.config import PRESETS, GPT2Config
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_pt import GPT2LMHeadModel
from gpt2_pt.model import GPT2Model

SEPARATOR = "<|endoftext|>"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run")
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps in all")
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--cooldown", type=int, default=300, help="last steps, of linear decay to zero")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--frequent", type=int, default=3000, help="tokens that every softmax includes")
    parser.add_argument("--sample", type=int, default=1500, help="tokens that stand for the rest; 0 for all of them")
    parser.add_argument("--late-sample", type=int, default=4500, help="the same in the cool-down")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate of AdamW: embeddings, biases and gains")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="peak rate of Muon: the kernels of the blocks")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--min-count", type=int, default=4, help="rarer tokens share one row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def read_tokens(folder: Path, cache: Path) -> np.ndarray:
    """The ids of all stories of ``folder``, each after an end-of-text token; kept in ``cache`` by content."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        sys.exit(f"{folder} holds no .txt files; expected one story a file")
    texts = [path.read_text(encoding="utf-8") for path in files]
    key = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    path = cache / f"tokens-{key}.npy"
    if path.exists():
        return np.load(path)
    tokenizer = GPT2Tokenizer()
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    ids: list[int] = []
    for text in texts:
        ids += [separator, *tokenizer.encode(text)]
    tokens = np.array(ids, dtype=np.uint16)
    cache.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens)
    return tokens


class Compact:
    """The vocabulary of the run: seen tokens keep rows of their own, all others share the last."""

    def __init__(self, tokens: np.ndarray, config: GPT2Config, min_count: int) -> None:
        self.counts = np.bincount(tokens, minlength=config.vocab_size)
        self.kept = np.flatnonzero(self.counts >= min_count)
        self.full = config
        self.to_row = np.full(config.vocab_size, len(self.kept), dtype=np.int64)
        self.to_row[self.kept] = np.arange(len(self.kept))
        self.sharing = config.vocab_size - len(self.kept)
        self.config = config.replace(vocab_size=len(self.kept) + 1, bos_token_id=None, eos_token_id=None)

    def expand(self, table: np.ndarray, gain: np.ndarray, bias: np.ndarray, smoothing: float = 0.01) -> np.ndarray:
        """The whole token table: tokens that shared a row get it back, each at its own share of their chance.

        A row can be given a constant on top of its logit: the states h = g * z + b that leave the last layer norm have
        sum(z) = 0, so d = (1/g) / (b . 1/g) has h . d = 1 for every one of them. What the shared tokens together get
        stays what was learned; between them it goes by their counts, with ``smoothing`` for those never seen.
        """
        out = table[self.to_row].astype(np.float64)
        shared = np.flatnonzero(self.to_row == len(self.kept))
        weight = self.counts[shared] + smoothing
        inverse = 1.0 / gain.astype(np.float64)
        direction = inverse / (bias @ inverse)
        out[shared] += np.log(self.sharing * weight / weight.sum())[:, None] * direction
        return out.astype(np.float32)


class TiedLoss(torch.autograd.Function):
    """Cross-entropy of hidden states under a tied table, a slice at a time, never holding all logits at once.

    ``offsets`` (V,) is added to the logits in the sum over the vocabulary and not to those of the targets: the
    logarithm of how many tokens a row stands for.
    """

    SLICE = 1024

    @staticmethod
    def forward(
        ctx, x: Tensor, table: Tensor, targets: Tensor, offsets: Tensor
    ) -> Tensor:  # (R, C), (V, C), (R,), (V,)
        dx, dtable = torch.empty_like(x), torch.zeros_like(table, dtype=torch.float32)
        total = x.new_zeros((), dtype=torch.float32)
        for i in range(0, x.size(0), TiedLoss.SLICE):
            part, wanted = x[i : i + TiedLoss.SLICE], targets[i : i + TiedLoss.SLICE, None]
            logits = (part @ table.T).float()  # (R', V)
            picked = logits.gather(1, wanted)
            logits += offsets
            top = logits.amax(-1, keepdim=True)
            probs = logits.sub_(top).exp_()
            norm = probs.sum(-1, keepdim=True)
            total += (norm.log() + top - picked).sum()
            probs /= norm * x.size(0)
            probs.scatter_add_(1, wanted, torch.full_like(picked, -1.0 / x.size(0)))
            grad = probs.to(x.dtype)
            dx[i : i + TiedLoss.SLICE] = grad @ table
            dtable += grad.T @ part
        ctx.save_for_backward(dx, dtable)
        return total / x.size(0)

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, dtable = ctx.saved_tensors
        return dx * scale.to(dx.dtype), (dtable * scale).to(dx.dtype), None, None


class Softmax:
    """Which rows the softmax of a step runs over, and how many tokens each stands for."""

    def __init__(self, rows: np.ndarray, sharing: int, frequent: int) -> None:
        counts = np.bincount(rows)
        self.size, self.sharing = len(counts), sharing
        self.always = np.zeros(self.size, dtype=bool)
        self.always[np.argsort(-counts, kind="stable")[:frequent]] = True
        self.always[-1] = True  # the shared row

    def choose(self, targets: np.ndarray, sample: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The chosen rows (V',), the targets counted among them, and the offsets (V',)."""
        exact = self.always.copy()
        exact[targets] = True
        rest = np.flatnonzero(~exact)
        offsets = np.zeros(self.size, dtype=np.float32)
        if 0 < sample < len(rest):
            offsets[rest] = math.log(len(rest) / sample)
            rest = np.random.default_rng(seed).choice(rest, sample, replace=False)
        offsets[-1] = math.log(self.sharing)
        chosen = np.concatenate((np.flatnonzero(exact), rest))
        place = np.zeros(self.size, dtype=np.int64)
        place[chosen] = np.arange(len(chosen))
        return chosen, place[targets], offsets[chosen]


def batches(tokens: np.ndarray, batch: int, length: int, seed: list[int], skip: int):
    """Rows of ``length + 1`` tokens after ``skip`` batches: each epoch shifts the cuts and shuffles the pieces."""
    for epoch in itertools.count():
        rng = np.random.default_rng([*seed, epoch])
        first = int(rng.integers(0, length))
        pieces = (len(tokens) - 1 - first) // length
        order = rng.permutation(pieces)
        for i in range(0, pieces - batch + 1, batch):
            if skip:
                skip -= 1
                continue
            yield tokens[first + order[i : i + batch, None] * length + np.arange(length + 1)]


def plan(rows: np.ndarray, args: argparse.Namespace, context: int, start: int):
    """(step, rows of tokens, where the rows sit) from ``start`` on: half the context, then all of it."""
    turn = args.steps - args.cooldown
    half = context // 2
    if start < turn:
        stream = batches(rows, args.batch // half, half, [args.seed, 0], start)
        for step in range(start, turn):
            batch = next(stream)
            yield step, batch, np.arange(len(batch))[:, None] % 2 * half + np.arange(half)
    stream = batches(rows, args.batch // context, context, [args.seed, 1], max(0, start - turn))
    for step in range(max(start, turn), args.steps):
        batch = next(stream)
        yield step, batch, np.broadcast_to(np.arange(context), (len(batch), context))


def rate(step: int, args: argparse.Namespace) -> float:
    """The share of the peak rate: warm-up, constant, linear to zero."""
    return min(1.0, (step + 1) / args.warmup, (args.steps - step) / args.cooldown)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "arguments.json").write_text(json.dumps(vars(args), default=str, indent=1, sort_keys=True))
    tokens = read_tokens(args.data / "train", args.out)
    full = PRESETS["gpt2-tales"].replace(
        resid_pdrop=args.dropout, embd_pdrop=args.dropout, attn_pdrop=args.dropout, use_cache=False
    )
    compact = Compact(tokens, full, args.min_count)
    rows = compact.to_row[tokens]
    print(f"{len(tokens):,} tokens, {len(compact.kept):,} kept, {compact.sharing:,} sharing one row", flush=True)

    model = GPT2Model(compact.config, seed=args.seed).to(args.device)
    table = {row.name: row for row in model.parameter_table()}
    named = dict(model.named_parameters())
    kernels = [p for n, p in named.items() if table[n].decay and n.startswith("h.")]
    decayed = [p for n, p in named.items() if table[n].decay and not n.startswith("h.")]
    plain = [p for n, p in named.items() if not table[n].decay]
    muon = torch.optim.Muon(kernels, lr=args.muon_lr, weight_decay=args.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.0}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        eps=1e-9,
    )
    state_path, start = args.out / "state.pt", 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        start = state["step"]
        print(f"going on from step {start}", flush=True)
    torch.manual_seed(args.seed + start)
    model.train()
    log = (args.out / "log.jsonl").open("a")
    began, seen = time.time(), 0
    softmax = Softmax(rows, compact.sharing, args.frequent)
    for step, batch, where in plan(rows, args, full.n_positions, start):
        share = rate(step, args)
        for optimizer, peak in ((muon, args.muon_lr), (adam, args.lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        sample = args.sample if step < args.steps - args.cooldown else args.late_sample
        chosen, targets, offsets = softmax.choose(batch[:, 1:].reshape(-1), sample, [args.seed, 2, step])
        x = model(
            torch.from_numpy(batch[:, :-1]).to(args.device), position_ids=torch.from_numpy(where.copy()).to(args.device)
        ).last_hidden_state.flatten(0, 1)
        loss = TiedLoss.apply(
            x,
            model.wte.weight[torch.from_numpy(chosen).to(args.device)],
            torch.from_numpy(targets).to(args.device),
            torch.from_numpy(offsets).to(args.device),
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += targets.size
        if step % 10 == 0:
            row = {
                "step": step,
                "loss": round(loss.item(), 4),
                "norm": round(norm.item(), 3),
                "rate": round(share, 4),
                "tokens_per_s": round(seen / (time.time() - began)),
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
                "step": step + 1,
            }
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
    finish(model, compact, args.out / "final")


@torch.no_grad()
def finish(model: GPT2Model, compact: Compact, folder: Path) -> None:
    """Write the trained model as an ordinary GPT-2 in half precision."""
    plain = PRESETS["gpt2-tales"]
    whole = GPT2LMHeadModel(plain, seed=None)
    state = {name: value.float().cpu() for name, value in model.state_dict().items()}
    rows = compact.expand(state["wte.weight"].numpy(), state["ln_f.weight"].numpy(), state["ln_f.bias"].numpy())
    state["wte.weight"] = torch.from_numpy(rows)
    whole.load_state_dict(state)
    whole.half().save_pretrained(folder)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    main()
