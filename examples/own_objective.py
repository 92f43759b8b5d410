"""An objective of your own, here GradAlign: `python examples/own_objective.py`.

Andriushchenko, Flammarion, "Understanding and improving fast adversarial training", NeurIPS 2020: the cosine of the
loss's gradients at an image and at a random point near it.
"""

import torch
from small_digits import EPS, datasets, fit, report, trained_network
from torch import Tensor, nn
from torch.nn import functional as F

import fastcure
from fastcure.objectives import Objective, ObjectiveOutput


class GradAlign(Objective):
    """`l(x, y) + gamma (1 - cos(g(x), g(x + u)))`, g = dl/dx and u uniform in [-eps, eps]."""

    title = "GradAlign"
    settings = scheduled = ("gamma", "eps")

    def __init__(self, model: nn.Module, eps: float, gamma: float = 1.0) -> None:
        """Take the network, the radius and the weight of the penalty."""
        super().__init__(model)
        self.eps, self.gamma = eps, gamma

    @property
    def cost(self) -> float:
        """Forward passes per sample: two with the gradient of the images, and a backward through all of it."""
        return 12.0

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate the objective."""
        near = x + self.eps * (2 * torch.rand_like(x) - 1)
        with self.passes(), fastcure.double_backward():
            points = [point.detach().requires_grad_() for point in (x, near)]
            logits = [self.model(point) for point in points]
            losses = [self.loss_fn(each, y) for each in logits]
            g, g_near = torch.autograd.grad([each.sum() for each in losses], points, create_graph=True)
        penalty = (1 - F.cosine_similarity(g.flatten(1), g_near.flatten(1))).mean()
        loss = losses[0].mean()
        return ObjectiveOutput(loss + self.gamma * penalty, loss, penalty, logits[0].detach())


def main(images: int | None = None, epochs: int = 4) -> nn.Module:
    """Fine-tune a trained network with GradAlign."""
    train, test = datasets(images)
    model = trained_network(train)
    report("standard training", model, test)

    fit(GradAlign(model, EPS, gamma=1.0), train, epochs, lr=2e-3)
    report("after GradAlign", model, test)
    return model


if __name__ == "__main__":
    main()
