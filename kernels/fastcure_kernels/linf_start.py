"""Random start of an L-infinity attack: x + uniform(-eps, eps) in each entry, clipped to the box.

The random numbers are made where they are used: in fp32 8 bytes an element are moved, x and the result. An
element's number depends on the seed and on its place in memory alone: it is the same for all dtypes, devices and
backends, and another one where the same values lie in another memory format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from .backend import use_triton
from .jit import kernel
from .philox import counters, draw_seed, uniform
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
def _linf_start_kernel(
    out_ptr, x_ptr, eps_ptr, eps_stride, seed_ptr, N,
    LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offsets < N
    eps = tl.load(eps_ptr + row * eps_stride)  # (), in the dtype of the arithmetic
    u = tl.rand(tl.load(seed_ptr), row * N + offsets)  # 64-bit counters
    x = tl.load(x_ptr + row * N + offsets, mask=mask).to(eps.dtype)
    y = x + (2 * u - 1) * eps
    y = tl.maximum(y, tl.full((), LOWER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
    y = tl.minimum(y, tl.full((), UPPER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + row * N + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("fastcure::linf_start", mutates_args=())
def _linf_start(x: Tensor, eps: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    out = torch.empty_like(x)
    rows = as_rows(row_strides(out), out, x)
    grid, options = elementwise_launch(x)
    scalars = (eps, eps.stride(0), seed, row_length(x))
    _linf_start_kernel.launch(grid, *rows, *scalars, LOWER=lower, UPPER=upper, **options)
    return out.copy_(rows[0])  # nothing to copy where the row is `out`


@_linf_start.register_fake
def _(x: Tensor, eps: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    return torch.empty_like(x)


def _linf_start_torch(x: Tensor, eps: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    """The plain-PyTorch twin: in float32 the same bits."""
    out = torch.empty_like(x)
    u = uniform(seed, counters(out, row_strides(out)))
    return out.copy_((x.to(eps.dtype) + (2 * u - 1) * broadcast(eps, x)).clamp(lower, upper))


def linf_start(
    x: Tensor,
    eps: float | Tensor,
    lower: float = 0.0,
    upper: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points uniform in the L-infinity ball of radius eps about x, clipped to the box; never differentiable.

    Args:
        x: Centres of the balls, (B, ...).
        eps: Radius in the units of `x`: a float, a 0-dim or a (B,) tensor.
        lower: Least value of an entry.
        upper: Greatest value of an entry.
        generator: Gives the one seed of the call, without a device sync; None is the default one of x's
            device. It may be a CPU generator where `x` is on a GPU.

    Returns:
        A detached tensor with the shape, dtype and memory layout of `x`, the noise of float32 resolution.

    Raises:
        TypeError: `x` is not floating-point.
        ValueError: an `eps` of another length than B or on another device, or lower > upper.
    """
    check_operands(x=x)
    check_bounds(lower, upper)
    eps = per_sample("eps", eps, x, accumulation_dtype(x))
    start = _linf_start if use_triton(x) else _linf_start_torch
    return start(x.detach(), eps, draw_seed(x, generator), float(lower), float(upper))
