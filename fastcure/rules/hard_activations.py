"""Hardsigmoid, of which torch has no second derivative, and hardswish: theirs is piecewise constant.

Between -3 and 3 they are `(x + 3) / 6` and `x (x + 3) / 6`; below they are 0, above 1 and x. At -3 and 3 the first
derivative is that of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcure.rules.passes import refuse_batched, save, saved


def hardsigmoid(x: Tensor) -> Tensor:
    """`clamp(x + 3, 0, 6) / 6`."""
    return _Hardsigmoid.apply(x)


def hardswish(x: Tensor) -> Tensor:
    """`x hardsigmoid(x)`."""
    return _Hardswish.apply(x)


def _in_place(rule: Any) -> Any:
    return lambda x: x.copy_(rule(x.clone()))


RULES = {
    "hardsigmoid": hardsigmoid,
    "hardsigmoid_": _in_place(hardsigmoid),
    "hardswish": hardswish,
    "hardswish_": _in_place(hardswish),
}


class _Hardsigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        save(ctx, x)
        return torch.ops.aten.hardsigmoid(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        refuse_batched(g)
        (x,) = saved(ctx)
        return torch.where((x > -3) & (x < 3), g / 6, 0 * g)


class _Hardswish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        save(ctx, x)
        return torch.ops.aten.hardswish(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        refuse_batched(g)
        (x,) = saved(ctx)
        return torch.where(x <= -3, 0 * g, torch.where(x < 3, g * (x / 3 + 0.5), g))
