"""Random starts: points uniform in a ball around each image, clipped to the box of pixel values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcure._validation import Bounds
from fastcure.attacks._arguments import Norm, rowwise


def uniform_in_ball(
    x: Tensor, eps: float | Tensor, norm: Norm, bounds: Bounds, generator: torch.Generator | None = None
) -> Tensor:
    """Return points drawn uniformly from the eps-ball around each image, clipped to `bounds`.

    The noise is drawn in float32, sample after sample, on the generator's device: a generator of one device and state
    gives the same points for every dtype, memory format and device of `x`. The host does not wait for a GPU.

    Args:
        x: `(B, ...)` images.
        eps: radius in pixels (linf) or as an L2 length (l2); a number or `(B,)`.
        norm: "linf" or "l2".
        bounds: range of pixel values.
        generator: on any device; None is the default generator of x's device.

    Returns:
        `(B, ...)`, detached, in the dtype and memory format of `x`.
    """
    x = x.detach()
    radius = rowwise(eps, x) if isinstance(eps, Tensor) and eps.dim() else eps
    noise = _in_unit_cube(x, generator) if norm == "linf" else _in_unit_ball(x, generator)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return torch.empty_like(x).copy_((wide + noise * radius).clamp(*bounds))


def _in_unit_cube(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return _drawn(torch.rand, x.shape, x, generator) * 2 - 1


def _in_unit_ball(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A normal vector has a uniform direction; the volume within radius r, r^N, is uniform too."""
    normal = _drawn(torch.randn, x.shape, x, generator)
    volume = _drawn(torch.rand, x.shape[:1], x, generator)
    length = torch.linalg.vector_norm(normal.flatten(1), dim=1)
    radius = volume.pow(1 / max(x.shape[1:].numel(), 1)) / length.clamp_min(torch.finfo(length.dtype).tiny)
    return normal * rowwise(radius, x)


def _drawn(draw: Callable[..., Tensor], shape: torch.Size, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw on the generator's device and move to that of `x`."""
    device = x.device if generator is None else generator.device
    # Only a copy from pinned memory runs without the host waiting for the device.
    pinned = x.is_cuda and device.type == "cpu"
    noise = draw(shape, generator=generator, dtype=torch.float32, device=device, pin_memory=pinned)
    return noise.to(x.device, non_blocking=True)
