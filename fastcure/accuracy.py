"""Accuracy of a model on images, clean or under attack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcure.objective import evaluation_mode, find_logits

Attack = Callable[..., Tensor]


class Batch(NamedTuple):
    """Images and labels, with random numbers of their own: whoever takes them, in whatever order, finds the same."""

    x: Tensor
    y: Tensor
    generator: torch.Generator
    """On the CPU."""


def accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack | None = None,
    batch_size: int = 256,
    seed: int | None = None,
) -> float:
    """Return the fraction of images that the model, in evaluation mode, classifies as labelled.

    Args:
        model: the network, normalisation inside.
        x: `(N, C, H, W)`, uint8 or floating point in [0, 1], on the model's device.
        y: class indices `(N,)`.
        attack: `(model, x, y) -> x_adv`, applied to each batch first; see `fastcure.attacks`.
        batch_size: images at a time.
        seed: if given, the attack takes `generator=`, too: that of each batch.

    Raises:
        ValueError: if there are no images.
    """
    if not len(x):
        raise ValueError("accuracy needs at least one image, got none")
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    for images, labels, generator in batches(x, y, batch_size, seed or 0):
        seeded = attack if attack is None or seed is None else partial(attack, generator=generator)
        count += right(model, images, labels, seeded).sum()
    return int(count) / len(x)


def right(model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None = None) -> Tensor:
    """Return which images of a batch are classified as labelled: bool `(B,)`; arguments as in `accuracy`."""
    with evaluation_mode(model):
        batch = x.float() / 255 if x.dtype == torch.uint8 else x
        if attack is not None:
            batch = attack(model, batch, y)
        with torch.no_grad():
            return find_logits(model(batch)).argmax(1) == y


def batches(x: Tensor, y: Tensor, batch_size: int, seed: int) -> list[Batch]:
    """Divide images and labels into batches, the last of which may be smaller."""
    parts = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    seeds = torch.randint(2**62, (len(parts),), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Batch(*part, torch.Generator().manual_seed(own)) for part, own in zip(parts, seeds, strict=True)]
