"""Loss surfaces: the negative loss on a plane across the decision boundary (figure 2 of the CURE paper)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastcure._diagnostics.first_pass import look_before_measure, takes_logits
from fastcure._functional import FunctionalLoss, LossFn, cross_entropy, evaluation_mode, unwrap
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import Bounds, check_pixels, check_positive
from fastcure.analysis.products import check_measurement
from fastcure.attacks._arguments import check_bounds


class LossSurface(NamedTuple):
    """What `loss_surface` returns; x itself lies in the middle, at a = b = 0."""

    values: Tensor
    """(B, P, P): -l(x + a[i] normal + b[j] v) at [:, i, j]."""
    a: Tensor
    """(P,), L2 lengths along the normal; it points across the boundary."""
    b: Tensor
    """(P,), L2 lengths along v."""
    directions: Tensor
    """(B, 2, ...), the unit vectors normal and v."""


@outside_inference_mode
def loss_surface(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    normal: Tensor | None = None,
    span: float = 2.0,
    points: int = 41,
    generator: torch.Generator | None = None,
    chunk_size: int = 256,
    bounds: Bounds = (0.0, 1.0),
    loss_fn: LossFn = cross_entropy,
) -> LossSurface:
    """Evaluate -l on the plane through x of the boundary's normal and a random direction orthogonal to it.

    Args:
        model, x, y, loss_fn: see `curvature_profile`.
        normal: `(B, ...)` normals, of any length but 0; None asks `fastcure.attacks.deepfool` for them.
        span: largest L2 length along each axis, in input units.
        points: P along each axis, odd, so that x is one of them.
        generator: source of the random directions, on the CPU or x's device; torch's default if None.
        chunk_size: images that go through the model together.
        bounds: range of the pixels of x. Points of the plane are not clipped to it.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or the model is random in
            evaluation mode.
        FloatingPointError: if a loss is not a finite number.

    Warns:
        UserWarning: once per model, if it returns probabilities in place of logits.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> fastcure.analysis.loss_surface(model, x, y, points=5).values.shape
        torch.Size([5, 5, 5])
    """
    check_measurement(x, y, "exact", None, chunk_size, loss_fn)
    check_bounds(bounds)
    check_pixels(x, bounds)
    check_positive("span", span)
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd, so that x is one of them, and >= 3, got {points}")
    model = unwrap(model)
    if normal is None:
        from fastcure.attacks._deepfool import deepfool

        normal = deepfool(model, x, bounds=None if bounds == (0.0, 1.0) else (-math.inf, math.inf)).normal
    if normal.shape != x.shape:
        raise ValueError(f"normal must have the shape of x {tuple(x.shape)}, got {tuple(normal.shape)}")

    first = normal.detach().flatten(1).to(x.dtype)
    length = first.norm(dim=1, keepdim=True)
    if not bool((length > 0).all()):
        i = int((~(length > 0)).flatten().nonzero()[0])
        raise ValueError(f"normal must be a direction, got one of length {float(length[i])} for sample {i}")
    first = first / length
    source = x.device if generator is None else generator.device
    second = torch.randn(first.shape, generator=generator, device=source).to(first)
    for _ in range(2):
        second = second - (second * first).sum(1, keepdim=True) * first
        second = second / second.norm(dim=1, keepdim=True)

    axis = torch.linspace(-span, span, points, dtype=x.dtype, device=x.device)
    axis[points // 2] = 0.0
    functional = FunctionalLoss(model, loss_fn, trainable=False)
    look_before_measure(functional, x, logits=takes_logits(loss_fn), pixels=False)
    flat, losses = x.flatten(1), []
    with torch.no_grad(), evaluation_mode(model, loss_fn):
        for index in torch.arange(len(x) * points**2, device=x.device).split(chunk_size):
            sample, a, b = index // points**2, index // points % points, index % points
            at = flat[sample] + axis[a, None] * first[sample] + axis[b, None] * second[sample]
            losses.append(functional(at.view(-1, *x.shape[1:]), y[sample])[1])
    values = -torch.cat(losses).view(len(x), points, points)
    if not bool(values.isfinite().all()):
        i = int((~values.isfinite()).flatten(1).any(1).nonzero()[0])
        raise FloatingPointError(
            f"a loss on the plane through sample {i} is NaN or infinite: check its pixels, the model's weights and the "
            f"dtype (fp16 overflows at 65504), or take a span below {span:g}"
        )
    return LossSurface(values, axis, axis.clone(), torch.stack([first, second], 1).view(len(x), 2, *x.shape[1:]))
