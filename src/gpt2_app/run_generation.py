"""The options of the field's `run_generation.py`, over the same machinery as `gpt2 generate`.

What its users know is kept: names, defaults, the question for a prompt, and how sequences are printed. All sequences
of a call are drawn together from one seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from gpt2_app import backends, failures, terminal, writing
from gpt2_app.sources import check_argument
from gpt2_app.vocabularies import DEFAULT_MODEL, load_tokenizer
from gpt2_core.errors import GenerationError, Gpt2Error, InputError

if TYPE_CHECKING:
    from gpt2_app.backends import Runner
    from gpt2_core.sampling import GenerationConfig


# How the settings that the library's messages name are typed here.
_OPTIONS = {
    "max_new_tokens": ("--length",),
    "top_k": ("--k",),
    "top_p": ("--p",),
    "repetition_penalty": ("--repetition_penalty",),
    "num_return_sequences": ("--num_return_sequences",),
    "temperature": ("--temperature",),
    "seed": ("--seed",),
    "framework": ("--framework",),
    "leave out do_sample": ("use --temperature 0",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run with these arguments, those of the process by default; the exit code."""
    options = parser().parse_args(argv)
    terminal.prepare_streams()
    try:
        for number, text in enumerate(generate(options), 1):
            terminal.write(f"=== GENERATED SEQUENCE {number} ===\n{text}\n")
    except (failures.Failure, Gpt2Error, OSError, KeyboardInterrupt) as error:
        return failures.report(error, as_json=False, options=_OPTIONS)
    return failures.DONE


def parser() -> argparse.ArgumentParser:
    """The options, with the defaults that their users know."""
    it = _Parser(
        prog="run_generation.py",
        description="Continue a text with GPT-2. `gpt2 generate` does the same with more comfort.",
    )
    it.add_argument("--model_type", default="gpt2", type=_model_type, help="gpt2, the only one here")
    it.add_argument("--model_name_or_path", default=DEFAULT_MODEL, help="default: %(default)s, which ships with us")
    it.add_argument("--prompt", default="", help="how the text begins; asked for if empty")
    it.add_argument("--length", type=int, default=20, help="tokens to add; -1 fills the model's window")
    it.add_argument("--stop_token", default=None, help="the text is cut before it")
    it.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token every time")
    it.add_argument("--repetition_penalty", type=float, default=1.0)
    it.add_argument("--k", type=int, default=0, help="draw from the k likeliest tokens; 0 from all")
    it.add_argument("--p", type=float, default=0.9, help="draw from the likeliest tokens with this share together")
    it.add_argument("--prefix", default="", help="text before the prompt that is not printed")
    it.add_argument("--padding_text", default="", help="older name of --prefix")
    it.add_argument("--xlm_language", default="", type=_no_language, help="for XLM alone: refused")
    it.add_argument("--seed", type=int, default=42)
    it.add_argument("--no_cuda", "--use_cpu", action="store_true", help="stay on the CPU")
    it.add_argument("--num_return_sequences", type=int, default=1)
    it.add_argument("--fp16", action="store_true", help="compute in half precision")
    it.add_argument("--framework", default=None, metavar=backends.CHOICES, help="default: the first that is installed")
    return it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(terminal.harmless(message))


def _model_type(value: str) -> str:
    if value.lower() != "gpt2":
        raise argparse.ArgumentTypeError(
            f"{value!r} is not supported; this program runs GPT-2 alone: --model_type gpt2"
        )
    return "gpt2"


def _no_language(value: str) -> str:
    if value:
        raise argparse.ArgumentTypeError(f"{value!r} is a language for XLM; GPT-2 has none, leave it out")
    return value


def generate(options: argparse.Namespace) -> list[str]:
    """The sequences: each is the prompt and what follows it.

    Raises: Gpt2Error, Failure.
    """
    settings = _settings(options)
    framework = backends.choose(options.framework).name
    prefix = check_argument(options.prefix, "--prefix") or check_argument(options.padding_text, "--padding_text")
    stop = check_argument(options.stop_token or "", "--stop_token")
    prompt = check_argument(options.prompt, "--prompt") or _ask()
    with terminal.busy(f"loading {options.model_name_or_path} ..."):
        tokenizer = load_tokenizer(options.model_name_or_path)
        runner = backends.load(
            framework,
            options.model_name_or_path,
            "cpu" if options.no_cuda else None,
            "float16" if options.fp16 else None,
        )
    ids = writing.prompt_ids(runner, tokenizer, prefix + prompt)
    settings = settings.replace(max_new_tokens=_length(options.length, runner, ids))
    rows = runner.generate([ids], settings)
    if options.temperature == 0 and options.num_return_sequences > 1:
        terminal.note("--temperature 0 takes the likeliest token every time: all sequences are the same")
        rows *= options.num_return_sequences
    return [prompt + _cut(writing.text_of(tokenizer, _new(row, ids, runner)), stop) for row in rows]


def _settings(options: argparse.Namespace) -> GenerationConfig:
    from gpt2_core.sampling import GenerationConfig

    if options.temperature == 0:
        if options.num_return_sequences < 1:
            raise GenerationError(
                f"num_return_sequences is {options.num_return_sequences}, expected a whole number of at least 1"
            )
        return GenerationConfig(repetition_penalty=options.repetition_penalty, seed=options.seed)
    return GenerationConfig(
        do_sample=True,
        temperature=options.temperature,
        top_k=options.k,
        top_p=options.p,
        repetition_penalty=options.repetition_penalty,
        num_return_sequences=options.num_return_sequences,
        seed=options.seed,
    )


def _ask() -> str:
    """The prompt, from whoever started this.

    Raises: KeyboardInterrupt where they end the input instead, InputError where it is not UTF-8.
    """
    try:
        return input("Model prompt >>> ")
    except UnicodeDecodeError as cause:
        raise InputError(
            f"the prompt is not UTF-8: byte 0x{cause.object[cause.start]:02x} at {cause.start}; check the encoding of "
            f"the terminal or file that it comes from"
        ) from cause
    except EOFError:
        sys.stdout.write("\n")
        raise KeyboardInterrupt from None


def _length(length: int, runner: Runner, ids: Sequence[int]) -> int:
    """As many tokens as asked for, or as the window holds."""
    return writing.room(runner, ids) if length < 0 else min(length, runner.window)


def _new(row: Sequence[int], prompt: Sequence[int], runner: Runner) -> list[int]:
    """The new tokens up to the end of the text."""
    new = list(row[len(prompt) :])
    ends = [place for place, token in enumerate(new) if token in runner.config.eos_token_ids]
    return new[: ends[0]] if ends else new


def _cut(text: str, stop: str) -> str:
    return text if not stop else text.partition(stop)[0]
