"""Bounds on the perturbation that a curved loss needs to reach a threshold (theorem 1 of the CURE paper)."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._functional import LossFn, cross_entropy, evaluation_mode, find_logits, unwrap
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import check_classes, check_labels
from fastcure.analysis.lanczos import extremes
from fastcure.analysis.products import Products, Progress, by_samples, check_measurement
from fastcure.attacks._arguments import hard_labels


class Bounds(NamedTuple):
    """L2 lengths `(B,)` in float64; infinite where the threshold cannot be reached, or nothing bounds it."""

    lower: Tensor
    """No shorter perturbation reaches the threshold."""
    upper: Tensor
    """A perturbation of this length reaches it."""
    lower_simple: Tensor
    """Below `lower`, and of no use where it is negative."""
    upper_simple: Tensor
    """Above `upper`."""


def quadratic_bounds(c: Tensor, g_norm: Tensor, nu: Tensor, g_along_u: Tensor) -> Bounds:
    """Bound the least ||r|| for which `-c + g.r + r.Hr / 2 >= 0`, from below and above, without solving for it.

    With nu = lambda_max(H) and u a unit eigenvector of it:

        ||g|| / nu (sqrt(1 + 2 nu c / ||g||^2) - 1)  <=  ||r||  <=  |g.u| / nu (sqrt(1 + 2 nu c / (g.u)^2) - 1)
        c / ||g|| - 2 nu c^2 / ||g||^3               <=  ||r||  <=  c / |g.u|

    written as `2 c / (||g|| + sqrt(||g||^2 + 2 nu c))`, which loses no digits as nu or g go to 0. A negative nu
    counts as 0 below and gives no upper bound. All are 0 where c = 0.

    Args:
        c: `(B,)`, >= 0, the gap to the threshold.
        g_norm: `(B,)`, ||g||.
        nu: `(B,)`.
        g_along_u: `(B,)`, g.u of either sign.

    Examples:
        >>> import torch
        >>> from fastcure.analysis import quadratic_bounds
        >>> one, nu = torch.ones(1), torch.zeros(1)
        >>> quadratic_bounds(c=one, g_norm=2 * one, nu=nu, g_along_u=2 * one).lower  # linear: c / ||g||
        tensor([0.5000])
    """
    along = torch.where(nu < 0, 0.0, g_along_u.abs())
    root = (2 * nu.clamp(min=0)).sqrt() * c.sqrt()  # a product of roots: nu c may underflow
    lower = 2 * c / (g_norm + torch.hypot(g_norm, root))
    upper = 2 * c / (along + torch.hypot(along, root))
    correction = torch.where(root == 0, 0.0, (root / g_norm).square())
    bounds = (lower, upper, c / g_norm * (1 - correction), c / along)
    return Bounds(*(torch.where(c == 0, 0.0, bound) for bound in bounds))


@outside_inference_mode
def robustness_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    kind: Literal["loss", "margin"] = "loss",
    threshold: float = math.log(2),
    target: int | Tensor | None = None,
    chunk_size: int = 256,
    loss_fn: LossFn = cross_entropy,
    progress: Progress | None = None,
) -> Bounds:
    """Bound the L2 perturbation with which the quadratic model of each sample's loss, or margin, is overcome.

    These bound the perturbation of the second-order expansion at x, not of the network itself. Curvature is exact,
    nu by Lanczos. Where its eigenspace has several dimensions (a ReLU network's margins have H = 0), u is the
    vector of it that lies nearest to g, which gives the least upper bound.

    Args:
        model, x, y, chunk_size, progress: see `curvature_profile`.
        kind: "loss" asks when the loss reaches `threshold`; "margin" when the logit of `target` reaches that of y.
        threshold: of the loss; log 2 is the cross-entropy of a probability of 1/2.
        target: class, or classes `(B,)`, other than y; None for the likeliest other one.
        loss_fn: `(logits, y) -> (B,)` of kind "loss".

    Returns:
        `Bounds(lower, upper, lower_simple, upper_simple)`; zeros where the threshold is already passed.

    Raises:
        TypeError, ValueError, FloatingPointError, RuntimeError: see `curvature_profile`.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> bounds = fastcure.analysis.robustness_bounds(model, x, y)
        >>> bool((bounds.lower <= bounds.upper).all())
        True
    """
    check_measurement(x, y, "exact", None, chunk_size, loss_fn)
    if kind == "margin":
        y, loss_fn, threshold = _opponents(model, x, y, target, chunk_size), _margin, 0.0
    elif kind != "loss":
        raise ValueError(f"kind must be 'loss' or 'margin', got {kind!r}")
    elif target is not None:
        raise ValueError(f"target is the class of kind='margin', got {target} with kind='loss'")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    eps = torch.finfo(x.dtype).eps

    def measure(product: Products, _: slice) -> tuple[Tensor, ...]:
        g = product.gradient
        values, vectors = extremes(product.exact, g[:, None], low=0, high=1, block=2, tolerance=eps**0.5)
        noise = 100 * eps * values.abs().amax(1)
        nu = values[:, -1]
        top = values >= (nu - noise)[:, None]
        along = torch.where(top, (vectors @ g[..., None]).squeeze(2), 0.0).norm(dim=1)
        nu = torch.where(nu.abs() <= noise, 0.0, nu)
        return quadratic_bounds((threshold - product.loss).clamp(min=0), g.norm(dim=1), nu, along)

    copies = min(chunk_size, 2)
    groups: dict[str, Any] = {"samples": chunk_size // copies, "copies": copies}
    return Bounds(*by_samples(measure, model, x, y, loss_fn=loss_fn, progress=progress, **groups))


def _margin(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the logit of the second class less that of the first, `classes` `(B, 2)`."""
    own, other = logits.gather(1, classes).unbind(1)
    return other - own


@torch.no_grad()
def _opponents(model: nn.Module, x: Tensor, y: Tensor, target: int | Tensor | None, chunk_size: int) -> Tensor:
    """Return label and target of each sample, `(B, 2)`."""
    model = unwrap(model)
    check_labels(y, len(x))
    labels = hard_labels(y)
    with evaluation_mode(model):
        logits = torch.cat([find_logits(model(part)) for part in x.split(chunk_size)])
    check_classes(y, logits)
    if target is None:
        target = logits.scatter(1, labels[:, None], -math.inf).argmax(1)
    targets = torch.as_tensor(target, device=x.device).long().expand(len(x))
    last = logits.shape[1] - 1
    for wrong, wanted in ((targets == labels, "differ from y"), ((targets < 0) | (targets > last), f"be in 0..{last}")):
        if bool(wrong.any()):
            raise ValueError(f"target must {wanted}, got {int(targets[wrong][0])}: name another class")
    return torch.stack([labels, targets], 1)
