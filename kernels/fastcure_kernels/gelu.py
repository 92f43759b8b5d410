"""The double backward of GELU in one pass; no autograd of its own.

With y = f(x), w the gradient at y and v the gradient that arrives at w f'(x), v f'(x) goes to w and v w f''(x) to x.
With Phi and phi the distribution and the density of a standard normal variable,

    f = x Phi    f' = Phi + x phi     f'' = (2 - x^2) phi

and with `approximate="tanh"`, where p = sqrt(2 / pi) (x + 0.044715 x^3), S = 1 / (1 + exp(-2 p)) and C = 2 S (1 - S),

    f = x S      f' = S + x C p'      f'' = 2 C p' + x C (p'' + 2 (1 - 2 S) p'^2)

Bytes moved an element in fp32: 20. torch's formulas, of plain operators, move several times as many.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from .backend import use_triton
from .jit import kernel
from .rows import accumulation_dtype, as_rows, row_strides

if TYPE_CHECKING:
    import triton.language as tl

CUBIC = 0.044715
BLOCK = 1024


@kernel
@no_type_check
def _double_backward_kernel(
    u_ptr, e_ptr, v_ptr, w_ptr, x_ptr, N, TANH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    x = tl.load(x_ptr + offsets, mask=inside).to(dtype)
    w = tl.load(w_ptr + offsets, mask=inside).to(dtype)
    v = tl.load(v_ptr + offsets, mask=inside).to(dtype)
    if TANH:
        root = tl.full((), 0.7978845608028654, dtype)  # sqrt(2 / pi)
        cubic = tl.full((), 0.044715, dtype)
        p = root * x * (1 + cubic * x * x)
        slope = root * (1 + 3 * cubic * x * x)
        small = tl.exp(-2 * tl.abs(p))  # never overflows
        S = tl.where(p < 0, small, 1.0) / (1 + small)
        C = 2 * small / ((1 + small) * (1 + small))
        first = S + x * C * slope
        second = 2 * C * slope + x * C * (6 * root * cubic * x + 2 * (1 - 2 * S) * slope * slope)
    else:
        density = tl.full((), 0.3989422804014327, dtype) * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
        first = 0.5 * (1 + tl.erf(x * tl.full((), 0.7071067811865476, dtype))) + x * density
        second = (2 - x * x) * density
    tl.store(u_ptr + offsets, (v * first).to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(e_ptr + offsets, (v * w * second).to(e_ptr.dtype.element_ty), mask=inside)


def derivatives(x: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """`f'(x)` and `f''(x)`, in operators that autograd differentiates further."""
    if approximate == "tanh":
        root = math.sqrt(2 / math.pi)
        slope = root * (1 + 3 * CUBIC * x.square())
        p = root * (x + CUBIC * x**3)
        S, rest = torch.sigmoid(2 * p), torch.sigmoid(-2 * p)  # 1 - S without cancellation
        C = 2 * S * rest
        bend = 6 * root * CUBIC * x + 2 * (rest - S) * slope.square()
        return S + x * C * slope, 2 * C * slope + x * C * bend
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density, (2 - x.square()) * density


def double_backward(v: Tensor, w: Tensor, x: Tensor, approximate: str = "none") -> tuple[Tensor, Tensor]:
    """`v f'(x)` and `v w f''(x)`, for three tensors of one shape and dtype; half precisions compute in float32."""
    dtype = accumulation_dtype(v, w, x)
    if not use_triton(x):
        first, second = derivatives(x.to(dtype), approximate)
        v = v.to(dtype)
        return (v * first).to(x.dtype), (v * w.to(dtype) * second).to(x.dtype)
    u, e = torch.empty_like(x), torch.empty_like(x)
    rows = as_rows(row_strides(u), v, w, x) if x.ndim else [v, w, x]
    _double_backward_kernel.launch(
        (-(-x.numel() // BLOCK),),
        *(u, e, *rows, x.numel()),
        TANH=approximate == "tanh",
        WIDE=dtype == torch.float64,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return u, e
