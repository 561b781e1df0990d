"""A form of a language model that is made for writing text: `model.prepare_for_generation()`.

    prepare(model, dtype, compile) -> PreparedModel     a snapshot of the weights
    PreparedModel.generate, .stream                     as the model's own, the same text from the same seed in float32
    PreparedEngine                                      what the searches drive: caches of fixed shape for steps

A pass over several tokens (prompts, drafts) is a TensorFlow graph of free sizes. A step, which reads one token a row,
is one XLA program for each pair of sizes: rows and columns of the cache are rounded up. What it reads is a cache that
stays as it is and the latest columns beside it, which come back with one more: a program of XLA copies what it changes,
so that must be small. A loop around the step, with the rules inside, writes several tokens in one go.

Letters: R rows, P rows of the caches, T new columns, S all columns, W columns of a cache, N latest columns, C model
width, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_core.engine import Chosen, Engine, Ids, Moment, Numbers, Real, chosen
from gpt2_core.errors import GenerationError, nearest
from gpt2_core.native import NativeModel
from gpt2_core.sampling import active_rules
from gpt2_tf import sampling
from gpt2_tf.adapters import merged_kernels
from gpt2_tf.attention import visible
from gpt2_tf.compiled import NativeEngine, check_native, native_model
from gpt2_tf.generation import GenerationMixin, ModelEngine, _marked, _marks
from gpt2_tf.layers import Tensor, dims

#: The number formats of weights that a model can be prepared in; None takes the model's own.
DTYPES: Mapping[str, tf.DType] = {
    "float32": tf.float32,
    "float16": tf.float16,
    "bfloat16": tf.bfloat16,
    "float64": tf.float64,
    "int8": tf.int8,
}
# Caches have 128 columns, 256, or a multiple of 256; each size is a program, and attention reads them all.
_NARROW, _WIDE = 128, 256
# The latest columns, which every step copies: 2 MB a row of gpt2. They join the cache when they are as many.
_LATEST = 32
# Queries taken at a time where prompts are longer: their scores stay small, and keys after the last are left out.
_QUERIES = 256
# Graphs that are kept, one for each set of rules: those used last.
_LOOPS = 8
_KEEPING = threading.Lock()
# Words that rules look for in the text may be so long: they have that much room to the left of its beginning.
_MARGIN = 64

_Pair = tuple[Tensor, Tensor]  # keys and values of one layer


def prepare(model: Any, dtype: str | tf.DType | None = None, compile: bool | str = True) -> PreparedModel:
    """A snapshot of ``model`` for generation; see `GenerationMixin.prepare_for_generation`.

    Raises: GenerationError.
    """
    if not (isinstance(compile, bool) or compile == "c++"):
        raise GenerationError(f"compile is {compile!r}, expected True (XLA), False or 'c++'")
    place = model.transformer.wte.weight.value.device
    if compile == "c++" and ":CPU:" not in place:
        raise GenerationError(f"compile='c++' is for a CPU, but the model is on {place}; take compile=True")
    with merged_kernels(model):
        return PreparedModel(model, _dtype(dtype, model, compile), compile)


def _dtype(dtype: str | tf.DType | None, model: Any, compile: bool | str) -> tf.DType:
    wanted = (
        tf.as_dtype(model.compute_dtype) if dtype is None else DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    )
    if wanted == tf.int8 and compile != "c++":
        raise GenerationError(
            "dtype is int8, which TensorFlow's own compiler has no fast product for; prepare with compile='c++', which "
            "takes a C++ compiler, or in float32"
        )
    if wanted in DTYPES.values():
        return wanted
    known = ", ".join(DTYPES)
    raise GenerationError(
        f"dtype is {dtype!r}, expected one of {known}, or None for the model's own{nearest(str(dtype), list(DTYPES))}"
    )


class _Dense:
    """x @ weight + bias, in the number format of the weight."""

    def __init__(self, layer: Any, dtype: tf.DType) -> None:
        self.weight = _numbers(layer.weight, dtype)  # (in, out)
        self.bias = _numbers(layer.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(R, in) -> (R, out)."""
        return tf.cast(tf.matmul(tf.cast(x, self.weight.dtype), self.weight) + self.bias, x.dtype)


def _numbers(variable: Any, dtype: tf.DType) -> Tensor:
    """What a variable holds now. Where nothing has to be converted that takes no memory until the variable changes."""
    value = variable.value.read_value() if hasattr(variable.value, "read_value") else tf.convert_to_tensor(variable)
    return value if value.dtype == dtype else tf.cast(value, dtype)


