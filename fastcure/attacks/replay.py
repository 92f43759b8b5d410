"""An attack's step as a CUDA graph: gradient and move, captured once and replayed for every step and start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastcure.layers import folds_of
from fastcure.objective import Objective
from fastcure.recorder import CudaRecorder, Recorder, addresses, buffers

SHAPES = 4
"""Captures that are kept for a model: beyond, the oldest goes."""

Move = Callable[[Objective, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(objective, adv, x, y, step_size, eps) -> adv`, the last two of shape (B,)."""


class ReplayedSteps:
    """Captures of attack steps, kept for each model.

    Args:
        recorder: makes what records a step.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        self.recorder = recorder
        self._cache: WeakKeyDictionary[nn.Module, dict[Any, _Step]] = WeakKeyDictionary()

    def of(
        self, objective: Objective, move: Move, settings: Any, x: Tensor, y: Tensor, step: Any, eps: Any
    ) -> Callable[[Tensor], Tensor]:
        """Return `adv -> adv`, one step around `x`; it serves until the next call.

        Args:
            objective: of the model under attack.
            move: the step.
            settings: all that `move` depends on beyond its arguments, hashable.
            x, y: images and labels.
            step, eps: step size and radius, a number or `(B,)`.
        """
        captures = self._cache.setdefault(objective.model, {})
        device = x.device.type
        key = (
            *(settings, objective.module.loss_fn, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            *((t.shape, t.stride(), t.dtype, t.device) for t in (x, y)),
            tuple(folds_of(objective.model)),
            *addresses(objective),
        )
        if key not in captures:
            while len(captures) >= SHAPES:
                del captures[next(iter(captures))]
            captures[key] = _Step(self.recorder(), objective, move, x, y)
        return captures[key].around(objective, x, y, step, eps)


class _Step:
    """One capture, and the memory that it reads and writes."""

    def __init__(self, recorder: Recorder, objective: Objective, move: Move, x: Tensor, y: Tensor) -> None:
        self.adv, self.x, self.y = x.clone(), x.clone(), y.clone()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.step, self.eps = (torch.zeros(len(x), dtype=wide, device=x.device) for _ in range(2))
        self.buffers = buffers(objective)

        def work() -> list[Tensor]:
            return [self.adv.copy_(move(objective, self.adv, self.x, self.y, self.step, self.eps))]

        recorder.warm_up(work)
        _, self.replay = recorder.record(work)

    def around(
        self, objective: Objective, x: Tensor, y: Tensor, step: float | Tensor, eps: float | Tensor
    ) -> Callable[[Tensor], Tensor]:
        for mine, its in zip(self.buffers, buffers(objective), strict=True):
            mine.copy_(its)
        for mine, given in ((self.x, x), (self.y, y), (self.step, step), (self.eps, eps)):
            mine.copy_(given) if isinstance(given, Tensor) else mine.fill_(given)

        def advance(adv: Tensor) -> Tensor:
            if adv is not self.adv:
                self.adv.copy_(adv)
            self.replay()
            return self.adv

        return advance


REPLAYED = ReplayedSteps()
