"""Step of an L2 attack: adv + step_size g / ||g||_2, projected on the ball about x, clipped to the box.

Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
Two norms come before the first result, so a program passes over its sample three times: in fp32 it moves 16
bytes an element (adv, g, x, the result) where the cache holds the sample, 32 where it does not.

The kernel sums squares in fp64, whose range holds the square of every smaller float: gradients of 1e-30 and
of 1e+30 need no pass for their largest entry. The reference divides by that entry, as not every device has fp64.
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
def _l2_step_kernel(
    out_ptr, adv_ptr, grad_ptr, x_ptr, step_ptr, step_stride, eps_ptr, eps_stride, N,
    LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * N
    adv_ptr += row * N
    grad_ptr += row * N
    x_ptr += row * N
    step = tl.load(step_ptr + row * step_stride)  # (), in the dtype of the arithmetic
    eps = tl.load(eps_ptr + row * eps_stride)  # ()
    lanes = tl.arange(0, BLOCK)  # (BLOCK,)

    squares = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < N:
        offsets = start + lanes
        g = tl.load(grad_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float64)
        squares += g * g
        start += BLOCK
    square = tl.sum(squares, 0)
    scale = step / tl.sqrt(tl.where(square == 0, 1.0, square))
    scale = tl.where(square == float("inf"), float("nan"), scale)  # as in the reference

    squares = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < N:
        offsets = start + lanes
        adv = tl.load(adv_ptr + offsets, mask=offsets < N, other=0.0).to(eps.dtype)
        g = tl.load(grad_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float64)
        x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(eps.dtype)
        d = (adv + (g * scale).to(eps.dtype) - x).to(tl.float64)
        squares += d * d
        start += BLOCK
    norm = tl.sqrt(tl.sum(squares, 0))
    shrink = tl.where(norm <= eps, 1.0, eps / tl.where(norm == 0, 1.0, norm)).to(eps.dtype)  # a NaN norm remains

    start = 0
    while start < N:
        offsets = start + lanes
        adv = tl.load(adv_ptr + offsets, mask=offsets < N, other=0.0).to(eps.dtype)
        g = tl.load(grad_ptr + offsets, mask=offsets < N, other=0.0).to(tl.float64)
        x = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(eps.dtype)
        y = x + (adv + (g * scale).to(eps.dtype) - x) * shrink
        y = tl.maximum(y, tl.full((), LOWER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, tl.full((), UPPER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=offsets < N)
        start += BLOCK


@torch.library.custom_op("fastcure::l2_step", mutates_args=())
def _l2_step(
    adv: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, lower: float, upper: float
) -> Tensor:
    out = torch.empty_like(adv)
    rows = as_rows(row_strides(out), out, adv, grad, x)
    n = row_length(adv)
    scalars = (step_size, step_size.stride(0), eps, eps.stride(0), n)
    _l2_step_kernel.launch((adv.shape[0],), *rows, *scalars, LOWER=lower, UPPER=upper, **reduction_launch(n))
    return out.copy_(rows[0])  # nothing to copy where the row is `out`


@_l2_step.register_fake
def _(adv: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, lower: float, upper: float) -> Tensor:
    return torch.empty_like(adv)


def _scaled(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples divided by m, their norms, and m: the largest magnitude of each, or 1 where all are zero."""
    largest = v.abs().amax(tuple(range(1, v.ndim))) if v.ndim > 1 else v.abs()
    largest = torch.where(largest == 0, 1.0, largest)
    v = v / broadcast(largest, v)
    return v, sum_samples(v.square()).sqrt(), largest


def _l2_step_torch(
    adv: Tensor, grad: Tensor, x: Tensor, step_size: Tensor, eps: Tensor, lower: float, upper: float
) -> Tensor:
    """The reference implementation."""
    out = torch.empty_like(adv)
    if out.numel() == 0:  # no largest entry
        return out
    adv, grad, x = (t.to(eps.dtype) for t in (adv, grad, x))
    grad, norm, _ = _scaled(grad)
    d = adv + grad * broadcast(step_size / torch.where(norm == 0, 1.0, norm), x) - x
    _, norm, largest = _scaled(d)
    norm = norm * largest
    shrink = torch.where(norm <= eps, 1.0, eps / norm)  # NaN where the norm is
    return out.copy_((x + d * broadcast(shrink, x)).clamp(lower, upper))


def l2_step(
    adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """One step of projected gradient ascent in the L2 ball of radius eps about x; never differentiable.

    Args:
        adv: The present points, (B, ...).
        grad: Gradients of the loss at `adv`, (B, ...). A sample of zeros does not move; an entry that is NaN
            or infinite makes its whole sample NaN. In float64 the norm must lie between 1e-150 and 1e+150.
        x: Centres of the balls, (B, ...).
        step_size: L2 length of the step in the units of `x`: a float, a 0-dim or a (B,) tensor. A negative
            one descends, as a targeted attack does.
        eps: L2 radius, a float, a 0-dim or a (B,) tensor.
        lower: Least value of an entry.
        upper: Greatest value of an entry.

    Returns:
        A detached tensor with the shape, dtype and memory layout of `adv`.

    Raises:
        TypeError: an operand is not floating-point.
        ValueError: shapes or devices that differ, a parameter of another length than B, or lower > upper.
    """
    check_operands(adv=adv, grad=grad, x=x)
    check_bounds(lower, upper)
    dtype = accumulation_dtype(adv, grad, x)
    step_size, eps = per_sample("step_size", step_size, x, dtype), per_sample("eps", eps, x, dtype)
    step = _l2_step if use_triton(adv) else _l2_step_torch
    return step(adv.detach(), grad.detach(), x.detach(), step_size, eps, float(lower), float(upper))
