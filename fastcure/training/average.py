"""An exponential moving average of a model's weights, beside the model that is trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


class WeightAverage:
    """The exponential moving average of a model's parameters over the steps of its training.

    After n steps the decay is `min(decay, (1 + n) / (10 + n))`: early in training the average is short. Buffers are
    those of the model; statistics of batch norms that training moves are to be computed anew, by `recalibrate`.

    Args:
        model: the network that is trained.
        decay: of the weights, in [0, 1).

    Attributes:
        model: a copy of the network, with the averaged weights.
        count: float64, 0-dim, steps averaged; on the device, so that nobody waits for it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model)
        self.count = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, model: nn.Module, finite: Tensor) -> None:
        """Take in the weights after a step; one that was not `finite` (0-dim, bool) leaves no trace."""
        self.count += finite
        weight = (1 - ((1 + self.count) / (10 + self.count)).clamp(max=self.decay)) * finite
        for mean, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, weight.to(mean.dtype))
        for mine, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)

    def recalibrate(self, batches: list[Tensor]) -> None:
        """Compute the statistics of the batch norms anew, from batches of images `(B, C, H, W)`; draws no numbers.

        The statistics of a model's batch norms are not those of its averaged weights.
        """
        with torch.random.fork_rng(devices=[self.count.device] if self.count.is_cuda else []):
            update_bn(batches, self.model)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state, for `load`."""
        return {**{f"model.{name}": value for name, value in self.model.state_dict().items()}, "count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `tensors` returned.

        Raises:
            KeyError, RuntimeError: if it is that of another model.
        """
        self.count.copy_(tensors["count"])
        state = {name.removeprefix("model."): value for name, value in tensors.items() if name != "count"}
        self.model.load_state_dict(state)
