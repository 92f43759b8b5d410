"""Random start of an L2 attack: x + eps u^(1/N) n / ||n||_2 with n normal and u uniform, clipped to the box.

That is uniform in the ball of radius eps about x. The random numbers are made where they are used, twice,
which is cheaper than keeping them: in fp32 8 bytes an element are moved, x and the result. An element's number
depends on the seed and on its place in memory alone, as in `linf_start`; the radii's come after all elements'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from .backend import use_triton
from .jit import kernel
from .philox import counters, draw_seed, normal, uniform
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
def _l2_start_kernel(
    out_ptr, x_ptr, eps_ptr, eps_stride, seed_ptr, N,
    LOWER: tl.constexpr, UPPER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    eps = tl.load(eps_ptr + row * eps_stride)  # (), in the dtype of the arithmetic
    seed = tl.load(seed_ptr)
    lanes = tl.arange(0, BLOCK)  # (BLOCK,)

    squares = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < N:
        offsets = start + lanes
        noise = tl.randn(seed, row * N + offsets)  # 64-bit counters
        squares += tl.where(offsets < N, noise * noise, 0.0)
        start += BLOCK
    square = tl.sum(squares, 0)
    u = tl.rand(seed, tl.num_programs(0).to(tl.int64) * N + row)
    radius = tl.exp2(tl.log2(u) / N) / tl.sqrt(tl.where(square == 0, 1.0, square))
    scale = eps * radius

    start = 0
    while start < N:
        offsets = start + lanes
        noise = tl.randn(seed, row * N + offsets)
        x = tl.load(x_ptr + row * N + offsets, mask=offsets < N, other=0.0).to(eps.dtype)
        y = x + noise * scale
        y = tl.maximum(y, tl.full((), LOWER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, tl.full((), UPPER, eps.dtype), propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + row * N + offsets, y.to(out_ptr.dtype.element_ty), mask=offsets < N)
        start += BLOCK


@torch.library.custom_op("fastcure::l2_start", mutates_args=())
def _l2_start(x: Tensor, eps: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    out = torch.empty_like(x)
    rows = as_rows(row_strides(out), out, x)
    n = row_length(x)
    grid = (x.shape[0] if n else 0,)
    scalars = (eps, eps.stride(0), seed, n)
    _l2_start_kernel.launch(grid, *rows, *scalars, LOWER=lower, UPPER=upper, **reduction_launch(n))
    return out.copy_(rows[0])  # nothing to copy where the row is `out`


@_l2_start.register_fake
def _(x: Tensor, eps: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    return torch.empty_like(x)


def _l2_start_torch(x: Tensor, eps: Tensor, seed: Tensor, lower: float, upper: float) -> Tensor:
    """The plain-PyTorch twin: in float32 the same numbers up to rounding."""
    out = torch.empty_like(x)
    noise = normal(seed, counters(out, row_strides(out)))
    square = sum_samples(noise.square())
    u = uniform(seed, x.numel() + torch.arange(x.shape[0], device=x.device))
    scale = eps * u.pow(1 / max(row_length(x), 1)) / torch.where(square == 0, 1.0, square).sqrt()
    return out.copy_((x.to(eps.dtype) + noise * broadcast(scale, x)).clamp(lower, upper))


def l2_start(
    x: Tensor,
    eps: float | Tensor,
    lower: float = 0.0,
    upper: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points uniform in the L2 ball of radius eps about x, clipped to the box; never differentiable.

    Args:
        x: Centres of the balls, (B, ...).
        eps: L2 radius in the units of `x`: a float, a 0-dim or a (B,) tensor.
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
    start = _l2_start if use_triton(x) else _l2_start_torch
    return start(x.detach(), eps, draw_seed(x, generator), float(lower), float(upper))
