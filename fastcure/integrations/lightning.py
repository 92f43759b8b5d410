"""A LightningModule that trains its network with an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastcure.integrations._with_objective import WithObjective


class LightningMixin(WithObjective):
    """The training step of a `LightningModule` (`lightning`, `pytorch_lightning`); put it before the module's class.

    It works in one process and in several (`strategy="ddp"`), in 32 bits and in bf16, and with
    `accumulate_grad_batches`.
    The objective is no submodule, so a checkpoint holds the network once, under the names that it has without the
    mixin: `load_from_checkpoint` takes a checkpoint of standard training.

    Define `make_objective`; `schedules` span `max_epochs`, which count as one where the run is limited by `max_steps`
    alone. The loss, the penalty and the scheduled numbers are logged. Validation is the module's own: attacks leave
    the inference mode in which Lightning validates.

    Raises:
        ValueError: if there are schedules and the run has no end.

    Examples:
        With `lightning.LightningModule` in place of `torch.nn.Module`, and an optimiser:

        >>> import torch, fastcure
        >>> from fastcure.integrations import LightningMixin
        >>> class Robust(LightningMixin, torch.nn.Module):
        ...     schedules = {"gamma": "0:1x50%,1"}
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = fastcure.models.resnet8(in_channels=1)
        ...
        ...     def make_objective(self):
        ...         return fastcure.CURE(self.model, h=fastcure.eps_to_h(0.1, 16 * 16))
        >>> Robust().objective.h
        1.6
    """

    trainer: Any
    log_dict: Callable[..., None]

    def images_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch; define it where a batch is no such pair."""
        x, y = batch
        return x, y

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Evaluate the objective on a batch."""
        x, y = self.images_and_labels(batch)
        values = self._scheduled_now() if self.schedules else {}
        out = self.objective(x, y)
        self.log_dict({"loss": out.loss.detach(), "penalty": out.penalty.detach(), **values})
        return out.total

    def _trained(self) -> nn.Module:
        assert isinstance(self, nn.Module)
        return self

    def _scheduled_now(self) -> dict[str, float]:
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
        if not math.isfinite(steps):
            raise ValueError(f"schedules need a run that ends, got max_epochs={epochs}: give max_epochs or max_steps")
        return self._follow_schedules(min(1.0, self.trainer.global_step / steps), epochs if (epochs or 0) > 0 else 1)
