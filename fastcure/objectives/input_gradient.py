"""Input-gradient regularisation: the squared norm of the loss's gradient in the images as the penalty."""

from __future__ import annotations

from torch import Tensor, nn

from fastcure._functional import LossFn, ModelWithLoss, cross_entropy, input_gradient, unwrap
from fastcure._validation import check_images
from fastcure.engines.base import twice_differentiable
from fastcure.objectives.base import Objective, ObjectiveOutput, Positive
from fastcure.rules import double_backward
from fastcure.rules.second_derivatives import Twice


class InputGradient(Objective):
    """`l(x, y) + gamma ||dl/dx||_2^2`, by double backpropagation: the first-order relative of CURE.

    Drucker, Le Cun, "Improving generalization performance using double backpropagation", IEEE Transactions on Neural
    Networks 3 (6), 1992; for robustness Ross, Doshi-Velez, "Improving the Adversarial Robustness and Interpretability
    of Deep Neural Networks by Regularizing their Input Gradients", AAAI 2018. It runs under
    `fastcure.double_backward()`.

    Args:
        model, loss_fn, batch_stats: as in `Objective`.
        gamma: weight of the penalty, `>= 0`.

    Raises:
        ValueError: if `gamma` is out of range, here and when it is set.
        RuntimeError: from `forward`, at an operator that has no second derivative.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> fastcure.objectives.InputGradient(model)(x, y).total.backward()
    """

    title = "input gradients"
    settings = ("gamma", "loss_fn", "batch_stats")
    scheduled = ("gamma",)
    gamma = Positive(zero=True)
    """Weight of the penalty."""

    def __init__(
        self, model: nn.Module, gamma: float = 1.0, *, loss_fn: LossFn = cross_entropy, batch_stats: str = "train"
    ) -> None:
        super().__init__(model, loss_fn, batch_stats)
        self.gamma = gamma

    @property
    def cost(self) -> float:
        """A forward, the gradient of the images, and a backward through both."""
        return 6.0

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate loss, penalty and logits at x; see `Objective.forward`."""
        check_images(x)
        point = x.detach().requires_grad_()
        with self.passes(), double_backward(), twice_differentiable():
            logits, losses = Twice(ModelWithLoss(unwrap(self.model), self.loss_fn))(point, y)
            g = input_gradient(losses, point, create_graph=True)
        loss, penalty = losses.mean(), g.square().flatten(1).sum(1).mean()
        return ObjectiveOutput(loss + self.gamma * penalty, loss, penalty, logits.detach())
