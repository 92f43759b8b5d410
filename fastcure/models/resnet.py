"""Residual networks with a 3 x 3 stem, for images of about 16 to 64 pixels (He et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.models.normalize import Normalize

Activation = Callable[[Tensor], Tensor]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norms, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: Activation = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inputs, H, W)` to `(B, outputs, H/stride, W/stride)`."""
        y = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """Stages of basic blocks, each stage after the first at half the resolution; images `(B, C, H, W)` to logits.

    Args:
        blocks: number of blocks of each stage.
        widths: channels of each stage.
        num_classes, in_channels, mean, std: see `fastcure.models.build`.
        activation: elementwise; a smooth one (`torch.nn.functional.gelu`) gives a network without kinks.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        activation: Activation = F.relu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.normalize = Normalize(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            stages.append(
                nn.Sequential(
                    *[BasicBlock(inputs if i == 0 else width, width, s, activation) for i, s in enumerate(strides)]
                )
            )
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = self.activation(self.bn1(self.conv1(self.normalize(x))))
        x = self.stages(x)
        # A mean, and no adaptive pooling: its double backward is cheap and deterministic on every device.
        return self.fc(torch.flatten(x, 2).mean(2))


def resnet8(
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    activation: Activation = F.relu,
) -> ResNet:
    """Three stages of one block, 16, 32 and 64 channels wide: 78 thousand parameters, for laptops.

    Examples:
        >>> import torch, fastcure
        >>> fastcure.models.resnet8()(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    return ResNet((1, 1, 1), (16, 32, 64), num_classes, in_channels, mean, std, activation)


def resnet18(
    num_classes: int = 10,
    in_channels: int = 3,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.25,),
    activation: Activation = F.relu,
) -> ResNet:
    """Four stages of two blocks, 64 to 512 channels wide: 11.2 million parameters, the paper's network.

    Examples:
        >>> import torch, fastcure
        >>> fastcure.models.resnet18()(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    return ResNet((2, 2, 2, 2), (64, 128, 256, 512), num_classes, in_channels, mean, std, activation)
