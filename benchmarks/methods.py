"""One training step of each method that the robustness study compares.

A step computes the parameter gradients of one batch, and nothing else. Every method runs in any of the three modes of
batch norm, so that two of them differ in what they are called after.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE
from fastcure._functional import FunctionalLoss, cross_entropy, evaluation_mode
from fastcure.attacks import pgd
from fastcure.attacks._random_start import uniform_in_ball
from fastcure.engines import ENGINES, Request

RS_STEP = 1.25
"""Step of FGSM with a random start, in eps (Wong et al., ICLR 2020)."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Schedules are those of `fastcure.training.schedule`."""

    label: str
    """Name of the curve that it is a point of."""
    method: str
    """One of `METHODS`."""
    epochs: int
    lr: str
    """Schedule of Adam's learning rate."""
    start: str = "normal"
    """"normal": the normally trained network; "scratch": initial weights."""
    batch_stats: str = "train"
    """"train": batch statistics, "frozen": running ones; "split": the loss in training mode, the penalty frozen."""
    steps: int = 0
    """Of the attack on which the loss is taken; 0 for FGSM without a random start."""
    gamma: str = "0"
    """Schedule of the penalty's weight (of TRADES: of its divergence)."""
    h: str = "1"
    """Schedule of the finite step, in units of `eps sqrt(N)`: the FGSM step of eps."""
    power: int = 2
    noise: float = 0.0
    """Radius of the uniform noise from which the penalty starts, in eps."""
    fraction: float = 1.0
    """Share of each batch that has the penalty, as in `fastcure.CURE`."""
    every: int = 1
    """The penalty is there at each so many-th step, as many times as strong."""
    mix: float = 0.0
    """Share of the loss taken at `x + h z`, whose forward the penalty has made anyhow."""
    engine: str = "eager"
    """Of the penalty: "eager", or "first_order" for finite differences of parameter gradients."""
    adaptive: bool = False
    """gamma is in units of (mean loss) / (mean penalty) of the batch."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.batch_stats not in ("train", "frozen", "split"):
            raise ValueError(f"batch_stats must be train, frozen or split, got {self.batch_stats!r}")
        if self.engine != "eager" and (self.mix or self.batch_stats == "train"):
            raise ValueError(f"engine={self.engine!r} needs mix=0 and frozen or split statistics, got {self}")
        if self.batch_stats == "split" and (self.mix or self.adaptive):
            raise ValueError(f"batch_stats='split' needs mix=0 and a gamma that is not adaptive, got {self}")
        if self.every > 1 and self.batch_stats != "frozen":
            raise ValueError(f"a penalty at some steps needs batch_stats='frozen', got {self.batch_stats!r}")
        if self.fraction < 1 and "cure" not in self.method:
            raise ValueError(f"fraction must be 1 for a method without curvature penalty, got {self}")
        if self.fraction < 1 and (self.every > 1 or self.mix not in (0, 1) or self.adaptive):
            raise ValueError(f"a penalty on some samples is that of fastcure.CURE, which knows no {self}")


class Moment(NamedTuple):
    """What a step is told besides its batch."""

    step: int
    eps: float
    gamma: float
    h: float
    """L2 length."""
    generator: torch.Generator


def gradients(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """Put the gradients of a step into `.grad`; return the penalty's mean (NaN where there is none).

    Args:
        model: the network; its flags come back as training.
        x: `(B, C, H, W)` in [0, 1].
        y: `(B,)`.
        recipe: of the run.
        moment: of the run.
    """
    model.train()
    model.zero_grad()
    return METHODS[recipe.method](model, x, y, recipe, moment)


def standard(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """Cross-entropy."""
    with mode(model, recipe):
        cross_entropy(model(x), y).mean().backward()
    return torch.nan


def adversarial(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """Cross-entropy at the points of FGSM, of FGSM with a random start (one step) or of PGD."""
    return standard(model, attacked(model, x, y, recipe.steps, moment), y, recipe, moment)


def cure(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """The curvature penalty, with the loss at x, at x + h z or between."""
    if recipe.noise:
        x = uniform_in_ball(x, recipe.noise * moment.eps, "linf", (0.0, 1.0), moment.generator)
    if recipe.every == 1 and recipe.mix in (0, 1) and not recipe.adaptive:
        objective = CURE(
            *(model, moment.h, moment.gamma),
            power=recipe.power,
            engine=recipe.engine,
            batch_stats=recipe.batch_stats,  # type: ignore[arg-type]
            loss_at="step" if recipe.mix else "x",
            fraction=recipe.fraction,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the first-order engine says of kinks is what is measured here
            out = objective(x, y)
        out.total.backward()
        return float(out.penalty.detach())
    if moment.step % recipe.every:
        return standard(model, x, y, recipe, moment)
    return penalise(model, x, y, recipe, moment, len(x), w_loss=1.0)


def cure_adversarial(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """Cross-entropy at adversarial points, and the curvature penalty at some x."""
    adversarial(model, x, y, recipe, moment)
    some = torch.randperm(len(x), generator=moment.generator)[: max(1, round(recipe.fraction * len(x)))].to(x.device)
    return penalise(model, x[some], y[some], recipe, moment, len(x), w_loss=0.0)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """`||dl/dx||^2` as the penalty, by double backpropagation (Drucker and Le Cun, 1992)."""
    with mode(model, recipe):
        point = x.detach().requires_grad_()
        loss = cross_entropy(model(point), y)
        (g,) = torch.autograd.grad(loss.sum(), point, create_graph=True)
        penalty = g.square().flatten(1).sum(1).mean()
        parameters = list(model.parameters())
        found = torch.autograd.grad(loss.mean() + moment.gamma * penalty, parameters)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    return float(penalty.detach())


def trades(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment) -> float:
    """Cross-entropy at x, and the divergence from there to the worst point found (after Zhang et al., ICML 2019)."""
    with torch.no_grad(), evaluation_mode(model):
        own = model(x).softmax(1)
    adv = attacked(model, x, own, recipe.steps, moment)  # soft targets: the divergence but for a constant
    with mode(model, recipe):
        logits, logits_adv = model(torch.cat([x, adv])).chunk(2)
        divergence = F.kl_div(logits_adv.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
        (cross_entropy(logits, y).mean() + moment.gamma * divergence).backward()
    return float(divergence.detach())


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor, Recipe, Moment], float]] = {
    "standard": standard,
    "adversarial": adversarial,
    "cure": cure,
    "cure+adversarial": cure_adversarial,
    "input-gradient": input_gradient,
    "trades": trades,
}


def mode(model: nn.Module, recipe: Recipe) -> AbstractContextManager[None]:
    """The mode of the passes of a loss."""
    return evaluation_mode(model) if recipe.batch_stats == "frozen" else nullcontext()


def attacked(model: nn.Module, x: Tensor, y: Tensor, steps: int, moment: Moment) -> Tensor:
    """Points of FGSM (`steps` 0), of FGSM with a random start (1) or of PGD, the model in evaluation mode."""
    step_size = {0: 1.0, 1: RS_STEP}.get(steps, 2.5 / max(steps, 1)) * moment.eps
    start = {"random_start": steps > 0, "generator": moment.generator}
    return pgd(model, x, y, moment.eps, step_size, max(steps, 1), **start)


def penalise(
    model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, moment: Moment, count: int, w_loss: float
) -> float:
    """Add the gradients of `w_loss * loss + gamma * penalty`: sums over x divided by `count`, gamma by its share."""
    engine, training = ENGINES[recipe.engine], recipe.batch_stats == "train"
    functional = Recorded(model, moving=model.modules() if training and w_loss > 0 else ())
    with torch.enable_grad(), warnings.catch_warnings(), nullcontext() if training else evaluation_mode(model):
        warnings.simplefilter("ignore")  # what the first-order engine says of kinks is what is measured here
        request = Request(model, functional.module.loss_fn, x, y, moment.h, power=recipe.power)
        found = engine.forward(request.of(functional))
    functional.move_buffers()
    state = found.state
    if recipe.mix:
        first, second = functional.losses
        state = state._replace(loss=torch.lerp(first, second, recipe.mix))
    penalty = found.penalty.mean()
    gamma = moment.gamma * recipe.every * count / len(x)
    if recipe.adaptive:
        gamma = gamma * found.loss.mean() / penalty.clamp_min(torch.finfo(x.dtype).tiny)
    weights = [
        torch.ones_like(found.loss) * w / count if wanted else None for w, wanted in ((w_loss, w_loss), (gamma, 1))
    ]
    for parameter, gradient in zip(found.parameters, engine.backward(state, *weights, retain=False), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return float(penalty)


class Recorded(FunctionalLoss):
    """Keeps the losses of its passes."""

    def __init__(self, model: nn.Module, *, moving: Iterable[nn.Module]) -> None:
        super().__init__(model, moving=moving)
        self.losses = list[Tensor]()

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(logits, loss (B,))`."""
        logits, loss = super().__call__(x, y)
        self.losses.append(loss)
        return logits, loss
