"""The reference implementation, `fastcure.reference`, behind the interface of an engine."""

from __future__ import annotations

from torch import Tensor

from fastcure import reference
from fastcure.engines.base import Evaluation, GraphEngine, Request, evaluation, twice_differentiable
from fastcure.rules.second_derivatives import Twice


class Reference(GraphEngine):
    """The definitions one by one, with nothing shared: 17 F."""

    training_norms = True

    def forward(self, request: Request) -> Evaluation:
        """Evaluate `fastcure.reference.curvature`."""
        functional, differentiable = request.functional, request.differentiable
        run, points = Twice(functional) if differentiable else functional, [request.x.detach()]

        def recorded(point: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """A model that differentiates itself needs an input that requires grad."""
            points.append(point if point.requires_grad else point.detach().requires_grad_(differentiable))
            return run(points[-1], y)

        with twice_differentiable():
            logits, loss, penalty = reference.curvature(
                *(recorded, request.x, request.y, request.h),
                power=request.power,
                direction=request.direction,
                loss_at=request.loss_at,
            )
        found = functional.leaves(loss, inputs=tuple(points)) if differentiable else []
        return evaluation(logits, loss, penalty, found)
