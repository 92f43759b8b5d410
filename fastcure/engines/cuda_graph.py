"""The eager engine as two CUDA graphs, one for its forward and one for its backward.

A step of ResNet-18 is more than a thousand launches, each of some microseconds on the host; on small batches the
device waits for them. Captured, they are two. The price: static shapes, memory that stays reserved, and Python that
runs only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure._recorder import Captures, CudaRecorder, Recorder, buffers
from fastcure._torch_compat import version
from fastcure.engines.base import Engine, Evaluation, Request
from fastcure.engines.eager import Eager


class CudaGraph(Engine):
    """Exact; captures once for each model, loss and shape. `h`, weights and running statistics are read anew.

    What else the model's Python code depends on is fixed by the first step.

    Args:
        recorder: makes what records a pair of graphs.
        device: type of device that it records.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder, device: str = "cuda") -> None:
        self.recorder, self.device = recorder, device
        self._captures: Captures[_Captured] = Captures()

    def forward(self, request: Request) -> Evaluation:
        """Replay the forward; the first call of a shape captures both graphs."""
        if not request.differentiable:
            return Eager().forward(request)
        x, device = request.x, request.x.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        with torch.cuda.device_of(x):  # it need not be the current one
            captured = self._captures.find(
                *(request.functional, x, request.y, (request.power, request.loss_at, request.direction is None)),
                lambda: _Captured(self.recorder(), request, autocast),
            )
            return captured.forward(request)

    def backward(
        self, state: _Step, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Replay the backward.

        Raises:
            RuntimeError: if another forward of this shape came in between, whose values are in place of ours; at a
                second backward; or if parameters have changed since.
        """
        return state.captured.backward(state.number, w_loss, w_penalty)


class _Captured:
    """Both graphs of one shape, and the memory that they read and write."""

    def __init__(self, recorder: Recorder, request: Request, autocast: tuple[bool, torch.dtype]) -> None:
        x, direction = request.x, request.direction
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.y = x.detach().clone(), request.y.detach().clone()
        self.h = torch.ones(len(x), dtype=wide, device=x.device)
        self.direction = None if direction is None else direction.detach().clone()
        self.buffers = buffers(request.functional)
        captured = replace(request, x=self.x, y=self.y, h=self.h, direction=self.direction)
        self.number = self.sent = 0
        inner: Evaluation

        def forward() -> list[Tensor]:
            nonlocal inner
            # A weight that autocast has cast before would not be cast again in a replay.
            with torch.autocast(x.device.type, autocast[1], enabled=autocast[0], cache_enabled=False):
                inner = Eager().forward(captured)
            return [inner.logits, inner.loss, inner.penalty]

        def backward() -> tuple[Tensor | None, ...]:
            return Eager().backward(inner.state, self.w_loss, self.w_penalty, retain=False)

        def both() -> None:
            nonlocal inner
            _, loss, penalty = forward()
            self.w_loss, self.w_penalty = torch.ones_like(loss), torch.ones_like(penalty)
            backward()
            del inner  # else the capture would find its nodes of parameters, made outside of it

        recorder.warm_up(both)
        self.values, self.replay_forward = recorder.record(forward)
        self.gradients, self.replay_backward = recorder.record(backward)
        self.parameters = inner.parameters

    def forward(self, request: Request) -> Evaluation:
        self.x.copy_(request.x)
        self.y.copy_(request.y)
        self.h.copy_(request.h) if isinstance(request.h, Tensor) else self.h.fill_(request.h)
        if request.direction is not None and self.direction is not None:
            self.direction.copy_(request.direction)
        for mine, its in zip(self.buffers, buffers(request.functional), strict=True):
            mine.copy_(its)
        self.replay_forward()
        self.number += 1
        self.versions = [version(p) for p in self.parameters]
        logits, loss, penalty = (value.clone() for value in self.values if value is not None)
        return Evaluation(logits, loss, penalty, self.parameters, _Step(self, self.number))

    def backward(self, number: int, w_loss: Tensor | None, w_penalty: Tensor | None) -> tuple[Tensor | None, ...]:
        if number != self.number:
            raise RuntimeError(
                "engine='cuda_graph' holds one batch of a shape at a time, and another forward came before this "
                "backward: send each step backward before the next, or use engine='eager'"
            )
        if self.sent == number:
            raise RuntimeError(
                "engine='cuda_graph' frees what a step holds in its backward: send loss and penalty backward together, "
                "or use engine='eager'"
            )
        if self.versions != [version(p) for p in self.parameters]:
            raise RuntimeError(
                "parameters were modified in place since the forward: call backward before the optimiser"
            )
        self.sent = number
        for static, weight in ((self.w_loss, w_loss), (self.w_penalty, w_penalty)):
            static.zero_() if weight is None else static.copy_(weight)
        self.replay_backward()
        # Copies: the caller may keep them as `.grad` while the next step is replayed.
        return tuple(None if gradient is None else gradient.clone() for gradient in self.gradients)


class _Step(NamedTuple):
    """One forward of a capture."""

    captured: _Captured
    number: int
