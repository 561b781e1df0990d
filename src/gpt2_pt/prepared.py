"""A form of a language model that is made for writing text: `model.prepare_for_generation()`.

    prepare(model, dtype, compile) -> PreparedModel     a snapshot of the weights, laid out for the kernels
    PreparedModel.generate, .stream                     as the model's own, the same text from the same seed in float32
    PreparedEngine                                      what the searches drive: a cache of fixed size, written in place

Each product with a weight is a kernel object: `_Dense` as PyTorch has it on every device, `_Packed` in oneDNN's own
layout on a CPU, `_Int8` with eight bits a weight. compiled.py has the step that reads one token a row as one call.

Letters: R rows, T new columns, S all columns, N = R * T, C model width, H heads, D head width, L layers, V vocabulary.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from gpt2_core.config import GPT2Config
from gpt2_core.engine import Chosen, Engine, Ids, Moment, Numbers, Real, chosen
from gpt2_core.errors import GenerationError, nearest
from gpt2_core.generation_config import DEFAULT_NEW_TOKENS, GenerationConfig
from gpt2_core.native import AT_ONCE, write_likeliest
from gpt2_pt.adapters import merged_kernels
from gpt2_pt.attention import visible
from gpt2_pt.block import ACTIVATIONS
from gpt2_pt.compiled import Graph, Graphs, check_native, native_model
from gpt2_pt.generation import GenerationMixin, ModelEngine

#: The number formats of weights that a model can be prepared in; None takes the model's own.
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,
}
# A cache has room for a multiple of so many columns.
_COLUMNS = 64
# oneDNN lays a weight out for products of so many rows: measured, that layout is the best, or within 5 % of it, for
# every number of rows from 1 to 1024, while one for a single row takes 1.5 times as long for eight.
_PACKED_FOR = 128
_TINY = 1e-30  # instead of the largest of a row of zeros


def prepare(model: Any, dtype: str | torch.dtype | None = None, compile: bool | str = False) -> PreparedModel:
    """A snapshot of ``model`` for generation; see `GenerationMixin.prepare_for_generation`.

    Raises: GenerationError.
    """
    if not (isinstance(compile, bool) or compile == "c++"):
        raise GenerationError(f"compile is {compile!r}, expected True, False or 'c++'")
    if compile == "c++" and model.device.type != "cpu":
        raise GenerationError(f"compile='c++' is for a CPU, but the model is on {model.device}; take compile=True")
    with merged_kernels(model):
        return PreparedModel(model, _dtype(dtype, model), bool(compile))


def _dtype(dtype: str | torch.dtype | None, model: Any) -> torch.dtype:
    own: torch.dtype = model.transformer.wte.weight.dtype
    wanted = own if dtype is None else DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None or wanted not in DTYPES.values():
        hint = nearest(str(dtype), list(DTYPES))
        raise GenerationError(
            f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}, or None for the model's own{hint}"
        )
    device = model.transformer.wte.weight.device
    if wanted is torch.int8 and device.type != "cpu":
        raise GenerationError(
            f"dtype is int8, which has kernels on a CPU, but the model is on {device}; prepare it in bfloat16, or move "
            "it first: model.to('cpu')"
        )
    return wanted


# -- products with a weight ------------------------------------------------------------------------------------


def _constant(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A copy: training the model that it was taken from changes nothing here."""
    return nn.Parameter(value.detach().to(dtype, copy=True).contiguous(), requires_grad=False)


class _Dense(nn.Module):
    """x @ weight + bias, as PyTorch has it on every device and in every number format.

    Its numbers are parameters of a module, so that a compiler may take them for constants and lay them out itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, act: str = "") -> None:
        super().__init__()
        self.weight = _constant(weight, dtype)  # (in, out)
        self.bias = None if bias is None else _constant(bias, dtype)
        self.dtype = dtype
        self.act = ACTIVATIONS[act] if act else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), through the activation where there is one."""
        x = x.to(self.dtype)
        y: Tensor = x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return y if self.act is None else self.act(y)

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """``to`` (N, out) and the product."""
        return to + self.forward(x)


