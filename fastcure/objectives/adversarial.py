"""Adversarial training: the mean loss at images that an L-infinity attack has found."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from fastcure_kernels import linf_step
from torch import Tensor, nn

from fastcure import _functional
from fastcure._folding.layers import folded_layers
from fastcure._functional import FunctionalLoss, LossFn, cross_entropy, evaluation_mode, unwrap
from fastcure._validation import check_batch, check_pixels
from fastcure.attacks._gradient import attack_gradient
from fastcure.attacks._random_start import uniform_in_ball
from fastcure.attacks._replay import REPLAYED
from fastcure.objectives.base import Objective, ObjectiveOutput, Positive
from fastcure.objectives.standard import mean_loss


class Attacked(Objective):
    """An objective that attacks the images of each batch first.

    Args:
        model, loss_fn, batch_stats: as in `Objective`. The attack runs in evaluation mode in either case.
        eps: L-infinity radius, pixels in [0, 1], `>= 0`.

    Raises:
        ValueError: if `eps` is out of range, here and when it is set; from `forward`, if pixels are not in [0, 1] (on
            a GPU, where a look at values takes time, in the first batch alone).
    """

    eps = Positive(zero=True)
    """L-infinity radius of the attack, pixels in [0, 1]."""
    random_start: ClassVar[bool] = True
    """Whether the attack starts at a uniform point of the ball, in place of the image."""
    relative_step: ClassVar[float] = 2.5
    """Sum of the lengths of all steps of the attack, in eps."""
    steps: int = 1
    """Gradient steps of the attack."""

    def __init__(
        self, model: nn.Module, eps: float, *, loss_fn: LossFn = cross_entropy, batch_stats: str = "train"
    ) -> None:
        super().__init__(model, loss_fn, batch_stats)
        self.eps = eps
        self._looked = False

    def attacked(self, x: Tensor, y: Tensor, loss_fn: LossFn) -> Tensor:
        """Return images `(B, ...)` within eps of `x` and within [0, 1], where `loss_fn` is larger.

        A NaN stays in the image, and so reaches the loss: no value is looked at.
        """
        check_batch(x, y, None)
        if x.device.type == "cpu" or not self._looked:
            check_pixels(x, option=False)
            self._looked = True
        model, eps, step_size = unwrap(self.model), self.eps, self.relative_step * self.eps / self.steps
        loss_at = _functional.FunctionalLoss(model, loss_fn, trainable=False)
        x = x.detach()
        with evaluation_mode(model, loss_fn):
            replay = REPLAYED.of(loss_at, _step, "objective", x, y, step_size, eps, asked=False)
            advance = replay or partial(_step, loss_at, x=x, y=y, step=step_size, eps=eps)
            with folded_layers(model):
                adv = uniform_in_ball(x, eps, "linf", (0.0, 1.0), self.generator) if self.random_start else x
                for _ in range(self.steps):
                    adv = advance(adv)
        return adv.clone() if replay else adv


def _step(functional: FunctionalLoss, adv: Tensor, x: Tensor, y: Tensor, step: Any, eps: Any) -> Tensor:
    return linf_step(adv, attack_gradient(functional, adv, y), x, step, eps, 0.0, 1.0)


class AdversarialTraining(Attacked):
    """The mean loss at the points of an attack on that loss; see its subclasses."""

    settings: ClassVar[tuple[str, ...]] = ("eps", "loss_fn", "batch_stats")
    scheduled = ("eps",)

    @property
    def cost(self) -> float:
        """A forward and the gradient of the images for each step of the attack, and a standard step."""
        return 2.0 * self.steps + 3

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate the loss, and the logits, at the attacked images; see `Objective.forward`."""
        return mean_loss(self, self.attacked(x, y, self.loss_fn), y)


class FGSM(AdversarialTraining):
    """Training on images of FGSM: `l(x + eps sign(dl/dx), y)`.

    Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, section 6, without the
    loss at x (alpha = 0). It can collapse at large eps or in long training.

    Args:
        model, eps, loss_fn, batch_stats: as in `Attacked`.

    Examples:
        >>> import torch
        >>> from fastcure.objectives import FGSM
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
        >>> FGSM(model, eps=8 / 255)(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 0, 1])).total.backward()
    """

    title = "FGSM training"
    random_start = False
    relative_step = 1.0


class FGSMRS(AdversarialTraining):
    """FGSM training with a random start: a step of 1.25 eps from a uniform point of the ball, projected onto the ball.

    Wong, Rice, Kolter, "Fast is better than free", ICLR 2020, algorithm 3. It can collapse at large eps or in long
    training.

    Args:
        model, eps, loss_fn, batch_stats: as in `Attacked`.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> fastcure.objectives.FGSMRS(model, eps=8 / 255)(x, y).total.backward()
    """

    title = "FGSM-RS training"
    relative_step = 1.25


class PGD(AdversarialTraining):
    """Adversarial training with PGD: the loss at the point that `steps` projected steps find in the ball.

    Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018,
    equation 2.1. The start is uniform in the ball, and a step is 2.5 eps / steps long.

    Args:
        model, eps, loss_fn, batch_stats: as in `Attacked`.
        steps: gradient steps, `>= 1`; a training step costs 2 `steps` + 3 forward passes.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> objective = fastcure.objectives.PGD(model, eps=8 / 255, steps=7)
        >>> objective.cost
        17.0
        >>> objective(x, y).total.backward()
    """

    title = "PGD training"
    settings = ("eps", "steps", "loss_fn", "batch_stats")

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        steps: int = 7,
        *,
        loss_fn: LossFn = cross_entropy,
        batch_stats: str = "train",
    ) -> None:
        super().__init__(model, eps, loss_fn=loss_fn, batch_stats=batch_stats)
        self.steps = check_steps(steps)


def check_steps(steps: int) -> int:
    """Check the number of steps of an attack, and return it."""
    if steps < 1 or steps != int(steps):
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    return int(steps)
