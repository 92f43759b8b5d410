"""The eager engine as two CUDA graphs, one for its forward and one for its backward.

A step of ResNet-18 is more than a thousand launches, each of some microseconds on the host; on small batches the
device waits for them. Captured, they are two. The price: static shapes, memory that stays reserved, and Python that
runs only once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastcure._cuda_graphs import Captures, CudaRecorder, Memory, Recorder, key_of, layout_of
from fastcure._folding.layers import replayed
from fastcure._functional import clones, copy_into
from fastcure._torch_compat import version
from fastcure.engines._loss_only import engine_of
from fastcure.engines.base import Engine, Evaluation, GraphEngine, Request


class CudaGraph(Engine):
    """Exact; captures once for each kind of step: model, loss, shape, and what Python reads of them.

    `h`, labels, weights and running statistics are read anew. One step at a time can wait for its backward; the next
    one runs eagerly. What the forwards read besides the model and the loss is fixed by the first step.

    Args:
        recorder: makes what records graphs.
        device: type of device that it records.
    """

    training_norms = True
    any_part = True

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder, device: str | None = "cuda") -> None:
        self.device = device
        self.captures: Captures[Captured] = Captures(recorder)

    def forward(self, request: Request) -> Evaluation:
        """Replay the forward; the first call of a kind captures both graphs."""
        with torch.cuda.device_of(request.x):  # it need not be the current one
            captured = self.captured(request) if request.differentiable else None
            if captured is None or captured.memory.is_held:
                return eagerly(request)
            return captured.forward(request)

    def backward(
        self, state: Step | Eagerly, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Replay the backward.

        Raises:
            RuntimeError: if parameters have changed since the forward.
        """
        if isinstance(state, Eagerly):
            return state.engine.backward(state.state, w_loss, w_penalty, retain=retain)
        return state.captured.backward(state, w_loss, w_penalty, retain=retain)

    def captured(self, request: Request) -> Captured | None:
        """Return what was captured of such a request, or capture it."""
        key = kind_of(request)
        return self.captures.get(request.model, key) or self.capture(request, key)

    def capture(self, request: Request, key: Hashable) -> Captured:
        """Capture a request."""
        return self.captures.record(request.model, key, lambda memory: Captured(memory, request))


class Eagerly(NamedTuple):
    """The state of a step that was not replayed."""

    engine: GraphEngine
    state: Any


def eagerly(request: Request) -> Evaluation:
    """Evaluate a request without a capture."""
    made = (engine := engine_of(request)).forward(request)
    return made._replace(state=Eagerly(engine, made.state))


def kind_of(request: Request) -> Hashable:
    """Return all that a capture of a request depends on."""
    if "key" not in request.known:
        request.known["key"] = key_of(request.model, request.loss_fn, request.x.device)
    return (
        *(request.power, request.loss_at, request.direction is None, request.with_loss, request.penalised),
        *(tuple(map(id, request.tracking)), layout_of(request.x, request.y), request.known["key"]),
    )


class Step:
    """One forward of a capture."""

    def __init__(self, captured: Captured) -> None:
        self.captured, self.sent = captured, False
        self.versions = captured.versions()


class Captured:
    """Both graphs of one kind of step, and the memory that they read and write.

    Args:
        memory: to record in.
        request: the step; its batch norms get no new statistics.
    """

    def __init__(self, memory: Memory, request: Request) -> None:
        x, direction, engine = request.x, request.direction, engine_of(request)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.memory, self.replays = memory, 0
        self.x, self.y = x.detach().clone(), request.y.detach().clone()
        self.h = torch.ones(len(x), dtype=wide, device=x.device)
        self._filled: float | None = None
        self._penalised = request.penalised
        self.direction = None if direction is None else direction.detach().clone()
        self.statistics = [buffer for norm in request.tracking for buffer in norm.buffers(recurse=False)]
        static = replace(request, x=self.x, y=self.y, h=self.h, direction=self.direction)
        device, autocast = x.device.type, torch.is_autocast_enabled(x.device.type)
        inner: Evaluation

        def forward() -> list[Tensor | None]:
            nonlocal inner
            # A weight that autocast has cast before would not be cast again in a replay.
            with torch.autocast(device, torch.get_autocast_dtype(device), enabled=autocast, cache_enabled=False):
                passes = replace(static)  # it copies the model's buffers, in each replay
                inner = engine.forward(passes)
            passes.update_buffers()
            return [inner.logits, inner.loss, inner.penalty, inner.step]

        def backward() -> tuple[Tensor | None, ...]:
            w_loss = self.w_loss if request.with_loss else None
            return engine.backward(inner.state, w_loss, self.w_penalty, retain=False)

        def both() -> None:
            nonlocal inner
            _, loss, penalty, _ = forward()
            assert loss is not None
            assert penalty is not None
            self.w_loss, self.w_penalty = torch.ones_like(loss), torch.ones_like(penalty)
            backward()
            del inner  # else the capture would find its nodes of parameters, made outside of it

        kept = clones(self.statistics)
        with replayed():
            memory.recorder.warm_up(both)
            self.values, self._replay_forward = memory.recorder.record(forward)
            gradients, self._replay_backward = memory.recorder.record(backward)
        copy_into(kept, self.statistics)
        self.parameters = inner.parameters
        self.gradients = [gradient for gradient in gradients if gradient is not None]
        self._has_gradient = [gradient is not None for gradient in gradients]

    def versions(self) -> list[int]:
        """Return the versions of the parameters."""
        return [version(parameter) for parameter in self.parameters]

    def forward(self, request: Request) -> Evaluation:
        """Replay the forward for a request; the step holds the memory until its last backward."""
        self.replays += 1
        self.x.copy_(request.x)
        self.y.copy_(request.y)
        if isinstance(request.h, Tensor):
            self.h.copy_(request.h) if request.h.dim() else self.h.fill_(request.h)
        elif request.h != self._filled:
            self.h.fill_(request.h)
        self._filled = None if isinstance(request.h, Tensor) else request.h
        if request.direction is not None and self.direction is not None:
            self.direction.copy_(request.direction)
        self._replay_forward()
        if self.statistics:
            increment_version(self.statistics)
        step = Step(self)
        self.memory.hold(step)
        *values, at = self.values
        logits, loss, penalty = clones(value for value in values if value is not None)
        return Evaluation(logits, loss, penalty, self.parameters, step, at)

    def backward(
        self, step: Step, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Replay the backward of a step that holds the memory."""
        if step.versions != self.versions():
            raise RuntimeError(
                "parameters were modified in place since the forward: call backward before the optimiser"
            )
        if step.sent:  # the first backward has overwritten what the forward left
            kept = clones(self.statistics)
            self._replay_forward()
            copy_into(kept, self.statistics)
        step.sent = True
        weights = [(self.w_loss, w_loss), *([(self.w_penalty, w_penalty)] if self._penalised else [])]
        for static, weight in weights:
            static.zero_() if weight is None else static.copy_(weight)
        self._replay_backward()
        if not retain:
            self.memory.release()
        # Copies: the caller may keep them as `.grad` while the next step is replayed.
        found = iter(clones(self.gradients))
        return tuple(next(found) if has else None for has in self._has_gradient)
