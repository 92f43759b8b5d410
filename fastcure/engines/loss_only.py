"""The loss without a penalty, for the samples of a batch that have none: ordinary first-order passes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcure.engines.eager import second_point
from fastcure.engines.graph import GraphEngine, evaluation, twice_differentiable
from fastcure.engines.protocol import Evaluation
from fastcure.objective import Objective


class LossOnly(GraphEngine):
    """3 F where the loss is at x, 5 F at x + h z. Not one of `ENGINES`: its penalty is 0."""

    def forward(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor,
        h: float | Tensor,
        *,
        power: int,
        direction: Tensor | None,
        differentiable: bool,
        stepped: bool = False,
    ) -> Evaluation:
        """One pass, or two with an input gradient between them. `power` is without effect."""
        point = x.detach().requires_grad_(stepped)
        with twice_differentiable():
            logits, loss = objective(point, y)
            if stepped:
                (g,) = torch.autograd.grad(loss.sum(), point)
                _, loss = objective(second_point(x.detach(), g, h, direction), y)
        found = objective.leaves(loss, inputs=(point,)) if differentiable else []
        return evaluation(logits, loss, torch.zeros_like(loss), found)
