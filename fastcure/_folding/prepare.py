"""Finding the batch norms of a model that can be folded into the layer before them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from fastcure._folding.layers import (
    FOLDS,
    LAYERS,
    NORMS,
    Fold,
    UsedElsewhereError,
    Watch,
    WeakFold,
    folded_layers,
    has_statistics,
    plain,
)
from fastcure._folding.pending import RELU, OverwrittenError, Pending
from fastcure._functional import check_initialised, evaluation_mode, unwrap
from fastcure._torch_compat import in_functorch_transform
from fastcure._validation import check_images
from fastcure.engines.base import twice_differentiable
from fastcure.objectives.cure import CURE


def prepare(model: nn.Module, x: Tensor) -> nn.Module:
    """Let the penalty fold the batch norms of `model` into the layers before them, where that gives the same value.

    The model is run a few times to see which batch norm alone takes the output of a convolution or linear layer, and
    whether ReLUs alone take the batch norm's, with or without a shortcut: those are one kernel where a GPU replays the
    passes, or images are large. The model is not changed: class, state dict, hooks and ordinary forward stay what they
    are. Only the evaluation-mode passes of `fastcure.curvature` and `CURE` compute the pairs that were found as one
    layer, and raise an error if one is no pair any more. Call it again after changing the model's structure, and on a
    copy of the model.

    Args:
        model: the network, or a `CURE` of it.
        x: `(B, ...)` images such as those of training; at most two are used.

    Returns:
        `model` itself.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x = torch.rand(2, 3, 16, 16)
        >>> fastcure.prepare(model, x) is model
        True
    """
    check_images(x.detach() if isinstance(x, Tensor) else x)
    inner = unwrap(model.model if isinstance(model, CURE) else model)
    FOLDS[inner] = [WeakFold.of(fold) for fold in fuse(inner, x, find(inner, x)[0]).folds]
    return model


def find(model: nn.Module, x: Tensor) -> tuple[list[Fold], dict[nn.Module, str]]:
    """Return the folds, and of every other batch norm why it is none."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    transformed: set[nn.Module] = set()

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        calls.setdefault(module, []).append((args[0] if args else kwargs["input"], output))
        if in_functorch_transform():
            transformed.add(module)

    watched = [module for module in names if (type(module) in LAYERS or isinstance(module, NORMS)) and plain(module)]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in watched]
    try:
        _run(model, x)
    finally:
        for handle in handles:
            handle.remove()

    makers = {id(runs[0][1]): layer for layer, runs in calls.items() if type(layer) in LAYERS and len(runs) == 1}
    folds: list[Fold] = []
    left: dict[nn.Module, str] = {}
    for norm in (module for module in names if isinstance(module, NORMS)):
        runs = calls.get(norm, [])
        layer: Any = makers.get(id(runs[0][0])) if runs else None
        if type(norm) not in NORMS or not plain(norm):
            left[norm] = "it is of a subclass, or has hooks"
        elif not has_statistics(norm):
            left[norm] = "it keeps no running statistics"
        elif norm in transformed:
            left[norm] = "it runs inside a transform of torch.func"
        elif len(runs) != 1:
            left[norm] = f"it runs {len(runs)} times a forward"
        elif layer is None:
            left[norm] = "its input is not the output of a plain convolution or linear layer that runs once"
        elif runs[0][0].dim() != layer.weight.dim():
            left[norm] = f"its channels are not those of {names[layer]}"
        else:
            folds.append(Fold(layer, norm))
    calls.clear()

    while used := _used_elsewhere(model, x, folds):
        for fold in folds:
            if fold.layer in used:
                left[fold.norm] = f"the output of {names[fold.layer]} is used elsewhere too"
        folds = [fold for fold in folds if fold.layer not in used]
    return folds, left


def _used_elsewhere(model: nn.Module, x: Tensor, folds: list[Fold]) -> set[nn.Module]:
    """Fold for one run; return layers whose output goes anywhere but to the batch norm, or is kept after the run."""
    watch = Watch()
    try:
        with folded_layers(model, folds, watch=watch):
            _run(model, x)
    except UsedElsewhereError as error:
        return {error.layer}
    return {output.fold.layer for reference in watch.outputs if (output := reference()) is not None}


class Fusion(NamedTuple):
    """What is done with the outputs of folded batch norms."""

    folds: list[Fold]
    others: dict[nn.Module, str]
    """Of every batch norm whose output is not left to ReLUs, why."""
    relus: ReLUs


class ReLUs(TorchFunctionMode):
    """Counts the ReLUs that run, and those of them that take a pending sum."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.fused = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RELU:
            self.all += 1
            self.fused += isinstance(args[0] if args else kwargs["input"], Pending)
        return func(*args, **kwargs)


def fuse(model: nn.Module, x: Tensor, folds: list[Fold]) -> Fusion:
    """Leave the outputs of batch norms to ReLUs, and take back those that something else takes, until none does."""
    others: dict[nn.Module, str] = {}
    while True:
        folds = [fold._replace(fused=fold.norm not in others) for fold in folds]
        watch, relus = Watch(), ReLUs()
        with suppress(OverwrittenError), relus, folded_layers(model, folds, watch=watch):
            _run(model, x)
        found = _not_for_relus(watch)
        if not found:
            return Fusion(folds, others, relus)
        others |= found


def _not_for_relus(watch: Watch) -> dict[nn.Module, str]:
    first = {norm: next((name for name in names if name != "relu"), None) for norm, names in watch.takers.items()}
    if found := {norm: f"{name} takes its output" for norm, name in first.items() if name}:
        return found
    unused = {norm: "nothing takes its output" for norm, names in watch.takers.items() if not names}
    kept = {norm: "its output is kept" for norm, reference in watch.pending if reference() is not None}
    return unused | kept


def _run(model: nn.Module, x: Tensor) -> None:
    # Two images: some layers refuse a single value a channel.
    buffers = dict(model.named_buffers())
    check_initialised({**dict(model.named_parameters()), **buffers})
    copies = {name: buffer.clone() for name, buffer in buffers.items()}
    with evaluation_mode(model), torch.enable_grad(), twice_differentiable():
        functional_call(model, copies, (x[:2].detach().requires_grad_(),))
