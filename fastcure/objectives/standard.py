"""Standard training: the mean loss of the images, without a penalty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure._functional import LossFn, ModelWithLoss, cross_entropy
from fastcure.objectives.base import Objective, ObjectiveOutput


class Standard(Objective):
    """The mean loss: `Standard(model)(x, y).total.backward()`, a step of standard training.

    Args:
        model, loss_fn, batch_stats: as in `Objective`.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> fastcure.objectives.Standard(model)(x, y).total.backward()
    """

    title = "standard training"

    @property
    def cost(self) -> float:
        """3: a forward, and a backward for twice as much."""
        return 3.0

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> ObjectiveOutput:
        """Evaluate the loss at x; see `Objective.forward`."""
        return mean_loss(self, x, y)


def mean_loss(objective: Objective, x: Tensor, y: Tensor) -> ObjectiveOutput:
    """Evaluate the mean of an objective's loss at `x` `(B, ...)`, without a penalty."""
    with objective.passes():
        logits, losses = ModelWithLoss(objective.model, objective.loss_fn)(x, y)
    loss = losses.mean()
    return ObjectiveOutput(loss, loss, torch.zeros((), device=x.device), logits.detach())


class SmoothedCrossEntropy(nn.Module):
    """Cross-entropy with label smoothing, per sample: a `loss_fn` for any objective.

    The target is `(1 - smoothing)` times the label plus `smoothing / C` on every class (Szegedy et al., CVPR 2016,
    section 7).

    Args:
        smoothing: in [0, 1); 0 is `cross_entropy`.

    Raises:
        ValueError: if it is out of range.

    Examples:
        >>> import torch, fastcure
        >>> loss_fn = fastcure.objectives.SmoothedCrossEntropy(0.1)
        >>> loss_fn(torch.zeros(2, 10), torch.tensor([3, 7])).shape
        torch.Size([2])
    """

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"label smoothing must be in [0, 1), got {smoothing}")
        self.smoothing = smoothing

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample `(B,)`; y as in `cross_entropy`."""
        loss = cross_entropy(logits, y)  # in float32, if autocast makes the logits; log_softmax on a GPU alone
        return torch.lerp(loss, -F.log_softmax(logits, 1, dtype=loss.dtype).mean(1), self.smoothing)


def smoothed(smoothing: float) -> LossFn:
    """Return the loss for this label smoothing: plain `cross_entropy` where it is 0."""
    return SmoothedCrossEntropy(smoothing) if smoothing else cross_entropy
