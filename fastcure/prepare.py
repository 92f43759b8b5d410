"""Finding the batch norms of a model that can be folded into the layer before them, and saying what is done with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcure.checks import check_images
from fastcure.engines import select
from fastcure.layers import (
    CONVOLUTIONS,
    FOLDS,
    NORMS,
    Fold,
    UsedElsewhereError,
    cheaper_layers,
    folds_of,
    has_statistics,
    plain,
)
from fastcure.objective import evaluation_mode, unwrap

LAYERS = (*CONVOLUTIONS, nn.Linear)


def prepare(model: nn.Module, x: Tensor) -> nn.Module:
    """Let the penalty fold the batch norms of `model` into the layers before them, where that gives the same value.

    The model is run a few times to see which batch norm alone takes the output of a convolution or linear layer. It is
    not changed: class, state dict, hooks and ordinary forward stay what they are. Only the evaluation-mode passes of
    `fastcure.curvature` and `CURE` compute the pairs that were found as one layer, and raise an error if one is no pair
    any more. Call it again after changing the model's structure, and on a copy of the model.

    Args:
        model: the network.
        x: `(B, ...)` images such as those of training; at most two are used.

    Returns:
        `model` itself.
    """
    check_images(x.detach() if isinstance(x, Tensor) else x)
    inner = unwrap(model)
    FOLDS[inner] = _find(inner, x)[0]
    return model


def explain(model: nn.Module, x: Tensor | None = None) -> str:
    """Say which engine "auto" picks for `model` and why, and what becomes of each batch norm.

    Args:
        model: the network.
        x: `(B, ...)` images; with them, why a batch norm is not folded is told as well.
    """
    inner = unwrap(model)
    engine, reason = select("auto", inner)
    lines = [f"engine: {engine} ({reason})"]
    names = {module: name for name, module in inner.named_modules()}
    norms = [module for module in names if isinstance(module, NORMS)]
    folds = folds_of(inner)
    if inner not in FOLDS:
        lines.append(f"batch norms folded: 0 of {len(norms)}; fastcure.prepare(model, x) has not been called")
    else:
        lines.append(f"batch norms folded into the layer before: {len(folds)} of {len(norms)}")
    lines += [f"  {names[fold.norm]} into {names[fold.layer]}" for fold in folds]
    if x is not None:
        lines += [f"  {names[norm]} not: {why}" for norm, why in _find(inner, x)[1].items()]
    return "\n".join(lines)


def _find(model: nn.Module, x: Tensor) -> tuple[list[Fold], dict[nn.Module, str]]:
    """Return the folds, and of every other batch norm why it is none."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        calls.setdefault(module, []).append((args[0] if args else kwargs["input"], output))

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
    try:
        with cheaper_layers(model, folds) as outputs:
            _run(model, x)
    except UsedElsewhereError as error:
        return {error.layer}
    return {output.fold.layer for reference in outputs if (output := reference()) is not None}


def _run(model: nn.Module, x: Tensor) -> None:
    # Two images: some layers refuse a single value a channel.
    copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with evaluation_mode(model), torch.enable_grad():
        functional_call(model, copies, (x[:2].detach().requires_grad_(),))
