"""The oracle of `fastcure.reference` behind the interface of an engine."""

from __future__ import annotations

from torch import Tensor

from fastcure import reference
from fastcure._functional import Objective
from fastcure.engines.autograd import GraphEngine, evaluation, twice_differentiable
from fastcure.engines.base import Evaluation
from fastcure.rules.second_derivatives import Twice


class Reference(GraphEngine):
    """The definitions one by one, with nothing shared: 17 F."""

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
        """Evaluate `fastcure.reference.curvature`."""
        run, points = Twice(objective) if differentiable else objective, [x.detach()]

        def recorded(point: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            """A model that differentiates itself needs an input that requires grad."""
            points.append(point if point.requires_grad else point.detach().requires_grad_(differentiable))
            return run(points[-1], y)

        with twice_differentiable():
            options = {"power": power, "direction": direction, "stepped": stepped}
            logits, loss, penalty = reference.curvature(recorded, x, y, h, **options)  # type: ignore[arg-type]
        found = objective.leaves(loss, inputs=tuple(points)) if differentiable else []
        return evaluation(logits, loss, penalty, found)
