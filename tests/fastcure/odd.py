"""A network between whose layers anything can be put, and what is said of its ReLUs."""

from collections.abc import Callable
from typing import Any

import torch
from networks import Case
from torch import Tensor, nn

from fastcure import explain


class Odd(nn.Module):
    """A convolution, a batch norm, and a way between them."""

    def __init__(self, way: Callable[["Odd", Tensor], Any], **norm_options: Any) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(2, 5, 3)
        self.other = nn.Conv2d(2, 5, 3)
        self.bn = nn.BatchNorm2d(5, **norm_options)
        self.later = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.identity, self.dropout = nn.Identity(), nn.Dropout(0.5)
        self.head = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Any:
        out = self.way(self, x)
        return (self.head(out[0]), *out[1:]) if isinstance(out, tuple) else self.head(out)

    def stored(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        self.kept = change(self.conv(x))
        return self.bn(self.kept)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def pair(m: Odd, x: Tensor) -> Tensor:
    return m.bn(m.conv(x))


def relus(case: Case) -> list[str]:
    """What is said of ReLUs."""
    lines = explain(case.model, case.x).splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("ReLUs")) :]


def fused(case: Case) -> tuple[int, int]:
    words = relus(case)[0].split()
    return int(words[-3]), int(words[-1])
