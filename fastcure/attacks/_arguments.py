"""What the attacks have in common: the checks of what they are given and of what they find."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastcure._validation import Bounds, check_pixels, outside

Norm = Literal["linf", "l2"]


def check_counts(**counts: int) -> None:
    """Check that each is a whole number of at least one."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


def check_bounds(bounds: Bounds) -> None:
    """Check the range of pixel values."""
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (lower, upper) with lower < upper, got {bounds}")


def hard_labels(y: Tensor) -> Tensor:
    """Return class indices `(B,)` of labels that may be probabilities `(B, C)`."""
    return y.argmax(1) if y.is_floating_point() else y.long()


def has_nan(x: Tensor) -> Tensor:
    """Return `(B,)`: which samples hold a NaN."""
    return x.isnan().flatten(1).any(1)


def has_no_class(logits: Tensor) -> Tensor:
    """Return which rows `(B,)` of logits `(B, C)` name no class: the largest is NaN or infinite."""
    return ~logits.amax(1).isfinite()


def check_result(bad: Tensor, x: Tensor, bounds: Bounds) -> None:
    """Check pixels and numbers in one look, for which the host waits for a GPU once: an attack's last step.

    Args:
        bad: `(B,)`, see `check_numbers`.
        x: `(B, ...)`, the images that were given.
        bounds: in which they must lie.

    Raises:
        ValueError: if they do not.
        FloatingPointError: as `check_numbers` does.
    """
    if bool(torch.cat([bad, outside(x, bounds)]).any()):
        check_pixels(x, bounds)
        check_numbers(bad)


def check_numbers(bad: Tensor) -> None:
    """Raise where an attack met what is not a number: standing still there would make a model look robust.

    Args:
        bad: `(B,)`, True for a sample that met a NaN.

    Raises:
        FloatingPointError: if any did.
    """
    found = bad.nonzero().flatten()
    if len(found):
        raise FloatingPointError(
            f"the loss or its gradient of {len(found)} of {len(bad)} samples is NaN (the first: sample "
            f"{int(found[0])}), so nothing is known of their robustness: check the images, the model's weights and the "
            "dtype (fp16 overflows at 65504)"
        )


def rowwise(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value a sample `(B,)` so that it broadcasts against `x` `(B, ...)`."""
    return values.reshape(-1, *[1] * (x.dim() - 1))
