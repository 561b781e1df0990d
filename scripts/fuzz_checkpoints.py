"""Damage files of every checkpoint format for as long as you like, and see that reading them ends well.

    python scripts/fuzz_checkpoints.py --seconds 60                 # every format, damage at random
    python scripts/fuzz_checkpoints.py --seconds 600 --engine atheris --formats gguf
    python scripts/fuzz_checkpoints.py --engine folders             # whole folders, through a conversion

Ending well: an error of the library (`Gpt2Error`), or a checkpoint whose tensors, configuration and tokenizer can be
read. Anything else is printed, with the file that did it kept in the folder of `--keep`, and the exit code is 1. The
table at the end has the inputs tried, how many ended in an error, the slowest, and the most memory that Python held.

atheris (pip install atheris) goes by what code an input reaches; without it damage is drawn at random, two thirds of it
at the beginning and the end of a file, where headers and directories are. `folders` damages any file of a folder, the
configuration and the tokenizer too, and converts what is there to a format drawn at random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass
class Tally:
    """What happened to the inputs of one format."""

    format: str
    inputs: int = 0
    errors: int = 0
    slowest: float = 0.0
    peak: int = 0
    wrong: int = 0


def sound(folder: Path, format: str) -> list[Path]:
    """A small model in a format; its files."""
    import numpy as np

    from gpt2_core.checkpoints import About, Tensor, formats, write_with
    from gpt2_core.checkpoints.tokenizers import parts_of
    from gpt2_core.config import GPT2Config
    from gpt2_core.parameters import Head, parameter_table
    from gpt2_core.vocabulary import BYTE_TO_CHAR, ENDOFTEXT

    ids = {char: index for index, char in enumerate(BYTE_TO_CHAR.values())} | {ENDOFTEXT: 256}
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), ENDOFTEXT)
    config = GPT2Config(
        vocab_size=257, n_positions=4, n_embd=32, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
    )
    about = About(config, Head.LM, parts_of(ids, [], source="the fuzzer", settings=roles))
    chance = np.random.default_rng(0)
    tensors = {
        row.name: Tensor.of(chance.standard_normal(row.shape, np.float32)) for row in parameter_table(config, Head.LM)
    }
    return list(write_with(formats()[format], folder, tensors, about=about))


def read_all(format: str, folder: Path) -> bool:
    """Read everything there is; whether it ended in an error of the library."""
    from gpt2_core.checkpoints import formats
    from gpt2_core.checkpoints.configs import config_of
    from gpt2_core.errors import Gpt2Error

    module = formats()[format]
    try:
        module.find(folder)
        with module.read(folder) as opened:
            for name in opened:
                opened.array(name)
            if opened.config is not None:
                config_of(opened, beside=False)
            if opened.tokenizer is not None:
                opened.tokenizer()
    except Gpt2Error:
        return True
    return False


def damaged(data: bytes, pick: random.Random) -> bytes:
    """`data` with a few of its bytes changed, replaced, repeated, moved or cut off."""
    work = bytearray(data)

    def place() -> int:
        size = max(len(work), 1)
        return pick.choice(
            [pick.randrange(min(size, 4096)), size - 1 - pick.randrange(min(size, 2048)), pick.randrange(size)]
        )

    for _ in range(pick.choice([1, 1, 1, 2, 4, 8])):
        kind = pick.randrange(5)
        at = place()
        if kind == 0 and work:
            work[at] = pick.randrange(256)
        elif kind == 1:
            width = pick.choice([1, 2, 4, 8])
            number = pick.choice(NUMBERS) % (1 << 8 * width)
            work[at : at + width] = number.to_bytes(width, pick.choice(["little", "big"]))
        elif kind == 2:
            work[at:at] = work[place() : place()][: pick.randrange(4096)]
        elif kind == 3:
            del work[at : at + pick.randrange(1, 64)]
        elif pick.random() < 0.3:
            del work[at:]
    return bytes(work)


def attempt(
    format: str,
    folder: Path,
    tally: Tally,
    keep: Path,
    what: Callable[[], bytes],
    use: Callable[[str, Path], bool] = read_all,
) -> None:
    """One input: read, timed, measured, and kept if it ends otherwise than it may."""
    began = time.perf_counter()
    tracemalloc.reset_peak()
    try:
        tally.errors += use(format, folder)
    except Exception as cause:
        tally.wrong += 1
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{format}-{tally.inputs}").write_bytes(what())
        print(f"{format}: {type(cause).__name__}: {str(cause)[:200]} (kept in {keep})", file=sys.stderr)
    tally.inputs += 1
    tally.slowest = max(tally.slowest, time.perf_counter() - began)
    tally.peak = max(tally.peak, tracemalloc.get_traced_memory()[1])


def at_random(format: str, seconds: float, seed: int, keep: Path) -> Tally:
    """Damage each file of a format in turn until the time is over."""
    pick, tally = random.Random(seed), Tally(format)
    with tempfile.TemporaryDirectory() as name:
        files = sound(Path(name) / "m", format)
        contents = [file.read_bytes() for file in files]
        tracemalloc.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            which = pick.randrange(len(files))
            data = damaged(contents[which], pick)
            files[which].write_bytes(data)
            attempt(format, Path(name) / "m", tally, keep, lambda data=data: data)  # type: ignore[misc]
            files[which].write_bytes(contents[which])
        tracemalloc.stop()
    return tally


def in_folders(format: str, seconds: float, seed: int, keep: Path) -> Tally:
    """Damage any file of a folder that a conversion made, and convert it, until the time is over."""
    from gpt2_core.checkpoints import formats
    from gpt2_core.conversion import carry_out, open_source, plan_conversion
    from gpt2_core.errors import Gpt2Error

    pick, tally = random.Random(seed), Tally(format)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        sound(root / "kept", "gguf")  # which keeps the configuration and the tokenizer inside
        with open_source(root / "kept") as opened:
            carry_out(plan_conversion(opened, root / "m", format, verify="none", tokenizer=format != "llmc"))

        def convert(format: str, folder: Path) -> bool:
            try:
                with open_source(folder, local_files_only=True) as opened:
                    carry_out(plan_conversion(opened, root / "out", pick.choice(list(formats()))))
            except Gpt2Error:
                return True
            finally:
                shutil.rmtree(root / "out", ignore_errors=True)
            return False

        contents = {file: file.read_bytes() for file in (root / "m").rglob("*") if file.is_file()}
        tracemalloc.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            file = pick.choice(list(contents))
            data = damaged(contents[file], pick)
            file.write_bytes(data)
            attempt(format, root / "m", tally, keep, lambda data=data: data, convert)  # type: ignore[misc]
            file.write_bytes(contents[file])
        tracemalloc.stop()
    return tally


def by_coverage(format: str, seconds: float, seed: int, keep: Path) -> Tally:
    """Let atheris look for inputs, in a process of its own: it ends its process."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "tally.json"
        command = [sys.executable, __file__, "--child", format, name, str(out), str(seconds), str(seed), str(keep)]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return Tally(**json.loads(out.read_text())) if out.exists() else Tally(format, wrong=1)