#: How oneDNN names the activations that it has.
_FUSED: Mapping[str, tuple[str, str]] = {
    "": ("none", ""),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
    "relu": ("relu", ""),
}


class _Packed:
    """The same in oneDNN's layout, with bias, activation and sum inside the kernel. For float32 and bfloat16 on a CPU.

    Measured on one core, against addmm, over all weights of gpt2 in float32: as fast for one row, 2.4 times as fast for
    8 rows, 2.3 times for 1024; in bfloat16 half the time of that.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, act: str = "") -> None:
        kernels = torch.ops.mkldnn
        self.product = kernels._linear_pointwise.default
        self.sum = kernels._linear_pointwise.binary
        rows = weight.detach().t().to(dtype).contiguous()  # (out, in)
        self.weight = kernels._reorder_linear_weight(rows, _PACKED_FOR)
        self.bias = None if bias is None else bias.detach().to(dtype, copy=True)
        self.dtype = dtype
        self.fused = _FUSED.get(act, ("none", ""))
        self.act = None if act in _FUSED else ACTIVATIONS[act]

    @staticmethod
    def serves(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether this PyTorch has such kernels for the device and the number format; tried on a small product."""
        if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.enabled:
            return False
        try:
            # Whatever number format and device are the default here.
            tried = _Packed(torch.ones(16, 32, dtype=dtype, device="cpu"), torch.zeros(32, device="cpu"), dtype)
            x = torch.ones(1, 16, dtype=dtype, device="cpu")
            return bool((tried.added(x, tried(x)) == 32).all())
        except (RuntimeError, AttributeError, NotImplementedError):
            return False

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), through the activation where there is one."""
        name, how = self.fused
        y: Tensor = self.product(x.to(self.dtype), self.weight, self.bias, name, [], how)
        return y if self.act is None else self.act(y)

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """``to`` (N, out) and the product."""
        if to.dtype is not self.dtype:
            return to + self(x)
        y: Tensor = self.sum(x.to(self.dtype), to, self.weight, self.bias, "add")
        return y


class _Int8:
    """The same with eight bits a weight and a scale for each output; x is rounded to eight bits as well, row by row.

    Each row is divided by its largest number, so that one fixed scale fits all: the result of a row does not depend on
    the others. Measured with outliers of 20 times in three channels, scales by row cost 0.2 % of bits per byte
    where one scale for all rows costs 1.3 %.

    Source: Dettmers et al. 2022, "LLM.int8()", section 2 (scales by row and by column).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, act: str = "") -> None:
        values, scales = _rounded(weight.detach().t().to(torch.float32).contiguous())  # (out, in), (out, 1)
        self.bias = None if bias is None else bias.detach().to(torch.float32, copy=True)
        self.act = ACTIVATIONS[act] if act else None
        self.product = _int8_product(values, scales.squeeze(1))

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The product without bias, for rows divided by their largest number; and that number (N, 1)."""
        largest = x.abs().amax(1, keepdim=True).clamp_min_(_TINY)
        return self.product(x / largest), largest

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), through the activation where there is one."""
        y, largest = self._scaled(x)
        y = y.mul_(largest) if self.bias is None else torch.addcmul(self.bias, y, largest)
        return y if self.act is None else self.act(y)

    def added(self, x: Tensor, to: Tensor) -> Tensor:
        """``to`` (N, out) and the product."""
        y, largest = self._scaled(x)
        to = torch.addcmul(to, y, largest)
        return to if self.bias is None else to.add_(self.bias)


