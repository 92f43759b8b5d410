"""Training steps to compare: each computes the parameter gradients of one batch, and nothing else.

A step is `(model, x, y) -> None` and leaves its gradients in `.grad`. Batch norm is in training mode wherever the
method trains in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcure import CURE
from fastcure.objectives import FGSMRS, PGD, Objective

Step = Callable[[nn.Module, Tensor, Tensor], None]
H, GAMMA = 1.25, 4.0


def standard(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Cross-entropy."""
    model.train()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def compiled_standard() -> Step:
    """Return the standard step with the model under `torch.compile`."""
    programs: dict[int, nn.Module] = {}

    def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
        program = programs.setdefault(id(model), torch.compile(model, dynamic=False))  # type: ignore[arg-type]
        standard(program, x, y)

    return step


def cure(engine: str = "eager", batch_stats: str = "frozen", **options: Any) -> Step:
    """Return a step of ours; `options` as in `fastcure.CURE`."""

    def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model.train()
        model.zero_grad()
        CURE(model, H, GAMMA, engine=engine, batch_stats=batch_stats, **options)(x, y).total.backward()

    return step


def published(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The schedule of CURE's published code, written from its description: nothing is shared.

    One forward in training mode for the loss; one in evaluation mode with a full backward, parameters included, for
    the direction; two more with `create_graph` for the difference; and a fifth that is not used. Sums over the batch,
    the un-squared norm, and no normalisation of the direction's length by exact zeros, as there.
    """
    model.train()
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)

    model.eval()
    point = x.detach().clone().requires_grad_()
    F.cross_entropy(model(point), y, reduction="sum").backward()
    assert point.grad is not None
    z = point.grad.sign()
    z = H * z / (z.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) + 1e-7)
    model.zero_grad()
    model(x)  # the fifth

    point = x.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no double backward
        stepped = F.cross_entropy(model(point + z), y, reduction="sum")
        original = F.cross_entropy(model(point), y, reduction="sum")
    (difference,) = torch.autograd.grad(stepped - original, point, create_graph=True)
    penalty = difference.flatten(1).norm(dim=1).mean()
    (loss + GAMMA * penalty).backward()
    model.train()


def adversarial(kind: type[Objective], **options: Any) -> Step:
    """Return a step of adversarial training at 8/255."""

    def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
        model.train()
        model.zero_grad()
        kind(model, eps=8 / 255, **options)(x, y).total.backward()

    return step


STEPS: dict[str, Step] = {
    "standard": standard,
    "cure, split (ours)": cure("auto", "split"),
    "cure, train (ours)": cure("auto", "train"),
    "cure, 1/4 (ours)": cure("auto", fraction=0.25),
    "cure, 1/4, at FGSM (ours)": cure("auto", fraction=0.25, loss_at="step"),
    "cure, reference": cure("reference"),
    "cure, published schedule": published,
    "fgsm-rs": adversarial(FGSMRS),
    "pgd-7": adversarial(PGD, steps=7),
    "pgd-10": adversarial(PGD, steps=10),
}
