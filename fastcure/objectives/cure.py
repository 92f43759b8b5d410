"""CURE as a module: the objective of a training step, `mean loss + gamma * mean penalty`."""

from __future__ import annotations

from torch import Tensor, nn

from fastcure._batch import Options, check_arguments, evaluate_batch, plan
from fastcure._defaults import BATCH_STATS, GAMMA, BatchStats, H
from fastcure._functional import LossFn, cross_entropy
from fastcure.engines import LossAt
from fastcure.objectives.base import Objective, ObjectiveOutput, Positive

CUREOutput = ObjectiveOutput


class CURE(Objective):
    """The regularised objective of a model: `CURE(model)(x, y).total.backward()`.

    Its parameters are the model's (and those of a `loss_fn` that is a module), so that
    `DistributedDataParallel(CURE(model))` works. Save `model.state_dict()`, which knows nothing of CURE.

    Every argument but `model` is an attribute for schedules to set, on the CURE itself: set on a wrapper around it
    (`ddp.gamma` in place of `ddp.module.gamma`) it raises an error in the next forward.

    Args:
        model: the network, see `fastcure.curvature`.
        h: L2 length of the finite step in input units, `> 0`; 1.25, the paper's, by default.
        gamma: weight of the penalty, `>= 0`; 4, the paper's, by default.
        loss_fn, power, engine, batch_stats, loss_at: as in `fastcure.curvature`.
        fraction: share of each batch that has a penalty, in (0, 1]: its first samples, so shuffle. Their mean estimates
            that of the batch without bias, and gamma means the same. A step costs 3 + 9 `fraction` forward passes
            (5 + 7 `fraction` with the loss at the step, 3 + 12 `fraction` with "split"). With "train" the two parts
            are normalised apart, neither of less than two samples, and buffers change by the larger one.
        microbatch: evaluate this many samples at a time: the same numbers, with the memory of so many. The gradients of
            `total` are then computed in the forward and only scaled in the backward; `loss` and `penalty` are
            detached. With `batch_stats="split"` the loss keeps the whole batch, and the penalty alone is divided; with
            "train", where samples depend on each other, nothing can be.

    Raises:
        ValueError: if `h`, `gamma`, `fraction` or `microbatch` is out of range, here and when it is set.
        AttributeError: when an attribute is set whose name is nearly that of one of these, but not quite.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> cure = fastcure.CURE(model, h=1.0, gamma=0.5)
        >>> out = cure(x, y)
        >>> out.total.backward()
        >>> cure.gamma = 1.0  # for the next step
        >>> cure.cost
        12.0
    """

    title = "CURE"
    settings = ("h", "gamma", "loss_fn", "power", "engine", "batch_stats", "loss_at", "fraction", "microbatch")
    scheduled = ("gamma", "h")
    modes = ("frozen", "split", "train")
    batch_stats: BatchStats
    h = Positive(per_sample=True)
    """L2 length of the finite step in input units."""
    gamma = Positive(zero=True)
    """Weight of the penalty."""

    def __init__(
        self,
        model: nn.Module,
        h: float | Tensor = H,
        gamma: float | Tensor = GAMMA,
        *,
        loss_fn: LossFn = cross_entropy,
        power: int = 2,
        engine: str = "auto",
        batch_stats: BatchStats = BATCH_STATS,
        loss_at: LossAt = "x",
        fraction: float = 1.0,
        microbatch: int | None = None,
    ) -> None:
        Options(loss_fn, power, engine, batch_stats, loss_at).check_microbatch(microbatch)
        super().__init__(model, loss_fn, batch_stats)
        self.microbatch = microbatch
        self.power, self.engine, self.loss_at = power, engine, loss_at
        self.h, self.gamma, self.fraction = h, gamma, fraction

    @property
    def fraction(self) -> float:
        """Share of each batch that has a penalty."""
        return self._fraction

    @fraction.setter
    def fraction(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"fraction must be in (0, 1], 1 for a penalty on every sample, got {value}")
        self._fraction = float(value)

    @property
    def microbatch(self) -> int | None:
        """How many samples are evaluated at a time."""
        return self._microbatch

    @microbatch.setter
    def microbatch(self, value: int | None) -> None:
        if value is not None and (value < 1 or value != int(value)):
            raise ValueError(f"microbatch must be >= 1, or None for the whole batch, got {value}")
        self._microbatch = value

    @property
    def cost(self) -> float:
        """Forward passes per sample, by an exact engine: 12, or 15 with "split", and fewer for a `fraction`."""
        if self.batch_stats == "split":
            return 3 + 12 * self.fraction
        return 5 + 7 * self.fraction if self.loss_at == "step" and self.fraction < 1 else 3 + 9 * self.fraction

    @property
    def can_microbatch(self) -> bool:
        """Whether samples do not depend on each other."""
        return self.batch_stats != "train"

    def forward(self, x: Tensor, y: Tensor, index: Tensor | None = None) -> CUREOutput:
        """Evaluate the objective on images `(B, ...)` and labels; see `fastcure.curvature` for what it raises."""
        options = Options(self.loss_fn, self.power, self.engine, self.batch_stats, self.loss_at)
        check_arguments(x, y, self.h)
        penalised = self._penalised(len(x))
        if self.microbatch is None or self.microbatch >= len(x):
            parts = plan(len(x), penalised, losses=self.batch_stats != "split")
            logits, losses, penalties, _ = evaluate_batch(self.model, x, y, self.h, options, parts)
            loss, penalty = losses.mean(), penalties.mean()
            return CUREOutput(loss + self.gamma * penalty, loss, penalty, logits)
        options.check_microbatch(self.microbatch)
        parts = plan(len(x), penalised, self.microbatch, losses=self.batch_stats != "split")
        weights = 1 / len(x), self.gamma / penalised
        logits, losses, penalties, total = evaluate_batch(self.model, x, y, self.h, options, parts, weights=weights)
        assert total is not None
        return CUREOutput(total, losses.mean(), penalties.mean(), logits)

    def _penalised(self, batch: int) -> int:
        """Return how many samples have a penalty, of which and of the others are enough for batch norms."""
        least = 2 if self.batch_stats == "train" else 1
        some = max(least, round(self.fraction * batch))
        return some if self.fraction < 1 and (least == 1 or some + least <= batch) else batch
