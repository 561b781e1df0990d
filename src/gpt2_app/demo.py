"""What `make demo` runs: one story from one seed, in every framework that is there, and whether they agree."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2_app import backends, failures, terminal
from gpt2_app.generate import TEMPERATURE, TOP_K
from gpt2_app.vocabularies import DEFAULT_MODEL, load_tokenizer
from gpt2_app.writing import prompt_ids, text_of
from gpt2_core.errors import Gpt2Error
from gpt2_core.sampling import GenerationConfig

# A story narrower than this is hard to read.
NARROWEST = 36


@dataclass(frozen=True)
class Story:
    """What one framework wrote."""

    title: str
    ids: tuple[int, ...]
    text: str
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Write the story; 0 where all frameworks wrote the same text, 1 where not, else as `gpt2_app.failures` has it."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("prompt", nargs="?", default="Once upon a time there was")
    parser.add_argument("--framework", choices=[*backends.BACKENDS, "all"], default="all", help="numpy comes along")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--length", type=int, default=100, help="new tokens")
    args = parser.parse_args(argv)
    terminal.prepare_streams()
    try:
        stories = [_write(name, args) for name in _frameworks(args.framework)]
    except (Gpt2Error, failures.Failure) as error:
        if failures.wants_traceback():
            raise
        return failures.report(error, as_json=False)
    _show(stories, args)
    return failures.DONE if len({story.ids for story in stories}) == 1 else failures.DIFFERENT


def _frameworks(asked: str) -> list[str]:
    """Those to write with; the reference is always among them: it is what the others are held to."""
    installed = [backend.name for backend in backends.BACKENDS.values() if backend.is_installed()]
    return installed if asked == "all" else list(dict.fromkeys([asked, "numpy"]))


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
    return Story(f"{backend.title}, {runner.dtype}", tuple(ids), text_of(tokenizer, ids), seconds)


def _show(stories: Sequence[Story], args: argparse.Namespace) -> None:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console = terminal.console()
    wide = len(stories) > 1 and console.width // len(stories) >= NARROWEST
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
        *most, last = (story.title.split(",")[0] for story in stories)
        console.print(f"{', '.join(most)} and {last}: {verdict}")
    console.print(f"More: gpt2 generate {args.prompt!r} --seed {args.seed + 1}      gpt2 --help", style="dim")
