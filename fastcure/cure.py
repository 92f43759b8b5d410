"""CURE as a module: the objective of a training step, `mean loss + gamma * mean penalty`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastcure.checks import check_positive
from fastcure.curvature import BatchStats, LossAt, check_arguments, check_modes, curvature
from fastcure.data_parallel import sent_backward_once
from fastcure.engines import engine_called
from fastcure.microbatch import check_parts, in_parts
from fastcure.objective import LossFn, ModelWithLoss, cross_entropy, unwrap


class CUREOutput(NamedTuple):
    """What a step returns; the first three are 0-dim and differentiable in the parameters."""

    total: Tensor
    """loss + gamma * penalty."""
    loss: Tensor
    """Mean loss of the batch, at x or where `loss_at` has it."""
    penalty: Tensor
    """Mean penalty of the batch."""
    logits: Tensor
    """(B, C), detached."""


class CURE(nn.Module):
    """The regularised objective of a model: `CURE(model)(x, y).total.backward()`.

    Its parameters are the model's (and those of a `loss_fn` that is a module), so that
    `DistributedDataParallel(CURE(model))` works. Save `model.state_dict()`, which knows nothing of CURE. `h` and
    `gamma` are plain attributes for schedules to set.

    Args:
        model: the network, see `fastcure.curvature`.
        h: L2 length of the finite step in input units, `> 0`.
        gamma: weight of the penalty, `>= 0`.
        loss_fn, power, engine, batch_stats, loss_at: as in `fastcure.curvature`.
        microbatch: evaluate this many samples at a time: the same numbers, with the memory of so many. The gradients of
            `total` are then computed in the forward and only scaled in the backward; `loss` and `penalty` are
            detached. With `batch_stats="split"` the loss keeps the whole batch, and the penalty alone is divided; with
            "train", where samples depend on each other, nothing can be.

    Raises:
        ValueError: if `h`, `gamma` or `microbatch` is out of range, here and when `h` or `gamma` is set.
    """

    def __init__(
        self,
        model: nn.Module,
        h: float | Tensor = 1.25,
        gamma: float | Tensor = 4.0,
        *,
        loss_fn: LossFn = cross_entropy,
        power: int = 2,
        engine: str = "auto",
        batch_stats: BatchStats = "frozen",
        loss_at: LossAt = "x",
        microbatch: int | None = None,
    ) -> None:
        super().__init__()
        unwrap(model)
        engine_called(engine)
        check_modes(power, batch_stats, loss_at)
        if microbatch is not None and (microbatch < 1 or microbatch != int(microbatch)):
            raise ValueError(f"microbatch must be >= 1, or None for the whole batch, got {microbatch}")
        check_parts(microbatch, batch_stats)
        self.microbatch = microbatch
        self.model = model
        self.loss_fn = loss_fn
        self.power, self.engine, self.batch_stats, self.loss_at = power, engine, batch_stats, loss_at
        self.h, self.gamma = h, gamma

    @property
    def h(self) -> float | Tensor:
        """L2 length of the finite step in input units."""
        return self._h

    @h.setter
    def h(self, value: float | Tensor) -> None:
        check_positive("h", value)
        self._h = value

    @property
    def gamma(self) -> float | Tensor:
        """Weight of the penalty."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: float | Tensor) -> None:
        check_positive("gamma", value, zero=True)
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"gamma must be a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        self._gamma = value

    def forward(self, x: Tensor, y: Tensor) -> CUREOutput:
        """Evaluate the objective on images `(B, ...)` and labels; see `fastcure.curvature` for what it raises."""
        if self.microbatch is not None and self.microbatch < len(x):
            return self._in_parts(x, y, self.microbatch)
        out = curvature(
            self.model,
            x,
            y,
            self.h,
            loss_fn=self.loss_fn,
            power=self.power,
            engine=self.engine,
            batch_stats=self.batch_stats,
            loss_at=self.loss_at,
        )
        loss, penalty = out.loss.mean(), out.penalty.mean()
        return CUREOutput(loss + self.gamma * penalty, loss, penalty, out.logits)

    def _in_parts(self, x: Tensor, y: Tensor, microbatch: int) -> CUREOutput:
        check_arguments(x, y, self.h, self.power, self.batch_stats, self.loss_at)
        check_parts(microbatch, self.batch_stats)
        model, split = unwrap(self.model), self.batch_stats == "split"
        called = ModelWithLoss(model, self.loss_fn)(x, y) if split else None
        w_loss, w_penalty = 0.0 if split else 1 / len(x), self.gamma / len(x)
        parts = in_parts(
            *(model, x, y, self.h, w_loss, w_penalty, microbatch),
            loss_fn=self.loss_fn,
            power=self.power,
            engine=self.engine,
            stepped=self.loss_at == "step",
        )
        penalty = parts.penalty.mean()
        total, loss, logits = parts.total, parts.loss.mean(), parts.logits
        if called is not None:
            loss = called[1].mean()
            total, loss, logits = total + loss, loss.detach(), called[0].detach()
        (total,) = sent_backward_once(total)
        return CUREOutput(total, loss, penalty, logits)

    def extra_repr(self) -> str:
        """Show the settings in `print(cure)`."""
        return (
            f"h={self.h}, gamma={self.gamma}, power={self.power}, engine={self.engine!r}, "
            f"batch_stats={self.batch_stats!r}, loss_at={self.loss_at!r}"
        )
