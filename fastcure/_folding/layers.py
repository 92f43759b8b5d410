"""A model's batch norms, folded into the layers before them while the penalty is evaluated.

In evaluation mode a batch norm is an affine map of each channel, `s x + t` with `s = weight / sqrt(var + eps)` and
`t = bias - s mean`. Since `s (W * x) + t = (s W) * x + t`, one that alone follows a convolution is folded into it, and
costs a product of the size of the weights. Gradients reach the weight of the convolution and the weight and bias of the
batch norm as before. Where it runs as a kernel of ours, the sum of what the convolution returns, the bias of the fold
and a shortcut is left pending until the ReLU behind it takes it in one pass (`fastcure._folding.pending`).

A module is left alone if it is of a subclass, has hooks or parametrisations, or a `forward` of its own; and while it
runs inside a transform of torch.func (a model may use vmap), which folding does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from fastcure_kernels.backend import use_triton
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure._folding.pending import Pending
from fastcure._model_lock import one_thread
from fastcure._torch_compat import (
    PARTS_OF_FORWARD,
    convolve,
    has_hooks,
    in_functorch_transform,
    registered_parameters,
    set_thread_local,
    thread_local,
    tree_leaves,
    version,
    without_storage,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
METHODS = frozenset(("forward", *PARTS_OF_FORWARD))
"""Those that a module may have of its own, in place of its class's."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Fold(NamedTuple):
    """A batch norm, and the convolution or linear layer whose output it alone takes."""

    layer: nn.Module
    norm: nn.Module
    fused: bool = False
    """Whether ReLUs alone take the output of the batch norm, as it is or added to something."""


class WeakFold(NamedTuple):
    """A fold that keeps neither module alive: a child may refer to its root, and would keep that alive too."""

    layer: ref[nn.Module]
    norm: ref[nn.Module]
    fused: bool

    @classmethod
    def of(cls, fold: Fold) -> WeakFold:
        """Return `fold` by weak references."""
        return cls(ref(fold.layer), ref(fold.norm), fold.fused)


FOLDS: WeakKeyDictionary[nn.Module, list[WeakFold]] = WeakKeyDictionary()
"""What `fastcure.prepare` found in each model that was given to it."""

LARGE = 1 << 26
"""Bytes of an input from which the device, not the host, is what an eager step waits for."""
_REPLAYED = "fastcure.replayed"

LAYERS = (*CONVOLUTIONS, nn.Linear)
KINDS: tuple[type[nn.Module], ...] = (*LAYERS, *NORMS)
FORWARDS = {kind: kind.forward for kind in KINDS}
"""torch's own; a class whose `forward` was exchanged since computes something else."""


