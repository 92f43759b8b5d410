"""Accuracy of a model on images, clean or under attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcure.objective import evaluation_mode, find_logits

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def accuracy(model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None = None, batch_size: int = 256) -> float:
    """Return the fraction of images that the model, in evaluation mode, classifies as labelled.

    Args:
        model: the network, normalisation inside.
        x: `(N, C, H, W)`, uint8 or floating point in [0, 1], on the model's device.
        y: class indices `(N,)`.
        attack: `(model, x, y) -> x_adv`, applied to each batch first; see `fastcure.attacks`.
        batch_size: images at a time.

    Raises:
        ValueError: if there are no images.
    """
    if not len(x):
        raise ValueError("accuracy needs at least one image, got none")
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    with evaluation_mode(model):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            batch = images.float() / 255 if images.dtype == torch.uint8 else images
            if attack is not None:
                batch = attack(model, batch, labels)
            with torch.no_grad():
                correct += (find_logits(model(batch)).argmax(1) == labels).sum()
    return int(correct) / len(x)