class _Layer:
    """The weights of one block."""

    def __init__(self, block: Any, dtype: tf.DType, stream: tf.DType) -> None:
        attn, mlp = block.attn, block.mlp
        self.heads: int = attn.n_head
        self.head_dim: int = attn.head_dim
        self.scale: float = attn.scale
        self.act: Callable[[Tensor], Tensor] = mlp.act
        self.ln_1, self.ln_2 = _Norm(block.ln_1, stream), _Norm(block.ln_2, stream)
        self.c_attn, self.c_proj = _Dense(attn.c_attn, dtype), _Dense(attn.c_proj, dtype)
        self.c_fc, self.mlp_proj = _Dense(mlp.c_fc, dtype), _Dense(mlp.c_proj, dtype)

    def qkv(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, 3, H, D)."""
        packed = self.c_attn(self.ln_1(x))
        return tf.reshape(packed, (-1, 3, self.heads, self.head_dim))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream (R, C), with what attention found (R, H * D) and the feed-forward layer added."""
        x = x + self.c_proj(y)
        return x + self.mlp_proj(self.act(self.c_fc(self.ln_2(x))))


class _Norm:
    """Layer normalisation, in float32 at least."""

    def __init__(self, layer: Any, stream: tf.DType) -> None:
        wide = stream if stream == tf.float64 else tf.float32
        self.gain, self.bias = _numbers(layer.weight, wide), _numbers(layer.bias, wide)
        self.eps: float = layer.eps

    def __call__(self, x: Tensor) -> Tensor:
        """(R, C) -> (R, C)."""
        wide = tf.cast(x, self.gain.dtype)
        centred = wide - tf.reduce_mean(wide, axis=-1, keepdims=True)
        scale = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True) + self.eps)
        return tf.cast(centred * scale * self.gain + self.bias, x.dtype)


