"""Convolution with derivatives of its own, to any order.

`conv(x, W)`, its input gradient `conv^T(g, W)` and its weight gradient `grad_W(g, x)` are bilinear, and the derivatives
of each are the other two:

    conv(x, W)       under g:  to x  conv^T(g, W)    to W  grad_W(g, x)
    conv^T(g, W)     under v:  to g  conv(v, W)      to W  grad_W(g, v)
    grad_W(g, x)     under V:  to g  conv(x, V)      to x  conv^T(g, V)

torch computes `grad_W(g, v)` as a convolution whose kernel is as large as the image, channels and batch exchanged,
which the libraries beneath are not made for; the arithmetic is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from fastcure_kernels.split_gradient import Branch, SplitGradient
from torch import Tensor

from fastcure.rules.passes import refuse_batched, save, saved, wanted

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""Stride, padding, dilation, whether transposed, output padding, groups: the arguments of `aten::convolution`."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """Convolve `x` `(B, C, ...)` with `weight` `(K, C / groups, ...)`; differentiable to any order."""
    if x.dim() != weight.dim():
        return NotImplemented
    return _Convolution.apply(x, weight, bias, geometry)


RULES = {"convolution": convolve}


def _backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return torch.ops.aten.convolution_backward(g, x, weight, [g.shape[1]], *geometry, wanted)


class _Convolution(torch.autograd.Function):
    """`conv(x, W) + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        save(ctx, x, weight)
        ctx.geometry = geometry
        ctx.branch = Branch(x, even_if_first=False)
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        refuse_batched(g)
        splits = ctx.branch.may_split()
        x, weight = saved(ctx)
        want = wanted(ctx, 3)
        if torch.is_grad_enabled():
            g_x = _InputGradient.apply(g, weight, x.detach(), ctx.geometry) if want[0] else None
            g_weight = _WeightGradient.apply(g, x, weight.detach(), ctx.geometry) if want[1] else None
            g_bias = g.sum([0, *range(2, g.dim())]) if want[2] else None
        else:  # all three in one call
            g_x, g_weight, g_bias = _backward(g, x, weight, ctx.geometry, want)
        return SplitGradient.of(g_x) if g_x is not None and splits else g_x, g_weight, g_bias, None


class _InputGradient(torch.autograd.Function):
    """`conv^T(g, W)`; `like` has the shape of the image."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        save(ctx, g, weight)
        ctx.geometry = geometry
        g_x = _backward(g, like, weight, geometry, [True, False, False])[0]
        assert g_x is not None
        return g_x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        refuse_batched(v)
        g, weight = saved(ctx)
        want_g, want_weight = wanted(ctx, 2)
        g_g = _Convolution.apply(v, weight, None, ctx.geometry) if want_g else None
        g_weight = _WeightGradient.apply(g, v, weight.detach(), ctx.geometry) if want_weight else None
        return g_g, g_weight, None, None


class _WeightGradient(torch.autograd.Function):
    """`grad_W(g, x)`; `like` has the shape of the weight."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, like: Tensor, geometry: Geometry) -> Tensor:
        save(ctx, g, x)
        ctx.geometry = geometry
        g_weight = _backward(g, x, like, geometry, [False, True, False])[1]
        assert g_weight is not None
        return g_weight

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        refuse_batched(v)
        g, x = saved(ctx)
        want_g, want_x = wanted(ctx, 2)
        g_g = _Convolution.apply(x, v, None, ctx.geometry) if want_g else None
        return g_g, _InputGradient.apply(g, v, x.detach(), ctx.geometry) if want_x else None, None, None
