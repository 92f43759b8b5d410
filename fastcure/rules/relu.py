"""ReLU whose double backward does not send zeros to its input, on a GPU.

The gradient at x is the gradient at y where y > 0, and its derivative by y is zero everywhere. torch writes those zeros
and adds them to what else arrives at y: four passes over it. On a CPU they cost less than a rule in Python does.
"""

from __future__ import annotations

from typing import Any

import torch
from fastcure_kernels.backend import use_triton
from torch import Tensor

from fastcure._torch_compat import is_view
from fastcure.rules.batch_norm import relu_of
from fastcure.rules.gate import gate
from fastcure.rules.passes import refuse_batched, save, saved
from fastcure.rules.pending_norm import PendingNorm


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`."""
    if isinstance(x, PendingNorm):
        y = relu_of(x, in_place=False)
        return relu(x.settled()) if y is NotImplemented else y
    return _ReLU.apply(x, False) if use_triton(x) else NotImplemented


def relu_(x: Tensor) -> Tensor:
    """The same in place; torch's own for views and for leaves, of which it refuses those that require grad."""
    if isinstance(x, PendingNorm) and (y := relu_of(x, in_place=True)) is not NotImplemented:
        return y
    return _ReLU.apply(x, True) if use_triton(x) and not is_view(x) and not x.is_leaf else NotImplemented


RULES = {"relu": relu, "relu_": relu_}
OF_NORMS = {
    "relu": lambda x: relu_of(x, in_place=False) if isinstance(x, PendingNorm) else NotImplemented,
    "relu_": lambda x: relu_of(x, in_place=True) if isinstance(x, PendingNorm) else NotImplemented,
}
"""Of norms that wait alone: a first derivative gains nothing by the rest."""


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
        y = torch.relu_(x) if in_place else torch.relu(x)
        save(ctx, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        refuse_batched(g)
        (y,) = saved(ctx)
        return gate(g, y), None
