"""A model's convolutions and batch norms, computed in cheaper ways of the same value while the penalty is evaluated.

In evaluation mode a batch norm is an affine map of each channel, `s x + t` with `s = weight / sqrt(var + eps)` and
`t = bias - s mean`. Written so, its double backward is a few products instead of a dozen passes; and since
`s (W * x) + t = (s W) * x + t`, one that alone follows a convolution is folded into it, and costs a product of the size
of the weights. Gradients reach the weight of the convolution and the weight and bias of the batch norm as before.
Convolutions take the rules of `fastcure.convolution`.

A module is left alone if it is of a subclass, has hooks or parametrisations, or a `forward` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.convolution import Geometry, Phase, convolve

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Fold(NamedTuple):
    """A batch norm, and the convolution or linear layer whose output it alone takes."""

    layer: nn.Module
    norm: nn.Module


FOLDS: WeakKeyDictionary[nn.Module, list[Fold]] = WeakKeyDictionary()
"""What `fastcure.prepare` found in each model that was given to it."""


@contextmanager
def cheaper_layers(model: nn.Module) -> Iterator[None]:
    """Compute the layers of `model`, which is in evaluation mode, as this file says.

    Gradients taken within are those of the input; gradients of the parameters are for after.

    Raises:
        RuntimeError: if a prepared model does not run its layers as it did when it was prepared.
    """
    folds = {fold.layer: fold.norm for fold in FOLDS.get(model, ()) if plain(fold.layer) and plain(fold.norm)}
    folded = set(folds.values())
    phase = Phase()
    pending: dict[nn.Module, Tensor] = {}
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for module in model.modules():
        if module in folds:
            forwards[module] = _folded(module, folds[module], phase, pending)
        elif module in folded:
            forwards[module] = _passed_on(module, pending)
        elif type(module) in CONVOLUTIONS and plain(module):
            forwards[module] = _convolution(module, phase)
        elif type(module) in NORMS and has_statistics(module) and plain(module):
            forwards[module] = _affine(module)
    try:
        for module, forward in forwards.items():
            module.forward = forward
        phase.input_gradient = True
        yield
        if pending:
            raise _ran_differently()
    finally:
        phase.input_gradient = False
        for module in forwards:
            vars(module).pop("forward", None)


def plain(module: nn.Module) -> bool:
    """Tell whether a module does what its class says, and nobody listens."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks)


def has_statistics(norm: nn.Module) -> bool:
    """Tell whether a batch norm uses running statistics in evaluation mode."""
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def channel_map(norm: Any) -> tuple[Tensor, Tensor]:
    """Return `s` and `t` `(C,)` of a batch norm in evaluation mode."""
    s = torch.rsqrt(norm.running_var + norm.eps)
    s = s if norm.weight is None else s * norm.weight
    t = -s * norm.running_mean
    return s, t if norm.bias is None else t + norm.bias


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, phase: Phase) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    padding = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        return layer._conv_forward(x, weight, bias)
    if x.dim() != weight.dim():  # no batch dimension
        return layer._conv_forward(x, weight, bias)
    return convolve(x, weight, bias, Geometry([*layer.stride], [*padding], [*layer.dilation], layer.groups), phase)


def _convolution(layer: Any, phase: Phase) -> Callable[[Tensor], Tensor]:
    return lambda x: _apply(layer, x, layer.weight, layer.bias, phase)


def _affine(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    original = type(norm).forward

    def forward(x: Tensor) -> Tensor:
        s, t = channel_map(norm)
        if x.dtype != s.dtype:  # autocast: the library's batch norm computes in the wider type
            return original(norm, x)
        shape = (-1, *[1] * (x.dim() - 2))
        return torch.addcmul(t.reshape(shape), x, s.reshape(shape))

    return forward


def _folded(layer: Any, norm: nn.Module, phase: Phase, pending: dict[nn.Module, Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        s, t = channel_map(norm)
        weight = layer.weight * s.reshape(-1, *[1] * (layer.weight.dim() - 1))
        out = _apply(layer, x, weight, t if layer.bias is None else t + s * layer.bias, phase)
        pending[norm] = out
        return out

    return forward


def _passed_on(norm: nn.Module, pending: dict[nn.Module, Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if pending.pop(norm, None) is not x:
            raise _ran_differently()
        return x

    return forward


def _ran_differently() -> RuntimeError:
    return RuntimeError(
        "the model does not run its layers as it did when it was prepared, so its folded batch norms would be wrong: "
        "do not call fastcure.prepare on a model whose path depends on its input"
    )
