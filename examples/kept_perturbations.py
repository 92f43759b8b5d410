"""An objective that keeps something of each image, here its perturbation: `python examples/kept_perturbations.py`.

Zheng, Zhang, Gu, Lee, Prakash, "Efficient adversarial training with transferable adversarial examples", CVPR 2020: each
epoch takes one step of an attack, from where the last epoch's ended.
"""

from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from fastcure.objectives import OBJECTIVES, Objective, ObjectiveOutput
from fastcure.training.finetune import finetune
from fastcure.training.settings import make_settings


class ATTA(Objective):
    """The loss at `x + d`, d being a step of FGSM from the last d of the image, in [-eps, eps]."""

    title = "ATTA"
    settings = scheduled = ("eps",)
    per_sample = ("last",)
    last: Tensor

    def __init__(self, model: nn.Module, eps: float) -> None:
        """Take the network and the radius."""
        super().__init__(model)
        self.eps = eps

    @property
    def cost(self) -> float:
        """Forward passes per sample: two for the perturbation, and a standard step."""
        return 5.0

    def allocate(self, count: int, shape: torch.Size) -> None:
        """Begin with no perturbation of any of the `count` images."""
        self.register_buffer("last", torch.zeros(count, *shape))

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate the loss at the attacked images, and keep their perturbations."""
        last = self.last[index]
        with self.passes():
            near = (x + self.transform(last)).clamp(0, 1).requires_grad_()
            (g,) = torch.autograd.grad(self.loss_fn(self.model(near), y).sum(), near)
            d = (near.detach() + self.eps * g.sign() - x).clamp(-self.eps, self.eps)
            logits = self.model((x + d).clamp(0, 1))
        loss = self.loss_fn(logits, y).mean()
        self.last[index] = self.transform.inverse(d, onto=last)
        return ObjectiveOutput(loss, loss, torch.zeros_like(loss), logits.detach())


def main(images: int | None = None, epochs: int = 10) -> dict[str, Any]:
    """Train a network on digits, then with ATTA; print and return its accuracies."""
    OBJECTIVES["atta"] = ATTA
    settings = {"objective": "atta", "pretrain_epochs": epochs, "epochs": epochs, "eps": (0.1,), "limit": images}
    with TemporaryDirectory() as out:
        return finetune(make_settings({**settings, "out": out}))


if __name__ == "__main__":
    main()
