"""How fast text becomes ids inside TensorFlow, beside GPT2Tokenizer itself and KerasHub in the same run.

    python benchmarks/text.py [--rounds 7] [--batch 64] [--lines 10] [--clock wall|cpu] [--json FILE]

Texts are those of benchmarks/tokenizer.py, in documents of some lines each. Every round runs each program once over
all documents, one program after the other; the table has the medians in MB of UTF-8 a second, and ratios to KerasHub's
median, or to the layer's where KerasHub is not installed. All give ragged ids, int32.

Pipelines: documents → batch → map, in parallel → iterated to the end. What TensorFlow does up to the first batch,
mostly making the graph ready, is a row of its own, in seconds. Cold: the program has seen one word before; KerasHub
keeps a table of the words it has seen. One by one: a tf.function called with one document. KerasHub's ids are not
GPT-2's on every text: the table says on how many documents. The clock "cpu" counts the time of all of this process's
threads, for machines that are busy otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import tensorflow as tf

from common import machine, versions, write_json
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_tf.text import TFGPT2Tokenizer
from tokenizer import code, many_languages, prose

Encode = Callable[[Any], Any]
Clock = Callable[[], float]
MEGABYTE = 1e6
ONE_BY_ONE = 200  # documents
GRAPH, PYTHON, KERAS_HUB = "the layer", "the layer, native=False", "KerasHub"


def makers() -> dict[str, Callable[[], Encode]]:
    """What makes each program that is installed: string tensor (B,) -> ragged ids."""

    def layer(native: bool) -> Encode:
        tokenizer = TFGPT2Tokenizer(padding=False, native=native)
        return lambda texts: tokenizer(texts)["input_ids"]

    found: dict[str, Callable[[], Encode]] = {GRAPH: lambda: layer(True), PYTHON: lambda: layer(False)}
    try:
        import keras_hub
    except ImportError:
        return found
    folder = tempfile.mkdtemp()
    GPT2Tokenizer().save_pretrained(folder)
    files = {"vocabulary": str(Path(folder, "vocab.json")), "merges": str(Path(folder, "merges.txt"))}
    found[KERAS_HUB] = lambda: keras_hub.tokenizers.GPT2Tokenizer(**files)  # outside graphs it is not TensorFlow's
    return found


def in_graph(encode: Encode) -> Encode:
    graph: Encode = tf.function(encode, input_signature=[tf.TensorSpec([None], tf.string)])
    return graph


def drain(texts: list[str], batch: int, encode: Encode, clock: Clock) -> tuple[float, float]:
    """Every batch of a pipeline, to its end: seconds up to the first batch, and of all others."""
    began = clock()
    data = tf.data.Dataset.from_tensor_slices(texts).batch(batch)
    batches = iter(data.map(encode, num_parallel_calls=tf.data.AUTOTUNE))
    next(batches)
    first = clock()
    for _ in batches:
        pass
    return first - began, clock() - first


def other_ids(texts: list[str], encode: Encode) -> int:
    """On how many documents the ids are not GPT-2's."""
    wanted = GPT2Tokenizer().encode_batch(texts)
    batches = tf.data.Dataset.from_tensor_slices(texts).batch(1).map(encode)
    got = [batch.to_list()[0] for batch in batches]
    return sum(here != there for here, there in zip(got, wanted, strict=True))


