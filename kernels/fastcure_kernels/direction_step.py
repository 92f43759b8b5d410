"""Step along the sign direction, x + h sign(g) / ||sign(g)||_2, one L2 length per sample.

The second point of CURE's finite difference (Moosavi-Dezfooli et al., CVPR 2019). ||sign(g)||_2 is
the square root of the number of non-zero entries: a program counts them in a first pass over its sample and steps
in a second one. In fp32 it moves 12 bytes an element (g, x, the result), 16 where g has left the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from .backend import use_triton
from .jit import kernel
from .rows import (
    accumulation_dtype,
    as_rows,
    broadcast,
    check_operands,
    per_sample,
    reduction_launch,
    row_length,
    row_strides,
    sum_samples,
)

if TYPE_CHECKING:
    import triton.language as tl


@kernel
@no_type_check
def _direction_step_kernel(out_ptr, x_ptr, grad_ptr, h_ptr, h_stride, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * N
    x_ptr += row * N
    grad_ptr += row * N
    h = tl.load(h_ptr + row * h_stride)  # (), in the dtype of the arithmetic
    lanes = tl.arange(0, BLOCK)  # (BLOCK,)

    counts = tl.zeros((BLOCK,), h.dtype)  # sums of |sign(g)|, so that a NaN passes on
    start = 0
    while start < N:
        offsets = start + lanes
        g = tl.load(grad_ptr + offsets, mask=offsets < N, other=0.0).to(h.dtype)
        counts += tl.where(g == 0, 0.0, tl.where(g == g, 1.0, g))
        start += BLOCK
    count = tl.sum(counts, 0)
    scale = h / tl.sqrt(tl.where(count == 0, 1.0, count))

    start = 0
    while start < N:
        offsets = start + lanes
        g = tl.load(grad_ptr + offsets, mask=offsets < N, other=0.0).to(h.dtype)
        x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(h.dtype)
        sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
        y = x + scale * sign
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=offsets < N)
        start += BLOCK


@torch.library.custom_op("fastcure::direction_step", mutates_args=())
def _direction_step(x: Tensor, grad: Tensor, h: Tensor) -> Tensor:
    out = torch.empty_like(x)
    rows = as_rows(row_strides(out), out, x, grad)
    n = row_length(x)
    _direction_step_kernel.launch((x.shape[0],), *rows, h, h.stride(0), n, **reduction_launch(n))
    return out.copy_(rows[0])  # nothing to copy where the row is `out`


@_direction_step.register_fake
def _(x: Tensor, grad: Tensor, h: Tensor) -> Tensor:
    return torch.empty_like(x)


def direction(grad: Tensor) -> Tensor:
    """The unit direction z = sign(g) / ||sign(g)||_2 of each sample, detached.

    Args:
        grad: Gradients g, (B, ...). A sample of zeros has a z of zeros; a NaN makes the z of its sample NaN.

    Returns:
        z, with the shape and dtype of `grad`.

    Raises:
        TypeError: `grad` is not floating-point.
        ValueError: `grad` has no batch dimension.
    """
    check_operands(grad=grad)
    grad = grad.detach()
    wide = grad.to(accumulation_dtype(grad))
    sign = torch.where(wide.isnan(), wide, wide.sign())  # torch.sign(NaN) is 0
    count = sum_samples(sign.abs())
    norm = torch.where(count == 0, 1.0, count).sqrt()
    return (sign / broadcast(norm, sign)).to(grad.dtype)


def _direction_step_torch(x: Tensor, grad: Tensor, h: Tensor) -> Tensor:
    """The reference implementation."""
    step = broadcast(h, x) * direction(grad.to(h.dtype))
    return torch.empty_like(x).copy_(x.to(h.dtype) + step)


def direction_step(x: Tensor, grad: Tensor, h: float | Tensor) -> Tensor:
    """The points x + h z, with z = sign(g) / ||sign(g)||_2 for each sample; never differentiable.

    Args:
        x: Inputs, (B, ...).
        grad: Gradients g, (B, ...), of the same or another dtype. A sample of zeros does not move; a NaN
            makes its whole sample NaN.
        h: L2 length of the step in the units of `x`: a float, a 0-dim or a (B,) tensor.

    Returns:
        A detached tensor with the shape, dtype and memory layout of `x`. The arithmetic is float32 (float64
        where either operand is float64).

    Raises:
        TypeError: `x` or `grad` is not floating-point.
        ValueError: shapes or devices that differ, or an `h` of another length than B.
    """
    check_operands(x=x, grad=grad)
    h = per_sample("h", h, x, accumulation_dtype(x, grad))
    step = _direction_step if use_triton(x) else _direction_step_torch
    return step(x.detach(), grad.detach(), h)
