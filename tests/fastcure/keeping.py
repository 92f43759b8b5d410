"""Objectives that keep something of each training sample."""

import torch
from torch import Tensor, nn

from fastcure.data import Transform
from fastcure.objectives import Objective, ObjectiveOutput


class Keeping(Objective):
    """FGSM training from the last perturbation of each image, which it keeps; it counts the uses of each, too."""

    title = "keeping"
    settings = ("eps", "microbatch", "loss_fn", "batch_stats")
    scheduled = ("eps",)
    per_sample = ("last", "uses")
    cost = 5.0
    can_microbatch = True
    last: Tensor
    uses: Tensor

    def __init__(self, model: nn.Module, eps: float, microbatch: int | None = None, **options: object) -> None:
        super().__init__(model, **options)  # type: ignore[arg-type]
        self.eps, self.microbatch = eps, microbatch
        self.seen: list[tuple[Tensor, Tensor, Transform]] = []
        self.register_buffer("steps", torch.zeros(()))

    def allocate(self, count: int, shape: torch.Size) -> None:
        self.register_buffer("last", torch.zeros(count, *shape))
        self.register_buffer("uses", torch.zeros(count, dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        assert index is not None
        self.seen.append((x, index, self.transform))
        self.steps = self.steps + 1  # replaced: the trainer looks a buffer up by its name
        last = self.last[index]
        with self.passes():
            near = (x + self.transform(last)).requires_grad_()
            (g,) = torch.autograd.grad(self.loss_fn(self.model(near), y).sum(), near)
            d = (near.detach() + self.eps * g.sign() - x).clamp(-self.eps, self.eps)
            logits = self.model(x + d)
            loss = self.loss_fn(logits, y).mean()
        self.last[index] = self.transform.inverse(d, onto=last)
        self.uses[index] += 1
        return ObjectiveOutput(loss, loss, torch.zeros_like(loss), logits.detach())
