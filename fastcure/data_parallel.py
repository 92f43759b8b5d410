"""A DistributedDataParallel around the penalty: what would silently leave gradients unaveraged is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def refuse_static_graph() -> None:
    """Raise if a DistributedDataParallel around us takes the graph of its first step for that of every step."""
    around = DistributedDataParallel._active_ddp_module
    if around is not None and around.static_graph:
        raise ValueError(
            "CURE must not be in a DistributedDataParallel with static_graph=True: where a step's graph is not that of "
            "the first, gradients are not averaged, without an error; leave it out (find_unused_parameters=True works)"
        )


def sent_backward_once(*values: Tensor) -> tuple[Tensor, ...]:
    """Return `values`; in a DistributedDataParallel, which averages in the first backward alone, a second one raises.

    Under its `no_sync`, where nothing is averaged, there may be as many as one likes.
    """
    around = DistributedDataParallel._active_ddp_module
    averages = around is not None and around.require_backward_grad_sync
    if averages and torch.is_grad_enabled() and any(value.requires_grad for value in values):
        return _Once.apply(*values)
    return values


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.sent = False
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.sent:
            raise RuntimeError(
                "DistributedDataParallel averages gradients in one backward a step, and this is the second: send the "
                "sum backward, as (loss + gamma * penalty).backward() or CURE's total, or use no_sync()"
            )
        ctx.sent = True
        return gradients
