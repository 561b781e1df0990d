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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gpt2_core.evaluation import Document, text_figures
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_pt import GPT2LMHeadModel
from gpt2_pt.evaluation import ModelScorer

SEPARATOR = 50256


def encode(tokenizer: GPT2Tokenizer, text: str) -> np.ndarray:
    return np.array([SEPARATOR, *tokenizer.encode(text)], dtype=np.int64)


class KneserNey:
    """Interpolated Kneser-Ney over token n-grams.

    An n-gram is numbered: its key is the number of its first n - 1 tokens and its last token, and its number is the
    place of that key among the sorted ones. So all lookups are searches for whole numbers.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int = 5) -> None:
        self.vocabulary = vocabulary
        self.keys: list[np.ndarray] = []
        numbers = np.zeros(len(tokens) + 1, np.int64)  # of the empty gram, at every position
        every, firsts, raw = [], [], []
        for n in range(1, order + 1):
            keys = numbers[: len(tokens) - n + 1] << 16 | tokens[n - 1 :]
            unique, first, numbers, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            self.keys.append(unique)
            every.append(numbers)
            firsts.append(first)
            raw.append(counts)
        self.levels = []
        for n in range(1, order + 1):
            keys = self.keys[n - 1]
            # Below the highest order a gram counts by how many different tokens stand before it.
            counts = raw[-1] if n == order else np.bincount(every[n - 1][firsts[n] + 1], minlength=len(keys))
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            discount = once / max(once + 2 * twice, 1)
            context = keys >> 16
            totals = np.bincount(context, counts)
            kinds = np.bincount(context, counts > 0)
            self.levels.append((np.maximum(counts - discount, 0.0), totals, discount * kinds))

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """The probability of each token but the first, given up to four before it."""
        size = len(tokens) - 1
        p = np.full(size, 1.0 / self.vocabulary)
        for n, (keys, (shares, totals, freed)) in enumerate(zip(self.keys, self.levels, strict=True), 1):
            if n - 2 >= size:
                break
            for_last = slice(max(0, n - 2), None)  # the first predicted token with n - 1 tokens before it
            context, known = self.number(tokens[:-1], n - 1)
            context, known = context[-len(p[for_last]) :], known[-len(p[for_last]) :]
            last = tokens[-len(context) :]
            key = context << 16 | last
            at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            total = np.where(known, totals[np.minimum(context, len(totals) - 1)], 0.0)
            usable = total > 0
            share = np.where(usable & (keys[at] == key), shares[at], 0.0) / np.where(usable, total, 1.0)
            weight = np.where(usable, freed[np.minimum(context, len(freed) - 1)] / np.where(usable, total, 1.0), 1.0)
            p[for_last] = share + weight * p[for_last]
        return p

    def number(self, tokens: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The number of the n-gram that ends at each token, and whether it was seen in training."""
        number, known = np.zeros(len(tokens), np.int64), np.ones(len(tokens), bool)
        for i in range(n):
            token = tokens[i : len(tokens) - n + 1 + i]
            key = number[: len(token)] << 16 | token
            at = np.minimum(np.searchsorted(self.keys[i], key), len(self.keys[i]) - 1)
            number, known = at, known[: len(token)] & (self.keys[i][at] == key)
        return number, known


def xz_bits(data: bytes, before: bytes = b"") -> int:
    def packed(what: bytes) -> int:
        # xz -9 has a dictionary of 64 MiB, more than all of the stories.
        return 8 * len(lzma.compress(what, preset=9))

    return packed(before + data) - (packed(before) if before else 0)


def read_texts(folder: Path) -> dict[str, str]:
    """The stories of a folder by name. Raises: ValueError, OSError."""
    texts = {}
    for path in sorted(folder.glob("*.txt")):
        try:
            texts[path.stem] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as cause:
            raise ValueError(f"{path} is not UTF-8 ({cause}); convert it first, for example with iconv") from cause
    if not texts:
        raise ValueError(f"{folder} holds no .txt files; expected stories in train/ and validation/ of --data")
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/*.txt and validation/*.txt")
    parser.add_argument("--model", default="gpt2-tales", help="a name or a folder")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    try:
        stories, books = read_texts(args.data / "train"), read_texts(args.data / "validation")
        scorer = ModelScorer(GPT2LMHeadModel.from_pretrained(args.model))
    except (ValueError, OSError) as error:  # the library's own errors among them
        parser.error(str(error))
    tokenizer = GPT2Tokenizer()
    train = np.concatenate([encode(tokenizer, story) for story in stories.values()])
    grams = KneserNey(train, vocabulary=50257)
    before = "".join(stories.values()).encode()
    table = []
    for name, text in books.items():
        data, tokens = text.encode(), encode(tokenizer, text)
        found = text_figures(scorer, tokenizer, [Document(text, len(text.split()), len(data))])
        table.append(
            {
                "book": name,
                "bytes": len(data),
                "tokens": len(tokens) - 1,
                "model": round(found.bits_per_byte, 4),
                "model_nats_per_token": round(found.nats / found.tokens, 4),
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
