"""The engines: ways to compute a loss, its curvature penalty and their parameter gradients.

An engine is two functions, `forward(objective, x, y, h, ...) -> Evaluation` and
`backward(state, w_loss, w_penalty) -> gradients`. The weights `(B,)` are known only in backward, so any downstream
use of the per-sample values differentiates rightly; `fastcure.curvature` attaches either to autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from fastcure_kernels import difference_sqnorm, direction_step
from torch import Tensor, nn

from fastcure import reference
from fastcure.layers import cheaper_layers
from fastcure.objective import Objective


class Evaluation(NamedTuple):
    """What an engine's forward returns: detached values, and the state that its backward takes."""

    logits: Tensor
    """(B, C), detached."""
    loss: Tensor
    """(B,), detached."""
    penalty: Tensor
    """(B,), detached."""
    parameters: list[nn.Parameter]
    """Those whose gradients backward returns, in this order."""
    state: Any


class Engine(Protocol):
    """A way to compute the penalty."""

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
    ) -> Evaluation:
        """Evaluate loss and penalty at `x` `(B, ...)`; keep what backward needs if `differentiable`."""

    def backward(
        self, state: Any, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of `sum(w_loss * loss + w_penalty * penalty)`; a weight of None costs nothing."""


class Graph(NamedTuple):
    """The state of an engine that leaves its second differentiation to autograd."""

    loss: Tensor
    penalty: Tensor
    leaves: list[Tensor]


class _GraphEngine:
    """Backward through an autograd graph that forward built: one double backward for everything."""

    def backward(
        self, state: Graph, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        pairs = [(state.loss, w_loss), (state.penalty, w_penalty)]
        # A penalty with no graph (a model linear in x and in its parameters' effect on g) has gradient zero.
        pairs = [(value, weight) for value, weight in pairs if weight is not None and value.requires_grad]
        if not pairs:
            return (None,) * len(state.leaves)
        values, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(values, state.leaves, weights, retain_graph=retain, allow_unused=True)


class Eager(_GraphEngine):
    """The shared schedule, 12 F: g(x) once, for the direction, for the difference and for the loss."""

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
    ) -> Evaluation:
        """Four passes (forward and input gradient at x and at x + h z), each on the record if `differentiable`."""
        with cheaper_layers(objective.model):
            point = x.detach().requires_grad_()
            logits, loss = objective(point, y)
            (g,) = torch.autograd.grad(loss.sum(), point, create_graph=differentiable)

            if direction is None:
                step = direction_step(x.detach(), g.detach(), h)
            else:
                length = torch.as_tensor(h, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.dim() - 1))
                step = torch.addcmul(x.detach(), length, direction.detach())
            step.requires_grad_()
            _, loss_step = objective(step, y)
            (g_step,) = torch.autograd.grad(loss_step.sum(), step, create_graph=differentiable)

        penalty = difference_sqnorm(g_step, g)
        if power == 1:
            zero = penalty == 0  # the norm's derivative there is taken as 0; NaN is not zero, and passes on
            penalty = torch.where(zero, 0.0, torch.where(zero, 1.0, penalty).sqrt())

        found = objective.leaves(loss, loss_step, inputs=(point, step)) if differentiable else []
        return _evaluation(logits, loss, penalty, found)


class Reference(_GraphEngine):
    """The oracle of `fastcure.reference` behind the same interface."""

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
    ) -> Evaluation:
        """Evaluate the definitions one by one."""
        logits, loss, penalty = reference.curvature(objective, x, y, h, power=power, direction=direction)
        found = objective.leaves(loss, inputs=()) if differentiable else []
        return _evaluation(logits, loss, penalty, found)


def _evaluation(logits: Tensor, loss: Tensor, penalty: Tensor, found: list[tuple[Tensor, nn.Parameter]]) -> Evaluation:
    return Evaluation(
        logits.detach(),
        loss.detach(),
        penalty.detach(),
        [parameter for _, parameter in found],
        Graph(loss, penalty, [leaf for leaf, _ in found]),
    )


ENGINES: dict[str, Engine] = {"eager": Eager(), "reference": Reference()}


def select(name: str, model: nn.Module) -> tuple[str, str]:
    """Return the engine that `name` stands for on this model, and why.

    Raises:
        ValueError: for a name that is not an engine.
    """
    if name == "auto":
        return "eager", "exact, and it needs nothing but operators with a double backward"
    if name not in ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}, got {name!r}")
    return name, "chosen by the caller"
