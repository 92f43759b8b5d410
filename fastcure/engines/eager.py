"""The shared schedule, 12 F: g(x) once, for the direction, for the difference and for the loss."""

from __future__ import annotations

import torch
from fastcure_kernels import difference_sqnorm, direction_step
from torch import Tensor

from fastcure._folding.layers import folded_layers
from fastcure._functional import Objective, input_gradient
from fastcure.engines.autograd import GraphEngine, evaluation, twice_differentiable
from fastcure.engines.base import Evaluation
from fastcure.rules import double_backward
from fastcure.rules.second_derivatives import Twice


class Eager(GraphEngine):
    """Exact, for any model whose operators have a double backward."""

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
        """Four passes (forward and input gradient at x and at x + h z), each on the record if `differentiable`."""
        run = Twice(objective) if differentiable else objective
        with folded_layers(objective.model), double_backward(), twice_differentiable():
            point = x.detach().requires_grad_()
            logits, loss = run(point, y)
            g = input_gradient(loss, point, create_graph=differentiable)
            step = second_point(x.detach(), g.detach(), h, direction).requires_grad_()
            _, loss_step = run(step, y)
            g_step = input_gradient(loss_step, step, create_graph=differentiable)

        penalty = difference_sqnorm(g_step, g)
        if power == 1:
            penalty = root(penalty)
        found = objective.leaves(loss, loss_step, inputs=(point, step)) if differentiable else []
        return evaluation(logits, loss_step if stepped else loss, penalty, found)


def second_point(x: Tensor, g: Tensor, h: float | Tensor, direction: Tensor | None) -> Tensor:
    """Return `x + h z`, with `direction` `(B, ...)` for z if there is one."""
    if direction is None:
        return direction_step(x, g, h)
    length = torch.as_tensor(h, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))
    return torch.addcmul(x, length, direction.detach())


def root(penalty: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 is taken as 0; NaN is not zero, and passes on."""
    zero = penalty == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, penalty).sqrt())