class UsedElsewhereError(RuntimeError):
    """Something other than its batch norm took the output of a folded layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(
            f"the output of {layer} went to its batch norm alone when the model was prepared, and now something else "
            "takes it: call fastcure.prepare again after a change to the model, and not at all if its path depends on "
            "its input"
        )
        self.layer = layer


class Output(Tensor):
    """What a folded layer returns: `value` is its batch norm's output, and only that batch norm takes it out.

    An identity of tensors would not do: changed in place, detached or kept for later, the output of a layer is used in
    ways that neither its name nor the graph shows. It has no storage, so operators that pass Python by fail as well.

    Raises:
        UsedElsewhereError: whatever is done with it.
    """

    fold: Fold
    value: Tensor

    @classmethod
    def of(cls, fold: Fold, value: Tensor) -> Output:
        """Wrap `value`, the output of `fold.norm`."""
        out = without_storage(cls, value)
        out.fold, out.value = fold, value
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        raise UsedElsewhereError(next(leaf.fold.layer for leaf in leaves if isinstance(leaf, Output)))

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


@dataclass
class Watch:
    """What became of the outputs of folded layers, for `fastcure.prepare`, which leaves the fused ones pending."""

    outputs: list[ref[Output]] = field(default_factory=list)
    pending: list[tuple[nn.Module, ref[Pending]]] = field(default_factory=list)
    """With the batch norm of each."""
    takers: dict[nn.Module, list[str]] = field(default_factory=dict)
    """The operators that took what a batch norm returned."""


@contextmanager
def folded_layers(model: nn.Module, folds: Iterable[Fold] | None = None, watch: Watch | None = None) -> Iterator[None]:
    """Compute each pair of a layer and its batch norm in evaluation mode as one layer.

    Args:
        model: the network.
        folds: the pairs; those of `folds_of(model)` if None.
        watch: is told what takes their outputs.

    Raises:
        UsedElsewhereError: within, if a folded layer's output goes anywhere but to its batch norm.
        RuntimeError: if another thread uses the model in such a way now.
    """
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for fold in folds_of(model) if folds is None else folds:
        forwards[fold.layer], forwards[fold.norm] = _folded(fold, watch), _taken_out(fold.norm)
    with one_thread(model) if forwards else nullcontext():
        try:
            for module, forward in forwards.items():
                module.forward = forward
            yield
        finally:
            for module in forwards:
                vars(module).pop("forward", None)


@contextmanager
def replayed() -> Iterator[None]:
    """Around passes that are captured, or compared with such: what a launch costs the host does not count."""
    before = thread_local(_REPLAYED)
    set_thread_local(_REPLAYED, 1)
    try:
        yield
    finally:
        set_thread_local(_REPLAYED, before)


def _is_worth_a_kernel(x: Tensor) -> bool:
    """Tell whether one kernel takes what follows a layer: it spares the device passes, and costs the host calls.

    Measured with ResNet-18 and 128 images, of 33 MB and less, on an H100: 17.3 ms of the device for 18.9, and 75 ms of
    the host for 46.
    """
    if not use_triton(x):
        return False
    asked = os.environ.get("FASTCURE_BACKEND") == "triton"
    return asked or thread_local(_REPLAYED) == 1 or x.numel() * x.element_size() >= LARGE


def folds_of(model: nn.Module) -> list[Fold]:
    """Return the pairs that `fastcure.prepare` found in `model` and that can still be folded."""
    if not FOLDS.get(model):
        return []
    modules = set(model.modules())
    pairs = ((weak.layer(), weak.norm(), weak.fused) for weak in FOLDS[model])
    found = [Fold(layer, norm, fused) for layer, norm, fused in pairs if layer in modules and norm in modules]
    return [fold for fold in found if can_be_folded(fold)]


def can_be_folded(fold: Fold) -> bool:
    """Tell whether both modules still compute what folding takes them for: all of it may change after `prepare`."""
    layer: Any = fold.layer
    norm: Any = fold.norm
    if type(layer) not in LAYERS or type(norm) not in NORMS or not (plain(layer) and plain(norm)):
        return False
    return has_statistics(norm) and len(norm.running_var) == len(layer.weight)


def plain(module: nn.Module) -> bool:
    """Tell whether a module does what its class says, and nobody listens."""
    registered = {"weight", "bias"} <= set(registered_parameters(module))  # others may depend on the input
    kind = type(module)
    own = kind.forward is FORWARDS.get(kind, kind.forward) and vars(module).keys().isdisjoint(METHODS)
    return registered and own and not has_hooks(module)


def has_statistics(norm: nn.Module) -> bool:
    """Tell whether a batch norm uses running statistics in evaluation mode."""
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def channel_map(norm: Any) -> tuple[Tensor, Tensor]:
    """Return `s` and `t` `(C,)` of a batch norm in evaluation mode."""
    return channel_map_of(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def channel_map_of(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same from its parts, each `(C,)`."""
    s = torch.rsqrt(var + eps)
    s = s if weight is None else s * weight
    t = -s * mean
    return s, t if bias is None else t + bias


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else convolve(layer, x, weight, bias)


# The argument of a layer's `forward` is called `input`: a model may give it by that name.


def _taken_out(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    original = type(norm).forward

    def forward(input: Tensor) -> Tensor:  # noqa: A002
        if isinstance(input, Output) and input.fold.norm is norm and not norm.training:
            return input.value
        return original(norm, input)

    return forward


def _folded(fold: Fold, watch: Watch | None) -> Callable[[Tensor], Tensor]:
    layer: Any = fold.layer
    folded = _once(fold)

    def forward(input: Tensor) -> Tensor:  # noqa: A002
        if fold.norm.training or input.dim() != layer.weight.dim() or in_functorch_transform():
            return _apply(layer, input, layer.weight, layer.bias)
        weight, bias = folded()
        kernel = _is_worth_a_kernel(input)
        # Elsewhere the libraries add a bias for nothing, and a ReLU of a sum is two passes in any case.
        if not fold.fused or not (kernel or watch):
            out = Output.of(fold, _apply(layer, input, weight, bias))
        else:
            apart = kernel and not isinstance(layer, nn.Linear)
            x = _apply(layer, input, weight, None if apart else bias)
            takers = (watch.takers.setdefault(fold.norm, []),) if watch else ()
            total = Pending.of(x, bias.to(x.dtype) if apart else None, None, takers)
            out = Output.of(fold, total)
            if watch:
                watch.pending.append((fold.norm, ref(total)))
        if watch:
            watch.outputs.append(ref(out))
        return out

    return forward


def _once(fold: Fold) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return what folds: both points of the penalty take one weight and bias, unless their parts change in between."""
    layer: Any = fold.layer
    norm: Any = fold.norm
    parts: list[Any] = []
    result: list[Tensor] = []

    def folded() -> tuple[Tensor, Tensor]:
        tensors = (layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        state = [torch.is_grad_enabled(), *[version(part) for part in tensors if part is not None]]
        if parts[:1] != [state] or any(old is not new for old, new in zip(parts[1:], tensors, strict=True)):
            s, t = channel_map(norm)
            dtype = layer.weight.dtype  # that of the norm may be wider
            weight = layer.weight * s.reshape(-1, *[1] * (layer.weight.dim() - 1))
            bias = t if layer.bias is None else t + s * layer.bias
            parts[:], result[:] = [state, *tensors], (weight.to(dtype), bias.to(dtype))
        return result[0], result[1]

    return folded
