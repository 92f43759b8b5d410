"""Norms of the loss's Hessian in the input: over all directions, or along the gradient's sign (figure 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fastcure_kernels import direction
from torch import Tensor, nn

from fastcure._functional import LossFn, cross_entropy
from fastcure._inference_mode import outside_inference_mode
from fastcure.analysis.products import Method, Products, Progress, by_samples, check_measurement, copies_for


class FrobeniusNorm(NamedTuple):
    """What `frobenius_norm` returns, in float64."""

    value: Tensor
    """(B,), an estimate of ||H||_F."""
    standard_error: Tensor
    """(B,), of the estimate."""


class GradientCurvature(NamedTuple):
    """What `curvature_along_gradient` returns, in float64."""

    value: Tensor
    """(B,), ||H z||_2."""


@outside_inference_mode
def frobenius_norm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    probes: int = 100,
    method: Method = "exact",
    h: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int = 256,
    loss_fn: LossFn = cross_entropy,
    progress: Progress | None = None,
) -> FrobeniusNorm:
    """Estimate ||H||_F of each sample's loss as the root of the mean of ||H v||^2 over Gaussian v.

    E ||H v||^2 = ||H||_F^2 for v ~ N(0, I). The standard error is that of the mean, divided by twice the value
    (delta method). Costs 2 forward passes per probe and at most a fifth more. A finite probe is stepped at the L2
    length h and its difference scaled to the length of v: a Gaussian step would be sqrt(N) times too long.

    Args:
        model, x, y, method, h, chunk_size, loss_fn, progress: see `curvature_profile`.
        probes: Gaussian vectors per sample, at least 2.
        generator: source of the probes, which depend on neither `chunk_size` nor the other samples; torch's default
            if None.

    Raises:
        TypeError, ValueError, FloatingPointError, RuntimeError: see `curvature_profile`.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> norm = fastcure.analysis.frobenius_norm(model, x, y, probes=10)
        >>> norm.value.shape, norm.standard_error.shape
        (torch.Size([5]), torch.Size([5]))
    """
    check_measurement(x, y, method, h, chunk_size, loss_fn)
    if probes < 2:
        raise ValueError(f"probes must be >= 2, for a standard error, got {probes}")
    source = torch.device("cpu") if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (len(x),), generator=generator, device=source).tolist()
    copies = copies_for(probes, chunk_size, min(chunk_size, len(x)))

    def measure(product: Products, part: slice) -> tuple[Tensor]:
        streams = [torch.Generator(x.device).manual_seed(seed) for seed in seeds[part]]

        def draw(count: int) -> Tensor:
            # A call for each vector: torch's normals depend on how many are drawn at once.
            return torch.stack([torch.stack([normal(s) for _ in range(count)]) for s in streams]).double()

        def normal(stream: torch.Generator) -> Tensor:
            return torch.randn(x[0].numel(), generator=stream, dtype=torch.float32, device=x.device)

        passes = [min(copies, probes - done) for done in range(0, probes, copies)]
        return (torch.cat([product(draw(count)).square().sum(2) for count in passes], 1),)

    groups: dict[str, Any] = {"samples": chunk_size // copies, "copies": copies}
    (squares,) = by_samples(measure, model, x, y, loss_fn=loss_fn, **groups, h=h, progress=progress)
    value = squares.mean(1).sqrt()
    error = squares.std(1) / probes**0.5 / (2 * torch.where(value == 0, 1.0, value))
    return FrobeniusNorm(value, error)


@outside_inference_mode
def curvature_along_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    method: Method = "exact",
    h: float | Tensor | None = None,
    chunk_size: int = 256,
    loss_fn: LossFn = cross_entropy,
    progress: Progress | None = None,
) -> GradientCurvature:
    """Compute ||H z|| of each sample's loss, z = sign(g) / ||sign(g)||_2: what CURE penalises.

    Zero where g is zero. With `method="finite"` it is the root of the penalty divided by h. Costs 4 forward passes.

    Args:
        model, x, y, method, h, chunk_size, loss_fn, progress: see `curvature_profile`.

    Raises:
        TypeError, ValueError, FloatingPointError, RuntimeError: see `curvature_profile`.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> fastcure.analysis.curvature_along_gradient(model, x, y).value.shape
        torch.Size([5])
    """
    check_measurement(x, y, method, h, chunk_size, loss_fn)

    def measure(product: Products, _: slice) -> tuple[Tensor]:
        return (product(direction(product.gradient)[:, None]).norm(dim=2).squeeze(1),)

    options: dict[str, Any] = {"samples": chunk_size, "copies": 1}
    return GradientCurvature(*by_samples(measure, model, x, y, loss_fn=loss_fn, **options, h=h, progress=progress))
