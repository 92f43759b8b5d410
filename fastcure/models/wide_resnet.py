"""Wide residual networks with pre-activation blocks (Zagoruyko and Komodakis, BMVC 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.models.normalize import Normalize


class PreActivationBlock(nn.Module):
    """Batch norm, ReLU, 3 x 3 convolution, twice; where the shape changes the shortcut is a 1 x 1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, inputs, H, W)` to `(B, outputs, H/stride, W/stride)`."""
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + skip


class WideResNet(nn.Module):
    """Three stages of `(depth - 4) / 6` blocks, `16 * width` channels and doubling; images to logits.

    Args:
        depth: number of convolutional layers, 4 more than a multiple of 6.
        width: widening factor.
        num_classes, in_channels, mean, std: see `fastcure.models.build`.

    Raises:
        ValueError: for a depth that does not fit.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_channels: int = 3,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 10, 16, 22, 28, ..., got {depth}")
        self.normalize = Normalize(in_channels, mean, std)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        stages, inputs = [], 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = []
            for index in range((depth - 4) // 6):
                blocks.append(PreActivationBlock(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, num_classes)`."""
        x = self.stages(self.conv1(self.normalize(x)))
        return self.fc(torch.flatten(F.relu(self.bn(x)), 2).mean(2))


def wide_resnet28_10(
    num_classes: int = 10, in_channels: int = 3, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.25,)
) -> WideResNet:
    """WRN-28-10: 36.5 million parameters.

    Examples:
        >>> import torch, fastcure
        >>> with torch.device("meta"):  # shapes alone: it has 36 million parameters
        ...     model = fastcure.models.wide_resnet28_10()
        >>> sum(p.numel() for p in model.parameters()) // 10**6
        36
    """
    return WideResNet(28, 10, num_classes, in_channels, mean, std)
