"""`gpt2 generate`: text to the terminal as it is written, or a JSON object for each sample."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_app import backends, terminal, writing
from gpt2_app.failures import clean_interrupt
from gpt2_app.sources import check_argument, decoded, one_source, open_source
from gpt2_app.vocabularies import DEFAULT_MODEL, load_tokenizer

if TYPE_CHECKING:
    from gpt2_app.backends import Runner
    from gpt2_core.sampling import GenerationConfig
    from gpt2_core.tokenizer import GPT2Tokenizer

# For stories: a little cooler than the model's own distribution, which keeps a small one on its subject, and without
# its long tail; 40 is what the samples published with GPT-2 were drawn with (openai/gpt-2, README.md).
TEMPERATURE, TOP_K = 0.7, 40
LENGTH = 200  # about 150 words
FILL = -1
# How the settings that the library's messages name are typed here.
OPTIONS = {
    "max_new_tokens": ("--length", "--max-new-tokens", "-n"),
    "top_k": ("--top-k",),
    "top_p": ("--top-p",),
    "min_p": ("--min-p",),
    "repetition_penalty": ("--repetition-penalty",),
    "temperature": ("--temperature", "-t"),
    "seed": ("--seed", "-s"),
    "dtype": ("--dtype",),
    "device": ("--device",),
    "framework": ("--framework", "-F"),
    "leave out do_sample": ("use --greedy",),
    'use "gpt2"': ("use --tokenizer gpt2",),
}


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="How the text begins; without it, --file or standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from a file.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME|FOLDER", help="gpt2-tales ships with the package.")
    ] = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER", help="Whose vocabulary, where the model's folder has none."),
    ] = None,
    framework: Annotated[
        str | None,
        typer.Option("--framework", "-F", metavar=backends.CHOICES, help="Default: the first that is installed."),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            "--max-new-tokens",
            "-n",
            help=f"How many tokens to add; {FILL} fills the model's window. Default: {LENGTH}, or what fits.",
        ),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token every time.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", help=f"Lower is safer, higher is wilder. Default: {TEMPERATURE}."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help=f"Draw from the K likeliest tokens; 0 from all. Default: {TOP_K}.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that together have this share.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that came up already are made less likely.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", help="The same seed gives the same text. Default: a fresh one, shown.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-N", min=1, help="How many texts; each has the next seed.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be given again.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ... Default: a GPU if there is one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="Number format: float32, bfloat16, ... or auto, the file's own.")
    ] = None,
    no_prompt: Annotated[bool, typer.Option("--no-prompt", help="Print the new text alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample, when it is done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No remarks on stderr.")] = False,
) -> None:
    """Continue a text, and show it as it is written.

    One line feed at the end of a prompt from a file or standard input is dropped. An empty prompt begins a new text,
    from the token that stands between texts. Every sample can be had again alone, with the seed shown beside it.
    """
    chosen = _sampling(greedy, temperature, top_k, top_p, min_p, repetition_penalty)
    if greedy and samples > 1:
        raise typer.BadParameter(
            f"--greedy writes the same text every time; leave out --samples {samples}, or leave out --greedy"
        )
    if stop and "" in stop:
        raise typer.BadParameter("--stop is an empty text, which every text holds; give at least one character")
    settings = _settings(chosen, length, seed)
    backends.check_dtype(backends.choose(framework), dtype)
    words = _prompt(prompt, file)
    with terminal.busy(f"loading {model} ...", quiet=quiet):
        vocabulary = load_tokenizer(tokenizer or model)
        runner = backends.load(framework, model, device, dtype)
    ids = writing.prompt_ids(runner, vocabulary, words)
    settings = _fitted(settings, length, writing.room(runner, ids))
    _check(runner, ids, settings)
    job = Job(runner, vocabulary, model, words, ids, settings, tuple(stop or ()), samples)
    if as_json:
        _write_json(job)
    else:
        _write_text(job, show_prompt=not no_prompt, quiet=quiet, seed_given=seed is not None)


@dataclass(frozen=True)
class Job:
    """What is to be written."""

    runner: Runner
    tokenizer: GPT2Tokenizer
    model: str
    prompt: str
    ids: list[int]
    settings: GenerationConfig
    stops: tuple[str, ...]
    samples: int

    def settings_of(self, sample: int) -> GenerationConfig:
        """The settings of one sample: its own seed, where tokens are drawn."""
        seed = self.settings.seed
        return self.settings if seed is None else self.settings.replace(seed=writing.seed_of(seed, sample))


# -- what was asked for --------------------------------------------------------------------------------------


def _sampling(greedy: bool, *given: Any) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    chosen = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    if not greedy:
        if chosen.get("temperature") == 0:
            raise typer.BadParameter("--temperature 0 divides by nothing; for the likeliest token use --greedy")
        return {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K, **chosen}
    idle = [f"--{name.replace('_', '-')}" for name in chosen if name != "repetition_penalty"]
    if idle:
        raise typer.BadParameter(f"{', '.join(idle)} cannot change what --greedy takes; leave out one or the other")
    return chosen


def _settings(chosen: dict[str, Any], length: int | None, seed: int | None) -> GenerationConfig:
    from gpt2_core.sampling import GenerationConfig

    if chosen.get("do_sample") and seed is None:
        seed = writing.drawn_seed()
    return GenerationConfig(**chosen, seed=seed, max_new_tokens=LENGTH if length in (None, FILL) else length)


def _fitted(settings: GenerationConfig, length: int | None, room: int) -> GenerationConfig:
    """The length asked for as it is; the default cut to what fits; all that fits for FILL."""
    if length is None:
        return settings.replace(max_new_tokens=min(LENGTH, room))
    return settings.replace(max_new_tokens=room) if length == FILL else settings


def _prompt(prompt: str | None, file: Path | None) -> str:
    one_source(prompt, file, "PROMPT")
    if prompt is not None:
        return check_argument(prompt, "PROMPT")
    if file is None and sys.stdin.isatty():
        return ""
    with open_source(file) as (stream, name):
        text = "".join(decoded(stream, name))
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _check(runner: Runner, ids: list[int], settings: GenerationConfig) -> None:
    """Raise what the model would, before anything is shown."""
    from gpt2_core.generation import prepare

    prepare(runner.config, [ids], generation_config=settings)


# -- telling it ----------------------------------------------------------------------------------------------


def _write_json(job: Job) -> None:
    for number in range(job.samples):
        settings = job.settings_of(number)
        sample = writing.write_text(job.runner, job.tokenizer, job.ids, settings, stops=job.stops)
        shown = {name: value for name, value in settings.to_dict().items() if name != "seed"}
        terminal.write_json(
            {
                "prompt": job.prompt,
                "text": sample.text,
                "prompt_ids": job.ids,
                "ids": sample.ids,
                "finish": sample.finish,
                "seed": settings.seed,
                "model": job.model,
                "framework": job.runner.framework,
                "device": job.runner.device,
                "dtype": job.runner.dtype,
                "settings": {**shown, **({"stop": list(job.stops)} if job.stops else {})},
                "seconds": round(sample.seconds, 4),
                "tokens_per_second": round(len(sample.ids) / sample.seconds, 2),
            }
        )


def _write_text(job: Job, *, show_prompt: bool, quiet: bool, seed_given: bool) -> None:
    for_people = sys.stdout.isatty()
    made, seconds = 0, 0.0

    try:
        for number in range(job.samples):
            settings = job.settings_of(number)
            if job.samples > 1:
                _heading(number, job.samples, settings.seed)
            if show_prompt:
                _show_prompt(job.prompt, for_people)
            sample = writing.write_text(
                job.runner, job.tokenizer, job.ids, settings, stops=job.stops, on_text=terminal.write
            )
            made, seconds = made + len(sample.ids), seconds + sample.seconds
            terminal.write("\n")
    except KeyboardInterrupt:
        clean_interrupt()
        if not quiet:
            _remark(job, 0, 0.0, seed_given=seed_given)
        raise
    if not quiet:
        _remark(job, made, seconds, seed_given=seed_given)


def _heading(number: int, count: int, seed: int | None) -> None:
    seeded = "" if seed is None else f", seed {seed}"
    terminal.write(f"{chr(10) if number else ''}=== SAMPLE {number + 1} of {count}{seeded} ===\n")


def _show_prompt(prompt: str, for_people: bool) -> None:
    if not for_people:
        terminal.write(prompt)
        return
    from rich.text import Text

    terminal.console().print(Text(prompt, "bold"), end="", soft_wrap=True)
    sys.stdout.flush()


def _remark(job: Job, made: int, seconds: float, *, seed_given: bool) -> None:
    """The seed, where it was drawn: without it the text could not be had again. For people also how fast it was."""
    parts = []
    first = job.settings.seed
    if first is not None:
        last = writing.seed_of(first, job.samples - 1)
        parts.append(f"seed {first}" if job.samples == 1 else f"seeds {first} to {last}")
    if sys.stderr.isatty():
        parts += [job.model, job.runner.framework, job.runner.device]
        if made:
            parts.append(f"{made} tokens in {seconds:.1f} s, {made / seconds:.1f} a second")
    elif seed_given:
        return
    if parts:
        terminal.note(" · ".join(parts))
