"""The input Hessian by first principles: the reference of the curvature measures."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from networks import Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def hessians(case: Case, loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy) -> Tensor:
    """(B, N, N) in float64, one sample at a time."""
    model = copy.deepcopy(case.model).double().eval()
    N = case.x[0].numel()

    def hessian(x: Tensor, y: Tensor) -> Tensor:
        # Twice in reverse: torch.func.hessian goes forward, for which torch 2.14 loads code that it calls deprecated.
        def loss(point: Tensor) -> Tensor:
            return loss_fn(model(point[None]), y[None])[0]

        return torch.func.jacrev(torch.func.jacrev(loss))(x.double()).reshape(N, N)

    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
        return torch.stack([hessian(x, y) for x, y in zip(case.x, case.y, strict=True)]).detach()


class Quadratic(NamedTuple):
    """A model and a loss that make l(x) = x.A x / 2 + b.x, whatever the label."""

    A: Tensor
    b: Tensor

    def case(self, batch: int) -> Case:
        return Case(nn.Flatten(), torch.rand(batch, *self.b.shape, dtype=self.b.dtype), torch.zeros(batch).long())

    def loss(self, points: Tensor, _: Tensor) -> Tensor:
        return ((points @ self.A) * points).sum(1) / 2 + points @ self.b


def quadratic(eigenvalues: Tensor, seed: int = 0) -> Quadratic:
    """A quadratic with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    N = len(eigenvalues)
    axes, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    return Quadratic(axes @ eigenvalues.double().diag() @ axes.T, torch.randn(N, generator=generator).double())
