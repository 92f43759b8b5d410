"""Accuracy against the radius of the attack (figure 4 of the CURE paper's supplement)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import Bounds, check_images, check_labels, check_pixels
from fastcure.attacks import pgd
from fastcure.attacks._arguments import Norm, check_bounds
from fastcure.evaluation.accuracy import accuracy, batches, correct


class AccuracyCurve(NamedTuple):
    """What `accuracy_curve` returns, in float64."""

    eps: Tensor
    """(K,), the radii."""
    accuracy: Tensor
    """(K,), the fraction of images classified correctly at each radius."""


@outside_inference_mode
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
    at_once: int = 1,
    bounds: Bounds = (0.0, 1.0),
    progress: Callable[[Iterable[tuple[float, ...]]], Iterable[tuple[float, ...]]] = iter,
) -> AccuracyCurve:
    """Measure accuracy under PGD at each radius; radii that are measured one by one start from the same random numbers.

    Args:
        model: the network, normalisation inside; evaluated in evaluation mode.
        x: `(N, ...)` images, uint8 or floating point within `bounds`.
        y: class indices `(N,)`.
        eps: radii, `>= 0`, in the units of `norm`; 0 is clean accuracy.
        steps, norm, restarts: as in `fastcure.attacks.pgd`.
        seed: of the random starts.
        batch_size: images at a time, those of all radii of a batch together.
        at_once: radii in one batch: with few images on a GPU, more of them fill it.
        bounds: range of pixel values, of images that are not uint8.
        progress: wraps the radii, in groups of `at_once`, to show how far it is.

    Raises:
        TypeError, ValueError, FloatingPointError: as `pgd` and `fastcure.evaluation.accuracy.accuracy` do.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> curve = fastcure.analysis.accuracy_curve(model, x, y, eps=[0, 8 / 255])
        >>> bool(curve.accuracy[1] <= curve.accuracy[0])
        True
    """
    if at_once < 1:
        raise ValueError(f"at_once must be >= 1, got {at_once}")
    check_labels(y, len(x), soft=False)
    check_bounds(bounds)
    if x.dtype != torch.uint8:
        check_images(x)
        check_pixels(x, bounds)
    elif bounds != (0.0, 1.0):
        raise ValueError(f"bounds must be (0, 1) for uint8 images, which are divided by 255, got {bounds}")
    values: list[float] = []
    for group in progress([tuple(eps[i : i + at_once]) for i in range(0, len(eps), at_once)]):
        if not any(group):  # nothing to attack
            values += [accuracy(model, x, y, None, batch_size)] * len(group)
            continue
        count = torch.zeros(len(group), dtype=torch.int64, device=x.device)
        for images, labels, generator in batches(x, y, max(1, batch_size // len(group)), seed):
            radii = torch.tensor(group, dtype=torch.float64, device=x.device).repeat_interleave(len(images))
            attack = partial(
                pgd, eps=radii, steps=steps, norm=norm, restarts=restarts, bounds=bounds, generator=generator
            )
            copies = images.repeat(len(group), *[1] * (images.dim() - 1))
            count += correct(model, copies, labels.repeat(len(group)), attack).reshape(len(group), -1).sum(1)
        values += (count.double() / len(x)).tolist()
    return AccuracyCurve(torch.tensor(eps, dtype=torch.float64), torch.tensor(values, dtype=torch.float64))
