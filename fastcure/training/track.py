"""Curvature and robustness on a fixed set of images, epoch by epoch (figure 3 of the CURE paper's supplement)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcure.analysis import curvature_along_gradient, frobenius_norm
from fastcure.attacks import pgd
from fastcure.evaluation.accuracy import accuracy

PROBES = 20
PAPER_EPS = 8 / 255
"""Radius of the paper's figure 3."""


def track_row(model: nn.Module, x: Tensor, y: Tensor, epoch: int, seed: int, eps: float) -> dict[str, Any]:
    """Measure mean ||H||_F, mean ||H z||, and accuracy under PGD-10 at `eps` and at the paper's radius.

    No random number but its own is drawn and nothing of the model changes, so that training goes on as without it.

    Args:
        model: the network.
        x: uint8 `(N, C, H, W)`.
        y: labels.
        epoch: epochs of fine-tuning behind.
        seed: of the probes and the attacks.
        eps: the radius at which the run is followed.
    """
    images, generator = x.float() / 255, torch.Generator().manual_seed(seed)

    def robust(eps: float) -> float:
        return accuracy(model, x, y, partial(pgd, eps=eps, steps=10, generator=torch.Generator().manual_seed(seed)))

    followed = robust(eps)
    return {
        "epoch": epoch,
        "images": len(x),
        "frobenius": float(frobenius_norm(model, images, y, probes=PROBES, generator=generator).value.mean()),
        "along_z": float(curvature_along_gradient(model, images, y).value.mean()),
        "clean": accuracy(model, x, y),
        "eps": eps,
        "pgd": followed,
        "pgd_paper": followed if eps == PAPER_EPS else robust(PAPER_EPS),
    }
