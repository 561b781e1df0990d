"""A step of GPT-2 on a CPU as one call: native.cpp, compiled where it is used, by the compiler that is there.

    NativeModel(layers, ...)            the weights, laid out so that each is read once, in order
    NativeModel.step(stream, cache, …)  one token for each row: the logits

Nothing here is needed to use the library: `prepare_for_generation(compile=True)` asks for it on a CPU. The compiled
file is kept in the user's cache folder, and made again when the source, the compiler or the processor is another.

Letters: R rows, C model width, H heads, D head width, S columns that a cache has room for, V vocabulary, K inputs and N
outputs of a product.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt2_core.engine import Chosen, Engine, Ids, Moment, Numbers, Real, chosen
from gpt2_core.errors import GenerationError

Floats = NDArray[np.float32]

#: The most tokens that are written in one go.
AT_ONCE = 32
#: The number formats of weights, and how native.cpp knows them.
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
#: The activations that it has, of those that a configuration can name.
ACTIVATIONS = {
    "gelu_new": 0,
    "gelu_pytorch_tanh": 0,
    "gelu_fast": 0,
    "gelu": 1,
    "relu": 2,
    "silu": 3,
    "swish": 3,
    "tanh": 4,
    "quick_gelu": 5,
}
_MAPS = Path("/proc/self/maps")
# Up to how many rows a step is faster than products that take many at once (measured against oneDNN and FBGEMM).
_MOST_ROWS = {"float32": 6, "bfloat16": 3, "int8": 64}
_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_LANES = 16  # outputs that are computed together
_ALIGNED = 16  # inputs, to a multiple of which those of a weight are filled up
_COLUMNS = 64  # a cache has room for a multiple of so many
_TINY = np.float32(1e-30)  # instead of the largest of a row of zeros
_PATIENCE = 120.0  # seconds, for the compiler
_LEFT = 3600.0  # seconds, after which nobody is compiling any more
_REMEDY = "set CXX to another compiler (GCC 9 or Clang 12, or newer), or leave compile out"


# -- the compiled file -------------------------------------------------------------------------------------------


@functools.cache
def load_step() -> ctypes.CDLL:
    """The compiled step, made if it is not there yet, or is not whole, or may be another's work.

    Raises: GenerationError, where there is no compiler, it cannot make it, or there is no place to keep it.
    """
    compiler = _compiler()
    flags = [*_FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    about = [_source(), *map(os.fsencode, (*compiler, *flags)), _version(compiler), _processor()]
    made_of = hashlib.sha256(b"\0".join(about)).hexdigest()[:20]
    folder = _folder()
    kept = _kept(folder, made_of)
    if kept is not None:
        try:
            return _loaded(kept)
        except (OSError, AttributeError):
            with contextlib.suppress(OSError):
                kept.unlink()
    return _compile(compiler, flags, folder, made_of)


def _loaded(file: Path) -> ctypes.CDLL:
    """Raises: OSError for what is no library of this machine, AttributeError for one that has no step."""
    loaded = ctypes.CDLL(str(file))
    loaded.gpt2_step.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Step), ctypes.POINTER(_OpenMP)]
    loaded.gpt2_step.restype = ctypes.c_int
    return loaded


def _name(made_of: str, content: bytes) -> str:
    """Of a kept file. It says what is in the file: one that lost its end would stop the process, not fail to load."""
    return f"step-{made_of}-{hashlib.sha256(content).hexdigest()[:20]}.so"


def _kept(folder: Path, made_of: str) -> Path | None:
    """The file that was kept, if it is whole and nobody else's; what else has such a name is removed."""
    for file in sorted(folder.glob(f"step-{made_of}-*.so")):
        with contextlib.suppress(OSError):
            about = file.lstat()
            if stat.S_ISREG(about.st_mode) and _is_ours(about) and file.name == _name(made_of, file.read_bytes()):
                return file
        with contextlib.suppress(OSError):
            file.unlink()
    return None


def _is_ours(about: os.stat_result) -> bool:
    """Whether it belongs to this user, and nobody else may write to it. Windows keeps others out of the folder."""
    return not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o022)


