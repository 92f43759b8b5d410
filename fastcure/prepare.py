"""Finding the batch norms of a model that can be folded into the layer before them, and saying what is done with it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from fastcure.engines import select
from fastcure.layers import CONVOLUTIONS, FOLDS, NORMS, Fold, has_statistics, plain
from fastcure.objective import evaluation_mode, graph_nodes, unwrap

LAYERS = (*CONVOLUTIONS, nn.Linear)


def prepare(model: nn.Module, x: Tensor) -> nn.Module:
    """Let the penalty fold the batch norms of `model` into the layers before them, where that gives the same value.

    The model is run once, on `x`, to see which batch norm alone takes the output of a convolution or linear layer. It
    is not changed: class, state dict, hooks and ordinary forward stay what they are. Only the evaluation-mode passes of
    `fastcure.curvature` and `CURE` compute the pairs that were found as one layer, and check that they still are pairs.
    Call it again after changing the model's structure.

    Args:
        model: the network.
        x: `(B, ...)` images such as those of training; one is enough.

    Returns:
        `model` itself.
    """
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
    folds = FOLDS.get(inner)
    if folds is None:
        lines.append(f"batch norms folded: 0 of {len(norms)}; fastcure.prepare(model, x) has not been called")
    else:
        lines.append(f"batch norms folded into the layer before: {len(folds)} of {len(norms)}")
    lines += [f"  {names[fold.norm]} into {names[fold.layer]}" for fold in folds or []]
    if x is not None:
        lines += [f"  {names[norm]} not: {why}" for norm, why in _find(inner, x)[1].items()]
    return "\n".join(lines)


def _find(model: nn.Module, x: Tensor) -> tuple[list[Fold], dict[nn.Module, str]]:
    """Run the model on one image; return the folds, and of every other batch norm why it is none."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(module, []).append((args[0], output))

    watched = [module for module in names if (type(module) in LAYERS or isinstance(module, NORMS)) and plain(module)]
    handles: list[RemovableHandle] = [module.register_forward_hook(record) for module in watched]
    try:
        with evaluation_mode(model), torch.enable_grad():
            copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
            output = functional_call(model, copies, (x[:1].detach().requires_grad_(),))
    finally:
        for handle in handles:
            handle.remove()

    outputs = [out for out in torch.utils._pytree.tree_leaves(output) if isinstance(out, Tensor)]
    uses = Counter(child for node in graph_nodes(*outputs) for child, _ in node.next_functions)
    makers = {id(runs[0][1]): layer for layer, runs in calls.items() if type(layer) in LAYERS and len(runs) == 1}
    folds: list[Fold] = []
    left: dict[nn.Module, str] = {}
    for norm in (module for module in names if isinstance(module, NORMS)):
        runs = calls.get(norm, [])
        layer = makers.get(id(runs[0][0])) if runs else None
        if type(norm) not in NORMS or not plain(norm):
            left[norm] = "it is of a subclass, or has hooks"
        elif not has_statistics(norm):
            left[norm] = "it keeps no running statistics"
        elif len(runs) != 1:
            left[norm] = f"it runs {len(runs)} times a forward"
        elif layer is None:
            left[norm] = "its input is not the output of a plain convolution or linear layer that runs once"
        elif uses[runs[0][0].grad_fn] != 1:
            left[norm] = f"the output of {names[layer]} is used elsewhere too"
        else:
            folds.append(Fold(layer, norm))
    return folds, left
