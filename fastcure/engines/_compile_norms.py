"""Batch norms in training mode inside the compiled region, in operators that `torch.func.grad` differentiates.

torch's own moves its running statistics in place, which no transform allows. Here the region returns what they become.
The compiler fuses the passes, and derives the second derivative from them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastcure._torch_compat import BatchNormBase
from fastcure.engines._compile_folding import Forwards
from fastcure.rules.arithmetic import all_but_channels, as_channels, wide


class TrainingNorms:
    """The batch norms that are in training mode now.

    Args:
        module: the network, with its loss.

    Raises:
        RuntimeError: if one of them does not compute what torch's does.
    """

    def __init__(self, module: nn.Module) -> None:
        found = {m: name for name, m in module.named_modules() if m.training and isinstance(m, BatchNormBase)}
        for norm, name in found.items():
            if type(norm).forward is not FORWARD or "forward" in vars(norm):
                raise RuntimeError(
                    f"engine='compile' cannot take the batch norm {name} ({type(norm).__name__}) in training mode, "
                    "which has a forward of its own: use engine='eager'"
                )
        self.moved: dict[str, Tensor] = {}
        """Running statistics after the pass that is traced now, by their names in `module`."""
        self.forwards: Forwards = {
            ref(norm): _by_the_batch(ref(norm), name, self.moved) for norm, name in found.items()
        }

    def taken(self) -> dict[str, Tensor]:
        """Return what a pass has moved; the next one starts from the given statistics again."""
        moved = dict(self.moved)
        self.moved.clear()
        return moved


FORWARD = BatchNormBase.forward


def _by_the_batch(reference: ref[Any], name: str, moved: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(input: Tensor) -> Tensor:  # noqa: A002
        norm: Any = reference()
        x, dims = wide(input), all_but_channels(input)
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        scale = torch.rsqrt(var + norm.eps)
        if norm.weight is not None:
            scale = scale * as_channels(norm.weight, x)
        y = (x - mean) * scale
        if norm.bias is not None:
            y = y + as_channels(norm.bias, x)
        if norm.track_running_stats and norm.running_mean is not None:
            n = x.numel() // x.shape[1]
            _move(norm, name, moved, mean.detach().flatten(), var.detach().flatten() * (n / (n - 1)))
        return y.to(input.dtype)

    return forward


def _move(norm: Any, name: str, moved: dict[str, Tensor], mean: Tensor, var: Tensor) -> None:
    """Write down what the statistics become by one more batch, as torch's forward moves them."""

    def old(part: str) -> Any:
        return moved.get(f"{name}.{part}", getattr(norm, part))

    factor, batches = norm.momentum, old("num_batches_tracked")
    if batches is not None:
        moved[f"{name}.num_batches_tracked"] = batches = batches + 1
    if factor is None:  # the mean over all batches
        factor = 0.0 if batches is None else 1.0 / batches.to(mean.dtype)
    moved[f"{name}.running_mean"] = old("running_mean") * (1 - factor) + mean * factor
    moved[f"{name}.running_var"] = old("running_var") * (1 - factor) + var * factor