def _source() -> bytes:
    try:
        return _SOURCE.read_bytes()
    except OSError as error:
        raise GenerationError(
            f"compile=True on a CPU compiles {_SOURCE}, which cannot be read ({error.strerror}); install the package "
            "again, unpacked, or leave compile out"
        ) from error


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    wanted = f"CXX names {named!r}, which is not there" if named else f"none of {', '.join(_COMPILERS)} is there"
    try:
        commands = [shlex.split(named)] if named else [[name] for name in _COMPILERS]
    except ValueError as error:
        commands, wanted = [], f"CXX is {named!r}, which is no command ({error})"
    for command in commands:
        if command and shutil.which(command[0]):
            return command
    raise GenerationError(
        f"compile=True on a CPU needs a C++ compiler, GCC or Clang, but {wanted}; install g++ or clang, or leave "
        "compile out: the prepared model needs no compiler"
    )


def _version(compiler: Sequence[str]) -> bytes:
    return _said([*compiler, "--version"]).stdout


def _said(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """What a command of the compiler says, however it ends."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GenerationError(
            f"compile=True on a CPU needs a C++ compiler, GCC or Clang, but {shlex.join(command)} did not end well: "
            f"{error}; {_REMEDY}"
        ) from error


def _processor() -> bytes:
    """What the compiler's "native" depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.node()} {platform.machine()} {platform.processor()}".encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"model", b"Features", b"CPU"))}))


def _folder() -> Path:
    """The user's own cache folder; what lies there is run, so it is nobody else's to write to."""
    folder = Path("~/.cache/gpt2-duet")
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        if not base:
            base = str(Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache"))
        folder = Path(base) / "gpt2-duet"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about, link = folder.stat(), folder.lstat()
    except (OSError, RuntimeError) as error:  # a RuntimeError where nobody knows of a home
        raise _no_room(folder, f"cannot be made ({getattr(error, 'strerror', None) or error})") from error
    if not _is_ours(about) or link.st_uid != about.st_uid:
        raise GenerationError(
            f"compile=True runs what it finds in {folder}, which others may write to: expected a folder of your own "
            f"(mode 700), got one of user {about.st_uid} with mode {about.st_mode & 0o777:o}; remove it and what is "
            "in it, which others may have put there; set XDG_CACHE_HOME to another, or leave compile out"
        )
    return folder


def _no_room(folder: Path, why: str) -> GenerationError:
    return GenerationError(
        f"compile=True keeps what it compiled in {folder}, which {why}; set XDG_CACHE_HOME to a folder that you may "
        "write to, or leave compile out"
    )


def _compile(compiler: Sequence[str], flags: Sequence[str], folder: Path, made_of: str) -> ctypes.CDLL:
    """The step, compiled, loaded and only then kept. It is made where it stays: elsewhere it might not be run."""
    try:
        for left in folder.glob(".making-*"):  # by a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - left.lstat().st_mtime > _LEFT:
                    shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-", ignore_cleanup_errors=True) as aside:
            made = Path(aside) / "step.so"
            loaded = _made([*compiler, *flags, str(_SOURCE), "-o", str(made)], made)
            made.chmod(0o700)
            made.replace(folder / _name(made_of, made.read_bytes()))
            return loaded
    except OSError as error:
        raise _no_room(folder, f"cannot be written to ({error.strerror or error})") from error


def _made(command: Sequence[str], file: Path) -> ctypes.CDLL:
    """What a command makes, loaded."""
    done = _said(command)
    if done.returncode:
        said = "\n".join(done.stderr.decode(errors="replace").splitlines()[:5]) or f"exit status {done.returncode}"
        raise GenerationError(
            f"the C++ compiler could not make the compiled step: {said}\n"
            f"the command was {shlex.join(command)}; {_REMEDY}"
        )
    if not file.exists():
        raise GenerationError(f"{shlex.join(command)} ended well, but made no file; {_REMEDY}")
    try:
        return _loaded(file)
    except (OSError, AttributeError) as error:
        raise GenerationError(
            f"what {shlex.join(command)} made cannot be loaded: {error}; expected a library for this machine, in a "
            f"folder from which programs may be run (XDG_CACHE_HOME names another); {_REMEDY}"
        ) from error


# -- weights -----------------------------------------------------------------------------------------------------


class _Weight(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p), ("outputs", ctypes.c_int64), ("inputs", ctypes.c_int64), ("padded", ctypes.c_int64),
    )  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = (("gain", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("first", _Norm), ("second", _Norm),
        ("attention", _Weight), ("projection", _Weight), ("inner", _Weight), ("outer", _Weight),
        ("heads", ctypes.c_int64), ("scale", ctypes.c_float),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)), ("count", ctypes.c_int64), ("width", ctypes.c_int64),
        ("head_width", ctypes.c_int64), ("kind", ctypes.c_int64), ("activation", ctypes.c_int64),
        ("last", _Norm), ("head", _Weight),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64), ("stream", ctypes.c_void_p), ("cache", ctypes.c_void_p),
        ("layer_stride", ctypes.c_int64), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64),
        ("column", ctypes.c_int64), ("seen", ctypes.c_void_p), ("logits", ctypes.c_void_p), ("threads", ctypes.c_int64),
    )  # fmt: skip


