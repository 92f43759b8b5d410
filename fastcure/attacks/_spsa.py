"""SPSA: an attack that sees a network's outputs only (Uesato et al., ICML 2018)."""

from __future__ import annotations

import torch
from fastcure_kernels import linf_step
from torch import Tensor, nn

from fastcure._diagnostics.first_pass import look_before_attack
from fastcure._functional import FunctionalLoss, evaluation_mode, unwrap
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import Bounds, check_batch, check_labels, check_pixels, check_positive
from fastcure.attacks._arguments import check_bounds, check_counts, check_numbers, has_nan, rowwise
from fastcure.attacks._margin import margin_loss

DECAY = 0.9
"""Of the running mean of gradient estimates: one of them is mostly noise."""


@outside_inference_mode
@torch.no_grad()
def spsa(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor = 8 / 255,
    *,
    steps: int = 20,
    samples: int = 128,
    delta: float = 0.01,
    step_size: float | Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
    chunk_size: int = 1024,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ascend the margin loss within the L-infinity eps-ball, its gradient estimated from differences of outputs.

    The estimate is the mean of `(l(x + delta v) - l(x - delta v)) v / (2 delta)` over random sign vectors v. As it
    uses no gradient of the network it is not misled by one that is zero or wrong. A sample stops where it is first
    misclassified; until then a step costs `2 samples + 1` forward passes.

    Args:
        model: the network, normalisation inside.
        x: `(B, ...)` images within `bounds`.
        y: class indices `(B,)` or probabilities `(B, C)`.
        eps: radius in pixels, a number or `(B,)`.
        steps: at most.
        samples: sign vectors of each estimate.
        delta: length of the difference in each pixel; the points compared may leave `bounds` by as much.
        step_size: in pixels; 2.5 eps / steps by default.
        bounds: range of pixel values.
        chunk_size: images of one forward pass, which bounds the memory.
        generator: source of the signs, on any device; torch's default if None.

    Returns:
        `(B, ...)` in the dtype of `x`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
        FloatingPointError: if an output was not a number.

    Warns:
        UserWarning: as `pgd` does.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> adversarial = fastcure.attacks.spsa(model, x, y, eps=8 / 255, steps=5, samples=16)
        >>> bool((adversarial - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    check_batch(x, y, None)
    check_labels(y, len(x))
    check_positive("eps", eps, batch=len(x), zero=True)
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)
    check_positive("step_size", step_size, batch=len(x), zero=True)
    check_positive("delta", delta)
    check_counts(steps=steps, samples=samples)
    if chunk_size < 2:
        raise ValueError(f"chunk_size must be >= 2, a pair of images, got {chunk_size}")
    check_bounds(bounds)
    check_pixels(x, bounds)
    model = unwrap(model)
    functional = FunctionalLoss(model, margin_loss, trainable=False)
    look_before_attack(functional, x)
    random = _seeded(generator, x.device)
    radius, length = (torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x)) for v in (eps, step_size))

    adv, mean = x.detach().clone(), torch.zeros_like(x)
    bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    left = torch.arange(len(x), device=x.device)
    with evaluation_mode(model):
        for _ in range(steps):
            loss = torch.cat([functional(adv[part], y[part])[1] for part in left.split(chunk_size)])
            bad[left] |= loss.isnan()
            left = left[loss <= 0]
            if not len(left):
                break
            g = _estimate(functional, adv[left], y[left], samples, delta, chunk_size // 2, random)
            mean[left] = torch.lerp(g, mean[left], DECAY)
            adv[left] = linf_step(adv[left], mean[left], x[left], length[left], radius[left], *bounds)
            bad[left] |= has_nan(g)
    check_numbers(bad)
    return adv


def _estimate(
    functional: FunctionalLoss, x: Tensor, y: Tensor, samples: int, delta: float, pairs: int, random: torch.Generator
) -> Tensor:
    """Return the estimated gradient `(B, ...)` from `samples` pairs of points a sample, `pairs` of them at a time."""
    g = torch.zeros_like(x)
    for rows in torch.arange(len(x) * samples, device=x.device).split(pairs):
        index = rows // samples
        signs = 2 * torch.randint(2, (len(index), *x.shape[1:]), generator=random, device=x.device).to(x.dtype) - 1
        points = torch.cat([x[index] + delta * signs, x[index] - delta * signs])
        above, below = functional(points, y[index.repeat(2)])[1].chunk(2)
        slope = ((above - below) / (2 * delta * samples)).to(x.dtype)
        g.index_add_(0, index, rowwise(slope, x) * signs)
    return g


def _seeded(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """Return a generator on `device` whose seed is drawn from another, or from torch's default."""
    source = generator.device if generator is not None else None
    seed = torch.randint(2**62, (), generator=generator, device=source)
    return torch.Generator(device).manual_seed(int(seed))
