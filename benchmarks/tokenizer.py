"""How fast the tokenizer is, beside tiktoken and tokenizers in the same run.

    python benchmarks/tokenizer.py [--prose FILE ...] [--code FILE ...] [--rounds 7] [--clock wall|cpu] [--json]

Every round times each program once on each text, one after the other; the table has the medians, and ratios to
tiktoken's median. Cold: a new tokenizer sees the text for the first time. Warm: it has seen it before. One thread, but
for the batch. The clock "cpu" counts this thread's time only, for machines that are busy otherwise.

Texts, if no files are given: prose, the Python language reference that comes with Python (pydoc_data.topics); code, the
standard library's sources; many languages, article 1 of the Declaration of Human Rights in twelve languages with its
words in random order, so that pieces repeat as they do in text but sentences do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2_core.pretokenize import PATTERN
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.vocabulary import gpt2_vocabulary

MEGABYTE = 1e6
LANGUAGES = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
    "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
)


def prose() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def code(size: int = 5_000_000) -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for file in sorted(folder.rglob("*.py")):
        if "site-packages" not in file.parts and "topics" not in file.name:
            text += file.read_text(encoding="utf-8", errors="replace")
            if len(text) > size:
                break
    return text


def many_languages(size: int = 1_000_000) -> str:
    draw = random.Random(1)
    parts: list[str] = []
    total = 0
    while total < size:
        words = draw.choice(LANGUAGES).split(" ")
        if len(words) < 3:  # written without spaces: shuffle the characters
            words = [*words[0]]
            joint = ""
        else:
            joint = " "
        draw.shuffle(words)
        parts.append(joint.join(words))
        total += len(parts[-1])
    return "\n".join(parts)


def others() -> dict[str, tuple[Callable[[str], Any], Callable[[Any], str] | None]]:
    """The programs to compare with that are installed: name -> (encode, decode)."""
    found: dict[str, tuple[Callable[[str], Any], Callable[[Any], str] | None]] = {}
    vocabulary = gpt2_vocabulary()
    try:
        import tiktoken

        encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=getattr(_tiktoken_plugin(), "r50k_pat_str", PATTERN),
            mergeable_ranks={data: index for index, data in enumerate(vocabulary.token_bytes[:-1])},
            special_tokens={"<|endoftext|>": 50256},
        )
        found["tiktoken"] = encoding.encode_ordinary, encoding.decode
    except ImportError:
        pass
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        merges = [tuple(merge.split(" ")) for merge in vocabulary.merges()]
        theirs = Tokenizer(models.BPE(vocab=vocabulary.token_ids, merges=merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        found["tokenizers"] = lambda text: theirs.encode(text).ids, None
    except ImportError:
        pass
    return found


def _tiktoken_plugin() -> Any:
    try:
        from tiktoken_ext import openai_public
    except ImportError:
        return None
    return openai_public


def measure(text: str, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Megabytes of UTF-8 per second, by what was done."""
    rivals = others()
    ours = GPT2Tokenizer()
    ids = ours.encode(text, special="text")
    array = ours.encode_array(text, special="text")
    for name, (encode, decode) in rivals.items():
        if list(encode(text)) != ids or (decode and decode(ids) != text):
            raise SystemExit(f"{name} gives other ids: the timings would mean nothing")
    if ours.decode(ids) != text or ours.decode(array) != text:
        raise SystemExit("decode is not the inverse of encode")
    times: dict[str, list[float]] = {}

    def run(name: str, function: Callable[[], Any]) -> None:
        start = clock()
        function()
        times.setdefault(name, []).append(clock() - start)

    for _ in range(rounds):
        fresh = GPT2Tokenizer()
        run("encode, ours cold", lambda fresh=fresh: fresh.encode(text, special="text"))  # type: ignore[misc]
        run("encode, ours warm", lambda: ours.encode(text, special="text"))
        run("encode, ours warm, to an array", lambda: ours.encode_array(text, special="text"))
        for name, (encode, decode) in rivals.items():
            run(f"encode, {name}", lambda encode=encode: encode(text))  # type: ignore[misc]
            if decode:
                run(f"decode, {name}", lambda decode=decode: decode(ids))  # type: ignore[misc]
        run("decode, ours, from a list", lambda: ours.decode(ids))
        run("decode, ours, from an array", lambda: ours.decode(array))
    size = len(text.encode()) / MEGABYTE
    return {name: size / statistics.median(values) for name, values in times.items()}


def measure_batch(text: str, rounds: int) -> dict[str, float]:
    """The text in lines, as one batch on all cores; wall time."""
    lines = text.splitlines(keepends=True)
    ours = GPT2Tokenizer()
    jobs: dict[str, Callable[[], Any]] = {
        "batch, ours, one thread": lambda: ours.encode_batch(lines, special="text", threads=1),
        "batch, ours, all cores": lambda: ours.encode_batch(lines, special="text"),
        "batch, ours, all cores, to one array": lambda: ours.encode_array(text, special="text", threads=None),
    }
    rivals = others()
    if "tiktoken" in rivals:
        encoding = rivals["tiktoken"][0].__self__  # type: ignore[attr-defined]
        cores = os.cpu_count() or 1
        jobs["batch, tiktoken, all cores"] = lambda: encoding.encode_ordinary_batch(lines, num_threads=cores)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    size = len(text.encode()) / MEGABYTE
    return {name: size / statistics.median(values) for name, values in times.items()}


def measure_start(rounds: int) -> dict[str, float]:
    """Seconds of a fresh process, beyond a Python that imports numpy."""
    load = "import numpy; from gpt2_core.tokenizer import GPT2Tokenizer; GPT2Tokenizer().encode('Hi there '"
    programs = {"numpy only": "import numpy", "one short text": f"{load})", "one long text": f"{load} * 2000)"}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["numpy only"])
    return {name: statistics.median(values) - base for name, values in times.items() if name != "numpy only"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--code", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.thread_time

    def read(files: list[Path] | None, otherwise: Callable[[], str]) -> str:
        return "".join(file.read_text(encoding="utf-8") for file in files) if files else otherwise()

    texts = {
        "prose": read(options.prose, prose),
        "code": read(options.code, code),
        "many languages": many_languages(),
    }
    result: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "clock": options.clock}
    for name, text in texts.items():
        rows = measure(text, options.rounds, clock) | measure_batch(text, options.rounds)
        result[name] = {"megabytes": len(text.encode()) / MEGABYTE, "MB/s": rows}
    result["seconds to start"] = measure_start(options.rounds)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result, list(texts))


def show(result: dict[str, Any], texts: list[str]) -> None:
    print(f"Python {result['python']}, {result['cores']} cores, {result['clock']} time; MB/s (times tiktoken's)\n")
    heads = [f"{name} ({result[name]['megabytes']:.1f} MB)" for name in texts]
    print(f"{'':38}" + "".join(f"{head:>25}" for head in heads))
    for row in result[texts[0]]["MB/s"]:
        kind = row.split(",")[0]
        rival = f"{kind}, tiktoken" + (", all cores" if kind == "batch" else "")
        cells = ""
        for name in texts:
            rates = result[name]["MB/s"]
            ratio = f"({rates[row] / rates[rival]:.2f}x)" if rival in rates else ""
            cells += f"{rates[row]:>16.1f} {ratio:>8}"
        print(f"{row:38}{cells}")
    for name, seconds in result["seconds to start"].items():
        print(f"{'start, ' + name:38}{seconds:>15.3f} s")


if __name__ == "__main__":
    main()
