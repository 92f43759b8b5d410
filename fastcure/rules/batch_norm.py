"""Batch norm with second-order rules of its own, by the batch's statistics and by given ones.

By given statistics it is an affine map of each channel, `s x + t`, and its double backward a few products.

By the batch's, its passes and their formulas are those of `fastcure_kernels.batch_norm`: kernels on a GPU, elsewhere
torch's own first derivative and a few operators. torch composes the double backward of some thirty passes. Where
kernels run, the output waits for what follows (`fastcure.rules.pending_norm`), and a residual and a ReLU are part of
the same passes.

The last backward reaches x twice, through the gradient that the first one made and through the output. Both are one
combination of four tensors: the node of the first leaves its operands with that of the second, which runs later, since
an edge from one to the other makes it wait. `instance_norm` is made of `batch_norm` and has these rules as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fastcure_kernels import batch_norm as passes
from fastcure_kernels.split_gradient import Branch, SplitGradient, reads_parts
from torch import Tensor

from fastcure._torch_compat import backward_id, engine_will_execute
from fastcure.rules.arithmetic import all_but_channels, as_channels, normalised
from fastcure.rules.gate import gate
from fastcure.rules.passes import differentiated, refuse_batched, save, saved, wanted
from fastcure.rules.pending_norm import PendingNorm, Seen, Sum


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
        running = None if mean is None or var is None else (mean, var)
        with torch.no_grad():
            norm, y = passes.measure(x, weight, bias, running, momentum, eps)
            y = PendingNorm.of(Sum(norm, x, weight, bias, eps).plus(None)) if y is None else y
        out: Tensor = _BatchNorm.apply(x, weight, bias, None, None, _Made(y, norm, eps))[0]
        return out
    if mean is None or var is None:
        return NotImplemented
    # A copy: a later forward in training mode changes running statistics in place, without telling autograd.
    s = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    t = -s * mean.clone() if bias is None else bias - s * mean.clone()
    return torch.addcmul(as_channels(t, x), x, as_channels(s, x)).to(x.dtype)


RULES = {"batch_norm": batch_norm}


def training_batch_norm(x: Tensor, *args: Any) -> Tensor:
    """The same by the batch's statistics alone; arguments are those of `batch_norm`."""
    training = args[4]
    return batch_norm(x, *args) if training else NotImplemented


def relu_of(pending: PendingNorm, in_place: bool) -> Tensor:
    """Take a norm that waits, and what was added to it; NotImplemented if it waits no longer."""
    total = pending.waiting()
    if total is None:
        return NotImplemented
    y, norm = total.finish(relu=True)
    if in_place:
        pending.seen.overwritten()
    made, residual = _Made(y, norm, total.eps, total.seen), total.residual
    if isinstance(residual, PendingNorm) and residual.became is not None:
        residual = residual.settled()
    z: Tensor = _BatchNorm.apply(total.x, total.weight, total.bias, residual, pending, made)[0]
    return pending.becomes(z) if in_place else z


class _Made(NamedTuple):
    """An output, and of what."""

    y: Tensor
    norm: passes.Norm
    eps: float
    seen: tuple[Seen, ...] = ()
    """Of the tensors between the norm and its ReLU."""


