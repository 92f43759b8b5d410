"""What a step changes beside the weights: buffers of the model and of the objective, whole ones and single rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcure.objectives import Objective
from fastcure.training.ranks import Ranks, Share

Copies = tuple[list[Tensor], list[Tensor]]


class Buffers:
    """The buffers that a step of `objective` changes; see `Objective` for what is `per_sample`.

    The objective may replace its own ones by other tensors, so that they are looked up by name whenever it is asked.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._model = list(objective.model.buffers()) if objective.updates_buffers else []
        own = (name for name, _ in objective.named_buffers() if not name.startswith("model."))
        self._own = [name for name in own if name not in objective.per_sample]

    @property
    def shared(self) -> list[Tensor]:
        """Those that count as the main process has them, such as the statistics of batch norms."""
        return self._model + [self._objective.get_buffer(name) for name in self._own]

    @property
    def per_sample(self) -> list[Tensor]:
        """Those that have a row for each training sample, `(N, ...)`."""
        return [self._objective.get_buffer(name) for name in self._objective.per_sample]

    @torch.no_grad()
    def copy(self, index: Tensor) -> Copies:
        """Return what a step on the samples `index` can change, for `put_back` and `settle`."""
        return [buffer.clone() for buffer in self.shared], [rows[index] for rows in self.per_sample]

    @torch.no_grad()
    def put_back(self, index: Tensor, before: Copies) -> None:
        """Undo what a step on the samples `index` has changed."""
        for buffer, value in zip(self.shared, before[0], strict=True):
            buffer.copy_(value)
        for rows, values in zip(self.per_sample, before[1], strict=True):
            rows[index] = values

    @torch.no_grad()
    def settle(self, batch: Share, before: Copies, finite: Tensor, ranks: Ranks) -> None:
        """Keep what a `finite` step (0-dim, bool) has changed, or undo it; take up the rows of the other processes."""
        for buffer, value in zip(self.shared, before[0], strict=True):
            buffer.copy_(torch.where(finite, buffer, value))
        if before[1]:
            pairs = zip(self.per_sample, before[1], strict=True)
            found = [torch.where(finite, rows[batch.places], values) for rows, values in pairs]
            places, *every = ranks.gather([batch.places, *found], batch.whole)
            for rows, values in zip(self.per_sample, every, strict=True):
                rows[places] = values
