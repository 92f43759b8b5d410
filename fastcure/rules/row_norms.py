"""Layer norm and group norm with a second-order rule of their own, over the rows that they normalise.

Both are `xh` of each row, times a weight, plus a bias; the rule is that of `xh`. With n values a row, mean m, inverse
deviation r, xh = r (x - m), w the gradient at xh, and sums over a row,

    q = r (w - sum(w) / n - xh sum(w xh) / n)                                         the gradient at x

and with v the gradient that arrives at q, the double backward gives

    to w:  u = r (v - sum(v) / n - xh sum(v xh) / n)                                  the same map
    to x:  -(r / n) (sum(w xh) u + sum(v xh) q + e xh),   e = r (sum(v w) - sum(v) sum(w) / n - sum(v xh) sum(w xh) / n)

`q` and `u` are one operator each. torch's own rule holds r and m constant from the third order on, and is wrong there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fastcure_kernels import row_norm
from fastcure_kernels.backend import use_triton
from torch import Tensor

from fastcure.rules.arithmetic import as_channels, normalised, wide
from fastcure.rules.passes import differentiated, refuse_batched, save, saved


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last dimensions, those of `shape`; differentiable to any order in x, weight and bias."""
    if not x.numel():
        return NotImplemented
    xh, m, r = _Standardise.apply(wide(x).reshape(-1, math.prod(shape)), eps)
    statistics = [*x.shape[: x.dim() - len(shape)], *[1] * len(shape)]
    return _affine(xh.view(x.shape), weight, bias).to(x.dtype), m.view(statistics), r.view(statistics)


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise `x` `(n, c, ...)`, `hw` pixels each, over groups of channels."""
    if not x.numel():
        return NotImplemented
    xh, m, r = _Standardise.apply(wide(x).reshape(n * groups, -1), eps)
    channels = [None if t is None else as_channels(t, x) for t in (weight, bias)]
    return _affine(xh.view(x.shape), *channels).to(x.dtype), m.view(n, groups), r.view(n, groups)


RULES = {"native_layer_norm": layer_norm, "native_group_norm": group_norm}


def _affine(xh: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return xh if bias is None else xh + bias
    return xh * weight if bias is None else torch.addcmul(wide(bias), xh, wide(weight))


class _Standardise(torch.autograd.Function):
    """`xh` of rows `(R, n)`, with their means and inverse deviations `(R, 1)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        xh, m, r = torch.native_layer_norm(x, x.shape[1:], None, None, eps)
        save(ctx, x, m, r)
        ctx.eps = eps
        ctx.mark_non_differentiable(m, r)
        return xh, m, r

    @staticmethod
    def backward(ctx: Any, w: Tensor, _m: Any, _r: Any) -> tuple[Any, ...]:
        refuse_batched(w)
        x, m, r = saved(ctx)
        if torch.is_grad_enabled():
            return _InputGradient.apply(w, x, m, r, ctx.eps), None
        return _map(w, x, m, r), None


class _InputGradient(torch.autograd.Function):
    """`q`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, m: Tensor, r: Tensor, eps: float) -> Tensor:
        q = _map(w, x, m, r)
        ctx.kernel = use_triton(x) and x.shape[1] <= row_norm.LONGEST  # which computes q again, for nothing
        save(ctx, w, x, m, r, None if ctx.kernel else q)
        ctx.eps = eps
        return q

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        refuse_batched(v)
        w, x, m, r, q = saved(ctx)
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            # Of views: w may depend on x, and that is not asked for here.
            w, x = w.view_as(w), x.view_as(x)
            (again,) = torch.autograd.grad(normalised(x, [1], ctx.eps), x, w, create_graph=True)
            return *differentiated([again], [w, x], ctx.needs_input_grad, [v]), None, None, None
        if not ctx.needs_input_grad[1]:
            return _map(v, x, m, r), None, None, None, None
        if ctx.kernel:
            return *row_norm.double_backward(v, w, x, m, r), None, None, None
        u, n = _map(v, x, m, r), x.shape[1]
        xh = (x - m) * r
        sum_w_xh, sum_v_xh = ((t * xh).sum(1, keepdim=True) for t in (w, v))
        e = r * ((v * w).sum(1, keepdim=True) - v.sum(1, keepdim=True) * w.sum(1, keepdim=True) / n)
        e -= r * sum_v_xh * sum_w_xh / n
        g_x = (xh.mul_(e)).addcmul_(u, sum_w_xh).addcmul_(q, sum_v_xh).mul_(-r / n)
        return u, g_x, None, None, None


def _map(w: Tensor, x: Tensor, m: Tensor, r: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.native_layer_norm_backward(
        w.contiguous(), x, x.shape[1:], m, r, None, None, [True, False, False]
    )[0]
    return found