@functools.cache
def _first_process() -> int:
    """The process in which another's threads were first asked for, which is the only one that has them."""
    return os.getpid()


def hardware_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _OpenMP(ctypes.Structure):
    _fields_ = (("parallel", ctypes.c_void_p), ("thread", ctypes.c_void_p), ("threads", ctypes.c_void_p))


def openmp_of(folder: Path, package: str = "torch") -> _OpenMP | None:
    """The OpenMP library that a framework has loaded into this process; None if there is none.

    Of several that one which lies in the framework's own folder, ``package`` or what begins with its name (wheels have
    a folder of libraries beside it), then one elsewhere below ``folder``, then one of the system; by name among equals.

    A framework's threads wait for its next operation by spinning; a step by other threads would share the processors
    with them, and took twice as long.
    """
    try:
        mapped = {Path(line.split(maxsplit=5)[5].strip()) for line in _MAPS.read_text().splitlines() if "omp" in line}
    except (OSError, IndexError):
        return None
    files = [path for path in mapped if path.name.startswith(("libgomp", "libiomp5", "libomp"))]

    def far(path: Path) -> tuple[int, str]:
        below = folder in path.parents
        own = below and path.relative_to(folder).parts[0].split(".")[0] == package
        return 2 - below - own, str(path)

    for path in sorted(files, key=far):
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(str(path))
            found = (loaded.GOMP_parallel, loaded.omp_get_thread_num, loaded.omp_get_num_threads)
            return _OpenMP(*(ctypes.cast(function, ctypes.c_void_p) for function in found))
    return None


@dataclass(frozen=True)
class NormWeights:
    """A layer normalisation: gain and bias (C,), epsilon."""

    gain: Floats
    bias: Floats
    epsilon: float


@dataclass(frozen=True)
class LayerWeights:
    """One block: heads and what its scores are multiplied with, two norms, four products."""

    heads: int
    scale: float
    first: NormWeights
    attention: Product
    projection: Product
    second: NormWeights
    inner: Product
    outer: Product


@dataclass(frozen=True)
class Product:
    """weight (N, K): float32, or int8 with scales (N,); bias (N,) or None."""

    weight: NDArray[Any]
    bias: Floats | None = None
    scales: Floats | None = None


