"""What `gpt2 generate` shows: a text as it is written, several under headings, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2_app import terminal, writing
from gpt2_app.failures import clean_interrupt

if TYPE_CHECKING:
    from gpt2_app.backends import Runner
    from gpt2_core.sampling import GenerationConfig
    from gpt2_core.tokenizer import GPT2Tokenizer


@dataclass(frozen=True)
class Job:
    """What is to be written: the prompts in batches, or one prompt several times, each call with a seed of its own."""

    runner: Runner
    tokenizer: GPT2Tokenizer
    model: str
    prompts: list[str]
    ids: list[list[int]]
    settings: GenerationConfig
    samples: int = 1
    batch_size: int = 16
    assistant: Runner | None = None
    log_probs: bool = False

    @property
    def streams(self) -> bool:
        """Whether each call writes one text whose characters are known as it grows."""
        return (
            min(self.batch_size, len(self.ids)) == 1
            and self.settings.num_return_sequences == 1
            and writing.can_stream(self.settings)
        )

    def settings_of(self, number: int) -> GenerationConfig:
        """The settings of the call that begins with sample or prompt ``number``: its own seed, where one is needed."""
        seed = self.settings.seed
        return self.settings if seed is None else self.settings.replace(seed=writing.seed_of(seed, number))

    def calls(self) -> Iterator[tuple[int, int, GenerationConfig]]:
        """Each call: its first prompt, the one behind its last, its settings."""
        if len(self.ids) == 1:
            for sample in range(self.samples):
                yield 0, 1, self.settings_of(sample)
        else:
            for first in range(0, len(self.ids), self.batch_size):
                yield first, min(first + self.batch_size, len(self.ids)), self.settings_of(first)

    def write(self, first: int, last: int, settings: GenerationConfig) -> list[writing.Sample]:
        """The texts of one call."""
        if self.streams:
            settings = settings.replace(return_dict=True) if self.log_probs else settings
            return [
                writing.write_text(self.runner, self.tokenizer, self.ids[first], settings, assistant=self.assistant)
            ]
        return writing.write_texts(
            self.runner, self.tokenizer, self.ids[first:last], settings, assistant=self.assistant
        )


# -- JSON ----------------------------------------------------------------------------------------------------


def write_json(job: Job) -> None:
    """One JSON object for each text, when its call is done."""
    for first, last, settings in job.calls():
        samples = job.write(first, last, settings)
        shown = {name: value for name, value in settings.to_dict().items() if name not in ("seed", "return_dict")}
        seconds, made = samples[0].seconds, sum(len(sample.ids) for sample in samples)
        for row, sample in enumerate(samples):
            prompt = first + row // settings.num_return_sequences
            out: dict[str, Any] = {
                "prompt": job.prompts[prompt],
                "text": sample.text,
                "prompt_ids": job.ids[prompt],
                "ids": sample.ids,
                "finish": sample.finish,
                "seed": settings.seed,
                "row": row,
            }
            if sample.score is not None:
                out["score"] = sample.score
            if job.log_probs and sample.log_probs is not None:
                out["log_probs"] = [round(value, 6) for value in sample.log_probs]
            terminal.write_json(
                out
                | {
                    "model": job.model,
                    "framework": job.runner.framework,
                    "device": job.runner.device,
                    "dtype": job.runner.dtype,
                    "settings": shown,
                    "seconds": round(seconds, 4),
                    "tokens_per_second": round(made / seconds, 2),
                }
            )


# -- text ----------------------------------------------------------------------------------------------------


def write_text(job: Job, *, show_prompt: bool, quiet: bool, seed_given: bool) -> None:
    """Texts on stdout, the streamed ones as they grow, and a remark on stderr."""
    made, seconds = 0, 0.0
    try:
        for number, (first, last, settings) in enumerate(job.calls()):
            if job.streams:
                samples = [_streamed(job, number, first, settings, show_prompt=show_prompt)]
            else:
                with terminal.busy(f"writing {(last - first) * settings.num_return_sequences} texts ...", quiet=quiet):
                    samples = job.write(first, last, settings)
                _shown(job, number, first, samples, show_prompt=show_prompt)
            made += sum(len(sample.ids) for sample in samples)
            seconds += samples[0].seconds
    except KeyboardInterrupt:
        clean_interrupt()
        if not quiet:
            _remark(job, 0, 0.0, seed_given=seed_given)
        raise
    if not quiet:
        _remark(job, made, seconds, seed_given=seed_given)


def _streamed(job: Job, number: int, prompt: int, settings: GenerationConfig, *, show_prompt: bool) -> writing.Sample:
    _heading(job, number, prompt, None)
    if show_prompt:
        _show_prompt(job.prompts[prompt])
    sample = writing.write_text(
        job.runner, job.tokenizer, job.ids[prompt], settings, assistant=job.assistant, on_text=terminal.write
    )
    terminal.write("\n")
    return sample


def _shown(job: Job, number: int, first: int, samples: list[writing.Sample], *, show_prompt: bool) -> None:
    each = job.settings.num_return_sequences
    for row, sample in enumerate(samples):
        prompt = first + row // each
        _heading(job, number if row == 0 else -1, prompt, row % each, sample.score)
        if show_prompt:
            _show_prompt(job.prompts[prompt])
        terminal.write(sample.text + "\n")


def _heading(job: Job, number: int, prompt: int, text: int | None, score: float | None = None) -> None:
    """Which text it is that follows, where there are several; ``number`` is its call's, or -1 within one."""
    parts, each = [], job.settings.num_return_sequences
    if job.samples > 1 and number >= 0:
        seed = job.settings_of(number).seed
        parts.append(f"SAMPLE {number + 1} of {job.samples}" + ("" if seed is None else f", seed {seed}"))
    if len(job.prompts) > 1:
        parts.append(f"PROMPT {prompt + 1} of {len(job.prompts)}")
    if each > 1 and text is not None:
        parts.append(f"TEXT {text + 1} of {each}")
    if parts and score is not None:
        parts.append(f"score {score:.4f}")
    if parts:
        at_the_top = number == 0 and prompt == 0 and not text
        terminal.write(f"{'' if at_the_top else chr(10)}=== {', '.join(parts)} ===\n")


def _show_prompt(prompt: str) -> None:
    if not sys.stdout.isatty():
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
