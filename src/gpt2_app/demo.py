"""What `make demo` runs: one story from one seed, in every framework asked for, and whether they agree."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2_app import backends, terminal
from gpt2_app.generate import TEMPERATURE, TOP_K
from gpt2_app.vocabularies import DEFAULT_MODEL, load_tokenizer
from gpt2_app.writing import prompt_ids
from gpt2_core.sampling import GenerationConfig

# Narrower than this, side by side is hard to read.
SIDE_BY_SIDE = 90


@dataclass(frozen=True)
class Story:
    """What one framework wrote."""

    title: str
    ids: tuple[int, ...]
    text: str
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Write the story; 0 where all frameworks wrote the same text, else 4."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time there was")
    parser.add_argument("--framework", default="pt", choices=list(backends.BACKENDS), help="numpy needs nothing else")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--length", type=int, default=100, help="new tokens")
    args = parser.parse_args(argv)
    terminal.prepare_streams()
    # The reference comes along always: it is what the others are held to.
    names = list(dict.fromkeys([args.framework, "numpy"]))
    stories = [_write(name, args) for name in names]
    _show(stories, args)
    return 0 if len({story.ids for story in stories}) == 1 else 4


def _write(framework: str, args: argparse.Namespace) -> Story:
    backend = backends.choose(framework)
    tokenizer = load_tokenizer(args.model)
    with terminal.busy(f"{backend.title} is writing ..."):
        runner = backends.load(framework, args.model, "cpu")
        settings = GenerationConfig(
            max_new_tokens=args.length, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, seed=args.seed
        )
        began = time.perf_counter()
        ids = runner.generate([prompt_ids(runner, tokenizer, args.prompt)], settings, None)[0]
        seconds = time.perf_counter() - began
    return Story(f"{backend.title}, {runner.dtype}", tuple(ids), tokenizer.decode(ids), seconds)


def _show(stories: Sequence[Story], args: argparse.Namespace) -> None:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console = terminal.console()
    wide = len(stories) > 1 and console.width >= SIDE_BY_SIDE
    width = (console.width - 1) // len(stories) if wide else console.width
    panels = [
        Panel(
            Text(terminal.harmless(story.text)),
            title=story.title,
            subtitle=f"{story.seconds:.1f} s",
            width=min(width, 100),
        )
        for story in stories
    ]
    if wide:
        console.print(Columns(panels, padding=0))
    else:
        for panel in panels:
            console.print(panel)
    if len(stories) > 1:
        same = len({story.ids for story in stories}) == 1
        count = len(stories[0].ids)
        verdict = f"the same {count} tokens from seed {args.seed}" if same else "they DIFFER: please report this"
        console.print(f"{' and '.join(story.title.split(',')[0] for story in stories)}: {verdict}")
    console.print(f"More: gpt2 generate {args.prompt!r} --seed {args.seed + 1}      gpt2 --help", style="dim")
