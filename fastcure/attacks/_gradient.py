"""Gradient-sign and projected-gradient attacks (Goodfellow et al., ICLR 2015; Madry et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from fastcure_kernels import l2_step, linf_step
from torch import Tensor, nn

from fastcure._cuda_graphs import CudaRecorder
from fastcure._diagnostics.first_pass import look_before_attack, takes_logits
from fastcure._folding.layers import folded_layers
from fastcure._functional import FunctionalLoss, LossFn, cross_entropy, evaluation_mode, input_gradient, unwrap
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import Bounds, check_batch, check_labels, check_pixels, check_positive
from fastcure.attacks._arguments import Norm, check_bounds, check_counts, check_result, hard_labels, has_nan, rowwise
from fastcure.attacks._margin import margin_loss
from fastcure.attacks._random_start import uniform_in_ball
from fastcure.attacks._replay import REPLAYED


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor = 8 / 255,
    *,
    bounds: Bounds = (0.0, 1.0),
    loss_fn: LossFn = cross_entropy,
    targeted: bool = False,
    eot: int = 1,
) -> Tensor:
    """One step of `eps` along the sign of the gradient, clipped to `bounds`; costs 2 forward passes.

    Arguments, result and errors are those of `pgd`.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> adversarial = fastcure.attacks.fgsm(model, x, y, eps=8 / 255)
        >>> bool((adversarial - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    options: dict[str, Any] = {"bounds": bounds, "loss_fn": loss_fn, "targeted": targeted, "eot": eot}
    return pgd(model, x, y, eps, step_size=eps, steps=1, random_start=False, **options)


@outside_inference_mode
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
    bounds: Bounds = (0.0, 1.0),
    generator: torch.Generator | None = None,
    *,
    loss_fn: LossFn = cross_entropy,
    targeted: bool = False,
    eot: int = 1,
    cuda_graph: bool | None = None,
) -> Tensor:
    """Projected gradient ascent of the loss within the eps-ball around `x`.

    The model is attacked in evaluation mode, with what `fastcure.prepare` found in it folded; its flags, buffers and
    `.grad`s come back as they were. Only input gradients are computed: `2 steps` forward passes' worth for one start,
    `2 steps + 1` for each of several, times `eot`. It may be called inside torch.inference_mode, which it leaves.

    Images outside of `bounds` are an error: on the CPU before the first step; on a GPU after the last one, where the
    host waits for the device in any case. Rounding, 1e-3 of the range or the dtype's epsilon, is allowed.

    Args:
        model: the network, normalisation inside.
        x: `(B, ...)` images within `bounds`.
        y: the right classes: indices `(B,)` or probabilities `(B, C)`; the wanted ones if `targeted`. With a `loss_fn`
            of your own and one start, whatever that takes.
        eps: radius in pixels (linf) or as an L2 length (l2); a number or `(B,)`.
        step_size: the same units; 2.5 eps / steps by default.
        steps: gradient steps of each start.
        norm: "linf" or "l2".
        restarts: number of starts; of each sample the best is kept: one that succeeds before one that does not, then
            the one of higher (targeted: lower) loss.
        random_start: start at a uniform point of the ball; False starts at x.
        bounds: range of pixel values.
        generator: source of the random starts, on any device; torch's default for x's device if None.
        loss_fn: `(logits, y) -> (B,)`, such as `margin_loss`.
        targeted: descend the loss towards the classes `y`; success is to be classified as them.
        eot: passes whose mean is each gradient, and by whose mean the starts are compared: for a model that is random
            on purpose, whose gradient in one pass is mostly noise (expectation over transformation, Athalye et al.,
            ICML 2018). Its random numbers are torch's own, not those of `generator`.
        cuda_graph: on a GPU, capture the step once for each model and shape and replay it, since launches take longer
            than the work. It reserves memory, and Python code of the model runs only once. By default it is done when
            a call of a kind comes for the third time, if a replayed step equals the eager one, and never with `eot`.

    Returns:
        `(B, ...)`, detached, in the dtype and memory format of `x`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
        FloatingPointError: if a gradient, or with restarts a loss, was not a number: standing still there would make
            the model look robust.

    Warns:
        UserWarning: once per model, if it returns probabilities in place of logits, or is random in evaluation mode
            and `eot` is 1.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> adversarial = fastcure.attacks.pgd(model, x, y, eps=8 / 255, steps=20, restarts=2)
        >>> bool((adversarial - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    check_batch(x, y, None)
    if loss_fn in (cross_entropy, margin_loss) or restarts > 1:
        check_labels(y, len(x))
    check_positive("eps", eps, batch=len(x), zero=True)
    if step_size is None:
        step_size = 2.5 * eps / max(steps, 1)
    check_positive("step_size", step_size, batch=len(x), zero=True)
    check_counts(steps=steps, restarts=restarts, eot=eot)
    if cuda_graph and eot > 1:
        raise ValueError(f"cuda_graph=True has no eot={eot}: leave one of them out")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} without random_start would repeat one attack: use restarts=1")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    check_bounds(bounds)
    if x.device.type == "cpu":
        check_pixels(x, bounds)
    if cuda_graph and not x.is_cuda and REPLAYED.captures.recorder is CudaRecorder:
        raise ValueError(f"cuda_graph=True wants tensors on cuda, got {x.device}: leave it out")
    move = linf_step if norm == "linf" else l2_step
    step = -step_size if targeted else step_size
    model = unwrap(model)
    functional = FunctionalLoss(model, loss_fn, trainable=False)
    look_before_attack(functional, x, logits=takes_logits(loss_fn), random=eot > 1)
    x = x.detach()

    def one_step(functional: FunctionalLoss, adv: Tensor, x: Tensor, y: Tensor, step: Any, eps: Any) -> Tensor:
        return move(adv, attack_gradient(functional, adv, y, eot), x, step, eps, *bounds)

    best: _Try | None = None
    bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with evaluation_mode(model, loss_fn):
        replay = None
        if cuda_graph is not False and eot == 1:
            replay = REPLAYED.of(functional, one_step, (norm, bounds), x, y, step, eps, asked=bool(cuda_graph))
        advance: Callable[[Tensor], Tensor] = replay or partial(one_step, functional, x=x, y=y, step=step, eps=eps)
        with folded_layers(model):
            for _ in range(restarts):
                adv = uniform_in_ball(x, eps, norm, bounds, generator) if random_start else x
                for _ in range(steps):
                    adv = advance(adv)
                adv = adv.clone() if replay else adv
                bad |= has_nan(adv)
                if restarts == 1:
                    break
                new = _judge(functional, adv, y, targeted, eot)
                bad |= new.score.isnan()
                best = new if best is None else _better(best, new)
    check_result(bad, x, bounds)
    return adv if best is None else best.adv


def attack_gradient(functional: FunctionalLoss, x: Tensor, y: Tensor, eot: int = 1) -> Tensor:
    """Return the gradient of the loss at images `x` `(B, ...)`, the mean of `eot` passes; NaN where the loss is."""
    point = x.detach().requires_grad_()

    def gradient() -> Tensor:
        with torch.enable_grad():
            loss = functional(point, y)[1]
            # What the output lost must not get lost again on the way back: NaN, and a right class of infinite logit.
            weights = torch.where(loss > -torch.inf, 1.0, torch.nan).to(loss.dtype)
            return input_gradient(loss, point, weights)

    total = gradient()
    for _ in range(eot - 1):
        total = total + gradient()
    return total / eot if eot > 1 else total


class _Try(NamedTuple):
    adv: Tensor
    success: Tensor
    """(B,), bool"""
    score: Tensor
    """(B,), the loss; targeted, minus the loss"""


@torch.no_grad()
def _judge(functional: FunctionalLoss, adv: Tensor, y: Tensor, targeted: bool, eot: int) -> _Try:
    logits, loss = functional(adv, y)
    for _ in range(eot - 1):
        more = functional(adv, y)
        logits, loss = logits + more[0], loss + more[1]
    hit = logits.argmax(1) == hard_labels(y)
    return _Try(adv, hit, -loss) if targeted else _Try(adv, ~hit, loss)


def _better(old: _Try, new: _Try) -> _Try:
    """Of each sample, the try that succeeds; where both do or neither does, the one of higher score."""
    better = torch.where(new.success == old.success, new.score > old.score, new.success)
    return _Try(
        torch.where(rowwise(better, old.adv), new.adv, old.adv),
        new.success | old.success,
        torch.where(better, new.score, old.score),
    )
