"""Batch norm with second-order rules of its own, by the batch's statistics and by given ones.

By given statistics it is an affine map of each channel, `s x + t`, and its double backward a few products.

By the batch's, with n values a channel, mean m, inverse deviation r, xh = r (x - m), weight s, w the gradient at the
output, and sums over a channel, the gradient at x is

    q = s r (w - sum(w) / n - xh sum(w xh) / n).

With v the gradient that arrives at q, the double backward gives

    to w:  u = s r (v - sum(v) / n - xh sum(v xh) / n)                             the same map
    to s:  e = r (sum(v w) - sum(v) sum(w) / n - sum(v xh) sum(w xh) / n)
    to x:  -(r / n) (sum(w xh) u + sum(v xh) q + r s e (x - m))

torch composes it of some thirty passes over the input; here u and three of the sums are one operator, and the rest is
one more sum and one combination of three tensors. `instance_norm` is made of `batch_norm` and has these rules as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcure.rules.passes import refuse_batched, save, saved, wanted


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Normalise `x` `(B, C, ...)`; differentiable to any order in x, weight and bias."""
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype  # that of statistics
    given = [t for t in (weight, bias, mean, var) if t is not None]
    if x.dim() < 2 or not x.numel() or any(t.dtype != wide or t.shape != x.shape[1:2] for t in given):
        return NotImplemented
    if training:
        return _BatchNorm.apply(x, weight, bias, mean, var, momentum, eps)
    if mean is None or var is None:
        return NotImplemented
    # A copy: a later forward in training mode changes running statistics in place, without telling autograd.
    s = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    t = -s * mean.clone() if bias is None else bias - s * mean.clone()
    return torch.addcmul(_as_channels(t, x), x, _as_channels(s, x)).to(x.dtype)


RULES = {"batch_norm": batch_norm}


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, m, r = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        save(ctx, x, weight, m, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Any, ...]:
        refuse_batched(w)
        x, weight, m, r = saved(ctx)
        want = wanted(ctx, 3)
        rest = (None,) * 4
        if not torch.is_grad_enabled():
            return *_backward(w, x, weight, m, r, ctx.eps, want), *rest
        # create_graph: the input gradient becomes a node with the rule above.
        g_x = _InputGradient.apply(w, x, weight, m, r, ctx.eps) if want[0] else None
        w = w.to(m.dtype)
        g_weight = (w * _normalised(x.to(m.dtype), ctx.eps)).sum(_all_but_channels(x)) if want[1] else None
        return g_x, g_weight, w.sum(_all_but_channels(x)) if want[2] else None, *rest


class _InputGradient(torch.autograd.Function):
    """`q`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, eps: float) -> Tensor:
        q, sum_w_xh, sum_w = _backward(w, x, weight, m, r, eps, [True, True, True])
        assert q is not None
        save(ctx, w, x, weight, m, r, q, sum_w_xh, sum_w)
        ctx.eps = eps
        return q

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        w, x, weight, m, r, q, sum_w_xh, sum_w = saved(ctx)
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            # Of views: w may depend on x, and that is not asked for here.
            w, x, weight = w.view_as(w), x.view_as(x), weight if weight is None else weight.view_as(weight)
            inputs = [t for t, want in zip((w, x, weight), ctx.needs_input_grad[:3], strict=True) if want]
            y = _normalised(x.to(m.dtype), ctx.eps) * (1.0 if weight is None else _as_channels(weight, x))
            (again,) = torch.autograd.grad(y, x, w.to(y.dtype), create_graph=True)
            found = iter(torch.autograd.grad(again, inputs, v, create_graph=True))
            return *(next(found) if want else None for want in ctx.needs_input_grad[:3]), None, None, None
        u, sum_v_xh, sum_v = _backward(v, x, weight, m, r, ctx.eps, [True, True, True])
        assert u is not None
        n = x.numel() / x.shape[1]
        e = r * ((v * w).sum(_all_but_channels(x), dtype=r.dtype) - sum_v * sum_w / n - sum_v_xh * sum_w_xh / n)
        s_e = e if weight is None else weight * e
        by_u, by_q, by_x = (_as_channels(-r / n * t, x) for t in (sum_w_xh, sum_v_xh, r * s_e))
        g_x = torch.addcmul(-by_x * m.view_as(by_x), x, by_x).addcmul_(u, by_u).addcmul_(q, by_q)
        return u, g_x.to(x.dtype), None if weight is None else e, None, None, None


def _normalised(x: Tensor, eps: float) -> Tensor:
    """`xh` in plain operators, differentiable to any order."""
    dims = _all_but_channels(x)
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _as_channels(values: Tensor, x: Tensor) -> Tensor:
    """One value a channel `(C,)`, to combine with `x`."""
    return values.view(-1, *[1] * (x.dim() - 2))


def _backward(
    w: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, eps: float, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return `q`, `sum(w xh)` and `sum(w)`, each if wanted."""
    weight = torch.ones_like(m) if weight is None else weight  # without one torch has no sums on a GPU
    if len(x) == 1:  # in channels_last the stride of the batch is arbitrary, and torch 2.13 then reads other values
        w, x = w.contiguous(), x.contiguous()
    return torch.ops.aten.native_batch_norm_backward(w, x, weight, None, None, m, r, True, eps, wanted)
