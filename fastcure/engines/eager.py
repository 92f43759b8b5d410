"""The shared schedule, 12 F: g(x) once, for the direction, for the difference and for the loss."""

from __future__ import annotations

import torch
from fastcure_kernels import difference_sqnorm, direction_step
from torch import Tensor

from fastcure._folding.layers import folded_layers
from fastcure._functional import input_gradient
from fastcure.engines.base import Evaluation, GraphEngine, Request, evaluation, twice_differentiable
from fastcure.rules import double_backward
from fastcure.rules.second_derivatives import Twice


class Eager(GraphEngine):
    """Exact, for any model whose operators have a double backward."""

    training_norms = True

    def forward(self, request: Request) -> Evaluation:
        """Four passes (forward and input gradient at x and at x + h z), each on the record if `differentiable`."""
        functional, x, y, graph = request.functional, request.x.detach(), request.y, request.differentiable
        run = Twice(functional) if graph else functional
        with folded_layers(functional.model), double_backward(), twice_differentiable():
            point = x.detach().requires_grad_()
            logits, loss = run(point, y)
            g = input_gradient(loss, point, create_graph=graph)
            step = second_point(x, g.detach(), request.h, request.direction).requires_grad_()
            _, loss_step = run(step, y)
            g_step = input_gradient(loss_step, step, create_graph=graph)

        penalty = difference_sqnorm(g_step, g)
        if request.power == 1:
            penalty = root(penalty)
        found = functional.leaves(loss, loss_step, inputs=(point, step)) if graph else []
        made = evaluation(logits, loss_step if request.loss_at == "step" else loss, penalty, found)
        return made._replace(step=step.detach())


def second_point(x: Tensor, g: Tensor, h: float | Tensor, direction: Tensor | None) -> Tensor:
    """Return `x + h z`, with `direction` `(B, ...)` for z if there is one."""
    if direction is None:
        return direction_step(x, g, h)
    return torch.addcmul(x, lengths(h, x), direction.detach())


def lengths(h: float | Tensor, x: Tensor) -> Tensor:
    """Return `h` as `(B, 1, ...)` or `(1, 1, ...)` beside `x`, where it is there already with no copy to a GPU."""
    shape = (-1, *[1] * (x.dim() - 1))
    if isinstance(h, Tensor):
        return h.to(x).reshape(shape)
    return torch.full([1] * x.dim(), h, dtype=x.dtype, device=x.device)


def root(penalty: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 is taken as 0; NaN is not zero, and passes on."""
    zero = penalty == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, penalty).sqrt())
