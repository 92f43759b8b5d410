"""DeepFool: the nearest point of another class, in L2 (Moosavi-Dezfooli et al., CVPR 2016)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._diagnostics.first_pass import look_before_measure
from fastcure._functional import FunctionalLoss, evaluation_mode, unreachable, unwrap
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import (
    Bounds,
    check_batch,
    check_classes,
    check_images,
    check_labels,
    check_pixels,
    check_positive,
)
from fastcure.attacks._arguments import (
    check_bounds,
    check_counts,
    check_numbers,
    hard_labels,
    has_nan,
    has_no_class,
    rowwise,
)

HALVINGS = 12
"""Least number, of the segment from x to the point found: the boundary is known to one part in 4096 of the segment.
Where a vanishing gradient made a step much too long, more follow, until it is known to one part in 2048 of its
distance."""

SHORTEST = 1e-4
"""Least L2 length of a step, so that rounding cannot hold a sample on the boundary."""


class DeepFool(NamedTuple):
    """What `deepfool` found."""

    x_adv: Tensor
    """(B, ...), just beyond the boundary; where nothing was found, the last point tried."""
    perturbation: Tensor
    """(B, ...), `x_adv - x`."""
    normal: Tensor
    """(B, ...), the unit normal of the boundary at `x_adv`, pointing out of the class; 0 where the gradient is."""
    distance: Tensor
    """(B,), the L2 length of the perturbation; 0 where x is of another class already, infinite where none was found."""


@outside_inference_mode
def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
    bounds: Bounds | None = None,
) -> DeepFool:
    """Find the smallest L2 perturbation of each image that leaves its class.

    Each step goes to the nearest boundary of the linearised network, and past it by `overshoot`; a sample stops at
    its first point of another class. The segment from x to that point is then halved until its crossing of the
    boundary is known. On a network that is linear in x the result is exact (to one part in 4096).

    The model is attacked in evaluation mode and comes back as it was. A step costs `classes + 2` forward passes for
    the samples still under way, the halvings 12 or a few more and the normal 4. It may be called inside
    torch.inference_mode, which it leaves.

    Args:
        model: the network, normalisation inside; it returns logits.
        x: `(B, ...)` images within `bounds`, by default within [0, 1]; rounding is allowed.
        y: class indices `(B,)` to leave, or probabilities `(B, C)` whose largest is meant; by default those that the
            model predicts. A sample that is not predicted as its `y` is left where it is, at distance 0.
        steps: at most.
        overshoot: relative length past the linearised boundary.
        classes: only the boundaries with the most likely classes at x are tried, its own counted; 2 or more.
        bounds: range of pixel values that no point leaves; None lets points leave [0, 1]. Images of another range
            without limits have `(-inf, inf)`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or the model is random in
            evaluation mode.
        FloatingPointError: if a gradient or an output was not a number.

    Warns:
        UserWarning: once per model, if it returns probabilities: distances are then too large, or infinite.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x = torch.rand(5, 1, 4, 4)
        >>> found = fastcure.attacks.deepfool(model, x, classes=3, bounds=None)
        >>> found.normal.shape
        torch.Size([5, 1, 4, 4])
    """
    if y is None:
        check_images(x)
    else:
        check_batch(x, y, None)
        check_labels(y, len(x))
    check_counts(steps=steps)
    check_positive("overshoot", overshoot, zero=True)
    if classes < 2:
        raise ValueError(f"classes must be >= 2, the own and another, got {classes}")
    if bounds is not None:
        check_bounds(bounds)
    check_pixels(x, bounds or (0.0, 1.0))
    model = unwrap(model)
    functional = FunctionalLoss(model, _no_loss, trainable=False)
    look_before_measure(functional, x, pixels=False)
    x = x.detach()
    with evaluation_mode(model):
        logits = _logits(functional, x)
        if logits.dim() != 2 or logits.shape[1] < 2:
            raise ValueError(f"the model must have 2 outputs or more, got {', '.join(map(str, logits.shape[1:]))}")
        if y is not None:
            check_classes(y, logits)
        own = logits.argmax(1) if y is None else hard_labels(y)
        rivals = _without(logits, own).topk(min(classes, logits.shape[1]) - 1).indices
        x_adv = x.clone()
        left = (logits.argmax(1) == own).nonzero().flatten()
        for _ in range(steps):
            if not len(left):
                break
            point = x_adv[left]
            point = point + (1 + overshoot) * _step(functional, point, own[left], rivals[left], bounds)
            x_adv[left] = point if bounds is None else point.clamp(*bounds)
            left = left[_is_of(functional, x_adv[left], own[left])]

        x_adv = _halve(functional, x, x_adv, own)
        normal, bad = _normal(functional, x_adv, own)
    check_numbers(bad | has_nan(x_adv))
    perturbation = x_adv - x
    distance = perturbation.flatten(1).norm(dim=1).index_fill(0, left, torch.inf)
    return DeepFool(x_adv, perturbation, normal, distance)


def _no_loss(logits: Tensor, _: Tensor) -> Tensor:
    return logits.flatten(1)[:, 0] if logits.dim() > 1 else logits


@torch.no_grad()
def _logits(functional: FunctionalLoss, x: Tensor) -> Tensor:
    return functional(x, x)[0]


def _is_of(functional: FunctionalLoss, x: Tensor, own: Tensor) -> Tensor:
    """Return which of `x` `(B, ...)` are of the class `own` `(B,)`; where an output overflowed, none is."""
    logits = _logits(functional, x)
    return (logits.argmax(1) == own) & ~has_no_class(logits)


def _without(logits: Tensor, own: Tensor) -> Tensor:
    return logits.scatter(1, own[:, None], -torch.inf)


def _gradients(functional: FunctionalLoss, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `(B, K)` of the classes `labels` `(B, K)`, and their gradients `(B, K, ...)`."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        chosen = functional(point, labels)[0].gather(1, labels)
        if not chosen.requires_grad:
            raise unreachable()
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        gradients = [torch.autograd.grad(each, point, **options)[0] for each in chosen.sum(0).unbind()]
        if any(g is None for g in gradients):
            raise unreachable()
    return chosen.detach(), torch.stack(gradients, 1)


def _step(functional: FunctionalLoss, x: Tensor, own: Tensor, rivals: Tensor, bounds: Bounds | None) -> Tensor:
    """Return the step `(B, ...)` from x to the nearest boundary with a rival `(B, K)` of the linearised network.

    A pixel that stands at a bound does not move past it: the others make the way.
    """
    logits, gradients = _gradients(functional, x, torch.cat([own[:, None], rivals], 1))
    w = (gradients[:, 1:] - gradients[:, :1]).flatten(2)  # (B, K, N)
    if bounds is not None:
        pixels = x.flatten(1)[:, None]
        w = w.masked_fill(((pixels <= bounds[0]) & (w < 0)) | ((pixels >= bounds[1]) & (w > 0)), 0.0)
    norm = w.norm(dim=2)
    distance = torch.where(norm == 0, torch.inf, (logits[:, :1] - logits[:, 1:]) / norm)
    length, nearest = distance.min(1)
    w, norm = (value[torch.arange(len(x), device=x.device), nearest] for value in (w, norm))
    # Where no boundary has a gradient, or only one that vanishes in rounding, there is nowhere to go.
    scale = length.clamp_min(SHORTEST) / norm
    scale = torch.where((norm == 0) | scale.isinf(), 0.0, scale)
    return (scale[:, None] * w).view_as(x)


def _halve(functional: FunctionalLoss, x: Tensor, x_adv: Tensor, own: Tensor) -> Tensor:
    """Return the point next to x, on the segment to `x_adv`, that is of another class; `x_adv` where it is not."""
    low, high = x.new_zeros(len(x)), x.new_ones(len(x))
    rows = (x_adv != x).flatten(1).any(1).nonzero().flatten()
    halvings = 0
    while len(rows):
        middle = (low[rows] + high[rows]) / 2
        stays = _is_of(functional, torch.lerp(x[rows], x_adv[rows], rowwise(middle, x)), own[rows])
        low[rows], high[rows] = torch.where(stays, middle, low[rows]), torch.where(stays, high[rows], middle)
        halvings += 1
        if halvings >= HALVINGS:
            middle = (low[rows] + high[rows]) / 2
            coarse = (high - low)[rows] > high[rows] / 2 ** (HALVINGS - 1)
            rows = rows[coarse & (middle > low[rows]) & (middle < high[rows])]
    return torch.lerp(x, x_adv, rowwise(high, x))


def _normal(functional: FunctionalLoss, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit normals `(B, ...)` of the boundary with the most likely other class, and which are NaN `(B,)`."""
    logits = _logits(functional, x)
    rival = _without(logits, own).argmax(1)
    _, gradients = _gradients(functional, x, torch.stack([own, rival], 1))
    w = gradients[:, 1] - gradients[:, 0]
    normal = torch.nn.functional.normalize(w.flatten(1), eps=torch.finfo(x.dtype).tiny).view_as(x)
    return normal, has_nan(w) | has_no_class(logits)
