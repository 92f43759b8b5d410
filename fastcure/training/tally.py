"""What the steps of an epoch add up to, and which was the first that was not finite; all on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EpochResult(NamedTuple):
    """Means over the images of an epoch, each at the moment it was seen, and the count of steps left out of them."""

    loss: float
    penalty: float
    accuracy: float
    skipped: int


class NotFinite(NamedTuple):
    """The first step whose loss, penalty or gradient was not finite."""

    step: int
    loss: float
    penalty: float
    gradient: float
    """L2 norm."""


class Tally:
    """Numbers that a step adds to without waiting for the device; to read them is to wait.

    Attributes:
        numbers: float64 (9,): sums over images of loss, penalty, correct answers and 1; the count of steps that were
            not finite; of the first of them index, mean loss, mean penalty and norm of the gradient.
    """

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.zeros(9, dtype=torch.float64, device=device)

    def add(self, step: int, sums: Tensor, norm: Tensor) -> Tensor:
        """Add a step; return whether it was finite, 0-dim. One that was not counts as such, and not in the sums.

        Args:
            step: its index in the epoch.
            sums: float64 (4,), as in `numbers`.
            norm: 0-dim, of the gradient.
        """
        finite = sums.isfinite().all() & norm.isfinite()
        totals, bad, first = self.numbers.split([4, 1, 4])
        found = torch.cat([sums.new_full((1,), step), sums[:2] / sums[3], norm.double().reshape(1)])
        first.copy_(torch.where(finite | (bad > 0), first, found))
        totals += torch.where(finite, sums, 0.0)
        bad += ~finite
        return finite

    def clear(self) -> None:
        """Begin an epoch."""
        self.numbers.zero_()

    def first_bad(self) -> NotFinite | None:
        """Return the first step that was not finite, if there was one."""
        numbers = self.numbers.tolist()
        return NotFinite(int(numbers[5]), *numbers[6:]) if numbers[4] else None

    def result(self) -> EpochResult:
        """Divide the sums by the number of images."""
        numbers = self.numbers.tolist()
        loss, penalty, correct = (total / (numbers[3] or 1.0) for total in numbers[:3])
        return EpochResult(loss, penalty, correct, int(numbers[4]))
