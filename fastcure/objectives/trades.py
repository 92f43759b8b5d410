"""TRADES: the loss at the images, and how far the outputs at attacked images diverge from those there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure._functional import LossFn, cross_entropy, evaluation_mode, find_logits
from fastcure.objectives.adversarial import Attacked, check_steps
from fastcure.objectives.base import ObjectiveOutput, Positive


class TRADES(Attacked):
    """`l(x, y) + gamma KL(p(x) || p(x'))`, x' the point in the eps-ball at which the divergence is largest.

    Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between Robustness and Accuracy", ICML
    2019, section 4, gamma being its 1 / lambda (6 and 1 in the paper). The attack starts at a uniform point of the
    ball and takes steps of 2.5 eps / steps. Both outputs are of one forward of x and x' together, whose statistics
    batch norms in training mode then take.

    Args:
        model, eps, loss_fn, batch_stats: as in `Attacked`; `loss_fn` is the loss at x.
        gamma: weight of the divergence, `>= 0`.
        steps: gradient steps of the attack, `>= 1`; a training step costs 2 `steps` + 7 forward passes.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> fastcure.objectives.TRADES(model, eps=8 / 255)(x, y).total.backward()
    """

    title = "TRADES"
    settings = ("eps", "gamma", "steps", "loss_fn", "batch_stats")
    scheduled = ("eps", "gamma")
    gamma = Positive(zero=True)
    """Weight of the divergence."""

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        gamma: float = 6.0,
        steps: int = 10,
        *,
        loss_fn: LossFn = cross_entropy,
        batch_stats: str = "train",
    ) -> None:
        super().__init__(model, eps, loss_fn=loss_fn, batch_stats=batch_stats)
        self.gamma = gamma
        self.steps = check_steps(steps)

    @property
    def cost(self) -> float:
        """The output at x, the attack, and a standard step on twice as many images."""
        return 1 + 2.0 * self.steps + 6

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate the loss, and the logits, at x, and the mean divergence; see `Objective.forward`."""
        with torch.no_grad(), evaluation_mode(self.model):
            p = find_logits(self.model(x)).softmax(1)
        # With p as soft targets the cross-entropy is the divergence but for a constant.
        adv = self.attacked(x, p, cross_entropy)
        with self.passes():
            logits, logits_adv = find_logits(self.model(torch.cat([x, adv]))).chunk(2)
        loss = self.loss_fn(logits, y).mean()
        wide = torch.promote_types(logits.dtype, torch.float32)  # on a CPU autocast leaves log_softmax in 16 bits
        log_p, log_q = logits.log_softmax(1, dtype=wide), logits_adv.log_softmax(1, dtype=wide)
        penalty = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return ObjectiveOutput(loss + self.gamma * penalty, loss, penalty, logits.detach())