class _BatchNorm(torch.autograd.Function):
    """The output, and an empty tensor by which the nodes of its gradients refer to this one.

    With a ReLU there is a second way to x and the residual, through `pending`, the sum before the ReLU: gradients take
    it where somebody can see them there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        pending: Tensor | None,
        made: _Made,
    ) -> tuple[Tensor, Tensor]:
        y, norm, ctx.eps, ctx.seen = made
        token = x.new_empty(0)
        dense = None if norm.x is x else norm.x
        save(ctx, x, weight, token, dense, norm.stats, y if norm.relu else None, norm.mask)
        ctx.set_materialize_grads(False)
        ctx.left = {}
        ctx.branch = Branch(residual, even_if_first=True) if residual is not None and type(residual) is Tensor else None
        if passes.runs_as_kernels(norm.x):
            reads_parts(ctx)
        return y, token

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Any, ...]:
        left = ctx.left.pop(backward_id(), [])
        if g is None and not left:
            return (None,) * 6
        x, weight, token, dense, stats, y, mask = saved(ctx)
        if g is not None:
            refuse_batched(g)
        through: Tensor | None = None
        if g is not None and any(ctx.seen):
            through, g = gate(g, y), None
        if g is not None and torch.is_grad_enabled():
            # create_graph: the input gradient becomes a node with the rule above.
            want = wanted(ctx, 4)
            operands = token, g, x, weight, dense, stats, y, mask, ctx.eps, ctx.left
            g_x, w = _InputGradient.apply(*operands) if want[0] or want[3] else (None, None)
            g_residual = None if mask is None else _handed_on(ctx, w)
            g_weight: Tensor | None = None
            g_bias: Tensor | None = None
            if any(want[1:3]):
                w = (g if y is None else gate(g, y)).to(stats.dtype)
                dims = all_but_channels(x)
                g_weight = (w * normalised(x.to(w.dtype), dims, ctx.eps)).sum(dims) if want[1] else None
                g_bias = w.sum(dims) if want[2] else None
            return g_x, g_weight, g_bias, g_residual, through, None
        norm = _norm(x, weight, dense, stats, y, mask)
        found = [passes.last_backward(norm, g if i == 0 else None, *operands) for i, operands in enumerate(left)]
        if not left and g is not None:
            found = [passes.backward(norm, g)]
        if not found:
            return None, None, None, None, through, None
        g_x, sums, masked = found[0]
        for more in found[1:]:
            g_x, sums = g_x + more[0], sums + more[1]
        parameters = (
            total if need else None for total, need in zip(sums.flip(0), ctx.needs_input_grad[1:], strict=False)
        )
        return g_x, *parameters, None if mask is None else _handed_on(ctx, masked), through, None


class _InputGradient(torch.autograd.Function):
    """`q`, and `w` unless that is `g`: with a residual it is its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        g: Tensor,
        x: Tensor,
        weight: Tensor | None,
        dense: Tensor | None,
        stats: Tensor,
        y: Tensor | None,
        mask: Tensor | None,
        eps: float,
        left: dict[int, list[tuple[Tensor, ...]]],
    ) -> tuple[Tensor, Tensor | None]:
        q, sums, w = passes.backward(_norm(x, weight, dense, stats, y, mask), g)
        save(ctx, w, x, weight, dense, stats, sums, y, mask)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.left = eps, left
        return q, None if w is g else w

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, v_residual: Tensor | None) -> tuple[Any, ...]:
        for each in (v, v_residual):
            if each is not None:
                refuse_batched(each)
        w, x, weight, dense, stats, w_sums, y, mask = saved(ctx)
        if v is None:
            return None, v_residual if v_residual is None or y is None else gate(v_residual, y), *(None,) * 8
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            # Of views: g may depend on x, and that is not asked for here. What is gated may be gated again.
            g, x, weight = w.view_as(w), x.view_as(x), weight if weight is None else weight.view_as(weight)
            w = g if y is None else gate(g, y)
            z = normalised(x.to(stats.dtype), all_but_channels(x), ctx.eps)
            z = z if weight is None else z * as_channels(weight, x)
            (again,) = torch.autograd.grad(z, x, w.to(z.dtype), create_graph=True)
            results, directions = [again], [v]
            if v_residual is not None:
                results, directions = [again, w], [v, v_residual]
            found = differentiated(results, [g, x, weight], ctx.needs_input_grad[1:], directions)
            return None, *found, *(None,) * 6
        u, v_sums = passes.double_backward(_norm(x, weight, dense, stats, y, mask), v, w, v_residual)
        if engine_will_execute(ctx.next_functions[0][0]):  # the norm's, which runs after all nodes of its gradients
            ctx.left.setdefault(backward_id(), []).append((v, w, v_sums, w_sums))
        return None, u, *(None,) * 8


def _handed_on(ctx: Any, w: Tensor | None) -> Tensor | None:
    """Return the gradient of a residual, to which the node behind it may add another as it reads both."""
    splits = w is not None and ctx.branch is not None and ctx.needs_input_grad[3] and ctx.branch.may_split()
    return SplitGradient.of(w) if w is not None and splits else w


def _norm(
    x: Tensor, weight: Tensor | None, dense: Tensor | None, stats: Tensor, y: Tensor | None, mask: Tensor | None
) -> passes.Norm:
    return passes.Norm(x if dense is None else dense, stats, weight, mask, relu=y is not None)
