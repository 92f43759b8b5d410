"""The engine "auto": eager; on a GPU, where the host is what a step waits for, steps that repeat are replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from fastcure import _trials
from fastcure._cuda_graphs import CudaRecorder, Recorder
from fastcure._folding.layers import replayed
from fastcure._functional import clones, copy_into
from fastcure._trials import Trials, differs, obstacle
from fastcure.engines.base import Evaluation, Request
from fastcure.engines.cuda_graph import Captured, CudaGraph, eagerly, kind_of


class Auto(CudaGraph):
    """The eager engine; on a GPU, a step is captured when one of its kind comes for the third time.

    A step whose predecessor still waits for its backward runs eagerly, as all do where somebody could notice the
    difference: with hooks on modules, modes of torch, several processes, or while a graph is being captured.

    Args:
        recorder: makes what records graphs.
        device: type of device that it records.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder, device: str = "cuda") -> None:
        super().__init__(recorder, None)
        self.replays_on = device
        self.trials = Trials(self.captures, "steps")

    def captured(self, request: Request) -> Captured | None:
        """Return what was captured of such a request; capture it when it comes for the third time."""
        model = request.model
        if request.x.device.type != self.replays_on or not self.trials.may_replay(model, request.x):
            return None
        key = kind_of(request)
        captured = self.captures.get(model, key)

        def compare(made: Captured) -> str:
            return difference(made, request)

        if captured is None:
            if not self.trials.comes_again(model, key, model, request.loss_fn):
                return None
            return self.trials.attempt(model, lambda: self._capture(request, key), compare)
        if captured.replays % _trials.COMPARED_EVERY == 0 and not captured.memory.is_held:
            return self.trials.attempt(model, lambda: captured, compare)
        return captured

    def _capture(self, request: Request, key: Hashable) -> Captured | str:
        def step() -> None:
            made = eagerly(replace(request))
            ones = torch.ones_like(made.loss)
            made.state.engine.backward(made.state.state, ones if request.with_loss else None, ones, retain=False)

        reason = obstacle(request.x, step, lambda: kind_of(replace(request, known={})))
        return reason or self.capture(request, key)


def difference(captured: Captured, request: Request) -> str:
    """Return how a replay differs from the eager step, if it does by more than rounding.

    The eager step is given the replay's direction: of a gradient near 0, rounding decides the sign.
    """
    kept = clones(captured.statistics)
    ours = captured.forward(request)
    statistics = clones(captured.statistics)
    copy_into(kept, captured.statistics)
    given = replace(request)
    if ours.step is not None and request.direction is None:
        given = replace(request, direction=ours.step - request.x, h=1.0)
    with replayed():
        theirs = eagerly(given)
    given.update_buffers()
    pairs = {
        "logits": ([ours.logits], [theirs.logits]),
        "losses": ([ours.loss], [theirs.loss]),
        "penalties": ([ours.penalty], [theirs.penalty]),
        "running statistics": (statistics, clones(captured.statistics)),
    }
    copy_into(kept, captured.statistics)
    ones = torch.ones_like(ours.loss)
    for what, pair in (("gradients of the penalty", (None, ones)), ("gradients of the loss", (ones, None))):
        if not (request.penalised if pair[0] is None else request.with_loss):
            continue
        mine = captured.backward(ours.state, *pair, retain=True)
        eager = theirs.state.engine.backward(theirs.state.state, *pair, retain=True)
        pairs[what] = _by_parameter(ours, mine, ours), _by_parameter(theirs, eager, ours)
    captured.memory.release()
    for what, both in pairs.items():
        if by := differs(*both, request.x):
            return f"its {what} differ by {by}"
    return ""


def _by_parameter(step: Evaluation, gradients: tuple[Tensor | None, ...], like: Evaluation) -> list[Tensor]:
    """Return gradients in the order of the parameters of `like`, with zeros for None."""
    found = dict(zip(map(id, step.parameters), gradients, strict=True))
    wanted = [(parameter, found.get(id(parameter))) for parameter in like.parameters]
    return [torch.zeros_like(parameter) if gradient is None else gradient for parameter, gradient in wanted]
