"""Batch norm with second-order rules of its own, by the batch's statistics and by given ones.

By given statistics it is an affine map of each channel, `s x + t`, and its double backward a few products.

By the batch's, its passes and their formulas are those of `fastcure_kernels.batch_norm`: kernels on a GPU, elsewhere
torch's own first derivative and a few operators. torch composes the double backward of some thirty passes.

The last backward reaches x twice, through the gradient that the first one made and through the output. Both are one
combination of four tensors: the node of the first leaves its operands with that of the second, which runs later, since
an edge from one to the other makes it wait. `instance_norm` is made of `batch_norm` and has these rules as well.
"""

from __future__ import annotations

from typing import Any

import torch
from fastcure_kernels import batch_norm as passes
from torch import Tensor

from fastcure._torch_compat import backward_id, engine_will_execute
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
        return _BatchNorm.apply(x, weight, bias, mean, var, momentum, eps)[0]
    if mean is None or var is None:
        return NotImplemented
    # A copy: a later forward in training mode changes running statistics in place, without telling autograd.
    s = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    t = -s * mean.clone() if bias is None else bias - s * mean.clone()
    return torch.addcmul(_as_channels(t, x), x, _as_channels(s, x)).to(x.dtype)


RULES = {"batch_norm": batch_norm}


class _BatchNorm(torch.autograd.Function):
    """The output, and an empty tensor by which the nodes of its gradients refer to this one."""

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
    ) -> tuple[Tensor, Tensor]:
        running = None if mean is None or var is None else (mean, var)
        y, norm = passes.forward(x, weight, bias, running, momentum, eps)
        token = x.new_empty(0)
        dense = None if norm.x is x else norm.x
        save(ctx, x, weight, token, dense, norm.stats)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.left = eps, {}
        return y, token

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Any, ...]:
        x, weight, token, dense, stats = saved(ctx)
        left = ctx.left.pop(backward_id(), [])
        if g is not None:
            refuse_batched(g)
        if g is not None and torch.is_grad_enabled():
            # create_graph: the input gradient becomes a node with the rule above.
            want, sum_of = wanted(ctx, 3), _all_but_channels(x)
            g_x = _InputGradient.apply(token, g, x, weight, dense, stats, ctx.eps, ctx.left) if want[0] else None
            w = g.to(stats.dtype)
            g_weight = (w * _normalised(x.to(w.dtype), ctx.eps)).sum(sum_of) if want[1] else None
            return g_x, g_weight, w.sum(sum_of) if want[2] else None, None, None, None, None
        norm = _norm(x, weight, dense, stats)
        found = [passes.last_backward(norm, g if i == 0 else None, *operands)[:2] for i, operands in enumerate(left)]
        if not left and g is not None:
            found = [passes.backward(norm, g)[:2]]
        if not found:
            return (None,) * 7
        g_x, sums = found[0]
        for more_x, more_sums in found[1:]:
            g_x, sums = g_x + more_x, sums + more_sums
        parameters = (
            total if need else None for total, need in zip(sums.flip(0), ctx.needs_input_grad[1:], strict=False)
        )
        return g_x, *parameters, None, None, None, None


class _InputGradient(torch.autograd.Function):
    """`q`."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        w: Tensor,
        x: Tensor,
        weight: Tensor | None,
        dense: Tensor | None,
        stats: Tensor,
        eps: float,
        left: dict[int, list[tuple[Tensor, ...]]],
    ) -> Tensor:
        q, sums, _ = passes.backward(_norm(x, weight, dense, stats), w)
        save(ctx, w, x, weight, dense, stats, sums)
        ctx.eps, ctx.left = eps, left
        return q

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        refuse_batched(v)
        w, x, weight, dense, stats, w_sums = saved(ctx)
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            # Of views: w may depend on x, and that is not asked for here.
            w, x, weight = w.view_as(w), x.view_as(x), weight if weight is None else weight.view_as(weight)
            inputs = [t for t, want in zip((w, x, weight), ctx.needs_input_grad[1:4], strict=True) if want]
            y = _normalised(x.to(stats.dtype), ctx.eps) * (1.0 if weight is None else _as_channels(weight, x))
            (again,) = torch.autograd.grad(y, x, w.to(y.dtype), create_graph=True)
            found = iter(torch.autograd.grad(again, inputs, v, create_graph=True))
            return None, *(next(found) if want else None for want in ctx.needs_input_grad[1:4]), *(None,) * 4
        u, v_sums = passes.double_backward(_norm(x, weight, dense, stats), v, w)
        if engine_will_execute(ctx.next_functions[0][0]):  # the norm's, which runs after all nodes of its gradients
            ctx.left.setdefault(backward_id(), []).append((v, w, v_sums, w_sums))
        return None, u, *(None,) * 6


def _norm(x: Tensor, weight: Tensor | None, dense: Tensor | None, stats: Tensor) -> passes.Norm:
    return passes.Norm(x if dense is None else dense, stats, weight)


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
