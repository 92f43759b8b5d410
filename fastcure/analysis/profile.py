"""Curvature profiles: the eigenvalues of the loss's Hessian in the input (figure 1 of the CURE paper)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._functional import LossFn, cross_entropy
from fastcure._inference_mode import outside_inference_mode
from fastcure.analysis.lanczos import extremes
from fastcure.analysis.products import Method, Products, Progress, by_samples, check_measurement, copies_for


class CurvatureProfile(NamedTuple):
    """What `curvature_profile` returns, in float64."""

    eigenvalues: Tensor
    """(B, N) ascending, or (B, 2k): the k smallest and the k largest."""
    mean: Tensor
    """(N,) or (2k,), over the samples."""


@outside_inference_mode
def curvature_profile(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    method: Method = "exact",
    h: float | Tensor | None = None,
    k: int | None = None,
    chunk_size: int = 256,
    loss_fn: LossFn = cross_entropy,
    progress: Progress | None = None,
) -> CurvatureProfile:
    """Compute the eigenvalues of the input Hessian of each sample's loss.

    The full spectrum costs 2 N forward passes per sample, and N^2 numbers; for more than about a thousand pixels ask
    for the extremes. The finite map v -> (g(x + h v) - g(x)) / h is not linear and its matrix A, whose columns are
    the images of unit vectors, is not symmetric: the finite spectrum is that of (A + A^T) / 2. Finite extremes are
    NOT those of that matrix but Ritz values: the extreme eigenvalues of (Q^T A(Q) + A(Q)^T Q) / 2, A applied to an
    orthonormal basis Q of the space in which Lanczos found the exact Hessian's extremes (and which holds g).

    Args:
        model: the network, normalisation inside, which returns logits; used in evaluation mode and left as it was.
        x: `(B, ...)` images of N values, pixels in [0, 1]. Others are warned of once per model.
        y: class indices `(B,)` or probabilities `(B, C)`; whatever `loss_fn` takes.
        method: "exact" differentiates twice; "finite" takes a step `h`, and needs no second derivative if k is None.
        h: L2 length of the finite step, `> 0`, one number or one per sample.
        k: how many of each end, `1 <= k <= N / 2`; None for all.
        chunk_size: pairs of a sample and a vector that go through the model together.
        loss_fn: `(logits, y) -> (B,)`.
        progress: wraps the loop over groups of samples, as `tqdm` does.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or the model is random in
            evaluation mode: its noise would pass for curvature.
        FloatingPointError: if a loss, gradient or curvature is not a finite number.
        RuntimeError: from torch, if an operator of the model has no second derivative.

    Warns:
        UserWarning: once per model, if it returns probabilities in place of logits.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> fastcure.analysis.curvature_profile(model, x, y).eigenvalues.shape  # 16 pixels
        torch.Size([5, 16])
        >>> fastcure.analysis.curvature_profile(model, x, y, k=2).mean.shape  # the 2 smallest and the 2 largest
        torch.Size([4])
    """
    check_measurement(x, y, method, h, chunk_size, loss_fn)
    N = x[0].numel()
    if k is None:
        copies = copies_for(N, chunk_size)
        samples = chunk_size // copies
    elif 1 <= k <= N // 2:
        copies = min(chunk_size, max(k, 2))
        # Finite Ritz values depend on the basis, which must not depend on a sample's neighbours.
        samples = chunk_size // copies if method == "exact" else 1
    else:
        raise ValueError(f"k must be in 1..{N // 2}, half of the {N} values of a sample, got {k}")

    def measure(product: Products, _: slice) -> tuple[Tensor]:
        if k is None:
            units = torch.eye(N, dtype=torch.float64, device=x.device).expand(len(product.loss), N, N)
            return (_eigenvalues(product(units)),)
        tolerance = torch.finfo(x.dtype).eps ** 0.5
        start = product.gradient[:, None]
        values, basis = extremes(product.exact, start, low=k, high=k, block=max(k, 2), tolerance=tolerance)
        if method == "finite":
            values = _eigenvalues(basis @ product.finite(basis).mT)
        return (torch.cat([values[:, :k], values[:, -k:]], 1),)

    options: dict[str, Any] = {"samples": samples, "copies": copies, "h": h, "graph": h is None or k is not None}
    (eigenvalues,) = by_samples(measure, model, x, y, loss_fn=loss_fn, progress=progress, **options)
    return CurvatureProfile(eigenvalues, eigenvalues.mean(0))


def _eigenvalues(matrix: Tensor) -> Tensor:
    """Return those of the symmetric part of `(G, n, n)`."""
    return torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
