"""What the formulas of several rules have in common, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """Return `t` in the dtype of the arithmetic: half precision in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def normalised(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """Return `x` less its mean over `dims`, divided by its deviation."""
    centred = x - x.mean([*dims], keepdim=True)
    return centred * torch.rsqrt(centred.square().mean([*dims], keepdim=True) + eps)


def all_but_channels(x: Tensor) -> list[int]:
    """Return the dimensions of `x` `(B, C, ...)` but that of the channels."""
    return [dim for dim in range(x.dim()) if dim != 1]


def as_channels(values: Tensor, x: Tensor) -> Tensor:
    """Return one value a channel `(C,)`, to combine with `x` `(B, C, ...)`."""
    return values.reshape(-1, *[1] * (x.dim() - 2))
