"""Networks for small images, each with its normalisation inside: they take pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastcure.models._pretrained import PRETRAINED, pretrained, pretrained_figures
from fastcure.models.normalize import Normalize
from fastcure.models.resnet import ResNet, resnet8, resnet18
from fastcure.models.wide_resnet import WideResNet, wide_resnet28_10

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "wide_resnet28_10": wide_resnet28_10,
}


def build(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    **arguments: Any,
) -> nn.Module:
    """Make the network called `name`, initialised from torch's default generator.

    Args:
        name: one of `MODELS`.
        num_classes: number of outputs.
        in_channels: channels of the input.
        mean, std: of each channel (or one for all), in pixels in [0, 1]; kept in the model's state dict.
        arguments: others of its function in this module.

    Raises:
        ValueError: for another name.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.build("resnet8", 7, 1)  # 7 classes, 1 channel
        >>> model(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 7])
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](num_classes=num_classes, in_channels=in_channels, mean=mean, std=std, **arguments)


__all__ = [
    "MODELS",
    "PRETRAINED",
    "Normalize",
    "ResNet",
    "WideResNet",
    "build",
    "pretrained",
    "pretrained_figures",
    "resnet8",
    "resnet18",
    "wide_resnet28_10",
]
