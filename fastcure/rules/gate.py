"""What the derivatives of a ReLU do: a gradient passes where the output is positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcure.rules.passes import refuse_batched, save, saved


def gate(g: Tensor, y: Tensor) -> Tensor:
    """`g` where `y > 0`, else 0, both `(B, ...)`; differentiable to any order in `g`, and constant in `y`."""
    gated: Tensor = _Gate.apply(g, y.detach())
    return gated


class _Gate(torch.autograd.Function):
    """Linear, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        save(ctx, y)
        return torch.ops.aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        refuse_batched(v)
        (y,) = saved(ctx)
        return _Gate.apply(v, y), None
