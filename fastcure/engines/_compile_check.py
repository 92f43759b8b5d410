"""The check of a compiled region, at its first use: its parameter gradients must be those of the eager engine.

Loss and penalty are compared apart, along the direction z of the compiled region, with the eager engine in float64. The
limit is a small multiple of the error that the eager engine itself makes in the dtype of the run: that holds the
rounding of each operator, the length of the sums and the condition of the difference of two gradients. Where a value
near the kink of a ReLU or a maximum is rounded to its other side, which is rare and a matter of chance, the difference
is larger; so a region passes as soon as it passes at one of a few points. A wrong derivative is wrong at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure.engines._loss_only import engine_of
from fastcure.engines.base import Engine, Evaluation, Request

FACTOR = 4.0
"""Times the eager engine's own error: another order of the same sums has another one, of that size."""
POINTS = 4
SAMPLES = 8
"""Samples that take part at all points but the last, where none depends on the others: in float64 a step needs more
memory, and on many GPUs far more time."""

Gradients = dict[int, Tensor]
"""By the parameters' ids; those that are not there are zero."""


class Eagerly(NamedTuple):
    """Gradients of the eager engine, each a pair: of the loss and of the penalty."""

    exact: tuple[Gradients, Gradients]
    own: tuple[Gradients, Gradients] | None
    """In the dtype of the run; None where the model runs in no other."""
    scale: float
    """Of the error of `own`, to be that of the dtype of the run."""


def check(region: Callable[[Tensor], tuple[Evaluation, Tensor | None]], request: Request, engine: Engine) -> bool:
    """Compare a compiled region with the eager engine.

    Args:
        region: `x -> (evaluation, z)`.
        request: for which it was compiled.
        engine: whose backward takes its states.

    Returns:
        Whether there was something to compare: a gradient that is not finite tells nothing.

    Raises:
        RuntimeError: if its gradients are wrong.
    """
    eps = torch.finfo(_computed_in(request)).eps
    own_errors, least = [0.0, 0.0], torch.inf
    samples = len(request.x) if any(module.training for module in request.model.modules()) else SAMPLES
    for x, count in _points(request.x.detach(), samples):
        evaluation, z = region(x)
        ours = _gradients(engine, evaluation, count)
        found = _eagerly(request, x, z, count)
        sizes = [_distance(gradients, {}) for gradients in found.exact]
        if not torch.tensor(sizes).isfinite().all():
            return False
        worst = 0.0  # excess over the limit, of loss and penalty
        for i, (size, exact) in enumerate(zip(sizes, found.exact, strict=True)):
            own = eps**0.5 * size if found.own is None else found.scale * _distance(found.own[i], exact)
            own_errors[i] = max(own_errors[i], own)
            limit = FACTOR * (own_errors[i] + eps * size)
            error = _distance(ours[i], exact)
            if not error <= limit:
                worst = max(worst, error / size if size else error)
        if not worst:
            return True
        least = min(least, worst)
    raise RuntimeError(
        f"the compiled gradients differ from the eager ones by {least:.1e} of their size, which rounding does not "
        "explain: the model has an operator whose second derivative the compiler does not see, or it reads a batch "
        "norm's parameters or statistics elsewhere than in that batch norm; use engine='eager'"
    )


def _points(x: Tensor, samples: int) -> Iterator[tuple[Tensor, int]]:
    """Yield points, and how many samples take part there; at the last one all, should they depend on each other."""
    generator = torch.Generator().manual_seed(0)
    count = min(len(x), samples)
    yield x, count
    for i in range(1, POINTS):
        noise = torch.rand(x.shape, generator=generator).to(x) - 0.5
        yield x + 0.02 * x.abs().amax() * noise, count if i < POINTS - 1 else len(x)


def _computed_in(request: Request) -> torch.dtype:
    device = request.x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else request.x.dtype


def _eagerly(request: Request, x: Tensor, z: Tensor | None, count: int) -> Eagerly:
    h = request.h[:count] if isinstance(request.h, Tensor) and request.h.dim() else request.h
    direction = None if z is None else z[:count]
    part = request.of(request.functional, x=x[:count], y=request.y[:count], h=h, direction=direction)

    engine = engine_of(part)

    def gradients(dtype: torch.dtype | None) -> tuple[Gradients, Gradients]:
        wide = torch.autocast(x.device.type, enabled=False) if dtype else nullcontext()
        with wide:
            return _gradients(engine, engine.forward(_in_dtype(part, dtype) if dtype else part), count)

    here = gradients(None)
    other = torch.float32 if x.dtype == torch.float64 else torch.float64
    try:
        there = gradients(other)
    except RuntimeError:  # a model with tensors of its own, of one dtype
        return Eagerly(here, None, 1.0)
    if other == torch.float64:
        return Eagerly(there, here, 1.0)
    return Eagerly(here, there, torch.finfo(x.dtype).eps / torch.finfo(other).eps)


def _in_dtype(request: Request, dtype: torch.dtype) -> Request:
    y = request.y.to(dtype) if request.y.is_floating_point() else request.y
    direction = None if request.direction is None else request.direction.to(dtype)
    return request.of(request.functional.to(dtype), x=request.x.to(dtype), y=y, direction=direction)


def _gradients(engine: Engine, evaluation: Evaluation, count: int) -> tuple[Gradients, Gradients]:
    """The parameter gradients of the loss and of the penalty of the first `count` samples."""
    weights = (torch.arange(len(evaluation.loss), device=evaluation.loss.device) < count).to(evaluation.loss.dtype)
    keys = [id(parameter) for parameter in evaluation.parameters]

    def of(w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool) -> Gradients:
        found = engine.backward(evaluation.state, w_loss, w_penalty, retain=retain)
        return {key: gradient for key, gradient in zip(keys, found, strict=True) if gradient is not None}

    return of(weights, None, retain=True), of(None, weights.to(evaluation.penalty.dtype), retain=False)


def _distance(a: Gradients, b: Gradients) -> float:
    """`||a - b||` over all parameters."""
    total = 0.0
    for key in a.keys() | b.keys():
        x, y = (of[key].double() if key in of else 0.0 for of in (a, b))
        total += float((torch.as_tensor(x) - y).square().sum())
    return total**0.5
