"""`gpt2 bench`: how fast a model writes on this machine, and how near that is to what its memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2_app import backends, terminal
from gpt2_app.vocabularies import DEFAULT_MODEL
from gpt2_core.errors import InputError

if TYPE_CHECKING:
    from gpt2_core.config import GPT2Config

OPTIONS = {"dtype": ("--dtype",), "compile": ("--compile",), "device": ("--device",), "framework": ("--framework",)}
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_STREAM = 256 * 2**20  # bytes that are read to measure the memory: more than any cache holds


def command(
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME|FOLDER|FILE", help="gpt2-tales ships with the package.")
    ] = DEFAULT_MODEL,
    batch: Annotated[str, typer.Option(metavar="N,N", help="How many texts are written at once.")] = "1,8",
    prompt: Annotated[str, typer.Option(metavar="N,N", help="How many tokens each begins with.")] = "32",
    new: Annotated[int, typer.Option(metavar="N", help="How many tokens each gets.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(metavar="N", help="How often each is measured.", min=1)] = 3,
    framework: Annotated[str | None, typer.Option(metavar=backends.CHOICES, help="What computes.")] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Where it computes.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="float32|int8|...", help="The weights' numbers.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the step that reads a token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure how fast a model writes: tokens per second by the number of texts and the length of their prompts.

    The likeliest tokens are written after random prompts. A token's time leaves the prompt out, which has a column of
    its own. The share is that of the memory's measured speed which reading every weight once a step would take; on a
    GPU, whose memory is not measured, there is none.
    """
    sizes = [(rows, length) for rows in _numbers("--batch", batch) for length in _numbers("--prompt", prompt)]
    with terminal.busy("loading the model", quiet=as_json):
        runner = backends.load(framework, model, device, dtype, compiled=compiled)
    longest = max(length for _, length in sizes)
    if longest + new > runner.window:
        raise InputError(
            f"--prompt {longest} and --new {new} make {longest + new} tokens, expected at most the {runner.window} "
            "positions of the model; make one of them smaller"
        )
    threads = _threads(runner)
    speed = bandwidth(threads) if runner.device.lower().startswith("cpu") else None
    found: list[dict[str, Any]] = []
    for rows, length in sizes:
        with terminal.busy(f"{rows} at once, prompts of {length}", quiet=as_json):
            found.append(measure(runner, rows, length, new, rounds) | {"rows": rows, "prompt": length})
        if speed is not None:
            used = weight_bytes(runner.config, runner.dtype) / (found[-1]["ms_a_step"] / 1e3)
            found[-1]["share_of_bandwidth"] = used / speed
    about = {
        "model": model, "framework": runner.framework, "device": runner.device, "dtype": runner.dtype,
        "threads": threads, "compiled": compiled, "new": new, "bandwidth": speed,
    }  # fmt: skip
    if as_json:
        terminal.write_json(about | {"results": found})
    else:
        _show(about, found)


def _numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and part.isascii() and int(part) > 0 for part in parts):
        raise InputError(
            f"{option} is {text!r}, expected whole numbers from 1 on, separated by commas, such as {option} 1,8"
        )
    return [int(part) for part in parts]


def _threads(runner: backends.Runner) -> int:
    if runner.framework == "pt":
        import torch

        return torch.get_num_threads()
    import os

    return os.cpu_count() or 1


def weight_bytes(config: GPT2Config, dtype: str) -> int:
    """The bytes that a step reads at least: every weight once, but of the positions, which are looked up."""
    from gpt2_core.parameters import count_parameters

    return (count_parameters(config) - config.n_positions * config.n_embd) * BYTES.get(dtype, 4)


def bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that so many threads read from memory together, the best of some rounds."""
    import numpy as np

    parts = np.array_split(np.ones(_STREAM // 4, np.float32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return _STREAM / best


def measure(runner: backends.Runner, rows: int, length: int, new: int, rounds: int) -> dict[str, float]:
    """What one size takes, medians: the prompt with its first token, and each step after that."""
    import numpy as np

    from gpt2_core.generation_config import GenerationConfig

    ids = np.random.default_rng(0).integers(0, runner.config.vocab_size, (rows, length)).tolist()

    def seconds(count: int) -> float:
        settings = GenerationConfig(max_new_tokens=count, eos_token_id=(), pad_token_id=0)
        began = time.perf_counter()
        runner.generate(ids, settings)
        return time.perf_counter() - began

    def pairs() -> Iterator[tuple[float, float]]:
        for turn in range(rounds + 1):
            pair = seconds(1), seconds(new)
            if turn:  # the first one traces, compiles and warms
                yield pair

    times = list(pairs())
    first = statistics.median(one for one, _ in times)
    step = max(statistics.median(many - one for one, many in times), 1e-9) / (new - 1)
    return {"ms_prompt": first * 1e3, "ms_a_step": step * 1e3, "tokens_per_second": rows / step}


def _show(about: dict[str, Any], found: list[dict[str, Any]]) -> None:
    from rich.table import Table

    speed = about["bandwidth"]
    note = f", memory read at {speed / 1e9:.1f} GB/s" if speed else ""
    table = Table(
        title=f"{terminal.harmless(about['model'])}, {about['framework']}, {about['dtype']} on {about['device']}, "
        f"{about['threads']} threads{note}"
    )
    for name in ("texts", "prompt", "prompt, ms", "step, ms", "tokens/s", "share of memory"):
        table.add_column(name, justify="right")
    for row in found:
        share = row.get("share_of_bandwidth")
        table.add_row(
            str(row["rows"]), str(row["prompt"]), f"{row['ms_prompt']:.1f}", f"{row['ms_a_step']:.2f}",
            f"{row['tokens_per_second']:.1f}", "" if share is None else f"{share:.0%}",
        )  # fmt: skip
    terminal.console().print(table)
