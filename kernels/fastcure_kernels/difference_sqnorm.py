"""Squared L2 norm of a difference, ||a - b||_2^2 per sample: CURE's penalty (Moosavi-Dezfooli et al., CVPR 2019).

With w the (B,) incoming weights, d/da = 2 w (a - b) and d/db = -d/da. In fp32 the forward reads 8 bytes an
element; the backward, one fused kernel, reads 8 and writes 4 for each gradient that is wanted. Under
`create_graph` the backward consists of differentiable torch operators, because a kernel has no derivative.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import use_triton
from .jit import kernel
from .rows import (
    accumulation_dtype,
    as_rows,
    broadcast,
    check_operands,
    elementwise_launch,
    reduction_launch,
    row_length,
    row_strides,
    sum_samples,
)

if TYPE_CHECKING:
    import triton.language as tl


@kernel
@no_type_check
def _forward_kernel(out_ptr, a_ptr, b_ptr, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * N
    b_ptr += row * N
    dtype = out_ptr.dtype.element_ty  # of the arithmetic
    lanes = tl.arange(0, BLOCK)  # (BLOCK,)
    sums = tl.zeros((BLOCK,), dtype)
    start = 0
    while start < N:
        offsets = start + lanes
        a = tl.load(a_ptr + offsets, mask=offsets < N, other=0.0).to(dtype)
        b = tl.load(b_ptr + offsets, mask=offsets < N, other=0.0).to(dtype)
        sums += (a - b) * (a - b)
        start += BLOCK
    tl.store(out_ptr + row, tl.sum(sums, 0))


@kernel
@no_type_check
def _backward_kernel(
    grad_a_ptr, grad_b_ptr, a_ptr, b_ptr, w_ptr, w_stride, N,
    WANT_A: tl.constexpr, WANT_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    w = tl.load(w_ptr + row * w_stride)  # (), in the dtype of the arithmetic
    a = tl.load(a_ptr + row * N + offsets, mask=offsets < N).to(w.dtype)
    b = tl.load(b_ptr + row * N + offsets, mask=offsets < N).to(w.dtype)
    grad = 2 * w * (a - b)
    if WANT_A:
        tl.store(grad_a_ptr + row * N + offsets, grad.to(grad_a_ptr.dtype.element_ty), mask=offsets < N)
    if WANT_B:
        tl.store(grad_b_ptr + row * N + offsets, (-grad).to(grad_b_ptr.dtype.element_ty), mask=offsets < N)


@torch.library.custom_op("fastcure::difference_sqnorm", mutates_args=())
def _difference_sqnorm(a: Tensor, b: Tensor) -> Tensor:
    out = _empty_norms(a, b)
    n = row_length(a)
    _forward_kernel.launch((a.shape[0],), out, *as_rows(row_strides(a), a, b), n, **reduction_launch(n))
    return out


@_difference_sqnorm.register_fake
def _empty_norms(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(a.shape[:1], dtype=accumulation_dtype(a, b), device=a.device)


@torch.library.custom_op("fastcure::difference_sqnorm_backward", mutates_args=())
def _difference_sqnorm_backward(a: Tensor, b: Tensor, w: Tensor, want_a: bool, want_b: bool) -> tuple[Tensor, Tensor]:
    grad_a, grad_b = _empty_gradients(a, b, w, want_a, want_b)
    strides = row_strides(a)
    (rows_a,) = as_rows(strides, grad_a) if want_a else [grad_a]
    (rows_b,) = as_rows(strides, grad_b) if want_b else [grad_b]
    grid, options = elementwise_launch(a)
    _backward_kernel.launch(
        grid,
        rows_a,
        rows_b,
        *as_rows(strides, a, b),
        w,
        w.stride(0),
        row_length(a),
        want_a,
        want_b,
        **options,
    )
    return grad_a.copy_(rows_a), grad_b.copy_(rows_b)  # nothing to copy where the rows are the gradient


@_difference_sqnorm_backward.register_fake
def _empty_gradients(a: Tensor, b: Tensor, w: Tensor, want_a: bool, want_b: bool) -> tuple[Tensor, Tensor]:
    """Memory for both gradients, empty where one is not wanted."""
    return (
        torch.empty_like(a) if want_a else a.new_empty(0),
        torch.empty_like(b) if want_b else b.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    want_a, want_b = ctx.needs_input_grad
    if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
        grad = 2 * broadcast(w, a) * (a.to(w.dtype) - b.to(w.dtype))
        return grad.to(a.dtype) if want_a else None, -grad.to(b.dtype) if want_b else None
    grad_a, grad_b = _difference_sqnorm_backward(a, b, w, want_a, want_b)
    return grad_a if want_a else None, grad_b if want_b else None


_difference_sqnorm.register_autograd(_backward, setup_context=_setup_context)


def _difference_sqnorm_torch(a: Tensor, b: Tensor) -> Tensor:
    """The reference implementation, differentiable by itself."""
    dtype = accumulation_dtype(a, b)
    return sum_samples((a.to(dtype) - b.to(dtype)).square())


def difference_sqnorm(a: Tensor, b: Tensor) -> Tensor:
    """Squared L2 norms of a - b, one for each sample; differentiable twice in both.

    Args:
        a: (B, ...).
        b: (B, ...).

    Returns:
        (B,), in float32 (float64 where either operand is float64), in which the sum is accumulated.

    Raises:
        TypeError: an operand is not floating-point.
        ValueError: shapes or devices that differ.
        NotImplementedError: the kernel was asked for a forward-mode derivative.
    """
    check_operands(a=a, b=b)
    if not use_triton(a):
        return _difference_sqnorm_torch(a, b)
    # A custom operator would pass a zero tangent on.
    if any(forward_ad.unpack_dual(t).tangent is not None for t in (a, b)):
        raise NotImplementedError("difference_sqnorm has no forward-mode derivative: set FASTCURE_BACKEND=torch")
    return _difference_sqnorm(a, b)
