"""What others have measured, to set beside our own figures. None of it was measured here.

Table 3 of the paper has one row for each size, 117M, 345M, 762M and 1542M as it calls gpt2, gpt2-medium, gpt2-large and
gpt2-xl. How its figures came about is known in outline only: the text was de-tokenised by rules that were not
published, and losses were scaled by the number of original tokens before the exponential (openai/gpt-2, issue 78). Each
protocol says in its details what that means for the comparison.

Source: Radford et al. 2019, "Language models are unsupervised multitask learners", table 3; the others as named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PAPER_SOURCE = "Radford et al. 2019, table 3"

#: By task and measure: the four sizes in the order of `SIZES`. Accuracies are in percent.
PAPER: Mapping[tuple[str, str], tuple[float, float, float, float]] = MappingProxyType(
    {
        ("LAMBADA", "perplexity"): (35.13, 15.60, 10.87, 8.63),
        ("LAMBADA", "accuracy"): (45.99, 55.48, 60.12, 63.24),
        ("CBT-CN", "accuracy"): (87.65, 92.35, 93.45, 93.30),
        ("CBT-NE", "accuracy"): (83.4, 87.1, 88.0, 89.05),
        ("WikiText2", "perplexity"): (29.41, 22.76, 19.93, 18.34),
        ("PTB", "perplexity"): (65.85, 47.33, 40.31, 35.76),
        ("enwik8", "bits per byte"): (1.16, 1.01, 0.97, 0.93),
        ("text8", "bits per character"): (1.17, 1.06, 1.02, 0.98),
        ("WikiText103", "perplexity"): (37.50, 26.37, 22.05, 17.48),
        ("1BW", "perplexity"): (75.20, 55.72, 44.575, 42.16),
    }
)


@dataclass(frozen=True)
class Published:
    """One figure of somebody else's: of which model, of which of our figures, and who says so."""

    model: str
    figure: str
    value: float
    source: str


_HARNESS = "lm-evaluation-harness"
_NANOGPT = "build-nanogpt, hellaswag.py"

#: Well-known figures by protocol, with the figure of ours that is defined the same way.
KNOWN: Mapping[str, tuple[Published, ...]] = MappingProxyType(
    {
        "wikitext2-raw": (
            Published("gpt2-large", "perplexity_per_token", 19.44, "transformers, perplexity page, stride 1024"),
            Published("gpt2-large", "perplexity_per_token", 16.45, "transformers, perplexity page, stride 512"),
            Published("gpt2", "perplexity_per_token", 29.94, "the same script, stride 1024 (llm.c, pull request 276)"),
        ),
        "wikitext103": (
            Published("gpt2", "perplexity_per_word", 37.37, f"{_HARNESS}, wikitext (transformers, issue 13761)"),
        ),
        "lambada": (
            Published("gpt2", "accuracy_last_word", 32.56, f"{_HARNESS}, lambada_openai (its issue 2159)"),
            Published("gpt2", "perplexity_last_word", 40.06, f"{_HARNESS}, lambada_openai (its issue 2159)"),
            Published("gpt2-xl", "perplexity_last_word", 10.63, f"{_HARNESS}, lambada_openai (its issue 911)"),
            Published("gpt2", "accuracy_last_token", 46.89, "openai/gpt-2, issue 131"),
        ),
        "cbt-cn": (Published("gpt2", "accuracy", 84.35, "transformers, issue 13761"),),
        "cbt-ne": (Published("gpt2", "accuracy", 73.65, "transformers, issue 13761"),),
        "hellaswag": (
            Published("gpt2", "accuracy", 28.59, _NANOGPT),
            Published("gpt2", "accuracy_by_token", 29.55, _NANOGPT),
            Published("gpt2-xl", "accuracy", 38.42, _NANOGPT),
            Published("gpt2-xl", "accuracy_by_token", 48.93, _NANOGPT),
        ),
        "hellaswag-harness": (
            Published("gpt2", "accuracy", 28.92, f"{_HARNESS} ({_NANOGPT})"),
            Published("gpt2", "accuracy_by_character", 31.14, f"{_HARNESS} ({_NANOGPT})"),
            Published("gpt2-xl", "accuracy", 40.04, f"{_HARNESS} ({_NANOGPT})"),
            Published("gpt2-xl", "accuracy_by_character", 50.89, f"{_HARNESS} ({_NANOGPT})"),
        ),
    }
)
