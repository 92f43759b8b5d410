"""The loss without a penalty, for the samples of a batch that have none: ordinary first-order passes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure._folding.layers import folded_layers
from fastcure._functional import FunctionalLoss, evaluation_mode, input_gradient
from fastcure._model_lock import one_thread
from fastcure.engines.base import Evaluation, Graph, GraphEngine, Request, evaluation
from fastcure.engines.eager import Eager, second_point
from fastcure.rules.context import fused_norms


class State(NamedTuple):
    """A graph, and whose it is."""

    functional: FunctionalLoss
    graph: Graph


class LossOnly(GraphEngine):
    """3 F where the loss is at x, 5 F at x + h z. Not one of `ENGINES`: its penalty is 0.

    Args:
        folded: whether to take the layers that `fastcure.prepare` found, and norms with their ReLUs as kernels of ours.
            Activation checkpointing, which the exact engines refuse, would recompute them without.
    """

    training_norms = True

    def __init__(self, folded: bool = True) -> None:
        self.folded = folded

    def forward(self, request: Request) -> Evaluation:
        """One pass, or two with an input gradient between them. `power` is without effect."""
        functional, x, y = request.functional, request.x.detach(), request.y
        differentiable, at_step = request.differentiable, request.loss_at == "step"
        # A model that differentiates itself needs an input that requires grad; it costs nothing where nobody asks.
        point, step = x.detach().requires_grad_(differentiable or at_step), None
        layers = folded_layers(functional.model) if self.folded else nullcontext()
        norms = fused_norms(x) if self.folded else nullcontext()
        with layers, norms, torch.set_grad_enabled(differentiable or at_step):
            logits, loss = functional(point, y)
            if at_step:
                g = input_gradient(loss, point)
                step = second_point(x, g, request.h, request.direction)
                with torch.set_grad_enabled(differentiable):
                    _, loss = functional(step, y)
        found = functional.leaves(loss, inputs=(point,)) if differentiable else []
        made = evaluation(logits, loss, torch.zeros_like(loss), found)
        return made._replace(state=State(functional, made.state), step=step)

    def backward(  # type: ignore[override]
        self, state: State, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Differentiate the weighted loss; what activation checkpointing recomputes here, in evaluation mode."""
        with one_thread(state.functional.module), evaluation_mode(state.functional.module):
            return super().backward(state.graph, w_loss, w_penalty, retain=retain)


def engine_of(request: Request) -> GraphEngine:
    """Return the eager engine of a part, penalised or not."""
    return Eager() if request.penalised else LossOnly()
