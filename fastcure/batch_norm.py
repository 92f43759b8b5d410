"""Batch norm by the batch's own statistics, with a second-order rule of its own.

With n values a channel, mean m, inverse deviation r, xh = r (x - m), weight s, w the gradient at the output, and sums
over a channel, the gradient at x is

    q = s r (w - sum(w) / n - xh sum(w xh) / n).

With v the gradient that arrives at q, the double backward gives

    to w:  u = s r (v - sum(v) / n - xh sum(v xh) / n)                             the same map
    to s:  e = r (sum(v w) - sum(v) sum(w) / n - sum(v xh) sum(w xh) / n)
    to x:  -(r / n) (sum(w xh) u + sum(v xh) q + r s e (x - m))

torch composes it of some thirty passes over the input; here u and three of the sums are one operator, and the rest is
one more sum and one combination of three tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.convolution import wanted


def normalise(norm: Any, x: Tensor) -> Tensor:
    """Apply a batch norm of `nn`, by the batch's statistics, to `x` `(B, C, ...)`; running ones move as it says.

    Differentiable to any order in x, weight and bias, all of one dtype.
    """
    norm._check_input_dim(x)
    F._verify_batch_size(x.shape)  # type: ignore[attr-defined]
    factor = 0.0 if norm.momentum is None else norm.momentum
    tracks = norm.training and norm.track_running_stats
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    running = (norm.running_mean, norm.running_var) if tracks else (None, None)
    return _BatchNorm.apply(x, norm.weight, norm.bias, *running, factor, norm.eps)


def is_ordinary(norm: nn.Module, x: Tensor) -> bool:
    """Tell whether `normalise` computes what the module does: not where dtypes are mixed, or ranks share statistics."""
    weight = norm.weight
    return not isinstance(norm, nn.SyncBatchNorm) and (weight is None or weight.dtype == x.dtype)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        factor: float,
        eps: float,
    ) -> Tensor:
        y, m, r = torch.native_batch_norm(x, weight, bias, mean, var, True, factor, eps)
        # Activation checkpointing recomputes by torch's batch norm, and would give the tensors that it saves for these,
        # if they had the same shapes. The first has a shape of its own, so that this is an error.
        ctx.save_for_backward(x.new_empty(0, dtype=torch.bool), x, weight, m, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Any, ...]:
        _, x, weight, m, r = ctx.saved_tensors
        want = wanted(ctx, 3)
        rest = (None,) * 4
        if not torch.is_grad_enabled():
            return *_backward(w, x, weight, m, r, ctx.eps, want), *rest
        # create_graph: the input gradient becomes a node with the rule above.
        g_x = _InputGradient.apply(w, x, weight, m, r, ctx.eps) if want[0] else None
        g_weight = (w * _normalised(x, ctx.eps)).sum(_all_but_channels(x)) if want[1] else None
        return g_x, g_weight, w.sum(_all_but_channels(x)) if want[2] else None, *rest


class _InputGradient(torch.autograd.Function):
    """`q`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, eps: float) -> Tensor:
        q, sum_w_xh, sum_w = _backward(w, x, weight, m, r, eps, [True, True, True])
        assert q is not None
        ctx.save_for_backward(w, x, weight, m, r, q, sum_w_xh, sum_w)
        ctx.eps = eps
        return q

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        w, x, weight, m, r, q, sum_w_xh, sum_w = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            # Of views: w may depend on x, and that is not asked for here.
            w, x, weight = w.view_as(w), x.view_as(x), weight if weight is None else weight.view_as(weight)
            inputs = [t for t, want in zip((w, x, weight), ctx.needs_input_grad[:3], strict=True) if want]
            y = _normalised(x, ctx.eps) * (1.0 if weight is None else _as_channels(weight, x))
            (again,) = torch.autograd.grad(y, x, w, create_graph=True)
            found = iter(torch.autograd.grad(again, inputs, v, create_graph=True))
            return *(next(found) if want else None for want in ctx.needs_input_grad[:3]), None, None, None
        u, sum_v_xh, sum_v = _backward(v, x, weight, m, r, ctx.eps, [True, True, True])
        assert u is not None
        n = x.numel() / x.shape[1]
        e = r * ((v * w).sum(_all_but_channels(x)) - sum_v * sum_w / n - sum_v_xh * sum_w_xh / n)
        s_e = e if weight is None else weight * e
        by_u, by_q, by_x = (_as_channels(-r / n * t, x) for t in (sum_w_xh, sum_v_xh, r * s_e))
        g_x = torch.addcmul(-by_x * m.view_as(by_x), x, by_x).addcmul_(u, by_u).addcmul_(q, by_q)
        return u, g_x, None if weight is None else e, None, None, None


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
    return torch.ops.aten.native_batch_norm_backward(w, x, weight, None, None, m, r, True, eps, wanted)
