"""How long the rest of a run takes: from the forward passes that it has made in its time, and those that are left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastcure.training.checkpoint import Progress
from fastcure.training.objective import make_objective
from fastcure.training.settings import Settings

STANDARD = 3
"""Forward passes per image of a step of standard training."""

PGD10 = 21
"""Forward passes per image of PGD-10: ten of a forward and an input gradient, and the forward at its end."""


class Passes(NamedTuple):
    """Forward passes on one image that the parts of a run make."""

    pretrain: float
    """An epoch of standard training."""
    finetune: float
    """An epoch of fine-tuning."""
    test: float
    """An evaluation on the test images."""

    def left(self, settings: Settings, progress: Progress, steps: int) -> float:
        """Return how many are left, of a run that came so far; an epoch has so many `steps`."""
        begun = progress.step / steps
        if progress.phase == "finetune":
            return (settings.epochs - progress.epoch - begun) * self.finetune + self.test
        epochs = 0 if settings.checkpoint is not None else settings.pretrain_epochs - progress.epoch - begun
        return epochs * self.pretrain + settings.epochs * self.finetune + 2 * self.test


def passes_of(settings: Settings, train: int, validation: int, test: int) -> Passes:
    """Return the passes of a run on so many images of each split."""
    followed = validation * (1 + PGD10) * (1 if settings.ema is None else 2)
    cost = make_objective(settings, nn.Identity()).cost
    return Passes(STANDARD * train + followed, cost * train + followed, test * (1 + PGD10 * len(settings.eps)))


class Eta:
    """Tells the time that is left.

    Args:
        left: forward passes to make.
        clock: seconds, from whenever.
    """

    def __init__(self, left: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._left, self._made = left, 0.0

    def made(self, passes: float) -> None:
        """Note that so many passes were made."""
        self._made, self._left = self._made + passes, max(self._left - passes, 0.0)

    @property
    def seconds(self) -> float | None:
        """Seconds that are left; None before there is anything to tell them by."""
        return (self._clock() - self._began) * self._left / self._made if self._made else None

    def __str__(self) -> str:
        if (seconds := self.seconds) is None:
            return ""
        minutes = round(seconds / 60)
        if minutes < 2:
            return f"{round(seconds)} s left"
        return f"{minutes // 60} h {minutes % 60:02} min left" if minutes >= 120 else f"{minutes} min left"
