"""Convolution with second-order rules of its own.

The derivative of a convolution's input gradient with respect to its weight is an ordinary weight gradient: with
`gI = conv^T(g, W)`, and `v` the gradient that arrives at `gI`, it is that of `conv(v, W)` under `g`. torch computes it
as a convolution whose kernel is as large as the image, channels and batch exchanged, which the libraries beneath are
not made for. Here it is the weight gradient that it is; the arithmetic is the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution moves over its input, one number a spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def wanted(ctx: Any, inputs: int) -> list[bool]:
    """Return which of the first `inputs` arguments of a Function need a gradient in the backward pass that runs now.

    `ctx.needs_input_grad` says which of them require grad. A pass for g(x) does not continue into weights, unless they
    depend on the image, and their gradients are then not computed.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the arguments that require grad
    return [need and _continues_into(next(nodes)) for need in ctx.needs_input_grad[:inputs]]


def _continues_into(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf for whose gradient torch.autograd.grad was called
        return True


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve `x` `(B, C, ...)` with `weight` `(K, C / groups, ...)`; differentiable to any order.

    As torch's own convolution, in the dtype of autocast where that is on.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # As torch's: what is wider than fp32 stays as it is.
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
    return _Convolution.apply(x, weight, bias, geometry)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    none = [0] * len(geometry.stride)
    return torch.convolution(x, weight, bias, *geometry[:3], False, none, geometry.groups)


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    none, sizes = [0] * len(geometry.stride), [weight.shape[0]]
    return torch.ops.aten.convolution_backward(g, x, weight, sizes, *geometry[:3], False, none, geometry.groups, wanted)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return _forward(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        want_x, want_weight, want_bias = wanted(ctx, 3)
        if not torch.is_grad_enabled():
            return *_backward(g, x, weight, ctx.geometry, [want_x, want_weight, want_bias]), None
        # create_graph: the input gradient becomes a node with the rule below; the rest takes torch's own rules.
        g_x = _InputGradient.apply(g, x.detach(), weight, ctx.geometry) if want_x else None
        if not (want_weight or want_bias):
            return g_x, None, None, None
        return g_x, *_backward(g, x, weight, ctx.geometry, [False, want_weight, want_bias])[1:], None


class _InputGradient(torch.autograd.Function):
    """`gI = conv^T(g, W)`; `x` gives the shape alone."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        g_x = _backward(g, x, weight, geometry, [True, False, False])[0]
        assert g_x is not None
        return g_x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, weight = ctx.saved_tensors
        want_g, _, want_weight, _ = ctx.needs_input_grad
        g_g = _forward(v, weight, None, ctx.geometry) if want_g else None
        g_weight = _backward(g, v, weight, ctx.geometry, [False, True, False])[1] if want_weight else None
        return g_g, None, g_weight, None
