"""The loss without a penalty, for the samples of a batch that have none: ordinary first-order passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcure._functional import Objective, evaluation_mode, input_gradient
from fastcure._one_thread import one_thread
from fastcure.engines.autograd import Graph, GraphEngine, evaluation, twice_differentiable
from fastcure.engines.base import Evaluation
from fastcure.engines.eager import second_point


class State(NamedTuple):
    """A graph, and whose it is."""

    objective: Objective
    graph: Graph


class LossOnly:
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
        # A model that differentiates itself needs an input that requires grad; it costs nothing where nobody asks.
        point = x.detach().requires_grad_(differentiable or stepped)
        with twice_differentiable(), torch.set_grad_enabled(differentiable or stepped):
            logits, loss = objective(point, y)
            if stepped:
                g = input_gradient(loss, point)
                step = second_point(x.detach(), g, h, direction)
                with torch.set_grad_enabled(differentiable):
                    _, loss = objective(step, y)
        found = objective.leaves(loss, inputs=(point,)) if differentiable else []
        made = evaluation(logits, loss, torch.zeros_like(loss), found)
        return made._replace(state=State(objective, made.state))

    def backward(
        self, state: State, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Differentiate the weighted loss; what activation checkpointing recomputes here, in evaluation mode."""
        with one_thread(state.objective.module), evaluation_mode(state.objective.module):
            return _graph.backward(state.graph, w_loss, w_penalty, retain=retain)


_graph = GraphEngine()
