"""Saying what is done with a model: which engine runs it, which cannot, and what becomes of each batch norm."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress

import torch
from torch import Tensor, nn

from fastcure._batch import Options, Part, evaluate, passes
from fastcure._defaults import BATCH_STATS, BatchStats
from fastcure._folding.layers import FOLDS, NORMS, folds_of
from fastcure._folding.prepare import find, fuse
from fastcure._functional import LossFn, cross_entropy, evaluation_mode, find_logits, unwrap
from fastcure.engines import ENGINES
from fastcure.engines.compile import has_compiler
from fastcure.objectives.cure import CURE


def explain(
    model: nn.Module, x: Tensor | None = None, y: Tensor | None = None, *, batch_stats: BatchStats = BATCH_STATS
) -> str:
    """Say which engine runs `model` and why, and what becomes of each batch norm.

    Args:
        model: the network, or a `CURE` of it, whose engine, loss and `batch_stats` are then those that count.
        x: `(B, ...)` images, of which two are used. With them the engines are tried, so that operators without a second
            derivative are named; and how many ReLUs can be fused with the convolution's bias and the shortcut before
            them, and why a batch norm is not folded or its output not left to a ReLU, are told as well.
        y: labels of x, for the loss of a `CURE`; without them the engines are tried with cross-entropy.
        batch_stats: as in `fastcure.curvature`. With "train" the flags of batch norms count as they stand.

    Examples:
        >>> import torch, fastcure
        >>> print(fastcure.explain(fastcure.models.resnet8()))  # doctest: +ELLIPSIS
        engine: ...
    """
    engine, loss_fn = "auto", None
    if isinstance(model, CURE):
        engine, batch_stats = model.engine, model.batch_stats
        loss_fn = None if y is None else model.loss_fn
        model = model.model
    Options(batch_stats=batch_stats)
    inner = unwrap(model)
    names = {module: name for name, module in inner.named_modules()}
    norms = _norms(inner, names, batch_stats)
    if x is None:
        return "\n".join([_engine(inner, engine), *norms])
    found, left = find(inner, x)
    norms += [f"  {names[norm]} not: {why}" for norm, why in left.items()]
    _, others, relus = fuse(inner, x, found)
    norms.append(f"ReLUs that can take the sum before them in one pass, on a GPU: {relus.fused} of {relus.all}")
    norms += [f"  not that of {names[norm]}: {why}" for norm, why in others.items()]
    tried = _tried(inner, x[:2].detach(), None if y is None else y[:2], loss_fn or cross_entropy, batch_stats)
    return "\n".join([_engine(inner, engine, tried["eager"]), *_engines(tried, x, batch_stats), *norms])


def _engine(model: nn.Module, engine: str, error: str = "") -> str:
    """Return the line about the engine that is asked for; `error` is that of the eager one."""
    if engine == "auto" and error:
        return f"engine: eager, which fails here (see below for those that run): {error}"
    if engine != "auto":
        return f"engine: {engine}, as asked"
    line = "engine: eager (exact, and it needs nothing but operators with a double backward)"
    if next((p.device.type for p in model.parameters()), "cpu") != "cpu":
        return f"{line}; steps that repeat are replayed as CUDA graphs"
    return f'{line}; engine="compile" is faster here, by up to a quarter, after a compilation of minutes'


def _engines(tried: dict[str, str], x: Tensor, batch_stats: str) -> list[str]:
    """Return a line for each engine but "auto"."""
    eager, first_order = tried["eager"], tried["first_order"]
    compiler = x.device.type != "cpu" or has_compiler()
    said = {
        "eager": eager and f"fails: {eager}",
        "compile": (eager and "fails where eager does") or ("" if compiler else "fails: no C++ compiler was found"),
        "cuda_graph": (eager and "fails where eager does") or ("" if x.is_cuda else f"fails: tensors on {x.device}"),
        "first_order": first_order and f"fails: {first_order}",
        "reference": tried["reference"] and f"fails: {tried['reference']}",
    }
    runs = {
        "eager": "runs",
        "compile": "not tried",
        "cuda_graph": "not tried",
        "first_order": f"runs, an estimate{tried['kinks']}",
        "reference": "runs, slowly",
    }
    if batch_stats == "train":
        said["first_order"] = "fails: batch norms in training mode"
    return [f"  engine {name}: {said[name] or runs[name]}" for name in said]


def _tried(model: nn.Module, x: Tensor, y: Tensor | None, loss_fn: LossFn, batch_stats: BatchStats) -> dict[str, str]:
    """Take a step with each engine that takes no preparation, and no trace of it stays.

    Returns:
        The error of each, or nothing; and of `kinks` what the first-order one misses.
    """
    with suppress(Exception):  # a copy, so that what a model is warned of once is still to be said
        model = copy.deepcopy(model)
    if y is None:  # in a pass like those of the penalty, to which the model may have hooked what it likes
        with torch.enable_grad(), evaluation_mode(model):
            y = find_logits(model(x.clone().requires_grad_())).detach().argmax(1)
    found = {"kinks": ""}
    for engine in ("eager", "first_order", "reference"):
        found[engine] = ""
        with warnings.catch_warnings(record=True) as said, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            try:
                stats = batch_stats if ENGINES[engine].training_norms else BATCH_STATS
                options = Options(loss_fn, engine=engine, batch_stats=stats)
                with torch.enable_grad(), passes(model, options) as norms:
                    part = Part(slice(0, len(x)), updates_buffers=False)
                    chosen, step = evaluate(model, x, y, 0.01 * x[0].numel() ** 0.5, options, part, norms)
                if step.parameters:
                    ones = torch.ones_like(step.loss)
                    chosen.backward(step.state, ones, ones, retain=False)
            except Exception as error:
                found[engine] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        for warning in said:
            if "kinks" in (message := str(warning.message)) and "(" in message:
                found["kinks"] = f" that misses kinks {message[message.index('(') : message.index(')') + 1]}"
    return found


def _norms(model: nn.Module, names: dict[nn.Module, str], batch_stats: str) -> list[str]:
    """Return what becomes of batch norms."""
    norms = [module for module in names if isinstance(module, NORMS)]
    folds = folds_of(model)
    training = [norm for norm in norms if norm.training and batch_stats == "train"]
    folded = [fold for fold in folds if fold.norm not in training]
    if model not in FOLDS:
        lines = [f"batch norms folded: 0 of {len(norms)}; fastcure.prepare(model, x) has not been called"]
    else:
        lines = [f"batch norms folded into the layer before: {len(folded)} of {len(norms)}"]
    if training:
        lines.append(f"  {len(training)} in training mode, where batch_stats='train' leaves them, so not folded")
    elif batch_stats == "train" and norms:
        lines.append("  all are in evaluation mode: batch_stats='train' is then 'frozen'; call model.train()")
    return lines + [f"  {names[fold.norm]} into {names[fold.layer]}{', before ReLU' * fold.fused}" for fold in folded]