def child(format: str, folder: str, out: str, seconds: str, seed: str, keep: str) -> None:
    """The process that atheris runs in; the first file of the format is what it invents."""
    import atheris

    with atheris.instrument_imports(include=["gpt2_core.checkpoints"]):
        import gpt2_core.checkpoints as package

        package.formats()
    root = Path(folder)
    (first, *_) = sound(root / "m", format)
    corpus = root / "corpus"
    corpus.mkdir()
    shutil.copyfile(first, corpus / "sound")
    tally = Tally(format)
    tracemalloc.start()

    def one(data: bytes) -> None:
        first.write_bytes(data)
        attempt(format, root / "m", tally, Path(keep), lambda: data)
        if tally.inputs % 200 == 0:
            Path(out).write_text(json.dumps(asdict(tally)))

    settings = [
        f"-max_total_time={int(float(seconds))}",
        f"-seed={int(seed) + 1}",
        "-max_len=200000",
        "-rss_limit_mb=4096",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *settings], one)
    atheris.Fuzz()


def main() -> int:
    """Fuzz the formats asked for; the exit code."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        return 0
    from gpt2_core.checkpoints import formats

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", default=",".join(formats()))
    parser.add_argument("--seconds", type=float, default=20, help="for each format")
    parser.add_argument("--engine", default="random", choices=("random", "folders", "atheris"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzzed"), help="where inputs that ended badly go")
    args = parser.parse_args()
    with contextlib.suppress(AttributeError):
        os.fsync = lambda descriptor: None  # nothing here has to survive
    run = {"random": at_random, "folders": in_folders, "atheris": by_coverage}[args.engine]
    print(f"{'format':12} {'inputs':>9} {'errors':>9} {'slowest':>9} {'peak':>9} {'wrong':>6}")
    wrong = 0
    for format in args.formats.split(","):
        tally = run(format, args.seconds, args.seed, args.keep.absolute())
        wrong += tally.wrong
        print(
            f"{format:12} {tally.inputs:9,} {tally.errors:9,} {tally.slowest:8.3f}s {tally.peak / 1e6:7.1f}MB "
            f"{tally.wrong:6}",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
