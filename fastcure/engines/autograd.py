"""Engines that leave their second differentiation to autograd: one double backward for everything."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fastcure._one_thread import Shared
from fastcure.engines.base import Evaluation
from fastcure.rules.second_derivatives import INSTEAD, PLAIN_ATTENTION, missing_derivatives

CHECKPOINTING = (
    "activation checkpointing recomputes the model outside of the penalty's evaluation mode: turn it off, and save "
    "memory by CURE(model, microbatch=N)"
)


def _uncompiled() -> AbstractContextManager[object]:
    compiled = "torch._dynamo" in sys.modules  # without it nothing is, and its import takes a second
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


UNCOMPILED = Shared(_uncompiled)


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


class Graph(NamedTuple):
    """Loss and penalty with the graph under them, and the leaves of it that carry parameter gradients."""

    loss: Tensor
    penalty: Tensor
    leaves: list[Tensor]


class GraphEngine:
    """The backward of engines whose state is a `Graph`."""

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
    """Split values with a graph into detached values and the graph; `found` as by `Objective.leaves`."""
    leaves, parameters = [leaf for leaf, _ in found], [parameter for _, parameter in found]
    return Evaluation(logits.detach(), loss.detach(), penalty.detach(), parameters, Graph(loss, penalty, leaves))
