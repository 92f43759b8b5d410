"""The steps of an epoch, of normal training or with CURE: the two differ in their objective alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure.cure import CUREOutput
from fastcure.objective import cross_entropy
from fastcure.training.ranks import Ranks
from fastcure.training.schedule import Schedule


class Normal(nn.Module):
    """The objective of normal training: cross-entropy in training mode, and no penalty."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> CUREOutput:
        """Return what `CURE` returns."""
        logits = self.model(x)
        loss = cross_entropy(logits, y).mean()
        return CUREOutput(loss, loss, torch.zeros((), device=x.device), logits)


class EpochResult(NamedTuple):
    """Means over the images of an epoch, each at the moment it was seen."""

    loss: float
    penalty: float
    accuracy: float


def train_steps(
    objective: nn.Module,
    batches: Iterable[tuple[float, tuple[Tensor, Tensor]]],
    optimizer: torch.optim.Optimizer,
    schedules: Mapping[str, Schedule],
    sums: Tensor,
    ranks: Ranks,
    autocast: torch.dtype | None = None,
) -> Iterator[None]:
    """Train, and yield after every step.

    Each process takes its share of a batch, and weighs it by its size: DistributedDataParallel takes the mean over the
    processes, whose shares of the last batch need not be equal.

    Args:
        objective: `CURE` or `Normal`, as `ranks.wrap` returns it.
        batches: the time in epochs, and `(x, y)`, the same for all processes.
        optimizer: of the model's parameters.
        schedules: of `lr`, and of attributes of the objective, set before each step.
        sums: float64 `(4,)`, on the device; to it are added, over the images of this process, loss, penalty, right
            answers and 1.
        ranks: the processes.
        autocast: dtype of autocast, or None.
    """
    inner: Any = objective.module if isinstance(objective, nn.parallel.DistributedDataParallel) else objective
    inner.model.train()
    for now, batch in batches:
        for name, schedule in schedules.items():
            if name != "lr":
                setattr(inner, name, schedule.at(now))
        for group in optimizer.param_groups:
            group["lr"] = schedules["lr"].at(now)
        x, y = ranks.share(*batch)
        count = len(x)
        if not count:  # all must take part: with one image of weight zero
            x, y = (part[:1] for part in batch)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            total, loss, penalty, logits = objective(x, y)
        optimizer.zero_grad()
        (total * (count * ranks.size / len(batch[0]))).backward()
        optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(1) == y).float().mean()
            sums += count * torch.stack([loss, penalty, right, torch.ones_like(right)]).double()
        yield


def epoch_result(epoch: int, sums: Tensor) -> EpochResult:
    """Divide the sums `(4,)` of all processes by the number of images.

    Raises:
        FloatingPointError: if the loss or the penalty is not finite.
    """
    result = EpochResult(*(sums[:3] / sums[3]).tolist())
    if not sums.isfinite().all():
        raise FloatingPointError(
            f"epoch {epoch + 1} ended with loss {result.loss} and penalty {result.penalty}: "
            "lower --lr or --gamma, or let gamma climb from 0"
        )
    return result
