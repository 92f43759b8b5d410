"""Normalisation as a layer, so that attacks and penalties are in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """`(x - mean) / std` per channel, for images `(B, C, H, W)` in [0, 1].

    Args:
        channels: C.
        mean, std: one number per channel, or one for all.

    Raises:
        ValueError: if there is another count of numbers, or a `std` that is not `> 0`.

    Examples:
        >>> import torch
        >>> from fastcure.models import Normalize
        >>> model = torch.nn.Sequential(Normalize(3, mean=(0.5,), std=(0.25,)), torch.nn.Conv2d(3, 8, 3))
        >>> model[0](torch.full((1, 3, 1, 1), 0.75)).flatten()
        tensor([1., 1., 1.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name} must have 1 or {channels} values, one per channel, got {len(values)}")
        if min(std) <= 0:
            raise ValueError(f"std must be > 0, got {min(std)}")
        self.register_buffer("mean", torch.tensor(mean).float().expand(channels).clone())
        self.register_buffer("std", torch.tensor(std).float().expand(channels).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`."""
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class Normalized(nn.Sequential):
    """A network that does not normalise its input itself, with `Normalize` in front of it."""

    def __init__(self, network: nn.Module, channels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(Normalize(channels, mean, std), network)


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside a `Normalized`, whose weights are saved and loaded; any other model as it is."""
    return model[1] if isinstance(model, Normalized) else model