def measure(texts: list[str], rounds: int, batch: int, clock: Clock) -> tuple[dict[str, float], dict[str, float]]:
    """MB/s and seconds, by what was done."""
    making = makers()
    warm = {name: make() for name, make in making.items()}
    graphs = {name: in_graph(encode) for name, encode in warm.items()}
    itself = GPT2Tokenizer()
    whole, few = tf.constant(texts), [tf.constant([text]) for text in texts[:ONE_BY_ONE]]
    all_size, few_size, rest_size = (size(part) for part in (texts, texts[:ONE_BY_ONE], texts[batch:]))
    rates: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}

    def run(row: str, megabytes: float, job: Callable[[], Any]) -> None:
        began = clock()
        job()
        rates.setdefault(row, []).append(megabytes / (clock() - began))

    for turn in range(rounds + 1):  # the first is not counted
        for name, make in making.items():
            encode, fresh = warm[name], make()
            fresh(tf.constant(["word"]))
            for kind, program in (("cold", fresh), ("warm", encode)):
                start, rest = drain(texts, batch, program, clock)
                seconds.setdefault(f"first batch, {kind}, {name}", []).append(start)
                rates.setdefault(f"pipeline, {kind}, {name}", []).append(rest_size / rest)
            graph = graphs[name]
            run(f"one call, {name}", all_size, lambda graph=graph: graph(whole))  # type: ignore[misc]
            run(f"one by one, {name}", few_size, lambda graph=graph: [graph(text) for text in few])  # type: ignore[misc]
        run("one call, GPT2Tokenizer, lists", all_size, lambda: itself.encode_batch(texts, threads=1))
        run("one by one, GPT2Tokenizer", few_size, lambda: [itself.encode(text) for text in texts[:ONE_BY_ONE]])
        if turn == 0:
            rates.clear()
            seconds.clear()
    return medians(rates), medians(seconds)


def size(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / MEGABYTE


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    return {row: statistics.median(values) for row, values in sorted(measured.items())}


def measure_back(texts: list[str], rounds: int, clock: Clock) -> dict[str, float]:
    """MB/s of ids to strings, all documents in one call."""
    layer = TFGPT2Tokenizer(padding=False)
    ids = layer(texts)["input_ids"]
    jobs: dict[str, Callable[[], Any]] = {f"back, {GRAPH}": lambda: layer.detokenize(ids)}
    making = makers()
    if KERAS_HUB in making:
        theirs: Any = making[KERAS_HUB]()
        graph = tf.function(theirs.detokenize)
        jobs[f"back, {KERAS_HUB}"] = lambda: graph(ids)
    rows, itself = ids.to_list(), GPT2Tokenizer()
    jobs["back, GPT2Tokenizer, lists"] = lambda: itself.batch_decode(rows)
    times: dict[str, list[float]] = {row: [] for row in jobs}
    for turn in range(rounds + 1):
        for row, job in jobs.items():
            began = clock()
            job()
            if turn:
                times[row].append(clock() - began)
    return {row: size(texts) / statistics.median(values) for row, values in times.items()}


def documents(text: str, lines: int) -> list[str]:
    every = text.splitlines(keepends=True)
    return ["".join(every[first : first + lines]) for first in range(0, len(every), lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64, help="documents in a batch of the pipelines")
    parser.add_argument("--lines", type=int, default=10, help="lines in a document")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    result: dict[str, Any] = {
        "machine": machine(),
        "clock": options.clock,
        "versions": versions("tensorflow", "keras", "keras-hub"),
    }
    for name, text in {"prose": prose(), "code": code(1_000_000), "many languages": many_languages(500_000)}.items():
        texts = documents(text, options.lines)
        rates, seconds = measure(texts, options.rounds, options.batch, clock)
        result[name] = {
            "documents": len(texts),
            "megabytes": size(texts),
            "documents with other ids": {who: other_ids(texts[:500], make()) for who, make in makers().items()},
            "MB/s": rates | measure_back(texts, options.rounds, clock),
            "seconds": seconds,
        }
        show(name, result[name])
    write_json(options.json, result)


def show(name: str, measured: dict[str, Any]) -> None:
    rates = measured["MB/s"]
    print(f"\n{name}: {measured['megabytes']:.1f} MB in {measured['documents']} documents; MB/s (ratio)")
    for row, rate in rates.items():
        kind = row.rsplit(", ", 1)[0] if row.endswith((GRAPH, KERAS_HUB)) else row.split(", GPT2")[0].split(", the")[0]
        base = rates.get(f"{kind}, {KERAS_HUB}", rates.get(f"{kind}, {GRAPH}"))
        print(f"  {row:42}{rate:10.2f} ({rate / base:.2f}x)")
    for row, seconds in measured["seconds"].items():
        print(f"  {row:42}{seconds:10.2f} s")
    print(f"  documents with other ids than GPT-2's, of the first 500: {measured['documents with other ids']}")


if __name__ == "__main__":
    main()
