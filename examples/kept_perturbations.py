"""An objective that keeps something of each image, here its perturbation: `python examples/kept_perturbations.py`.

Zheng, Zhang, Gu, Lee, Prakash, "Efficient adversarial training with transferable adversarial examples", CVPR 2020: one
step of an attack an epoch, from where that of the last epoch ended, through the augmentation and back.
"""

import torch
from small_digits import EPS, datasets, report, trained_network
from torch import Tensor, nn

import fastcure
from fastcure.data import Augment, Loader
from fastcure.objectives import Objective, ObjectiveOutput


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
            near = (x + self.transform(last).to(x.dtype)).clamp(0, 1).requires_grad_()
            (g,) = torch.autograd.grad(self.loss_fn(self.model(near), y).sum(), near)
            d = (near.detach() + self.eps * g.sign() - x).clamp(-self.eps, self.eps)
            logits = self.model((x + d).clamp(0, 1))
            loss = self.loss_fn(logits, y).mean()
        self.last[index] = self.transform.inverse(d.to(last.dtype), onto=last)
        return ObjectiveOutput(loss, loss, torch.zeros_like(loss), logits.detach())


def main(images: int | None = None, epochs: int = 4) -> nn.Module:
    """Fine-tune a trained network; `fastcure finetune` would do this for whatever is in `OBJECTIVES`."""
    train, test = datasets(images)
    model = trained_network(train)
    report("standard training", model, test)

    x, y = fastcure.data.load("digits")[:2]
    loader = Loader(x[:images], y[:images], batch_size=32, augment=Augment(pad=1))
    objective = ATTA(model, EPS)
    objective.allocate(len(loader.y), x.shape[1:])
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
    for _ in range(epochs):
        model.train()
        for batch in loader.batches():
            optimizer.zero_grad()
            objective.transform = batch.transform
            objective(batch.x, batch.y, batch.index).total.backward()
            optimizer.step()
    report("after ATTA", model, test)
    return model


if __name__ == "__main__":
    main()
