"""ReLU of a sum, y = max(x + bias[c] + residual, 0): what follows a convolution whose batch norm is folded into it.

With m = 1 where y > 0 and w the gradient at y, both x and residual have the gradient m w, one tensor, and bias the sum
of it over all but the channels. That is linear in w; its transpose takes (a, b, v) to m (a + b + v[c]), and is itself
transposed by the first rule. So two functions, each the derivative of the other, differentiate it to any order, and
the arithmetic of all is one kernel: a sum, gated by its own sign, which it writes down as a bit, or by those bits. NaN
passes on as in torch.relu.

Bytes moved an element in fp32: 8 in each pass and 1/8 for the bits, 4 more with a residual, or where its gradient
arrives in two parts; a bias moves none, and its gradient reads 4. A pass that wants no gradient of bias computes none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import use_triton
from .jit import kernel
from .rows import accumulation_dtype, check_operands
from .split_gradient import Branch, SplitGradient, parts_of, reads_parts
from .torch_compat import engine_will_execute

if TYPE_CHECKING:
    import triton.language as tl


@kernel
@no_type_check
def _gated_sum_kernel(
    out_ptr, mask_ptr, a_ptr, b_ptr, bias_ptr, N, C, INNER, SAMPLE,
    READ: tl.constexpr, WRITE: tl.constexpr, WITH_B: tl.constexpr, WITH_BIAS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)  # (BLOCK,)
    offsets = first + lanes
    inside = offsets < N
    total = tl.load(a_ptr + offsets, mask=inside).to(dtype)
    if WITH_BIAS:
        within = (first % SAMPLE).to(tl.int32) + lanes  # 64-bit division once a block, not once an element
        total += tl.load(bias_ptr + within // INNER % C, mask=inside).to(dtype)
    if WITH_B:
        total += tl.load(b_ptr + offsets, mask=inside).to(dtype)
    closed = total <= 0  # not so for NaN
    if READ:
        places = first // 8 + tl.arange(0, BLOCK // 8)
        bits = tl.load(mask_ptr + places, mask=places * 8 < N, other=0).to(tl.int32)  # (BLOCK // 8,)
        bits = tl.reshape(tl.broadcast_to(bits[:, None], (BLOCK // 8, 8)), (BLOCK,))
        closed = (bits >> lanes % 8) % 2 == 0
    out = tl.where(closed, 0.0, total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=inside)
    if WRITE:
        bits = tl.where(inside, tl.where(out <= 0, 0, 1), 0) << lanes % 8
        bits = tl.sum(tl.reshape(bits, (BLOCK // 8, 8)), 1)  # (BLOCK // 8,)
        places = first // 8 + tl.arange(0, BLOCK // 8)
        tl.store(mask_ptr + places, bits.to(tl.uint8), mask=places * 8 < N)


@torch.library.custom_op("fastcure::gated_sum", mutates_args=())
def _gated_sum(mask: Tensor | None, last: bool, a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """`a + b + bias[c]`, and zero where `mask`, or without one the sum's own sign, says so; channels last if `last`."""
    out = _empty_sum(mask, last, a, b, bias)
    _launch(out, mask, a, b, bias, write=False)
    return out