class NativeModel:
    """The weights of a language model, laid out for the compiled step.

    Args:
        layers, last, head: its blocks, its last norm and its head. In int8 norms and the weights behind them are
            evened out (`smoothed`) first.
        table: (V, C), the tokens' embeddings: float32, or what they become in ``dtype``: the upper halves as 16 bits,
            or int8 with ``scales`` (V, 1).
        positions: (P, C), those of the positions.
        head_width: D.
        dtype: float32, bfloat16 or int8; weights given as float32 are rounded to it.
        activation: as a configuration names it.
        openmp: whose threads do the work (`openmp_of`); None for threads of its own. A process that was forked from one
            that asked for them has threads of its own, too: OpenMP's wait there forever for those that did not come.

    Raises: GenerationError, where it cannot be compiled, or has no such activation.
    """

    def __init__(
        self, layers: Sequence[LayerWeights], last: NormWeights, head: Product, *, table: NDArray[Any],
        positions: Floats, head_width: int, dtype: str, activation: str,
        scales: Floats | None = None, openmp: _OpenMP | None = None,
    ) -> None:  # fmt: skip
        if activation not in ACTIVATIONS:
            raise GenerationError(
                f"compile=True on a CPU has the activations {', '.join(ACTIVATIONS)}, but this model has "
                f"{activation!r}; leave compile out"
            )
        self._step = load_step().gpt2_step
        self._openmp = None if openmp is None else ctypes.pointer(openmp)
        if openmp is not None:
            _first_process()
        self._kept: list[Any] = []  # what the structures point to
        self._kind = KINDS[dtype]
        self.most_rows = _MOST_ROWS[dtype]
        if table.dtype == np.float32 and dtype == "int8":
            table, flat = rounded(table)
            scales = flat[:, None]
        elif table.dtype == np.float32 and dtype == "bfloat16":
            table = to_bfloat16(table)
        self._table, self._scales, self._positions = table, scales, positions
        even = smoothed if dtype == "int8" else lambda norm, product: (norm, product)
        last, head = even(last, head)
        made = []
        for layer in layers:
            (first, attention), (second, inner) = even(layer.first, layer.attention), even(layer.second, layer.inner)
            made.append(
                _Layer(
                    self._norm(first), self._norm(second), self._weight(attention), self._weight(layer.projection),
                    self._weight(inner), self._weight(layer.outer), layer.heads, layer.scale,
                )
            )  # fmt: skip
        self.width, self.vocabulary = head.weight.shape[1], head.weight.shape[0]
        self._layers = (_Layer * len(made))(*made)
        self._model = _Model(
            self._layers, len(made), self.width, head_width, self._kind, ACTIVATIONS[activation], self._norm(last),
            self._weight(head),
        )  # fmt: skip
        self.heads = max(layer.heads for layer in layers)

    def embed(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Floats:
        """What `step` begins with, (R, C), of tokens (R,) at positions (R,)."""
        found = self._table[tokens]
        with _quietly():
            if self._scales is not None:
                found = found * self._scales[tokens]
            elif found.dtype.itemsize == 2:
                found = (found.astype(np.int32) << 16).view(np.float32)
            out: Floats = found + self._positions[positions]
        return out

    def step(
        self, stream: Floats, cache: NDArray[np.float32], column: int, seen: NDArray[np.bool_] | None, threads: int
    ) -> Floats:
        """Read one token for each row, and say what may come next.

        Args:
            stream: (R, C), the sum of the embeddings of the tokens and of their positions. It is written over.
            cache: (2L, R, H, S, D): keys and values of each block in turn. Those of the tokens are put into ``column``.
            seen: (R, column + 1), which columns are text in each row; None where all are.
            threads: how many work on it.

        Returns: logits (R, V).

        Raises: GenerationError, where there is no memory or there are no threads for it.
        """
        R, D = len(stream), cache.shape[4]
        if stream.dtype != np.float32 or not stream.flags.c_contiguous or stream.shape[1] != self.width:
            raise ValueError(
                f"stream is {stream.dtype} {stream.shape}, expected contiguous float32 ({R}, {self.width})"
            )
        expected = (2 * len(self._layers), R, self.heads, cache.shape[3], D)
        if cache.dtype != np.float32 or cache.shape != expected or cache.strides[3:] != (4 * D, 4):
            raise ValueError(f"cache is {cache.dtype} {cache.shape}, expected float32 {expected} with whole columns")
        if not 0 <= column < cache.shape[3] or (seen is not None and seen.shape != (R, column + 1)):
            raise ValueError(f"column is {column} of {cache.shape[3]}, seen {None if seen is None else seen.shape}")
        columns = None if seen is None else np.ascontiguousarray(seen, np.uint8)
        logits = np.empty((R, self.vocabulary), np.float32)
        layer, row, head = (stride // 4 for stride in cache.strides[:3])
        step = _Step(
            R, stream.ctypes.data, cache.ctypes.data, layer, row, head, column,
            None if columns is None else columns.ctypes.data, logits.ctypes.data, threads,
        )  # fmt: skip
        openmp = self._openmp if self._openmp is not None and os.getpid() == _first_process() else None
        if self._step(ctypes.byref(self._model), ctypes.byref(step), openmp):
            raise GenerationError(f"the compiled step found no memory, or could not start {threads} threads")
        return logits

    def _norm(self, norm: NormWeights) -> _Norm:
        return _Norm(self._pointer(norm.gain), self._pointer(norm.bias), norm.epsilon)

    def _pointer(self, values: NDArray[Any] | None) -> int | None:
        if values is None:
            return None
        # A copy: what was given may be the numbers that a model is trained on.
        kept = np.array(values, np.float32 if values.dtype.kind == "f" else values.dtype, order="C")
        self._kept.append(kept)
        return int(kept.ctypes.data)

    def _weight(self, product: Product) -> _Weight:
        N, K = product.weight.shape
        weight, scales, offsets = product.weight, product.scales, None
        if self._kind == KINDS["int8"]:
            if scales is None:
                weight, scales = rounded(weight)
            # What they are multiplied with is from 1 to 255, so that 128 stands for 0.
            offsets = self._pointer(_filled(128 * weight.sum(axis=1, dtype=np.int32)))
        elif self._kind == KINDS["bfloat16"]:
            weight = to_bfloat16(weight)
        values, padded = _grouped(weight, 4 if weight.dtype == np.int8 else 1)
        bias = np.zeros(N, np.float32) if product.bias is None else product.bias
        self._kept.append(values)
        return _Weight(
            values.ctypes.data, None if scales is None else self._pointer(_filled(scales / np.float32(127))), offsets,
            self._pointer(_filled(bias)), N, K, padded,
        )  # fmt: skip


def _filled(values: NDArray[Any]) -> NDArray[Any]:
    """(N,) with zeros up to a multiple of 16."""
    return np.pad(values, (0, -len(values) % _LANES))


def _grouped(weight: NDArray[Any], together: int) -> tuple[NDArray[Any], int]:
    """A weight (N, K) in groups of 16 outputs, with so many inputs together; and how many inputs there are then."""
    N, K = weight.shape
    padded = -(-K // _ALIGNED) * _ALIGNED
    out = _room((-(-N // _LANES), padded // together, _LANES, together), weight.dtype)
    for group in range(len(out)):
        rows = weight[group * _LANES : (group + 1) * _LANES]
        if padded > K:
            rows = np.pad(rows, ((0, 0), (0, padded - K)))
        out[group, :, : len(rows)] = rows.reshape(len(rows), -1, together).swapaxes(0, 1)
    return out, padded


def rounded(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Whole numbers (N, K) from -127 to 127, and the scale (N,) of each row."""
    with _quietly():
        scales = np.maximum(np.abs(weight).max(axis=1), _TINY) / np.float32(127)
        return np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8), scales


def _quietly() -> np.errstate:
    """Numbers that are none stay so, and whoever writes with them is told; numpy need not warn of each besides."""
    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


def to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to nearest, ties to even; of a nan some nan."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    out = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), out)


def smoothed(norm: NormWeights, product: Product) -> tuple[NormWeights, Product]:
    """A norm and the product behind it, with channels that are large after the norm made smaller there, larger behind.

    That changes no result, but lets eight bits hold both better. Four standard deviations stand for the largest number
    of a channel.

    Source: Xiao et al. 2023, "SmoothQuant", section 4, with the norm's own gain in the place of measured activations.
    """
    with _quietly():
        large = np.maximum(4 * np.abs(norm.gain) + np.abs(norm.bias), np.float32(1e-6))
        share = np.sqrt(large / np.maximum(np.abs(product.weight).max(axis=0), np.float32(1e-6)))
        even = NormWeights(norm.gain / share, norm.bias / share, norm.epsilon)
        return even, Product(product.weight * share, product.bias)


def blocks_of(model: Any, norm: Callable[[Any], NormWeights], product: Callable[[Any], Product]) -> list[LayerWeights]:
    """The blocks of a framework's model; ``norm`` and ``product`` take the numbers out of its layers."""
    return [
        LayerWeights(
            block.attn.n_head, block.attn.scale, norm(block.ln_1), product(block.attn.c_attn),
            product(block.attn.c_proj), norm(block.ln_2), product(block.mlp.c_fc), product(block.mlp.c_proj),
        )
        for block in model.transformer.h
    ]  # fmt: skip


def write_likeliest(
    engine: Engine, one_more: Callable[[Ids, Ids, Real | None], Floats], keep: Callable[[Floats], None],
    last: Ids, moment: Moment, open_: Real, n: int, log_probs: bool,
) -> Chosen:  # fmt: skip
    """`Engine.write` where the likeliest token is taken as it is: no framework is asked between two steps.

    ``one_more`` takes tokens (R,), their positions, and which columns are text, and reads on; ``keep`` puts its logits
    (R, V) where the engine has them.
    """
    going, eos, tokens = open_, np.array(engine.eos_ids, np.int64), last
    made: list[Ids] = []
    noted: list[Numbers] = []
    while len(made) < n and going.any():
        engine.advance(1)
        positions = np.minimum(engine.lengths - 1, engine.config.n_positions - 1)
        logits = one_more(tokens, positions, None if engine.real.all() else engine.real)
        best = logits.argmax(axis=1)  # of equals the first; nan where any is
        made.append(chosen(np.take_along_axis(logits, best[:, None], axis=1)[:, 0], best))
        tokens = made[-1].clip(0)
        if log_probs:
            keep(logits)
            noted.append(engine.log_probs(tokens[:, None])[:, 0])
        going = going & (made[-1] >= 0) & (tokens[:, None] != eos).all(axis=1)
        going = going & (moment.made + len(made) < moment.limits)
    keep(logits)
    return Chosen(np.stack(made, axis=1), np.stack(noted, axis=1) if log_probs else None)


class NativeCache:
    """Keys and values of all blocks in one array (2L, R, H, S, D), written in place; columns up to ``stop`` are text.

    Args:
        layers, heads, width: L, H of the block that has the most, D.
        rows, columns: R, and for how many columns there is room at first.
    """

    def __init__(self, layers: int, heads: int, width: int, rows: int, columns: int) -> None:
        self.buffer = np.zeros((2 * layers, rows, heads, _wide(columns), width), np.float32)
        self.start = self.stop = 0  # the columns that were put in last

    def extend(self, new: int) -> None:
        """Room for ``new`` columns more, which come next."""
        self.start, self.stop = self.stop, self.stop + new
        if self.stop > self.buffer.shape[3]:
            old = self.buffer
            self.buffer = np.zeros(
                (*old.shape[:3], _wide(self.stop + max(new, self.stop // 2)), old.shape[4]), np.float32
            )
            self.buffer[..., : self.start, :] = old[..., : self.start, :]

    def put(self, parts: Sequence[NDArray[np.float32]]) -> None:
        """The columns that come next: keys and values of each block in turn, (R, H, T, D)."""
        self.extend(parts[0].shape[2])
        for to, part in zip(self.buffer, parts, strict=True):
            to[:, : part.shape[1], self.start : self.stop] = part

    def take(self, rows: NDArray[np.int64], lead: int) -> None:
        """These rows in this order, without the first ``lead`` columns."""
        self.buffer = np.ascontiguousarray(self.buffer[:, rows, :, lead:])
        self.crop(self.stop - lead)

    def crop(self, width: int) -> None:
        """Forget the columns from ``width`` on."""
        self.start = self.stop = width


def _wide(columns: int) -> int:
    return -(-columns // _COLUMNS) * _COLUMNS


def _room(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeros, in large pages where the system has them: a processor then looks up fewer addresses."""
    count = math.prod(shape)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.zeros(shape, dtype)
    memory = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)