_Product = _Dense | _Packed | _Int8


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (out, in) from -127 to 127, and the scale (out, 1) of each row."""
    scales = rows.abs().amax(1, keepdim=True).clamp_min(_TINY) / 127
    return (rows / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _int8_product(values: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """x (N, in) of at most 1, rounded to 255 steps, times whole numbers (out, in) with their scales (out,).

    Raises: GenerationError, where this PyTorch has no such kernels.
    """
    reasons = []
    for make in (_fbgemm_product, _onednn_product):
        try:
            product = make(values, scales)
            product(torch.zeros(1, values.size(1), dtype=torch.float32, device="cpu"))
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            reasons.append((str(error).splitlines() or [""])[0])
        else:
            return product
    raise GenerationError(
        f"dtype is int8, but this PyTorch ({torch.__version__}) has no int8 kernels for this processor, neither "
        f"FBGEMM's ({reasons[0]}) nor oneDNN's ({reasons[1]}); prepare the model in float32 or bfloat16"
    )


def _fbgemm_product(values: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """FBGEMM's kernel: rounds x itself, and is the faster one for few rows."""
    kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch means to drop this kind of tensor; then oneDNN's kernel serves
            zeros = torch.zeros(len(values), dtype=torch.int64, device=values.device)
            whole = torch._make_per_channel_quantized_tensor(values, scales.double(), zeros, 0)
            packed = torch.ops.quantized.linear_prepack(whole, None)
    finally:
        torch.backends.quantized.engine = before
    # Without the instructions for it, sums of two products are kept in 16 bits: then seven bits must do.
    most = 127 if torch.cpu._is_vnni_supported() else 63
    return lambda x: kernel(x, 1.0 / most, most + 1, packed)


