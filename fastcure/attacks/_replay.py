"""An attack's step as a CUDA graph: gradient and move, captured once and replayed for every step and start."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from fastcure._cuda_graphs import Captures, CudaRecorder, Recorder, key_of, layout_of
from fastcure._folding.layers import folded_layers, replayed
from fastcure._functional import FunctionalLoss
from fastcure._trials import COMPARED_EVERY, Trials, differs, norm_of, obstacle

Move = Callable[[FunctionalLoss, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`(functional, adv, x, y, step_size, eps) -> adv`, the last two of shape (B,)."""


class ReplayedSteps:
    """Captures of attack steps, kept for each model.

    Args:
        recorder: makes what records a step.
        device: type of device that it records.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder, device: str = "cuda") -> None:
        self.captures: Captures[_Step] = Captures(recorder)
        self.device, self.trials = device, Trials(self.captures, "attack steps")

    def of(
        self,
        functional: FunctionalLoss,
        move: Move,
        settings: Any,
        x: Tensor,
        y: Tensor,
        step: Any,
        eps: Any,
        *,
        asked: bool,
    ) -> Callable[[Tensor], Tensor] | None:
        """Return `adv -> adv`, one step around `x` that is replayed, or None; it serves until the next call.

        Args:
            functional: of the model under attack.
            move: the step, which runs with folded layers.
            settings: all that `move` depends on beyond its arguments, hashable.
            x, y: images and labels.
            step, eps: step size and radius, a number or `(B,)`.
            asked: whether to capture the first of a kind, and raise what goes wrong; else it is tried with the third.
        """
        model, loss_fn = functional.model, functional.module.loss_fn
        if not asked and (x.device.type != self.device or not self.trials.may_replay(model, x)):
            return None

        def key() -> Hashable:
            return get_ident(), settings, layout_of(x, y), key_of(model, loss_fn, x.device)

        def eagerly() -> Tensor:
            with folded_layers(model):
                return move(functional, x, x, y, step, eps)

        def capture() -> _Step:
            return self.captures.record(model, kind, lambda memory: _Step(memory.recorder, functional, move, x, y))

        def examined() -> _Step | str:
            return obstacle(x, eagerly, key) or capture()

        def difference(captured: _Step) -> str:
            ours = captured.around(x, y, step, eps)(x).clone()
            with replayed():
                theirs = eagerly()
            by = differs([ours], [theirs], x, norm_of([theirs - x]))
            return by and f"its images differ by {by}"

        with torch.cuda.device_of(x):  # it need not be the current one
            kind = key()
            captured = self.captures.get(model, kind)
            if captured is None and asked:
                captured = capture()
            elif captured is None and self.trials.comes_again(model, kind, model, loss_fn):
                captured = self.trials.attempt(model, examined, difference)
            elif captured is not None and not asked and captured.uses % COMPARED_EVERY == 0:
                kept = captured
                captured = self.trials.attempt(model, lambda: kept, difference)
            return None if captured is None else captured.around(x, y, step, eps)


class _Step:
    """One capture, and the memory that it reads and writes."""

    def __init__(self, recorder: Recorder, functional: FunctionalLoss, move: Move, x: Tensor, y: Tensor) -> None:
        model, loss_fn, self.uses = functional.model, functional.module.loss_fn, 0
        self.adv, self.x, self.y = x.clone(), x.clone(), y.clone()
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.step, self.eps = (torch.zeros(len(x), dtype=wide, device=x.device) for _ in range(2))

        def work() -> list[Tensor]:
            passes = FunctionalLoss(model, loss_fn, trainable=False)  # it copies the buffers, in each replay
            with folded_layers(model):
                return [self.adv.copy_(move(passes, self.adv, self.x, self.y, self.step, self.eps))]

        with replayed():
            recorder.warm_up(work)
            _, self.replay = recorder.record(work)

    def around(self, x: Tensor, y: Tensor, step: float | Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        self.uses += 1
        for mine, given in ((self.x, x), (self.y, y), (self.step, step), (self.eps, eps)):
            mine.copy_(given) if isinstance(given, Tensor) else mine.fill_(given)

        def advance(adv: Tensor) -> Tensor:
            if adv is not self.adv:
                self.adv.copy_(adv)
            self.replay()
            return self.adv

        return advance


REPLAYED = ReplayedSteps()
