"""x @ weight + bias, by the library that is the faster one for it.

For float32 on a CPU PyTorch asks MKL, which takes AMD's processors at half of what they can do; oneDNN, which PyTorch
has as well, does not. Measured on two cores of an EPYC, 2,048 rows, 768 to 3,072: 173 GFLOP/s and 342, the gradients
189 and 408, 182 and 299.

Letters: R rows, K inputs, N outputs of a product.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# With fewer rows reading the weight is what takes the time.
_FEW = 32
_PLAIN = (Tensor, nn.Parameter)
_KIND: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (K, N) + bias (N,) -> (..., N), with gradients of every order."""
    flat = x.reshape(-1, x.size(-1))
    if serves(flat, weight) and (bias is None or _fits(bias, weight)):
        out: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:
        out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.size(1))


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is asked for a product of x (R, K) and weight; never where something else looks at operations."""
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return False
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return False
    return bool(
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.size(0) >= _FEW
        and x.size(1) == weight.size(0)
        and weight.size(1) > 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch.backends.mkldnn.enabled
        and prefers_onednn()
    )


def _fits(bias: Tensor, weight: Tensor) -> bool:
    plain = type(bias) in _PLAIN and bias.dtype is torch.float32 and bias.device.type == "cpu"
    return plain and bias.shape == weight.shape[1:]


def times(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (R, K) @ b (N, K).T + bias (N,) by oneDNN; of any strides, without gradients."""
    # The kernel reads a bias as if its numbers stood side by side.
    whole = None if bias is None else bias.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, whole, "none", [], "")
    return out


@functools.cache
def prefers_onednn() -> bool:
    """Whether this is AMD's processor, on which PyTorch would take MKL, and oneDNN is there; tried on a small product.

    What is known before decides, not a measurement: a run that goes on has to go on with the same numbers.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if not _is_of_amd():
        return False
    try:
        # Whatever number format and device are the default where it is first asked.
        ones, zeros = torch.ones(16, 32, **_KIND), torch.zeros(16, **_KIND)
        return bool((times(ones, ones.t().contiguous().t(), zeros) == 32).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def _is_of_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:
        return "AuthenticAMD" in platform.processor()


class _Linear(torch.autograd.Function):
    """The product, and its gradients by the same library; second derivatives by PyTorch's own products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        slope = upstream[0].contiguous()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        d_x = d_weight = None
        if torch.is_grad_enabled():  # these gradients are to be differentiated once more
            d_x = slope @ weight.t() if needs_x else None
            d_weight = x.t() @ slope if needs_weight else None
        else:
            d_x = times(slope, weight) if needs_x else None
            d_weight = times(x.t(), slope.t()) if needs_weight else None
        return d_x, d_weight, slope.sum(0) if needs_bias else None
