"""What an engine is: two functions that compute a loss, its curvature penalty and their parameter gradients."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fastcure._functional import Objective


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
    """A way to compute the penalty; `fastcure.curvature` attaches any of them to autograd."""

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
        """Evaluate loss and penalty at `x` `(B, ...)`; keep what backward needs if `differentiable`.

        If `stepped`, the loss is that at `x + h z`. Logits are those at x.
        """

    def backward(
        self, state: Any, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of `sum(w_loss * loss + w_penalty * penalty)`; a weight of None costs nothing.

        The weights `(B,)` are known only here, so any downstream use of the per-sample values differentiates rightly.
        With `retain` the state must serve another backward.
        """
