"""Gradient-sign and projected-gradient attacks (Goodfellow et al., ICLR 2015; Madry et al., ICLR 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from fastcure_kernels import l2_start, l2_step, linf_start, linf_step
from torch import Tensor, nn

from fastcure.checks import check_batch, check_positive
from fastcure.objective import LossFn, Objective, cross_entropy, evaluation_mode, unwrap

Norm = Literal["linf", "l2"]


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor = 8 / 255,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
    loss_fn: LossFn = cross_entropy,
) -> Tensor:
    """One step of `eps` along the sign of the gradient, clipped to `bounds`; costs 2 forward passes.

    Arguments, result and errors are those of `pgd`.
    """
    return pgd(model, x, y, eps, step_size=eps, steps=1, random_start=False, bounds=bounds, loss_fn=loss_fn)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor = 8 / 255,
    step_size: float | Tensor | None = None,
    steps: int = 10,
    norm: Norm = "linf",
    restarts: int = 1,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
    *,
    loss_fn: LossFn = cross_entropy,
) -> Tensor:
    """Projected gradient ascent of the loss within the eps-ball around `x`.

    The model is attacked in evaluation mode; its flags, buffers and `.grad`s come back as they were. Only input
    gradients are computed: `2 steps` forward passes' worth for one start, `2 steps + 1` for each of several.

    Args:
        model: the network, normalisation inside.
        x: `(B, ...)` images within `bounds`.
        y: class indices `(B,)` or probabilities `(B, C)`.
        eps: radius in pixels (linf) or as an L2 length (l2); a number or `(B,)`.
        step_size: the same units; 2.5 eps / steps by default.
        steps: gradient steps of each start.
        norm: "linf" or "l2".
        restarts: number of starts; of each sample the best is kept, a misclassified one before one of higher loss.
        random_start: start at a uniform point of the ball; False starts at x.
        bounds: range of pixel values.
        generator: source of the random starts, on the CPU or x's device; torch's default if None.
        loss_fn: `(logits, y) -> (B,)`.

    Returns:
        `(B, ...)`, detached, in the dtype and memory format of `x`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
        FloatingPointError: if a gradient was not a number: standing still there would make the model look robust.
    """
    check_batch(x, y, None)
    check_positive("eps", eps, batch=len(x), zero=True)
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)
    check_positive("step_size", step_size, batch=len(x), zero=True)
    for name, count in (("steps", steps), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} without random_start would repeat one attack: use restarts=1")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (lower, upper) with lower < upper, got {bounds}")
    start, ascend = (linf_start, linf_step) if norm == "linf" else (l2_start, l2_step)
    model = unwrap(model)
    objective = Objective(model, loss_fn, trainable=False)
    x = x.detach()

    best, best_score = x, None
    with evaluation_mode(model, loss_fn):
        for _ in range(restarts):
            adv = start(x, eps, *bounds, generator=generator) if random_start else x
            for _ in range(steps):
                adv = ascend(adv, _input_gradient(objective, adv, y), x, step_size, eps, *bounds)
            if restarts == 1:
                best = adv
                break
            score = _score(objective, adv, y)
            if best_score is None:
                best, best_score = adv, score
            else:
                better = score > best_score
                best = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), adv, best)
                best_score = torch.where(better, score, best_score)
    _check_numbers(best)
    return best


def _input_gradient(objective: Objective, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        return torch.autograd.grad(objective(point, y)[1].sum(), point)[0]


@torch.no_grad()
def _score(objective: Objective, x: Tensor, y: Tensor) -> Tensor:
    """Return how good an adversarial image is `(B,)`: its loss, with all misclassified above all that are not."""
    logits, loss = objective(x, y)
    labels = y.argmax(1) if y.is_floating_point() else y
    return torch.sigmoid(loss.double()) + (logits.argmax(1) != labels)


def _check_numbers(adv: Tensor) -> None:
    bad = adv.flatten(1).isnan().any(1).nonzero().flatten()
    if len(bad):
        raise FloatingPointError(
            f"the gradient of {len(bad)} of {len(adv)} samples is NaN (the first: sample {int(bad[0])}), so nothing is "
            "known of their robustness: check the model's weights and dtype (fp16 overflows at 65504)"
        )
