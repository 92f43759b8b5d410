"""Accuracy of a model on images, clean or under attack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcure._functional import evaluation_mode, find_logits
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import check_classes, check_labels

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

    It may be called inside torch.inference_mode.

    Args:
        model: the network, normalisation inside.
        x: `(N, C, H, W)`, uint8 or floating point in [0, 1], on the model's device.
        y: class indices `(N,)`.
        attack: `(model, x, y) -> x_adv`, applied to each batch first; see `fastcure.attacks`.
        batch_size: images at a time.
        seed: if given, the attack takes `generator=`, too: that of each batch.

    Raises:
        TypeError, ValueError: if there are no images, or images or labels are of the wrong kind.
        FloatingPointError: if an output of the model is NaN or its largest is infinite.

    Examples:
        >>> from functools import partial
        >>> import torch, fastcure
        >>> from fastcure.evaluation.accuracy import accuracy
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> pgd = partial(fastcure.attacks.pgd, eps=8 / 255, steps=5)
        >>> accuracy(model, x, y, pgd, seed=0) <= accuracy(model, x, y)
        True
    """
    if not len(x):
        raise ValueError("accuracy needs at least one image, got none")
    check_labels(y, len(x), soft=False)
    count, lost = torch.zeros(2, dtype=torch.int64, device=x.device)
    for i, (images, labels, generator) in enumerate(batches(x, y, batch_size, seed or 0)):
        seeded = attack if attack is None or seed is None else partial(attack, generator=generator)
        logits = _logits(model, images, labels, seeded)
        if i == 0:
            check_classes(y, logits)
        valid, hits = judge(logits, labels)
        count, lost = count + hits.sum(), lost + (~valid).sum()
    check_outputs(int(lost), len(x))
    return int(count) / len(x)


def correct(model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None = None) -> Tensor:
    """Return which images of a batch are classified as labelled: bool `(B,)`; arguments as in `accuracy`.

    An image whose output is NaN or infinite is not. The host waits for a GPU, to check the labels.

    Raises:
        TypeError, ValueError: if images or labels are of the wrong kind.

    Examples:
        >>> import torch
        >>> from fastcure.evaluation.accuracy import correct
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> correct(model, x, y).shape, correct(model, x, y).dtype
        (torch.Size([5]), torch.bool)
    """
    check_labels(y, len(x), soft=False)
    logits = _logits(model, x, y, attack)
    check_classes(y, logits)
    return judge(logits, y)[1]


def judge(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return where logits `(B, C)` name a class, and where it is y: bool `(B,)` both.

    Examples:
        >>> import torch
        >>> from fastcure.evaluation.accuracy import judge
        >>> valid, correct = judge(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([1, 1]))
        >>> valid, correct
        (tensor([ True, False]), tensor([ True, False]))
    """
    largest, index = logits.max(1)
    valid = largest.isfinite()  # the maximum of a row with a NaN is NaN, and may be anywhere
    return valid, valid & (index == y)


def check_outputs(lost: int, images: int) -> None:
    """Raise if some outputs named no class.

    Examples:
        >>> from fastcure.evaluation.accuracy import check_outputs
        >>> check_outputs(lost=0, images=100)
    """
    if lost:
        raise FloatingPointError(
            f"the outputs of {lost} of {images} images are NaN or infinite, and name no class: check the images, the "
            "model's weights and the dtype (fp16 overflows at 65504)"
        )


@outside_inference_mode
def _logits(model: nn.Module, x: Tensor, y: Tensor, attack: Attack | None) -> Tensor:
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"x must be uint8, or floating point with pixels in [0, 1], got {x.dtype}: pass x.byte()")
    with evaluation_mode(model):
        batch = x.float() / 255 if x.dtype == torch.uint8 else x
        if attack is not None:
            batch = attack(model, batch, y)
        with torch.no_grad():
            return find_logits(model(batch))


def batches(x: Tensor, y: Tensor, batch_size: int, seed: int) -> list[Batch]:
    """Divide images and labels into batches, the last of which may be smaller.

    Examples:
        >>> import torch
        >>> from fastcure.evaluation.accuracy import batches
        >>> [len(batch.x) for batch in batches(torch.zeros(5, 1, 4, 4), torch.zeros(5), batch_size=2, seed=0)]
        [2, 2, 1]
    """
    parts = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    seeds = torch.randint(2**62, (len(parts),), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Batch(*part, torch.Generator().manual_seed(own)) for part, own in zip(parts, seeds, strict=True)]
