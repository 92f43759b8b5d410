"""Checks of what a caller passes: each error names the value met, the value wanted and the fix."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcure._torch_compat import in_forward_mode, in_functorch_transform

Bounds = tuple[float, float]
SLACK = 1e-3
"""By which resampling and rounding may leave the range of pixels, as a share of that range."""


def check_positive(name: str, value: float | Tensor, *, batch: int | None = None, zero: bool = False) -> None:
    """Check that a number, or a tensor of one number per sample, is finite and `> 0` (`>= 0` if `zero`).

    Tensors on another device than the CPU are checked for their shape alone: a look at their values would make the
    host wait for the device.
    """
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but nothing here is differentiable in it: pass {name}.detach()")
        if value.dim() > 1 or (value.dim() == 1 and len(value) != (batch or len(value))):
            wanted = f"({'B' if batch is None else batch},)"
            raise ValueError(f"{name} must be a number or have shape {wanted}, got shape {tuple(value.shape)}")
        if value.device.type != "cpu" or not value.numel():
            return
        value = float(value.min()) if torch.isfinite(value).all() else math.nan
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{name} must be {'>=' if zero else '>'} 0, got {value}")


def check_images(x: Tensor) -> None:
    """Check that `x` `(B, ...)` is a batch of floating-point images, outside of any graph."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (B, ...), got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point with pixels in [0, 1], got {x.dtype}: pass x.float() / 255")
    if x.dim() < 2:
        raise ValueError(f"x must have a batch dimension and more, (B, ...), got shape {tuple(x.shape)}")
    if x.is_inference():
        raise ValueError("x was made under torch.inference_mode, and autograd cannot save it: pass x.clone()")
    if x.requires_grad:
        raise ValueError("x requires grad, but nothing here is differentiable in x: pass x.detach()")
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError("x carries a forward-mode tangent, which would be lost: pass its primal")


def refuse_transforms() -> None:
    """Raise where autograd's ordinary gradients, of which the penalty is made, cannot be had or would be lost."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("the penalty is made of gradients, which torch.inference_mode forbids: use torch.no_grad")
    if in_forward_mode() or in_functorch_transform():
        raise RuntimeError(
            "the penalty has no forward-mode derivative and no rule for torch.func (grad, jvp, vmap): call it outside "
            "of these, and take its gradients by backward()"
        )


def check_batch(x: Tensor, y: Tensor, direction: Tensor | None) -> None:
    """Check images, and that labels and direction agree with them."""
    check_images(x)
    check_length(y, len(x))
    if y.device != x.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}: pass y.to(x.device)")
    if direction is not None and direction.shape != x.shape:
        raise ValueError(f"direction must have the shape of x {tuple(x.shape)}, got {tuple(direction.shape)}")


def check_length(y: Tensor, batch: int) -> None:
    """Check that `y` is a tensor of one label, of whatever kind, for each sample."""
    if not isinstance(y, Tensor) or y.dim() < 1 or len(y) != batch:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y must be a tensor with one label for each of the {batch} samples, got {got}")


def check_labels(y: Tensor, batch: int, *, soft: bool = True) -> None:
    """Check that `y` holds class indices `(B,)` or, if `soft`, probabilities `(B, C)`. No value is looked at."""
    check_length(y, batch)
    got, fraction = tuple(y.shape), y.is_floating_point() or y.is_complex()
    if fraction and y.dim() == 2 and y.shape[1] > 1:
        if not soft:
            raise ValueError(f"labels must be class indices ({batch},), got probabilities {got}: pass y.argmax(1)")
    elif y.dim() != 1:
        fix = "flatten()" if y.numel() == batch else "argmax(1)"
        raise ValueError(f"labels must have shape ({batch},), one class index a sample, got {got}: pass y.{fix}")
    elif fraction:
        raise ValueError(f"labels must be whole numbers, one class index a sample, got {y.dtype}: pass y.long()")


def check_classes(y: Tensor, logits: Tensor) -> None:
    """Check that labels fit `logits` `(B, C)`: indices in 0..C-1, or rows of C probabilities. It waits for a GPU."""
    if logits.dim() != 2:
        raise ValueError(f"the model must return logits (B, C), got shape {tuple(logits.shape)}")
    classes = logits.shape[1]
    if y.is_floating_point():
        if y.shape[1:] != logits.shape[1:]:
            got = tuple(y.shape)
            raise ValueError(f"soft targets must have the shape of the logits {tuple(logits.shape)}, got {got}")
    elif y.numel():
        low, high = (int(value) for value in y.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels must be in 0..{classes - 1}, the model having {classes} outputs, got {low}..{high}: renumber "
                "them or give the model more outputs"
            )


def outside(x: Tensor, bounds: Bounds) -> Tensor:
    """Return which samples `(B,)` of `x` `(B, ...)` leave `bounds` by more than rounding; NaN is no matter of this."""
    slack = max(SLACK, torch.finfo(x.dtype).eps) * (bounds[1] - bounds[0])
    return ((x < bounds[0] - slack) | (x > bounds[1] + slack)).flatten(1).any(1)


def check_pixels(x: Tensor, bounds: Bounds = (0.0, 1.0), *, option: bool = True) -> None:
    """Check that images `x` lie within `bounds`, but for rounding. It waits for a GPU.

    Args:
        x: `(B, ...)`.
        bounds: range of pixel values.
        option: whether the caller can name another range, by an argument `bounds`.
    """
    if bool(outside(x, bounds).any()):
        low, high = (float(value) for value in x[~x.isnan()].aminmax())
        advice = ", or pass the range of your pixels as bounds=(lower, upper)" if option else ""
        raise ValueError(
            f"x must hold pixels in [{bounds[0]:g}, {bounds[1]:g}], got {low:.4g}..{high:.4g}: divide by 255, make "
            f"normalisation a layer of the model (fastcure.models.Normalize){advice}"
        )