def _onednn_product(values: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's kernel, for numbers that were rounded already."""
    kernel = torch.ops.onednn.qlinear_pointwise.default
    packed = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)  # it takes any other order for this one
    zeros = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    middle = torch.tensor(128.5, dtype=torch.float32, device=values.device)

    def product(x: Tensor) -> Tensor:
        rounded = torch.add(middle, x, alpha=127).to(torch.uint8)  # cut off, so the half rounds
        y: Tensor = kernel(rounded, 1.0 / 127, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        return y

    return product


# -- the model ---------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """The weights of one block."""

    def __init__(self, block: Any, make: Callable[..., _Product], stream: torch.dtype, smooth: bool) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.heads: int = attn.n_head
        self.is_pruned = False  # whether other blocks have more
        self.scale: float = attn.scale
        act = next(name for name, function in ACTIVATIONS.items() if function is mlp.act)
        self.ln_1, c_attn = _norm_and_weight(block.ln_1, attn.c_attn.weight, stream, smooth)
        self.ln_2, c_fc = _norm_and_weight(block.ln_2, mlp.c_fc.weight, stream, smooth)
        self.c_attn = make(c_attn, attn.c_attn.bias)
        self.c_proj = make(attn.c_proj.weight, attn.c_proj.bias)
        self.c_fc = make(c_fc, mlp.c_fc.bias, act=act)
        self.mlp_proj = make(mlp.c_proj.weight, mlp.c_proj.bias)


_Norm = tuple[Any, Tensor, Tensor, float]  # shape, gain, bias, epsilon


def _norm_and_weight(norm: Any, weight: Tensor, stream: torch.dtype, smooth: bool) -> tuple[_Norm, Tensor]:
    """A layer norm, and the weight (C, out) behind it.

    With ``smooth``, channels that the norm makes large are made smaller there and larger in the weight, which changes
    no result but lets eight bits hold both better. Four standard deviations stand for the largest number of a channel.

    Source: Xiao et al. 2023, "SmoothQuant", section 4, with the norm's own gain in the place of measured activations.
    """
    gain, bias, weight = norm.weight.detach(), norm.bias.detach(), weight.detach()
    if smooth:
        large = (4 * gain.abs() + bias.abs()).float().clamp_min(1e-6)
        share = (large / weight.abs().amax(1).float().clamp_min(1e-6)).sqrt()
        gain, bias, weight = gain / share, bias / share, weight * share.unsqueeze(1)
    return (norm.normalized_shape, gain.to(stream, copy=True), bias.to(stream, copy=True), norm.eps), weight


class _Body(nn.Module):
    """All the weights of a model, and its forward pass over a cache that has room already."""

    def __init__(self, model: Any, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        body, device = model.transformer, model.device
        on_cpu, int8 = device.type == "cpu", dtype is torch.int8
        # Half of a float's digits are enough for weights; what is summed up over the layers has them all on a CPU.
        self.stream = torch.float32 if int8 or (on_cpu and dtype in (torch.float16, torch.bfloat16)) else dtype
        # Attention in half precision takes PyTorch several times as long as in float32 on a CPU.
        self.kept = torch.float32 if model.config.reorder_and_upcast_attn and dtype.itemsize < 4 else self.stream
        self.dtype = dtype

        def make(weight: Tensor, bias: Tensor | None, act: str = "") -> _Product:
            if int8:
                return _Int8(weight, bias, act)
            return (_Packed if packed else _Dense)(weight, bias, dtype, act)

        with torch.no_grad():
            self.norm, head = _norm_and_weight(body.ln_f, model.lm_head.weight.t(), self.stream, int8)
            self.head = make(head, None)
            self.layers = nn.ModuleList(_Layer(block, make, self.stream, int8) for block in body.h)
            table, scales = _rounded(body.wte.weight.float()) if int8 else (body.wte.weight, None)
            self.wte = _constant(table, dtype)
            self.scales = None if scales is None else _constant(scales, torch.float32)
            self.wpe = _constant(body.wpe.weight, self.stream)
        self.blocks: tuple[Any, ...] = tuple(self.layers)
        self.heads = max(layer.heads for layer in self.blocks)
        for layer in self.blocks:
            layer.is_pruned = layer.heads < self.heads

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids (N,) and their positions -> (N, C)."""
        x = F.embedding(ids, self.wte)
        if self.scales is not None:
            x = x * F.embedding(ids, self.scales)
        return x.to(self.stream) + F.embedding(positions, self.wpe)

    def hidden(self, x: Tensor, cache: _Cache, rows: int, mask: Tensor | None, causal: bool, every: bool) -> Tensor:
        """The stream (N, C) after all blocks, normed; of the last column (R, C) alone without ``every``."""
        writes, reads = cache.views()
        last = len(self.blocks) - 1
        for i, layer in enumerate(self.blocks):
            short = i == last and not every and x.size(0) > rows
            x = self._block(x, layer, writes[2 * i : 2 * i + 2], reads[2 * i : 2 * i + 2], rows, mask, causal, short)
        return F.layer_norm(x, *self.norm)

    def forward(self, ids: Tensor, positions: Tensor, place: Tensor, mask: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """One token for each row (R,) -> logits (R, V), all shapes the same at every step.

        ``place`` (1,) is the column it goes to, ``mask`` (1 or R, 1, 1, S) is added to the scores of all columns that
        ``kept``, 2L of (R, H, S, D), has room for.
        """
        x = self.embed(ids, positions)
        for i, layer in enumerate(self.blocks):
            x = self._block(x, layer, place, kept[2 * i : 2 * i + 2], ids.size(0), mask, False, False)
        out: Tensor = self.head(F.layer_norm(x, *self.norm))
        return out

    def _block(
        self,
        x: Tensor,  # (N, C)
        layer: _Layer,
        write: Tensor | Sequence[Tensor],  # the new columns of keys and of values (R, H, T, D), or which they are (T,)
        read: Sequence[Tensor],  # (R, H, S, D)
        rows: int,
        mask: Tensor | None,  # (1 or R, 1, T, S)
        causal: bool,
        short: bool,
    ) -> Tensor:
        """One block; with ``short`` only the last column goes on, after its keys and values were taken of all."""
        H, T, C = layer.heads, x.size(0) // rows, x.size(1)
        new = layer.c_attn(F.layer_norm(x, *layer.ln_1))
        if T == 1:
            q, k, v = new.view(rows, 3, H, 1, -1).unbind(1)
        else:
            q, k, v = new.view(rows, T, 3, H, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if layer.is_pruned:
            read = [part[:, :H] for part in read]
            write = write if isinstance(write, Tensor) else [part[:, :H] for part in write]
        if isinstance(write, Tensor):
            read[0].index_copy_(2, write, k.to(self.kept))
            read[1].index_copy_(2, write, v.to(self.kept))
        else:
            write[0].copy_(k)
            write[1].copy_(v)
        if short:
            q, causal = q[:, :, -1:], False
            mask = None if mask is None else mask[:, :, -1:]
            x = x.view(rows, T, C)[:, -1]
        y = F.scaled_dot_product_attention(
            q.to(self.kept), read[0], read[1], attn_mask=mask, is_causal=causal, scale=layer.scale
        )
        x = layer.c_proj.added(y.transpose(1, 2).reshape(x.size(0), -1), x)
        return layer.mlp_proj.added(layer.c_fc(F.layer_norm(x, *layer.ln_2)), x)


class PreparedModel(GenerationMixin):
    """A snapshot of a language model that only writes text: `generate` and `stream`, as the model's own.

    config, device: of the model. dtype: of the weights, torch.int8 where they have eight bits.
    """

    def __init__(self, model: Any, dtype: torch.dtype, compile: bool = False) -> None:
        self.config: GPT2Config = model.config
        self.device: torch.device = model.device
        self.dtype = dtype
        on_cpu = self.device.type == "cpu"
        if compile and on_cpu:
            check_native(dtype)
        self._body = _Body(model, dtype, packed=_Packed.serves(self.device, dtype)).eval()
        self._native = native_model(model, self._body) if compile and on_cpu else None
        self._graphs = Graphs(self._body, self.device) if compile and not on_cpu else None

    def prepare_for_generation(self, dtype: str | torch.dtype | None = None, compile: bool | str = False) -> NoReturn:
        """What was prepared once cannot be prepared again: its weights are laid out for one number format.

        Raises: GenerationError.
        """
        raise GenerationError(
            f"this model is prepared already, in {str(self.dtype).removeprefix('torch.')}; call prepare_for_generation "
            "on the model it was made from"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__reduce__()

    def __reduce__(self) -> NoReturn:
        raise GenerationError(
            "a prepared model cannot be copied or pickled: its weights are laid out for this processor; copy or save "
            "the model it was made from, and call prepare_for_generation on that"
        )

    def _engine(self, *arguments: Any, **options: Any) -> Engine:
        return PreparedEngine(self, *arguments, **options)


# -- what a model has read ---------------------------------------------------------------------------------------


class _Cache:
    """Keys and values of all layers in one buffer (2L, rows, H, capacity, D), filled up to some column."""

    def __init__(self, model: PreparedModel, rows: int, capacity: int) -> None:
        config = model.config
        self.rows = rows
        self.start = self.stop = 0  # the columns written last
        capacity = -(-capacity // _COLUMNS) * _COLUMNS
        shape = (2 * config.n_layer, rows, model._body.heads, capacity, config.head_dim)
        # A recorded step reads all columns; of those not yet written nothing may come but numbers.
        make = torch.empty if model._graphs is None else torch.zeros
        self._new = functools.partial(make, dtype=model._body.kept, device=model.device)
        self.buffer: Tensor = self._new(shape)

    def extend(self, new: int) -> None:
        """Room for ``new`` columns more, which come next."""
        self.start, self.stop = self.stop, self.stop + new
        if self.stop > self.buffer.size(3):
            old, capacity = self.buffer, self.stop + max(new, self.stop // 2)
            size = (*old.shape[:3], -(-capacity // _COLUMNS) * _COLUMNS, old.size(4))
            self.buffer = self._new(size)
            self.buffer[:, : self.rows, :, : self.start] = old[:, : self.rows, :, : self.start]

    def views(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The new columns, and all: keys and values of each layer in turn, (R, H, T or S, D)."""
        used = self.buffer[:, : self.rows] if self.rows < self.buffer.size(1) else self.buffer
        new, every = used.narrow(3, self.start, self.stop - self.start), used.narrow(3, 0, self.stop)
        return new.unbind(0), every.unbind(0)

    def crop(self, width: int) -> None:
        """Forget the columns from ``width`` on."""
        self.start = self.stop = width

    def take(self, rows: Ids, lead: int) -> None:
        """These rows in this order, without the first ``lead`` columns."""
        index, room = np.arange(len(rows)), self.buffer.size(1)
        ordered = len(rows) <= room and bool((np.diff(rows) >= 0).all()) and not lead
        width = self.stop - lead
        if ordered and (rows >= index).all() and (np.diff(rows) > 0).all():
            turn, source = index, self.buffer  # rows move up: nothing is written over that is still to move
        elif ordered and (rows <= index).all():
            turn, source = index[::-1], self.buffer  # rows are repeated: the same from below
        else:
            turn, source = index, self.buffer
            self.buffer = self._new((source.size(0), len(rows), *source.shape[2:]))
        for to in turn.tolist():
            if source is not self.buffer or rows[to] != to:
                self.buffer[:, to, :, :width].copy_(source[:, int(rows[to]), :, lead : self.stop])
        self.rows = len(rows)
        self.start = self.stop = width


class PreparedEngine(ModelEngine):
    """Rows of text that a prepared model has read."""

    past: Any
    _graph: Graph | None = None  # where a GPU runs recorded steps: this engine's own as long as it lives
    _release: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, model: PreparedModel, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        if model._native is not None and self.is_plain and not self.keep_hidden:
            self.at_once = AT_ONCE

    def _modules_of(self, model: Any) -> list[Any]:
        return []  # no modules: there is no mode to change

    def _capacity(self, new: int) -> int:
        settings: GenerationConfig = self.settings
        if settings.max_length is not None:
            return max(new, min(settings.max_length, self.config.n_positions))
        more = DEFAULT_NEW_TOKENS if settings.max_new_tokens is None else settings.max_new_tokens
        return max(new, min(new + more, self.config.n_positions))

    def _run(self, ids: Ids, mask: Real | None, positions: Ids | None, every: bool) -> None:
        (R, T), body = ids.shape, self.model._body
        with torch.inference_mode():
            cache = self.past if self.past is not None else _Cache(self.model, R, self._capacity(T))
            cache.extend(T)
            self.past = cache
            if positions is None:
                where = torch.arange(cache.start, cache.stop, device=self.device).expand(R, T).reshape(-1)
            else:
                where = self._put(positions).view(-1)
            tokens = self._put(ids).view(-1)
            if T == 1 and not self.keep_hidden:
                if self._has_native_step(R):
                    self.logits = torch.from_numpy(self._one_more(ids[:, 0], where.numpy(), mask)).unsqueeze(1)
                    return
                if self.model._graphs is not None:
                    self.logits = self._step(tokens, where, mask, cache).unsqueeze(1)
                    return
            seen = None
            if mask is not None or (cache.start and T > 1):
                real = None if mask is None else self._put(mask)
                seen = self._sum_of(visible(T, cache.stop, real, self.device))
            wide = every or self.keep_hidden
            hidden = body.hidden(body.embed(tokens, where), cache, R, seen, seen is None and T > 1, wide)
            hidden = hidden.view(R, -1, self.config.n_embd)
            if self.keep_hidden:
                new = F.normalize(hidden.to(torch.float64), dim=-1)
                self.hidden = new if self.hidden is None else torch.cat((self.hidden, new), dim=1)
            if not every:
                hidden = hidden[:, -1:]
            self.logits = body.head(hidden.reshape(-1, hidden.size(2))).view(R, -1, self.config.vocab_size)

    def _has_native_step(self, rows: int) -> bool:
        native = self.model._native
        return native is not None and rows <= native.most_rows

    def _one_more(self, tokens: Ids, positions: Ids, mask: Real | None) -> NDArray[np.float32]:
        """Logits (R, V) of the step in C++; the cache has room for it already."""
        native, cache = self.model._native, self.past
        columns = cache.buffer[:, : cache.rows].numpy()
        out: NDArray[np.float32] = native.step(
            native.embed(tokens, positions), columns, cache.start, mask, torch.get_num_threads()
        )
        return out

    def write(
        self, last: Ids, moment: Moment, uniforms: Numbers | None, open_: Real, n: int, *, log_probs: bool = False
    ) -> Chosen:
        """See `Engine.write`."""
        if n == 1 or self.at_once == 1 or uniforms is not None or not self._has_native_step(len(last)):
            return super().write(last, moment, uniforms, open_, n, log_probs=log_probs)

        def one_more(tokens: Ids, positions: Ids, mask: Real | None) -> NDArray[np.float32]:
            self.past.extend(1)
            return self._one_more(tokens, positions, mask)

        def keep(logits: NDArray[np.float32]) -> None:
            self.logits = torch.from_numpy(logits).unsqueeze(1)

        with torch.inference_mode():
            return write_likeliest(self, one_more, keep, last, moment, open_, n, log_probs)

    def _sum_of(self, seen: Tensor) -> Tensor:
        """What is added to the scores; a sum serves every layer as it is, truth would be turned into one in each."""
        kept = self.model._body.kept
        return torch.zeros(seen.shape, dtype=kept, device=self.device).masked_fill_(~seen, -torch.inf)

    def _step(self, ids: Tensor, positions: Tensor, mask: Real | None, cache: _Cache) -> Tensor:
        """The recorded step over all columns that the cache has room for; those that are not written are masked."""
        R, width = len(ids), cache.buffer.size(3)
        real = np.zeros((1 if mask is None else R, 1, 1, width), np.bool_)
        real[..., : cache.stop] = True if mask is None else mask[:, None, None]
        seen, place = self._sum_of(self._put(real)), torch.tensor([cache.start], device=self.device)
        graphs = self.model._graphs
        used = cache.buffer[:, :R]
        release = None
        if self._graph is None or self._graph.buffer.shape != used.shape:
            release, self._graph = self._release, graphs.graph(tuple(used.shape))
            self._release = weakref.finalize(self, graphs.give_back, self._graph)
        if used.data_ptr() != self._graph.buffer.data_ptr():
            self._graph.buffer.copy_(used)
            cache.buffer = self._graph.buffer
        if release is not None:
            release()  # only now: the columns read so far were still there
        return self._graph(ids, positions, place, seen)

    def _read_past(self, past: Any) -> tuple[Any, int, int]:
        read, rows, length = super()._read_past(past)
        with torch.inference_mode():
            cache = _Cache(self.model, rows, self._capacity(length))
            cache.extend(length)
            for i, part in enumerate(part for pair in read for part in pair):
                cache.buffer[i, :, : part.size(1), :length] = part
        return cache, rows, length

    def _reorder(self, rows: Ids, lead: int) -> None:
        with torch.inference_mode():
            self.past.take(rows, lead)
            index = self._put(rows)
            self.logits = None if self.logits is None else self.logits[index]
            self.hidden = None if self.hidden is None else self.hidden[index, lead:]

    def _shorten(self, width: int) -> None:
        self.past.crop(width)
        self.hidden = None if self.hidden is None else self.hidden[:, :width]

    def choose(self, moments: Sequence[Moment], uniforms: Numbers | None) -> Ids:
        """See `Engine.choose`."""
        if uniforms is not None or not self.is_plain or len(moments) > 1:
            return super().choose(moments, uniforms)
        with torch.inference_mode():
            highest, tokens = self.logits[:, 0].max(-1)  # of equals the first; nan where any is
            return chosen(highest.float().cpu().numpy(), tokens.cpu().numpy())[:, None]