@_gated_sum.register_fake
def _empty_sum(mask: Tensor | None, last: bool, a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(a, memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.custom_op("fastcure::gated_sum_and_mask", mutates_args=())
def _gated_sum_and_mask(last: bool, a: Tensor, b: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum gated by its own sign, and a mask of one bit an element, in the order of memory: whether it is open."""
    out, mask = _empty_sum_and_mask(last, a, b, bias)
    _launch(out, mask, a, b, bias, write=True)
    return out, mask


@_gated_sum_and_mask.register_fake
def _empty_sum_and_mask(last: bool, a: Tensor, b: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty_sum(None, last, a, b, bias), torch.empty(((a.numel() + 7) // 8,), dtype=torch.uint8, device=a.device)


def _launch(out: Tensor, mask: Tensor | None, a: Tensor, b: Tensor | None, bias: Tensor | None, *, write: bool) -> None:
    last = not out.is_contiguous()  # channels last
    form = torch.channels_last if last else torch.contiguous_format
    operands = [t if t is None else t.contiguous(memory_format=form) for t in (a, b)]
    wide = accumulation_dtype(*(t for t in (a, b, bias) if t is not None)) == torch.float64
    block = 1024
    _gated_sum_kernel.launch(
        (-(-out.numel() // block),),
        out,
        *(out if t is None else t for t in (mask, *operands, bias)),
        out.numel(),
        out.shape[1],
        1 if last else out.shape[2:].numel(),
        out.shape[1:].numel(),
        READ=mask is not None and not write,
        WRITE=write,
        WITH_B=b is not None,
        WITH_BIAS=bias is not None,
        WIDE=wide,
        BLOCK=block,
        num_warps=4,
    )


def _sum_of_channels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over all dimensions but the second: (C,)."""
    return x.sum([dim for dim in range(x.ndim) if dim != 1], dtype=dtype)


def _wanted_now(ctx: Any) -> bool:
    """Whether this very pass takes the gradient of the last tensor, which is no leaf, any further."""
    return engine_will_execute(ctx.next_functions[-1][0])


class _BiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, bias: Tensor | None, last: bool) -> Tensor:
        y, mask = _gated_sum_and_mask(last, x, residual, bias)
        ctx.save_for_backward(mask)
        ctx.last, ctx.bias_dtype = last, None if bias is None else bias.dtype
        # Not beside a leaf, which may make the memory of this gradient its own.
        ctx.branch = None if residual is None or x.is_leaf else Branch(residual, even_if_first=True)
        reads_parts(ctx)
        return y

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        want_x, want_residual, want_bias, _ = ctx.needs_input_grad
        dtype = ctx.bias_dtype if want_bias and _wanted_now(ctx) else None
        a, b, sums = _Spread.apply(mask, ctx.last, w, want_x, want_residual, dtype)
        if b is not None and ctx.branch is not None and ctx.branch.may_split():
            b = SplitGradient.of(b)
        return a, b, sums, None


class _Spread(torch.autograd.Function):
    """`w -> (m w, m w, sums of m w)`, each if wanted: the last in `bias_dtype`, and without one not at all."""

    @staticmethod
    def forward(
        ctx: Any, mask: Tensor, last: bool, w: Tensor, want_a: bool, want_b: bool, bias_dtype: torch.dtype | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        ctx.save_for_backward(mask)
        ctx.set_materialize_grads(False)
        ctx.last, ctx.shape, ctx.dtype = last, w.shape, w.dtype
        masked = _gated_sum(mask, last, *parts_of(w), None)
        sums = None if bias_dtype is None else _sum_of_channels(masked, bias_dtype)
        return masked if want_a else None, masked.detach() if want_b else None, sums

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        a, b = (b, None) if a is None else (a, b)
        if a is None and v is not None:
            a, v = v.to(ctx.dtype).view(-1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape), None
        g = None if a is None else _MaskedSum.apply(mask, ctx.last, a, b, v if v is None else v.view_as(v))
        return None, None, g, None, None, None


class _MaskedSum(torch.autograd.Function):
    """`(a, b, v) -> m (a + b + v[c])`."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, last: bool, a: Tensor, b: Tensor | None, v: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.last, ctx.bias_dtype = last, None if v is None else v.dtype
        return _gated_sum(mask, last, a, b, v)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        *_, want_a, want_b, want_v = ctx.needs_input_grad
        dtype = ctx.bias_dtype if want_v and _wanted_now(ctx) else None
        return None, None, *_Spread.apply(mask, ctx.last, w, want_a, want_b, dtype)


def _bias_relu_torch(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The reference implementation, differentiable by itself."""
    total = x
    if bias is not None:
        total = (x + bias.view(-1, *[1] * (x.ndim - 2))).to(x.dtype)
    if residual is not None:
        total = total + residual
    return torch.relu(total) if total is x else torch.relu_(total)


def bias_relu(x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Evaluate max(x + bias[c] + residual, 0); differentiable to any order in all three.

    Args:
        x: (B, C, ...).
        bias: (C,), of the same or another dtype.
        residual: Of the shape and dtype of `x`.

    Returns:
        A tensor with the shape and dtype of `x`, channels last where `x` is; other layouts become contiguous. The
        arithmetic is float32 (float64 where any operand is float64).

    Raises:
        TypeError: an operand is not floating-point, or `residual` is of another dtype than `x`.
        ValueError: shapes or devices that differ, or no channels.
        NotImplementedError: the kernel was asked for a forward-mode derivative.
    """
    check_operands(x=x, **({} if residual is None else {"residual": residual}))
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype {x.dtype} of x, got {residual.dtype}: convert it")
    if x.ndim < 2:
        raise ValueError(f"x must be (B, C, ...), got shape {tuple(x.shape)}: unsqueeze it")
    if bias is not None:
        check_operands(bias=bias)
        if bias.shape != x.shape[1:2]:
            raise ValueError(f"bias must be ({x.shape[1]},), one a channel, got {tuple(bias.shape)}: reshape it")
        if bias.device != x.device:
            raise ValueError(f"bias must be on the device {x.device} of x, got {bias.device}: move it")
    if not use_triton(x) or torch.compiler.is_compiling():  # a compiler fuses these by itself
        return _bias_relu_torch(x, bias, residual)
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (x, bias, residual)):
        raise NotImplementedError("bias_relu has no forward-mode derivative: set FASTCURE_BACKEND=torch")
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    bias = bias if bias is None else bias.contiguous()
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual))):
        return _gated_sum(None, last, x, residual, bias)
    # A view is no leaf: of leaves autograd does not say whether a pass wants them.
    y: Tensor = _BiasReLU.apply(x, residual, bias if bias is None else bias.view(-1), last)
    return y
