"""How values that engines computed become part of autograd: the nodes that call an engine's backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastcure._torch_compat import backward_retains_graph, foreach_add
from fastcure.engines import Engine, Evaluation


def attach(parts: list[tuple[Engine, Evaluation]]) -> list[tuple[Tensor, Tensor]]:
    """Return loss and penalty `(B,)` of each part, differentiable in the parameters through its engine's backward."""
    parameters = list(dict.fromkeys(parameter for _, found in parts for parameter in found.parameters))
    values = _Attach.apply(parts, parameters, *parameters)
    return list(zip(values[::2], values[1::2], strict=True))


def scaled(value: Tensor, gradients: dict[nn.Parameter, Tensor]) -> Tensor:
    """Return `value` (0-dim), whose gradients are known already: its backward only scales them."""
    out: Tensor = _Scaled.apply(value, tuple(gradients.values()), *gradients)
    return out


class _Attach(torch.autograd.Function):
    """Gives the engines' detached values the parameters as their history, and the engines as their derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: list[tuple[Engine, Evaluation]],
        order: list[nn.Parameter],
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, ...]:
        # Without the values, which get this node as their history.
        ctx.state = [(engine, found.state, found.parameters) for engine, found in parts]
        ctx.order = order
        ctx.set_materialize_grads(False)  # an output that nobody uses has weight None, and costs nothing
        return tuple(value for _, found in parts for value in (found.loss, found.penalty))

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> tuple[Any, ...]:
        parts, retain = _take_state(ctx)
        gradients: dict[nn.Parameter, Tensor] = {}
        for i in reversed(range(len(parts))):
            engine, state, parameters = parts[i] if retain else parts.pop()
            given = weights[2 * i], weights[2 * i + 1]
            _add_gradients(gradients, engine, state, parameters, *given, retain=retain)
        return None, None, *[gradients.get(parameter) for parameter in ctx.order]


class _Scaled(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *parameters: nn.Parameter) -> Tensor:
        ctx.state = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        gradients, _ = _take_state(ctx)
        return None, None, *[scale.to(gradient) * gradient for gradient in gradients]


def _take_state(ctx: Any) -> tuple[Any, bool]:
    """Return `ctx.state` and whether another backward may want it; else it is freed.

    Raises:
        RuntimeError: in a backward with create_graph=True, and if an earlier one has freed it.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the curvature penalty has no second derivative: call backward without create_graph=True")
    if ctx.state is None:
        raise RuntimeError("the graph of this penalty was freed by an earlier backward: retain_graph=True keeps it")
    state, retain = ctx.state, backward_retains_graph()
    if not retain:  # freed node by node while the inner backward runs, not when the caller drops the outputs
        ctx.state = None
    return state, retain


def add_part(
    gradients: dict[nn.Parameter, Tensor],
    engine: Engine,
    found: Evaluation,
    w_loss: float,
    w_penalty: float | Tensor,
) -> None:
    """Add a part's gradients of the weighted sums of loss and penalty; a weight of 0 costs nothing."""
    weights = [
        None if isinstance(weight, (int, float)) and weight == 0 else torch.ones_like(values) * weight
        for values, weight in ((found.loss, w_loss), (found.penalty, w_penalty))
    ]
    _add_gradients(gradients, engine, found.state, found.parameters, *weights, retain=False)


def _add_gradients(
    gradients: dict[nn.Parameter, Tensor],
    engine: Engine,
    state: Any,
    parameters: list[nn.Parameter],
    w_loss: Tensor | None,
    w_penalty: Tensor | None,
    *,
    retain: bool,
) -> None:
    """Add a part's gradients, to those that there are in one launch on a GPU."""
    if not parameters or (w_loss is None and w_penalty is None):
        return
    new = engine.backward(state, w_loss, w_penalty, retain=retain)
    pairs = [(p, gradient) for p, gradient in zip(parameters, new, strict=True) if gradient is not None]
    both = [(gradients[p], gradient, p) for p, gradient in pairs if p in gradients]
    gradients.update(pairs)
    if both:  # not in place: a gradient may be another's too
        old, more, whose = map(list, zip(*both, strict=True))
        gradients.update(zip(whose, foreach_add(old, more), strict=True))
