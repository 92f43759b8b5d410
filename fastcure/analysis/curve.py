"""Accuracy against the radius of the attack (figure 4 of the CURE paper's supplement)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcure.accuracy import accuracy
from fastcure.attacks import pgd
from fastcure.attacks.gradient import Norm


class AccuracyCurve(NamedTuple):
    """Both (K,), in float64."""

    eps: Tensor
    accuracy: Tensor


def accuracy_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: Sequence[float],
    *,
    steps: int = 10,
    norm: Norm = "linf",
    restarts: int = 1,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[Iterable[float]], Iterable[float]] = iter,
) -> AccuracyCurve:
    """Measure accuracy under PGD at each radius; each radius starts from the same random numbers.

    Args:
        model: the network, normalisation inside; evaluated in evaluation mode.
        x: `(N, ...)` images, uint8 or floating point in [0, 1].
        y: class indices `(N,)`.
        eps: radii, `>= 0`, in the units of `norm`; 0 is clean accuracy.
        steps, norm, restarts: as in `fastcure.attacks.pgd`.
        seed: of the random starts.
        batch_size: images at a time.
        progress: wraps the radii, to show how far it is.

    Raises:
        ValueError, FloatingPointError: as `pgd` does.
    """
    values = []
    for radius in progress(eps):
        attack = partial(pgd, eps=radius, steps=steps, norm=norm, restarts=restarts)
        values.append(accuracy(model, x, y, attack if radius else None, batch_size, seed))
    return AccuracyCurve(torch.tensor(eps, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))
