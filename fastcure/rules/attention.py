"""Attention that is differentiated twice: torch's fused kernels have no second derivative.

Short sequences use torch's plain operators, which store the N x M probabilities and tensors derived from them. From
`LONG` queries and keys on, no tensor of that size is stored: each pass recomputes the probabilities, for `ROWS` queries
at a time. With P = softmax(c Q K'), O = P V, t^ = t - rowsum(P t), and dO the gradient at O, the first backward is

    W = P (dO V')^                            dQ = c W K,   dK = c W' Q,   dV = P' dO

and with A, B, C the gradients that arrive at dQ, dK and dV, the double backward gives

    S = c (A K' + Q B')^,   T = P (S (dO V')^ + dO C')^
    to dO: (P S) V + P C    to Q: c (W B + T K)    to K: c (W' A + T' Q)    to V: (P S)' dO

That is 2 matrix products forward, 5 in the first backward, 12 in the double backward and 5 in the last: 24 where plain
operators, which keep the probabilities, take 18.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastcure._torch_compat import math_attention
from fastcure.rules.arithmetic import wide
from fastcure.rules.passes import differentiated, refuse_batched, save, saved

LONG = 256
"""The rule applies from this many queries and keys on."""
ROWS = 64
"""How many queries are processed at a time."""


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """`softmax(query key^T / sqrt(E)) value`; `(..., L, E)`, `(..., S, E)`, `(..., S, E_v)` -> `(..., L, E_v)`."""
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return NotImplemented  # torch says what is wrong
    if mask is not None and mask.dtype == torch.bool:  # which the plain operator would add as it is
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    if not _serves(query, key, value, mask, causal) or dropout or options.get("enable_gqa"):
        return math_attention(query, key, value, mask, dropout, causal, **options)[0]
    scale = options.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    mask = None if mask is None else mask.expand(*query.shape[:-1], key.shape[-2])
    out: Tensor = _Attention.apply(q, k, v, mask, causal, scale)
    return out.view(*query.shape[:-1], value.shape[-1])


RULES = {"scaled_dot_product_attention": scaled_dot_product_attention}


def _serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    if min(q.shape[-2], k.shape[-2]) < LONG or not q.numel() or not q.dtype == k.dtype == v.dtype:
        return False
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1]:
        return False
    if mask is None:
        return True
    whole = (*q.shape[:-1], k.shape[-2])
    fits = all(size in (1, want) for size, want in zip(mask.shape[::-1], whole[::-1], strict=False))
    return not causal and not mask.requires_grad and mask.dim() <= len(whole) and fits


class _Attention(torch.autograd.Function):
    """O, of `(B, L, E)`, `(B, S, E)` and `(B, S, E_v)`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
        save(ctx, q, k, v, mask)
        ctx.options = causal, scale
        with torch.autocast(q.device.type, enabled=False):
            return torch.cat([p @ wide(v) for _, p in _probabilities(q, k, mask, causal, scale)], -2).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        refuse_batched(g)
        q, k, v, mask = saved(ctx)
        run = _InputGradient.apply if torch.is_grad_enabled() else _input_gradient
        return *run(g, q, k, v, mask, *ctx.options), None, None, None


class _InputGradient(torch.autograd.Function):
    """dQ, dK and dV."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        save(ctx, g, q, k, v, mask)
        ctx.options = causal, scale
        return _input_gradient(g, q, k, v, mask, causal, scale)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor) -> tuple[Any, ...]:
        for each in (a, b, c):
            refuse_batched(each)
        g, q, k, v, mask = saved(ctx)
        causal, scale = ctx.options
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            # Of views: they may depend on one another, and that is not asked for here.
            inputs = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (g, q, k, v)]
            whole = None if mask is None else mask.reshape(-1, *mask.shape[-2:])
            out = math_attention(*inputs[1:], whole, 0.0, causal, scale=scale)[0]
            first = torch.autograd.grad(out, inputs[1:], inputs[0], create_graph=True)
            return *differentiated(first, inputs, ctx.needs_input_grad, (a, b, c)), None, None, None
        return *_double_backward((a, b, c), g, q, k, v, mask, causal, scale), None, None, None


def _input_gradient(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        wide_q, wide_k, wide_v, wide_g = (wide(t) for t in (q, k, v, g))
        to_q, to_k, to_v = (torch.zeros_like(t) for t in (wide_q, wide_k, wide_v))
        for rows, p in _probabilities(q, k, mask, causal, scale):
            g_rows = wide_g[:, rows]
            w = _centred(g_rows @ wide_v.mT, p).mul_(p).mul_(scale)
            to_q[:, rows] = w @ wide_k
            to_k = to_k.baddbmm(w.mT, wide_q[:, rows])  # in place it is not counted
            to_v = to_v.baddbmm(p.mT, g_rows)
    return to_q.to(q.dtype), to_k.to(q.dtype), to_v.to(q.dtype)


def _double_backward(
    arriving: tuple[Tensor, Tensor, Tensor],
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    with torch.autocast(q.device.type, enabled=False):
        wide_g, wide_q, wide_k, wide_v, a, b, c = (wide(t) for t in (g, q, k, v, *arriving))
        to_g, to_q, to_k, to_v = (torch.zeros_like(t) for t in (wide_g, wide_q, wide_k, wide_v))
        for rows, p in _probabilities(q, k, mask, causal, scale):
            g_rows, q_rows, a_rows = wide_g[:, rows], wide_q[:, rows], a[:, rows]
            dp = _centred(g_rows @ wide_v.mT, p)
            s = _centred((a_rows @ wide_k.mT).baddbmm(q_rows, b.mT).mul_(scale), p)
            t = _centred((s * dp).baddbmm(g_rows, c.mT), p).mul_(p).mul_(scale)
            w, ps = dp.mul_(p).mul_(scale), s.mul_(p)
            to_g[:, rows] = (ps @ wide_v).baddbmm(p, c)
            to_q[:, rows] = (w @ b).baddbmm(t, wide_k)
            to_k = to_k.baddbmm(w.mT, a_rows).baddbmm(t.mT, q_rows)
            to_v = to_v.baddbmm(ps.mT, g_rows)
    return tuple(t.to(q.dtype) for t in (to_g, to_q, to_k, to_v))


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of queries with their probabilities `(B, rows, S)`; zeros for a query that is masked wholly."""
    q, keys = wide(q) * scale, wide(k).mT
    for start in range(0, q.shape[1], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[1]))
        scores = q[:, rows] @ keys
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(start + 1)
            scores.masked_fill_(hidden, -torch.inf)
        if mask is None:
            yield rows, scores.softmax(-1)
            continue
        scores += mask[..., rows, :].reshape(scores.shape)
        blind = torch.isneginf(scores).all(-1, keepdim=True)
        yield rows, scores.softmax(-1).masked_fill_(blind, 0.0)


def _centred(t: Tensor, p: Tensor) -> Tensor:
    """Subtract from each row of `t` its mean under `p`, in place."""
    return t.sub_((t * p).sum(-1, keepdim=True))
