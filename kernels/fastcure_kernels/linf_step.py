"""Step of an L-infinity attack: adv + step_size sign(g), projected on the ball about x, clipped to the box.

Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
In fp32 it moves 16 bytes an element: adv, g and x are read, the result is written.
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
    check_bounds,
    check_operands,
    elementwise_launch,
    per_sample,
    row_length,
    row_strides,
)

if TYPE_CHECKING:
    import triton.language as tl


@kernel
@no_type_check
def _linf_step_kernel(
    out_ptr, adv_ptr, grad_ptr, x_ptr, step_ptr, step_stride, eps_ptr, eps_stride, N,
    LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offsets < N
    step = tl.load(step_ptr + row * step_stride)  # (), in the dtype of the arithmetic
    eps = tl.load(eps_ptr + row * eps_stride)  # ()
    adv = tl.load(adv_ptr + row * N + offsets, mask=mask).to(eps.dtype)
    g = tl.load(grad_ptr + row * N + offsets, mask=mask).to(eps.dtype)
    x = tl.load(x_ptr + row * N + offsets, mask=mask).to(eps.dtype)
    y = adv + step * tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
    y = tl.maximum(y, x - eps, propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, x + eps, propagate_nan=tl.PropagateNan.ALL)
    y = tl.maximum(y, tl.full((), LOWER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, tl.full((), UPPER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + row * N + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastcure::linf_step", mutates_args=())
def _linf_step(
    adv: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, lower: float, upper: float
) -> Tensor:
    out = torch.empty_like(adv)
    rows = as_rows(row_strides(out), out, adv, grad, x)
    grid, options = elementwise_launch(adv)
    scalars = (step_size, step_size.stride(0), eps, eps.stride(0), row_length(adv))
    _linf_step_kernel.launch(grid, *rows, *scalars, LOWER=lower, UPPER=upper, **options)
    return out.copy_(rows[0])  # nothing to copy where the row is `out`


@_linf_step.register_fake
def _(adv: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, lower: float, upper: float) -> Tensor:
    return torch.empty_like(adv)


def _linf_step_torch(
    adv: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, lower: float, upper: float
) -> Tensor:
    """The reference implementation."""
    out = torch.empty_like(adv)
    adv, grad, x = (t.to(eps.dtype) for t in (adv, grad, x))
    sign = torch.where(grad.isnan(), grad, grad.sign())  # torch.sign(NaN) is 0
    y = adv + broadcast(step_size, x) * sign
    radius = broadcast(eps, x)
    return out.copy_(y.maximum(x - radius).minimum(x + radius).clamp(lower, upper))


def linf_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """One step of projected sign ascent in the L-infinity ball of radius eps about x; never differentiable.

    Args:
        adv: The present points, (B, ...).
        grad: Gradients of the loss at `adv`, (B, ...). Zero entries do not move, NaN ones become NaN.
        x: Centres of the balls, (B, ...).
        step_size: Length of the step in each entry, in the units of `x`: a float, a 0-dim or a (B,) tensor.
            A negative one descends, as a targeted attack does.
        eps: Radius, a float, a 0-dim or a (B,) tensor.
        lower: Least value of an entry.
        upper: Greatest value of an entry.

    Returns:
        A detached tensor with the shape, dtype and memory layout of `adv`. The arithmetic is float32 (float64
        where an operand is float64): a float16 or bfloat16 result may leave the ball by its own rounding.

    Raises:
        TypeError: an operand is not floating-point.
        ValueError: shapes or devices that differ, a parameter of another length than B, or lower > upper.
    """
    check_operands(adv=adv, grad=grad, x=x)
    check_bounds(lower, upper)
    dtype = accumulation_dtype(adv, grad, x)
    step_size, eps = per_sample("step_size", step_size, x, dtype), per_sample("eps", eps, x, dtype)
    step = _linf_step if use_triton(adv) else _linf_step_torch
    return step(adv.detach(), grad.detach(), x.detach(), step_size, eps, float(lower), float(upper))
