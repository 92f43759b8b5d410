"""Extreme eigenpairs of symmetric maps, many maps together: block Lanczos with thick restarts.

Krylov spaces of a block of vectors, so that repeated eigenvalues are found as often as they are wanted, kept
orthonormal to rounding; Ritz values of the map itself on that basis, not of a recurrence. The input Hessian of a
ReLU network has the eigenvalue 0 nearly N times, and its Krylov spaces end after a few steps: a direction that
brings nothing new is replaced by a random one.
Wu and Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. 22, 2000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure._diagnostics.warning import warn


class Ritz(NamedTuple):
    """Eigenpairs of the maps restricted to the spaces that were searched, of m dimensions."""

    values: Tensor
    """(G, m) ascending; the first `low` and the last `high` are eigenvalues."""
    vectors: Tensor
    """(G, m, N), orthonormal."""


def extremes(
    product: Callable[[Tensor], Tensor], start: Tensor, *, low: int, high: int, block: int, tolerance: float
) -> Ritz:
    """Find the `low` smallest and the `high` largest eigenvalues of each of G symmetric maps.

    Args:
        product: applies the maps to float64 vectors `(G, n, N)`.
        start: `(G, n, N)`, n <= block, vectors that the searched spaces shall contain; zeros count for nothing.
        low, high: how many; together at most N.
        block: vectors that are multiplied together; eigenvalues are found with a multiplicity up to it.
        tolerance: on the residual `||H v - value v||` in units of the largest |eigenvalue|; an eigenvalue's error is
            of the order of its square where no other lies near.

    Warns:
        RuntimeWarning: if rounding, or a limit of 4 N products, left a residual above 1e-3 of the largest eigenvalue.
    """
    G, _, N = start.shape
    generator = torch.Generator(start.device).manual_seed(0)
    block = min(block, N)
    room = min(N, low + high + max(8 * block, 64))
    # One pair more at each end must converge: a start that is itself an eigenvector converges at once, to anything.
    ends = (low + 1 if low else 0, high + 1 if high else 0)
    basis = image = start.new_empty(G, 0, N)
    fill = torch.randn(G, block - start.shape[1], N, generator=generator, dtype=start.dtype, device=start.device)
    new = _orthonormal(torch.cat([start, fill], 1), basis, start.new_zeros(G), generator)
    products = 0
    while True:
        new_image = product(new)
        products += new.shape[1]
        basis, image = torch.cat([basis, new], 1), torch.cat([image, new_image], 1)
        projected = basis @ image.mT
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        rotation, m = rotation.mT, basis.shape[1]
        if m == N:
            break
        scale = values.abs().amax(1)
        outer = [*range(m)] if sum(ends) >= m else [*range(ends[0]), *range(m - ends[1], m)]
        residual = rotation[:, outer] @ image - values[:, outer, None] * (rotation[:, outer] @ basis)
        error = residual.norm(dim=2).amax(1)
        # What is not symmetric is rounding, below which no residual can go.
        noise = (projected - projected.mT).flatten(1).norm(dim=1) * N**0.5 / m
        settled = bool((error <= torch.maximum(tolerance * scale, 2 * noise)).all())
        if m >= sum(ends) and (settled or products >= 4 * N):
            uncertain = error > max(tolerance, 1e-3) * scale
            if bool(uncertain.any()):
                warn(
                    f"eigenvalues are uncertain by up to {float((error / scale)[uncertain].max()):.0e} of the largest, "
                    f"after {products} products: use float64 weights and images",
                    RuntimeWarning,
                )
            break
        floor = 0.1 / block * tolerance * scale  # below it, what is left out keeps no residual from converging
        new = _orthonormal(new_image[:, : N - m], basis, floor, generator)
        if m + new.shape[1] > room:
            spare = (room - low - high) // (6 if low and high else 3)
            kept = [i for i in range(m) if i < (low and low + spare) or i >= m - (high and high + spare)]
            basis, image = rotation[:, kept] @ basis, rotation[:, kept] @ image
    return Ritz(values, rotation @ basis)


def _orthonormal(block: Tensor, basis: Tensor, floor: Tensor, generator: torch.Generator) -> Tensor:
    """Make `block` `(G, n, N)` orthonormal and orthogonal to `basis`; random where less than `floor` `(G,)` is left."""
    for _ in range(2):  # once more, as a short remainder is orthogonal in proportion to its length only
        for _ in range(2):
            block = block - (block @ basis.mT) @ basis
        q, r = torch.linalg.qr(block.mT)
        lost = r.diagonal(dim1=1, dim2=2).abs() <= floor[:, None]
        block, floor = q.mT, torch.zeros_like(floor)
        if bool(lost.any()):
            random = torch.randn(block.shape, generator=generator, dtype=block.dtype, device=block.device)
            block = torch.where(lost[..., None], random, block)
    return block
