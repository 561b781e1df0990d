#!/usr/bin/env python3
"""How well the embedded model predicts the validation books, beside ``xz -9`` and a 5-gram model.

    python scripts/report_tales.py --data tales/ [--model gpt2-tales] [--json]

All figures are bits per byte of UTF-8 text, per book. The model reads each book in windows of its whole context that
overlap by half, and is scored on the second half of each (the first window on all of it). The 5-gram is over the same
tokens, trained on the same stories, with interpolated Kneser-Ney smoothing (Chen & Goodman 1998, section 3), one
discount per order. ``xz -9`` compresses each book alone, and once with the training stories before it (what the book
adds), since the other two have read them as well.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_pt import GPT2LMHeadModel

SEPARATOR = 50256


def encode(tokenizer: GPT2Tokenizer, text: str) -> np.ndarray:
    return np.array([SEPARATOR, *tokenizer.encode(text)], dtype=np.int64)


@torch.no_grad()
def model_bits(model: GPT2LMHeadModel, tokens: np.ndarray) -> float:
    """The bits that the model needs for all tokens but the first."""
    context = model.config.n_positions
    stride = context // 2
    total, done = 0.0, 1
    while done < len(tokens):
        stop = min(len(tokens), context + 1) if done == 1 else min(len(tokens), done + stride)
        start = max(0, stop - 1 - context)
        window = torch.from_numpy(tokens[start:stop])
        logits = model(window[None, :-1], use_cache=False).logits[0].float()
        fresh = stop - done
        total += float(F.cross_entropy(logits[-fresh:], window[-fresh:], reduction="sum"))
        done = stop
    return total / math.log(2)


class KneserNey:
    """Interpolated Kneser-Ney over token n-grams, all orders at once in sorted arrays."""

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int = 5) -> None:
        self.vocabulary, self.order = vocabulary, order
        # An n-gram is a row of token ids, seen as one opaque value so that it can be sorted and searched.
        grams = [self.pack(tokens, n) for n in range(1, order + 1)]
        self.tables = []
        lower_than: np.ndarray | None = None
        for n in range(order, 0, -1):
            if lower_than is None:
                keys, counts = np.unique(grams[n - 1], return_counts=True)
            else:  # how many different tokens stand before it
                keys, counts = np.unique(lower_than, return_counts=True)
            rows = self.rows(keys, n)
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            discount = once / (once + 2 * twice)
            contexts, inverse = np.unique(self.as_keys(rows[:, :-1]), return_inverse=True) if n > 1 else (None, None)
            totals = np.bincount(inverse, counts) if n > 1 else np.array([counts.sum()], float)
            kinds = np.bincount(inverse) if n > 1 else np.array([len(keys)])
            self.tables.append((keys, counts, contexts, totals, discount * kinds / totals, discount))
            lower_than = self.as_keys(rows[:, 1:]) if n > 1 else None
        self.tables.reverse()

    @staticmethod
    def as_keys(rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(rows.astype(">u2"))
        return rows.view(f"S{2 * rows.shape[1]}").ravel() if rows.shape[1] else np.zeros(len(rows), "S1")

    @classmethod
    def pack(cls, tokens: np.ndarray, n: int) -> np.ndarray:
        # Ids are shifted by one so that no key ends in a zero byte pair, which such strings would drop.
        return cls.as_keys(np.lib.stride_tricks.sliding_window_view(tokens + 1, n))

    @staticmethod
    def rows(keys: np.ndarray, n: int) -> np.ndarray:
        return np.frombuffer(keys.tobytes(), ">u2").reshape(-1, n)

    @staticmethod
    def find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return at, keys[at] == wanted

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """The probability of each token but the first, given up to four before it."""
        size = len(tokens) - 1
        p = np.full(size, 1.0 / self.vocabulary)
        for n, (keys, counts, contexts, totals, back_off, discount) in enumerate(self.tables, 1):
            first = max(0, n - 2)  # the first predicted token that has n - 1 before it
            grams = self.pack(tokens, n)[max(0, 2 - n) :]
            at, hit = self.find(keys, grams)
            got = np.where(hit, counts[at] - discount, 0.0)
            if n == 1:
                share, weight = got / totals[0], np.full(len(grams), back_off[0])
            else:
                where, known = self.find(contexts, self.as_keys(self.rows(grams, n)[:, :-1]))
                share = np.where(known, got / totals[where], 0.0)
                weight = np.where(known, back_off[where], 1.0)
            p[first:] = share + weight * p[first:]
        return p


def xz_bits(data: bytes, before: bytes = b"") -> int:
    def packed(what: bytes) -> int:
        # xz -9 has a dictionary of 64 MiB, more than all of the stories.
        return 8 * len(lzma.compress(what, preset=9))

    return packed(before + data) - (packed(before) if before else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="gpt2-tales")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = GPT2Tokenizer()
    stories = [path.read_text(encoding="utf-8") for path in sorted((args.data / "train").glob("*.txt"))]
    train = np.concatenate([encode(tokenizer, story) for story in stories])
    grams = KneserNey(train, vocabulary=50257)
    before = "".join(stories).encode()
    model = GPT2LMHeadModel.from_pretrained(args.model)
    table = []
    for path in sorted((args.data / "validation").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        data, tokens = text.encode(), encode(tokenizer, text)
        bits = model_bits(model, tokens)
        table.append(
            {
                "book": path.stem,
                "bytes": len(data),
                "tokens": len(tokens) - 1,
                "model": round(bits / len(data), 4),
                "model_nats_per_token": round(bits * math.log(2) / (len(tokens) - 1), 4),
                "5-gram": round(float(-np.log2(grams.probabilities(tokens)).sum()) / len(data), 4),
                "xz -9": round(xz_bits(data) / len(data), 4),
                "xz -9 after the stories": round(xz_bits(data, before) / len(data), 4),
            }
        )
    if args.json:
        print(json.dumps(table, indent=1))
        return
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