class PreparedModel(GenerationMixin):
    """A snapshot of a language model that only writes text: `generate` and `stream`, as the model's own.

    config: of the model. dtype: of the weights. compile: whether steps are programs of XLA, or the one in C++.
    """

    def __init__(self, model: Any, dtype: tf.DType, compile: bool | str = True) -> None:
        body = model.transformer
        self.config: GPT2Config = model.config
        self.dtype = dtype
        self.compile = compile
        self._native: NativeModel | None = None
        if compile == "c++":
            check_native(dtype)
            self._native = native_model(model, self)
        if dtype == tf.int8:
            dtype = tf.float32  # of the passes over several tokens
        self._numbers = dtype
        on_cpu = "CPU" in body.wte.weight.value.device
        # Half of a float's digits are enough for weights; what is summed up over the layers has them all on a CPU.
        self._stream = tf.float32 if on_cpu and dtype.size < 4 else dtype
        self._table, self._positions = _numbers(body.wte.weight, dtype), _numbers(body.wpe.weight, self._stream)
        self._layers = [_Layer(block, dtype, self._stream) for block in body.h]
        self._norm = _Norm(body.ln_f, self._stream)
        head = model.lm_head
        self._head = self._table if head.weight is body.wte.weight else _numbers(head.weight, dtype)  # (V, C)
        self._turned: Tensor | None = None  # the same as (C, V), from the first batch on
        self._step = tf.function(self._one_more, jit_compile=True, autograph=False)
        self._passes: dict[tuple[Any, ...], Any] = {}
        self._loops: OrderedDict[Any, Any] = OrderedDict()
        self._choices: OrderedDict[Any, Any] = OrderedDict()

    def prepare_for_generation(self, dtype: str | tf.DType | None = None, compile: bool | str = True) -> NoReturn:
        """What was prepared once cannot be prepared again: the numbers it was made from are the model's.

        Raises: GenerationError.
        """
        raise GenerationError(
            f"this model is prepared already, in {self.dtype.name}; call prepare_for_generation on the model it was "
            "made from"
        )

    def _choose(self, engine: ModelEngine, logits: Tensor, moment: Moment, uniforms: Numbers) -> Tensor:
        """The next token of each row, or what kept it from being chosen; by a graph for the engine's rules."""
        history = None if moment.history is None else tf.constant(moment.history)
        made, limits, numbers = (tf.constant(each) for each in (moment.made, moment.limits, uniforms))
        return self._choice(_rules_of(engine, False, True))(logits, None, history, numbers, made, limits)

    def _engine(self, *arguments: Any, **options: Any) -> Engine:
        return (PreparedEngine if self._native is None else NativeEngine)(self, *arguments, **options)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return tf.cast(tf.gather(self._table, ids), self._stream) + tf.gather(self._positions, positions)

    # -- several tokens: a graph of free sizes ------------------------------------------------------------------

    def _several(
        self, ids: Tensor, past: Sequence[_Pair] | None, mask: Tensor | None, positions: Tensor | None,
        every: bool, wide: bool,
    ) -> tuple[Tensor, Tensor, list[_Pair]]:  # fmt: skip
        """A pass over new columns (R, T), traced once for each kind of pass and number of pieces.

        The logits after the last or ``every`` column; the hidden states of the last or, where it is ``wide``, every
        column; and what was read with them.
        """
        pieces = -(-ids.shape[1] // _QUERIES)
        kind = (past is None, mask is None, positions is None, every, every or wide, pieces)
        if kind not in self._passes:
            self._passes[kind] = self._trace(*kind)
        flat = [] if past is None else [part for pair in past for part in pair]
        given = [each for each in (mask, positions) if each is not None]
        logits, hidden, kept = self._passes[kind](ids, flat, given)
        return logits, hidden, kept

    def _trace(self, no_past: bool, no_mask: bool, no_positions: bool, every: bool, wide: bool, pieces: int) -> Any:
        def run(ids: Tensor, flat: list[Tensor], given: list[Tensor]) -> Any:
            past = None if no_past else list(zip(flat[::2], flat[1::2], strict=True))
            mask = None if no_mask else given[0]
            return self._read(ids, past, mask, None if no_positions else given[-1], every, wide, pieces)

        shapes = [(None, layer.heads, None, self.config.head_dim) for layer in self._layers for _ in range(2)]
        flat = [] if no_past else [tf.TensorSpec(shape, self._stream) for shape in shapes]
        given = [] if no_mask else [tf.TensorSpec((None, None), tf.bool)]
        given += [] if no_positions else [tf.TensorSpec((None, None), tf.int64)]
        signature = (tf.TensorSpec((None, None), tf.int64), flat, given)
        return tf.function(run, input_signature=signature, autograph=False)

    def _read(
        self, ids: Tensor, past: Sequence[_Pair] | None, mask: Tensor | None, positions: Tensor | None,
        every: bool, wide: bool, pieces: int,
    ) -> tuple[Tensor, Tensor, list[_Pair]]:  # fmt: skip
        R, T = dims(ids)
        start = 0 if past is None else dims(past[0][0])[2]
        seen = visible(T, start + T, mask)  # (1 or R, 1, T, S)
        where = tf.range(start, start + T)[None] if positions is None else positions
        x = tf.reshape(self._embed(ids, where), (R * T, self.config.n_embd))
        kept: list[_Pair] = []
        for layer in self._layers:
            packed = tf.reshape(layer.qkv(x), (R, T, 3, layer.heads, layer.head_dim))
            q, k, v = tf.unstack(tf.transpose(packed, (2, 0, 3, 1, 4)), num=3)  # (R, H, T, D)
            if past is not None:
                k, v = (tf.concat(both, axis=2) for both in zip(past[len(kept)], (k, v), strict=True))
            kept.append((k, v))
            if layer is self._layers[-1] and not wide:  # only the last column goes on
                x, q, seen, pieces, T = tf.reshape(x, (R, T, -1))[:, -1], q[:, :, -1:], seen[:, :, -1:], 1, 1
            y = self._attended(q * layer.scale, k, v, seen, start, pieces)
            x = layer.after(x, tf.reshape(tf.transpose(y, (0, 2, 1, 3)), (R * T, layer.heads * layer.head_dim)))
        x = tf.reshape(self._norm(x), (R, T, self.config.n_embd))
        last = x if every else x[:, -1:]
        flat = tf.matmul(
            tf.cast(tf.reshape(last, (-1, self.config.n_embd)), self._numbers), self._head, transpose_b=True
        )
        logits = tf.reshape(tf.cast(flat, self._stream), (R, -1, self.config.vocab_size))
        return logits, x, kept

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, start: Any, pieces: int) -> Tensor:
        """Attention (R, H, T, D) of scaled queries, some of them at a time."""
        out = []
        for piece in range(pieces):
            first = piece * _QUERIES
            stop = None if piece == pieces - 1 else first + _QUERIES
            keys = None if stop is None else start + stop
            scores = tf.matmul(q[:, :, first:stop], k[:, :, :keys], transpose_b=True)
            scores = tf.where(seen[:, :, first:stop, :keys], scores, tf.cast(-np.inf, scores.dtype))
            out.append(tf.matmul(tf.nn.softmax(scores), v[:, :, :keys]))
        return out[0] if pieces == 1 else tf.concat(out, axis=2)

    # -- one token a row: a program of fixed sizes ---------------------------------------------------------------

    def _one_more(
        self,
        tokens: Tensor,  # (P,)
        positions: Tensor,  # (P,)
        column: Tensor,  # (), where among the latest columns these tokens go
        since: Tensor,  # (), the first of the latest columns that are text in every row
        seen: Tensor,  # (P, W + N), which columns are text in each row; since then all are
        cache: Sequence[_Pair],  # (P, H, W, D)
        latest: Sequence[_Pair],  # (P, H, N, D)
        turned: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, list[_Pair]]:
        """Logits (P, V), the highest of each row and where it stands (P,), and the latest columns with one more.

        The highest is infinite where any is no number.
        """
        P, W = tokens.shape[0], cache[0][0].shape[2]
        at = tf.range(seen.shape[1]) - W
        seen = (seen | ((at >= since) & (at <= column)))[:, None]  # (P, 1, W + N)
        place = tf.stack((0, 0, column, 0))
        x = self._embed(tokens, positions)  # (P, C)
        kept: list[_Pair] = []
        for layer, (keys, values), (new_keys, new_values) in zip(self._layers, cache, latest, strict=True):
            q, k, v = tf.unstack(layer.qkv(x), axis=1)  # (P, H, D)
            new_keys = keras.ops.slice_update(new_keys, place, k[:, :, None])
            new_values = keras.ops.slice_update(new_values, place, v[:, :, None])
            kept.append((new_keys, new_values))
            q = q * layer.scale
            scores = tf.concat([tf.einsum("phd,phsd->phs", q, part) for part in (keys, new_keys)], axis=-1)
            probs = tf.nn.softmax(tf.where(seen, scores, tf.cast(-np.inf, scores.dtype)))
            y = tf.einsum("phs,phsd->phd", probs[:, :, :W], values)
            y += tf.einsum("phs,phsd->phd", probs[:, :, W:], new_values)
            x = layer.after(x, tf.reshape(y, (P, -1)))
        x = tf.cast(self._norm(x), self._numbers)
        logits = tf.matmul(x, self._head, transpose_b=True) if turned is None else tf.matmul(x, turned)
        logits = tf.cast(logits, self._stream)
        # XLA's maximum passes over nan.
        highest = tf.reduce_max(tf.where(tf.math.is_nan(logits), tf.cast(np.inf, logits.dtype), logits), axis=-1)
        return logits, highest, tf.argmax(logits, axis=-1), kept

    def _head_for(self, rows: int) -> Tensor | None:
        """The head turned for products with several rows: measured, they take 0.6 times as long; one row as long."""
        if rows == 1:
            return None
        if self._turned is None:
            self._turned = tf.transpose(self._head)
        return self._turned

    def _choice(self, rules: _Rules) -> Any:
        """A graph that chooses by these rules from logits that are there already."""
        return _recent(self._choices, rules, lambda: tf.function(rules.choose, reduce_retracing=True, autograph=False))

    # -- many tokens in one go -------------------------------------------------------------------------------------

    def _loop(self, rules: _Rules) -> Any:
        """A graph that writes by these rules; those for which nobody asked lately are forgotten.

        Where the likeliest token is taken as it is, all of it is one program of XLA; rules and draws, which sort, are
        faster outside.
        """
        step = self._one_more if rules.is_bare else self._step

        def write(start: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
            return self._write(rules, step, **start)

        return _recent(
            self._loops, rules, lambda: tf.function(write, autograph=False, jit_compile=rules.is_bare or None)
        )

    def _write(
        self,
        rules: _Rules,
        step: Any,
        *,
        n: Tensor,  # (), at most N - column
        tokens: Tensor,  # (P,), not read yet
        lengths: Tensor,  # (P,)
        column: Tensor,
        seen: Tensor,
        cache: Sequence[_Pair],
        latest: Sequence[_Pair],
        turned: Tensor | None,
        uniforms: Tensor | None,  # (P, N)
        made: Tensor,  # (P,)
        limits: Tensor,  # (P,)
        going: Tensor,  # (P,)
        history: Tensor | None,  # (P, n)
    ) -> tuple[Tensor, Tensor, Tensor, list[_Pair]]:
        """How many tokens of each row, these and their log-probabilities, (P, N) each, and the latest columns."""
        P = tokens.shape[0]
        places = tf.range(_LATEST)

        def more(i: Tensor, tokens: Tensor, going: Tensor, ids: Tensor, noted: Tensor, flat: list[Tensor]) -> Any:
            positions = tf.minimum(lengths + i, self.config.n_positions - 1)
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            logits, _, best, pairs = step(tokens, positions, column + i, column, seen, cache, pairs, turned)
            # Behind the tokens of this go, before which those of the text stand.
            texts = None if history is None else tf.concat((history, ids[:, :i]), axis=1)
            number = None if uniforms is None else tf.gather(uniforms, i, axis=1)
            token = rules.choose(logits, best, texts, number, made + tf.cast(i, tf.int64), limits)
            token = tf.ensure_shape(token, (P,))
            ids = tf.where(places == i, token[:, None], ids)
            read = tf.maximum(token, 0)
            if rules.log_probs:
                found = tf.gather(sampling.log_softmax(logits), read, batch_dims=1)
                noted = tf.where(places == i, found[:, None], noted)
            ended = tf.reduce_any(token[:, None] == tf.constant([-1, *rules.eos_ids], tf.int64), axis=-1) | (token < 0)
            going = going & ~ended & (made + tf.cast(i, tf.int64) + 1 < limits)
            return i + 1, read, going, ids, noted, [part for pair in pairs for part in pair]

        start = (
            0, tokens, going, tf.fill((P, _LATEST), tf.constant(-1, tf.int64)), tf.zeros((P, _LATEST), tf.float64),
            [part for pair in latest for part in pair],
        )  # fmt: skip
        i, _, _, ids, noted, flat = tf.while_loop(
            lambda i, tokens, going, *_: (i < n) & tf.reduce_any(going), more, start, parallel_iterations=1
        )
        return i, ids, noted, list(zip(flat[::2], flat[1::2], strict=True))


def _recent(kept: OrderedDict[Any, Any], rules: _Rules, make: Callable[[], Any]) -> Any:
    """What was made for these rules; what nobody asked for lately is forgotten."""
    with _KEEPING:
        if rules not in kept:
            kept[rules] = make()
        kept.move_to_end(rules)
        found = kept[rules]
        if len(kept) > _LOOPS:
            kept.popitem(last=False)
    return found


@dataclass(frozen=True)
class _Rules:
    """How a loop chooses: what of a call's settings it is made for."""

    settings: Any
    eos_ids: tuple[int, ...]
    is_plain: bool
    log_probs: bool
    draws: bool

    @property
    def is_bare(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        return self.is_plain and not self.draws

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rules) and self._key == other._key

    @property
    def _key(self) -> str:
        values = [(name, getattr(self.settings, name)) for name in active_rules(self.settings)]
        return repr((values, self.eos_ids, self.is_plain, self.log_probs, self.draws))

    def choose(
        self,
        logits: Tensor,
        best: Tensor | None,  # used where the likeliest is taken as it is
        history: Tensor | None,
        uniforms: Tensor | None,
        made: Tensor,
        limits: Tensor,
    ) -> Tensor:
        """The next token of each row (P,), or what kept it from being chosen."""
        if self.is_bare:
            return _marked(best, _marks(logits, logits))
        scores = sampling.apply_rules(logits, history, self.settings, made, self.eos_ids, limits)
        return _marked(sampling.choose(scores, uniforms), _marks(logits, scores))


@dataclass
class _Fixed:
    """What was read, in caches of fixed shape: ``used`` columns, and ``count`` of the latest."""

    cache: list[_Pair]  # (P, H, W, D)
    latest: list[_Pair]  # (P, H, N, D)
    used: int
    count: int = 0

    @property
    def rows(self) -> int:
        return int(self.cache[0][0].shape[0])

    @property
    def width(self) -> int:
        return int(self.cache[0][0].shape[2])

    def joined(self, rows: int) -> list[_Pair]:
        """All columns of the first rows, of free shape."""
        return [
            (_joined(cache[0], latest[0], rows, self), _joined(cache[1], latest[1], rows, self))
            for cache, latest in zip(self.cache, self.latest, strict=True)
        ]


def _joined(cache: Tensor, latest: Tensor, rows: int, fixed: _Fixed) -> Tensor:
    return tf.concat((cache[:rows, :, : fixed.used], latest[:rows, :, : fixed.count]), axis=2)


def _width(columns: int) -> int:
    """The columns of a cache for so many; more than enough for one."""
    return _NARROW if columns <= _NARROW else -(-columns // _WIDE) * _WIDE


def _rows(rows: int) -> int:
    """The rows of a cache for so many: powers of two, and half as many again."""
    power = 1 << max(rows - 1, 0).bit_length()
    return power if rows < 3 or rows > power // 4 * 3 else power // 4 * 3


class PreparedEngine(ModelEngine):
    """Rows of text that a prepared model has read: pairs of free shape, or after a step `_Fixed`."""

    past: Any

    def __init__(self, model: PreparedModel, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        self._best: tuple[Tensor, Tensor] | None = None  # of the last logits: the highest, and where it stands
        self._steps = model.compile and not self.keep_hidden
        if self._steps and not self.processors and _longest_word(self.settings) <= _MARGIN:
            self.at_once = _LATEST

    def _run(self, ids: Ids, mask: Real | None, positions: Ids | None, every: bool) -> None:
        self._best = None
        if self._steps and self.past is not None and ids.shape[1] == 1:
            self._read_one(ids[:, 0])
            return
        self._loosen()
        self.logits, new, self.past = self.model._several(
            tf.constant(ids),
            self.past,
            None if mask is None else tf.constant(mask),
            None if positions is None else tf.constant(positions),
            every,
            self.keep_hidden,
        )
        if self.keep_hidden:
            new = tf.linalg.l2_normalize(tf.cast(new, tf.float64), axis=-1)
            self.hidden = new if self.hidden is None else tf.concat((self.hidden, new), axis=1)

    def _read_one(self, tokens: Ids) -> None:
        fixed, R = self._fixed(len(tokens)), len(tokens)
        positions = np.minimum(self.lengths - 1, self.config.n_positions - 1)
        seen = self._seen(fixed)
        seen[:R, fixed.width + fixed.count] = self.real[:, -1]
        logits, highest, best, fixed.latest = self.model._step(
            tf.constant(_filled(tokens, fixed.rows)), tf.constant(_filled(positions, fixed.rows)),
            tf.constant(fixed.count), tf.constant(fixed.count + 1), tf.constant(seen), fixed.cache, fixed.latest,
            self.model._head_for(fixed.rows),
        )  # fmt: skip
        fixed.count += 1
        self.logits, self._best = logits[:R, None], (highest, best)

    def _seen(self, fixed: _Fixed) -> Real:
        """Which columns are text in each row, (P, W + N)."""
        seen = np.zeros((fixed.rows, fixed.width + _LATEST), np.bool_)
        R, stop = len(self.real), fixed.used + fixed.count
        seen[:R, : fixed.used] = self.real[:, : fixed.used]
        seen[:R, fixed.width : fixed.width + fixed.count] = self.real[:, fixed.used : stop]
        return seen

    def write(
        self, last: Ids, moment: Moment, uniforms: Numbers | None, open_: Real, n: int, *, log_probs: bool = False
    ) -> Chosen:
        """See `Engine.write`."""
        rules = _rules_of(self, log_probs, uniforms is not None)
        if self.at_once == 1 or (n == 1 and not rules.is_bare):  # the program of the bare step is there anyway
            return super().write(last, moment, uniforms, open_, n, log_probs=log_probs)
        R, fixed = len(last), self._fixed(len(last))
        P, n = fixed.rows, min(n, _LATEST - fixed.count)
        history = None
        if moment.history is not None:
            # One width for each width of the cache; a window that slid leaves a text longer than what the cache holds.
            length = moment.history.shape[1]
            before = max(fixed.width, _width(length)) + _LATEST + _MARGIN - length
            history = np.pad(_filled(moment.history, P), ((0, 0), (before, 0)), constant_values=-1)
        numbers = None
        if uniforms is not None:
            numbers = np.zeros((P, _LATEST))
            numbers[:R, :n] = uniforms[:, :n]
        count, ids, noted, fixed.latest = self.model._loop(rules)(
            {
                "n": tf.constant(n),
                "tokens": tf.constant(_filled(last, P)),
                "lengths": tf.constant(_filled(self.lengths, P), tf.int32),
                "column": tf.constant(fixed.count),
                "seen": tf.constant(self._seen(fixed)),
                "cache": fixed.cache,
                "latest": fixed.latest,
                "turned": self.model._head_for(P),
                "uniforms": None if numbers is None else tf.constant(numbers),
                "made": tf.constant(_filled(moment.made, P)),
                "limits": tf.constant(_filled(moment.limits, P)),
                "going": tf.constant(_filled(open_, P)),
                "history": None if history is None else tf.constant(history),
            }
        )
        columns = int(count)
        fixed.count += columns
        self.advance(columns)
        self.logits = self._best = None
        return Chosen(ids.numpy()[:R, :columns], noted.numpy()[:R, :columns] if log_probs else None)

    def _fixed(self, rows: int) -> _Fixed:
        """What was read, in caches of fixed shape with room for a column."""
        if isinstance(self.past, _Fixed):
            if self.past.count < _LATEST:
                return self.past
            P, pairs = self.past.rows, self.past.joined(self.past.rows)
        else:
            P, pairs = _rows(rows), self.past
        R, _, S, _ = pairs[0][0].shape
        W = _width(S)
        wider = ((0, P - R), (0, 0), (0, W - S), (0, 0))
        cache = [(tf.pad(keys, wider), tf.pad(values, wider)) for keys, values in pairs]
        if isinstance(self.past, _Fixed):
            latest = self.past.latest  # their numbers are looked at no more
        else:
            shapes = [(P, layer.heads, _LATEST, self.config.head_dim) for layer in self.model._layers]
            latest = [(tf.zeros(shape, self.model._stream), tf.zeros(shape, self.model._stream)) for shape in shapes]
        fixed = self.past = _Fixed(cache, latest, S)
        return fixed

    def _loosen(self) -> None:
        """What was read, in free shape again."""
        if isinstance(self.past, _Fixed):
            # A column may be counted in `real` that is still to be read; the rows are the same.
            self.past = self.past.joined(len(self.real))

    def _read_past(self, past: Any) -> tuple[Any, int, int]:
        read, rows, length = super()._read_past(past)
        stream = self.model._stream
        return [(tf.cast(keys, stream), tf.cast(values, stream)) for keys, values in read], rows, length

    def _reorder(self, rows: Ids, lead: int) -> None:
        self._best = None
        if isinstance(self.past, _Fixed) and not lead:
            P = self.past.rows
            index = _filled(rows, P if P // 2 < len(rows) <= P else _rows(len(rows)))
            for name in ("cache", "latest"):
                pairs = getattr(self.past, name)
                setattr(self.past, name, [(tf.gather(keys, index), tf.gather(values, index)) for keys, values in pairs])
            self.logits = None if self.logits is None else tf.gather(self.logits, rows)
            return
        if isinstance(self.past, _Fixed):
            self.past = self.past.joined(self.past.rows)
        super()._reorder(rows, lead)

    def _shorten(self, width: int) -> None:
        if isinstance(self.past, _Fixed) and width >= self.past.used:
            self.past.count = width - self.past.used
            return
        self._loosen()
        super()._shorten(width)

    def choose(self, moments: Sequence[Moment], uniforms: Numbers | None) -> Ids:
        """See `Engine.choose`."""
        if self._best is None or uniforms is not None or not self.is_plain:
            return super().choose(moments, uniforms)
        R = len(moments[0].made)
        highest, out = (part.numpy()[:R] for part in self._best)
        return chosen(highest, out)[:, None]


def _rules_of(engine: ModelEngine, log_probs: bool, draws: bool) -> _Rules:
    return _Rules(engine.settings, engine.eos_ids, engine.is_plain, log_probs, draws)


def _longest_word(settings: Any) -> int:
    """How much of a text's end the rules compare."""
    words = [len(word) for word in settings.bad_words_ids or ()]
    return max(int(settings.no_repeat_ngram_size), *words, 0)


def _filled(rows: Any, count: int) -> Any:
    """Rows (R, ...) and the last of them again, (count, ...); rows that are open stand nowhere twice."""
    if len(rows) == count:
        return rows
    more = np.zeros_like(rows[-1:]) if rows.dtype == np.bool_ else rows[-1:]
    return np.concatenate((rows, np.repeat(more, count - len(rows), axis=0)))
