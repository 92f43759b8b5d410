"""What an engine is: two functions that compute a loss, its curvature penalty and their parameter gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastcure._functional import FunctionalLoss, LossFn
from fastcure._model_lock import Shared
from fastcure._torch_compat import compiler_is_loaded
from fastcure.rules.second_derivatives import INSTEAD, PLAIN_ATTENTION, missing_derivatives

LossAt = Literal["x", "step"]

CHECKPOINTING = (
    "activation checkpointing recomputes the model outside of the penalty's evaluation mode: turn it off, and save "
    "memory by CURE(model, microbatch=N)"
)


@dataclass(frozen=True)
class Request:
    """All that an engine is asked for."""

    model: nn.Module
    loss_fn: LossFn
    x: Tensor
    """(B, ...) images."""
    y: Tensor
    h: float | Tensor
    """One number, or one per sample (B,)."""
    power: int = 2
    loss_at: LossAt = "x"
    """Where the loss is taken: at x, or at x + h z. Logits are those at x."""
    direction: Tensor | None = None
    """(B, ...) in place of z."""
    differentiable: bool = True
    """Whether to keep what backward needs."""
    with_loss: bool = True
    """Whether the loss may be sent backward."""
    penalised: bool = True
    """Whether these samples have a penalty: else it is 0, for engines that take such parts."""
    tracking: tuple[nn.Module, ...] = ()
    """Batch norms in training mode that update their running statistics."""
    known: dict[str, Any] = field(default_factory=dict)
    """What an engine has found out of this batch, for its other parts."""

    @cached_property
    def functional(self) -> FunctionalLoss:
        """Model and loss as one function, made when it is first asked for."""
        return FunctionalLoss(self.model, self.loss_fn, tracking=self.tracking)

    def of(self, functional: FunctionalLoss, **changes: Any) -> Request:
        """Return the request for another functional, or for the same one, which `replace` would make anew."""
        other = replace(self, **changes)
        vars(other)["functional"] = functional
        return other

    def update_buffers(self) -> None:
        """Give `tracking` their new running statistics, if passes of `functional` have made any."""
        if "functional" in vars(self):
            self.functional.update_buffers()


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
    step: Tensor | None = None
    """(B, ...), `x + h z`, where an engine tells it."""


class Engine(ABC):
    """A way to compute the penalty: a file that says what it can, and two functions."""

    exact: ClassVar[bool] = True
    """Whether its gradients are those of the definition; else they are an estimate."""
    training_norms: ClassVar[bool] = False
    """Whether it runs batch norms in training mode."""
    any_part: ClassVar[bool] = False
    """Whether it takes samples without a penalty, too."""
    device: str | None = None
    """The only type of device that it runs on, if there is one."""

    @abstractmethod
    def forward(self, request: Request) -> Evaluation:
        """Evaluate loss and penalty."""

    @abstractmethod
    def backward(
        self, state: Any, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient of `sum(w_loss * loss + w_penalty * penalty)`; a weight of None costs nothing.

        The weights `(B,)` are known only here, so any downstream use of the per-sample values differentiates rightly.
        With `retain` the state must serve another backward.
        """


class Graph(NamedTuple):
    """Loss and penalty with autograd's graph under them, and the leaves of it that carry parameter gradients."""

    loss: Tensor
    penalty: Tensor
    leaves: list[Tensor]


class GraphEngine(Engine):
    """An engine whose state is a `Graph`: it leaves the second differentiation to autograd, in one backward."""

    instead = f"replace it, or {INSTEAD}"
    """Of an operator that has no second derivative here."""

    def backward(
        self, state: Graph, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Differentiate the weighted sum of both."""
        pairs = [(state.loss, w_loss), (state.penalty, w_penalty)]
        # A penalty without a graph, of a loss linear in x and in nothing else, has gradient zero.
        pairs = [(value, weight) for value, weight in pairs if weight is not None and value.requires_grad]
        if not pairs:
            return (None,) * len(state.leaves)
        values, weights = zip(*pairs, strict=True)
        try:
            with missing_derivatives(self.instead):
                return torch.autograd.grad(values, state.leaves, weights, retain_graph=retain, allow_unused=True)
        except CheckpointError as error:
            raise RuntimeError(CHECKPOINTING) from error


def evaluation(logits: Tensor, loss: Tensor, penalty: Tensor, found: list[tuple[Tensor, nn.Parameter]]) -> Evaluation:
    """Split values with a graph into detached values and the graph; `found` as by `FunctionalLoss.leaves`."""
    leaves, parameters = [leaf for leaf, _ in found], [parameter for _, parameter in found]
    return Evaluation(logits.detach(), loss.detach(), penalty.detach(), parameters, Graph(loss, penalty, leaves))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run passes in ways that have a double backward: attention in plain operators, compiled modules uncompiled.

    Raises:
        RuntimeError: if the model checkpoints its activations in the reentrant way, or has an operator without a
            derivative that is asked for.
    """
    try:
        with UNCOMPILED, PLAIN_ATTENTION, missing_derivatives():
            yield
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise RuntimeError(CHECKPOINTING) from error
        raise


def _uncompiled() -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if compiler_is_loaded() else nullcontext()


UNCOMPILED = Shared(_uncompiled)
