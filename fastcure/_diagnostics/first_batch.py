"""What a model is examined for once: pixels outside of [0, 1], steps lost in rounding, random evaluation passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastcure._diagnostics.warning import warn
from fastcure._functional import FunctionalLoss
from fastcure._validation import outside

if TYPE_CHECKING:
    from fastcure.engines.base import Request

_seen: WeakSet[nn.Module] = WeakSet()
_small_steps: WeakSet[nn.Module] = WeakSet()


@contextmanager
def first_batch(request: Request) -> Iterator[None]:
    """Around the passes of the penalty: examine the first batch that a model sees, and no other.

    A look at values makes the host wait for the device, hence once; while a CUDA graph is captured, not even that.

    Raises:
        ValueError: if the model draws random numbers in evaluation mode, and its logits depend on them.
    """
    x = request.x
    if request.model in _seen or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield
        return
    warn_of_range(x)
    before = random_states(x)
    yield
    if not all(map(torch.equal, before, random_states(x))):
        refuse_randomness(request.functional, x, request.y)
    _seen.add(request.model)


def warn_of_range(x: Tensor) -> bool:
    """Warn if pixels are not in [0, 1], and tell whether it did; one that is not a number is no matter of this."""
    found = bool(outside(x, (0.0, 1.0)).any())
    if found:
        low, high = (float(value) for value in x[~x.isnan()].aminmax())
        warn(
            f"pixels should be in [0, 1], got {low:.4g}..{high:.4g}: h, eps and curvature are in units of the input; "
            "divide by 255, or make normalisation a layer of the model (fastcure.models.Normalize)"
        )
    return found


def refuse_randomness(functional: FunctionalLoss, x: Tensor, y: Tensor) -> None:
    """Raise if two passes in evaluation mode differ: so do g(x) and g(x + h z), whatever the curvature is."""
    difference = difference_of_passes(functional, x, y)
    if difference > 1e-3:
        raise ValueError(
            f"the model is random in evaluation mode: logits differ by {difference:.1%} between two passes, which the "
            "penalty would take for curvature; give F.dropout and the like training=self.training, or use nn.Dropout"
        )


def difference_of_passes(functional: FunctionalLoss, x: Tensor, y: Tensor) -> float:
    """Return by how much the logits of two passes differ, relative to their size; it draws nothing for others."""
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        first, second = (functional(x.detach(), y)[0].double() for _ in range(2))
    return float((first - second).norm() / first.norm())


def warn_of_small_step(model: nn.Module, x: Tensor, h: float | Tensor) -> None:
    """Warn, once per model, of steps that are lost in rounding.

    A step moves a pixel by `h / sqrt(N)`; where that is less than the spacing of numbers near 1, pixels fall short of
    it or do not move at all, and the difference of gradients drowns in rounding. Measured on a ResNet in bfloat16 and
    float16: at that spacing the penalty and its gradient are off by 10 %, at a third of it by 25 to 50 %.
    """
    if isinstance(h, Tensor):
        if h.device.type != "cpu" or not h.numel():
            return
        h = float(h.min())
    device, pixels = x.device.type, x[0].numel() if len(x) else 1
    autocast = torch.is_autocast_enabled(device) and x.dtype == torch.float32
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    least = torch.finfo(dtype).eps * pixels**0.5
    if h < least and model not in _small_steps:
        _small_steps.add(model)
        warn(
            f"h should be >= {least:.2g} for {pixels} pixels in {dtype}, got {h:.2g}: most of the difference of "
            "gradients is rounding; take a larger h, or a wider dtype for the penalty"
        )


def random_states(x: Tensor) -> list[Tensor]:
    """Return the states of torch's generators on the CPU and on the device of `x`."""
    states = [torch.get_rng_state()]
    if x.device.type != "cpu" and hasattr(module := torch.get_device_module(x.device), "get_rng_state"):
        states.append(module.get_rng_state(x.device))
    return states
