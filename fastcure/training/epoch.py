"""One epoch of training, normal or with CURE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure import CURE
from fastcure.training.schedule import Schedule


class EpochResult(NamedTuple):
    """Means over the images of an epoch, each at the moment it was seen."""

    loss: float
    penalty: float
    accuracy: float


def train_epoch(
    cure: CURE,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    lr: Schedule,
    epoch: int,
    steps: int,
    *,
    gamma: Schedule | None = None,
    h: Schedule | None = None,
    autocast: torch.dtype | None = None,
) -> EpochResult:
    """Train for one epoch: with CURE if there is a schedule of `gamma`, else normally, in training mode.

    Args:
        cure: the regulariser around the model.
        batches: `(x, y)` on the model's device.
        optimizer: of the model's parameters; its learning rate is set from `lr` before each step.
        lr, gamma, h: schedules, in epochs.
        epoch: number of epochs before this one.
        steps: number of batches of an epoch.
        autocast: dtype of autocast, or None.

    Raises:
        FloatingPointError: if the loss or the penalty is not finite at the end of the epoch.
    """
    model = cure.model
    device = next(model.parameters()).device
    model.train()
    sums, count = torch.zeros(3, dtype=torch.float64, device=device), 0
    for step, (x, y) in enumerate(batches):
        now = epoch + step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr.at(now)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            if gamma is None or h is None:
                logits = model(x)
                loss = total = cure.loss_fn(logits, y).mean()
                penalty = torch.zeros((), device=device)
            else:
                cure.gamma, cure.h = gamma.at(now), h.at(now)
                total, loss, penalty, logits = cure(x, y)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        with torch.no_grad():
            right = (logits.argmax(1) == y).float().mean()
            sums += len(x) * torch.stack([loss.detach(), penalty.detach(), right]).double()
        count += len(x)
    result = EpochResult(*(sums / count).tolist())
    if not all(map(torch.isfinite, sums)):
        raise FloatingPointError(
            f"epoch {epoch + 1} ended with loss {result.loss} and penalty {result.penalty}: "
            "lower --lr or --gamma, or let gamma climb from 0"
        )
    return result
