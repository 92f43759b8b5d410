"""An attack's step as a CUDA graph: gradient and move, captured once and replayed for every step and start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastcure._functional import FunctionalLoss, LossFn
from fastcure._recorder import Captures, CudaRecorder, Recorder, key_of, layout_of

Move = Callable[[FunctionalLoss, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(functional, adv, x, y, step_size, eps) -> adv`, the last two of shape (B,)."""


class ReplayedSteps:
    """Captures of attack steps, kept for each model.

    Args:
        recorder: makes what records a step.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        self.captures: Captures[_Step] = Captures(recorder)

    def of(
        self, model: nn.Module, loss_fn: LossFn, move: Move, settings: Any, x: Tensor, y: Tensor, step: Any, eps: Any
    ) -> Callable[[Tensor], Tensor]:
        """Return `adv -> adv`, one step around `x`; it serves until the next call.

        Args:
            model: the model under attack.
            loss_fn: its loss.
            move: the step.
            settings: all that `move` depends on beyond its arguments, hashable.
            x, y: images and labels.
            step, eps: step size and radius, a number or `(B,)`.
        """
        with torch.cuda.device_of(x):  # it need not be the current one
            key = settings, layout_of(x, y), key_of(model, loss_fn, x.device)
            captured = self.captures.get(model, key) or self.captures.record(
                model, key, lambda memory: _Step(memory.recorder, model, loss_fn, move, x, y)
            )
            return captured.around(x, y, step, eps)


class _Step:
    """One capture, and the memory that it reads and writes."""

    def __init__(self, recorder: Recorder, model: nn.Module, loss_fn: LossFn, move: Move, x: Tensor, y: Tensor) -> None:
        self.adv, self.x, self.y = x.clone(), x.clone(), y.clone()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.step, self.eps = (torch.zeros(len(x), dtype=wide, device=x.device) for _ in range(2))

        def work() -> list[Tensor]:
            functional = FunctionalLoss(model, loss_fn, trainable=False)  # it copies the buffers, in each replay
            return [self.adv.copy_(move(functional, self.adv, self.x, self.y, self.step, self.eps))]

        recorder.warm_up(work)
        _, self.replay = recorder.record(work)

    def around(self, x: Tensor, y: Tensor, step: float | Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        for mine, given in ((self.x, x), (self.y, y), (self.step, step), (self.eps, eps)):
            mine.copy_(given) if isinstance(given, Tensor) else mine.fill_(given)

        def advance(adv: Tensor) -> Tensor:
            if adv is not self.adv:
                self.adv.copy_(adv)
            self.replay()
            return self.adv

        return advance


REPLAYED = ReplayedSteps()
