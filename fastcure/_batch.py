"""Loss and penalty of a batch, which is a list of parts: which samples, penalised or not.

The whole batch is one part, a penalty on a share of it makes two, micro-batches are many; one loop runs them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._attach import add_part, attach, scaled
from fastcure._defaults import BATCH_STATS, BatchStats
from fastcure._diagnostics.first_batch import first_batch, warn_of_small_step
from fastcure._diagnostics.modes import regularisation_left_out, warn_of_idle_norms
from fastcure._distributed import averaged_once, refuse_static_graph, refuse_wrappers_within
from fastcure._functional import LossFn, ModelWithLoss, cross_entropy, evaluation_mode, loss_scale, unwrap
from fastcure._model_lock import one_thread
from fastcure._torch_compat import BatchNormBase, not_inside_torch_compile
from fastcure._validation import check_batch, check_positive, refuse_transforms
from fastcure.engines import Engine, Evaluation, LossAt, LossOnly, Request, engine_called

NORMS = (BatchNormBase,)


@dataclass(frozen=True)
class Options:
    """The settings of the penalty that are choices, as in `fastcure.curvature`.

    Raises:
        ValueError: if one is out of range, or two do not go together.
    """

    loss_fn: LossFn = cross_entropy
    power: int = 2
    engine: str = "auto"
    batch_stats: BatchStats = BATCH_STATS
    loss_at: LossAt = "x"

    def __post_init__(self) -> None:
        engine_called(self.engine)
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power!r}")
        if self.batch_stats not in ("frozen", "split", "train"):
            raise ValueError(f"batch_stats must be 'frozen', 'split' or 'train', got {self.batch_stats!r}")
        if self.loss_at not in ("x", "step"):
            raise ValueError(f"loss_at must be 'x' or 'step', got {self.loss_at!r}")
        if self.loss_at == "step" and self.batch_stats == "split":
            raise ValueError(
                "loss_at='step' must have batch_stats 'frozen' or 'train', got 'split', which takes the loss from a "
                "forward of its own at x"
            )

    def check_microbatch(self, microbatch: int | None) -> None:
        """Raise if the batch is to be divided though each of its samples depends on all of it."""
        if microbatch is not None and self.batch_stats == "train":
            raise ValueError(
                f"microbatch must be None with batch_stats='train', got {microbatch}: each sample depends on the whole "
                "batch; use batch_stats='frozen' or 'split', or a smaller batch"
            )


class Part(NamedTuple):
    """Samples that one pass takes together."""

    samples: slice
    penalised: bool = True
    """Whether they have a penalty, or the loss alone."""
    updates_buffers: bool = True
    """Whether batch norms in training mode update their running statistics by them."""

    def of(self, values: Tensor) -> Tensor:
        """Return its share of `values` `(B, ...)`."""
        return values if len(values) == self.samples.stop - self.samples.start else values[self.samples]


def plan(batch: int, penalised: int, microbatch: int | None = None, *, losses: bool = True) -> list[Part]:
    """Divide `batch` samples, the first `penalised` of which have a penalty, into parts in the order of their passes.

    Args:
        batch: how many there are.
        penalised: how many have a penalty.
        microbatch: the most of a part.
        losses: whether the loss of those without penalty is wanted.

    Returns:
        The parts. Running statistics follow the last one, which without `microbatch` is the largest: nothing may fail
        after it.
    """
    size = microbatch or max(batch, 1)
    starts = [*range(0, penalised, size), *range(penalised, batch, size)] if losses else [*range(0, penalised, size)]
    ends = pairwise([*starts, batch if losses else penalised])
    found = [(slice(start, stop), start < penalised) for start, stop in ends]
    if microbatch is None:
        found.sort(key=lambda part: part[0].stop - part[0].start)
    return [Part(samples, has, (samples, has) == found[-1]) for samples, has in found] or [Part(slice(0, 0))]


class BatchResult(NamedTuple):
    """Loss and penalty, in the order of the samples."""

    logits: Tensor
    """(B, C), detached."""
    loss: Tensor
    """(B,), differentiable in the parameters; with weights, detached."""
    penalty: Tensor
    """Of the samples that have one, as `loss`."""
    total: Tensor | None
    """0-dim, with weights: `sum(w_loss * loss) + sum(w_penalty * penalty)`, differentiable in the parameters once."""


def evaluate_batch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    h: float | Tensor,
    options: Options,
    parts: list[Part],
    *,
    direction: Tensor | None = None,
    weights: tuple[float, float | Tensor] | None = None,
) -> BatchResult:
    """Evaluate loss and penalty part by part, of arguments that `check_arguments` has seen.

    Args:
        model: the network.
        x: `(B, ...)` images.
        y: labels.
        h: step, one number or one per sample.
        options: of the penalty.
        parts: as from `plan`.
        direction: `(B, ...)` in place of z, for a plan of one part.
        weights: of the sums of loss and penalty, where they are known: the gradients of a part are then computed right
            after its forward, so that its memory is free for the next, and the backward only scales their sum.

    Raises:
        TypeError, ValueError, RuntimeError: as `fastcure.curvature` says.
    """
    model, loss_fn, split = unwrap(model), options.loss_fn, options.batch_stats == "split"
    warn_of_idle_norms(model, options.batch_stats)
    called = ModelWithLoss(model, loss_fn)(x, y) if split else None
    lengths = h if isinstance(h, Tensor) and h.dim() else None
    gradients: dict[nn.Parameter, Tensor] = {}
    known: dict[str, Any] = {}
    results: list[tuple[Part, Engine, Evaluation]] = []
    scale = loss_scale(x.device)
    left_out = regularisation_left_out(model, loss_fn, options.engine, options.batch_stats)
    with left_out, passes(model, options) as norms:
        for part in parts:
            step = h if lengths is None else part.of(lengths)
            engine, found = evaluate(model, part.of(x), part.of(y), step, options, part, norms, direction, known)
            if weights is not None:
                add_part(gradients, engine, found, 0.0 if split else scale * weights[0], scale * weights[1])
                found = found._replace(state=None)
            results.append((part, engine, found))
    results.sort(key=lambda result: result[0].samples.start)
    if weights is None:
        values = attach([(engine, found) for _, engine, found in results])
    else:
        values = [(found.loss, found.penalty) for _, _, found in results]
    logits, loss = _joined([found.logits for _, _, found in results]), _joined([loss for loss, _ in values])
    penalty = _joined([value for (part, *_), (_, value) in zip(results, values, strict=True) if part.penalised])
    total = None
    if weights is not None:
        value = weights[1] * penalty.sum() if split else weights[0] * loss.sum() + weights[1] * penalty.sum()
        total = scaled(value, gradients if scale == 1 else {p: g / scale for p, g in gradients.items()})
    if called is not None:
        logits, loss = called[0].detach(), called[1]
        if total is not None and weights is not None:
            total, loss = total + weights[0] * loss.sum(), loss.detach()
    if total is not None:
        (total,) = averaged_once((model, loss_fn), total)
    else:
        loss, penalty = averaged_once((model, loss_fn), loss, penalty)
    return BatchResult(logits, loss, penalty, total)


@contextmanager
def passes(model: nn.Module, options: Options) -> Iterator[list[nn.Module]]:
    """Around the passes of a batch: evaluation mode, in this thread alone.

    Yields:
        The batch norms in training mode, whose flags stay as they are with `batch_stats="train"`.
    """
    refuse_wrappers_within(model, options.loss_fn)
    with one_thread(model, options.loss_fn):
        norms = training_norms(model, options.loss_fn) if options.batch_stats == "train" else []
        with evaluation_mode(model, options.loss_fn, but=NORMS if norms else ()):
            yield norms


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    h: float | Tensor,
    options: Options,
    part: Part,
    norms: list[nn.Module],
    direction: Tensor | None = None,
    known: dict[str, Any] | None = None,
) -> tuple[Engine, Evaluation]:
    """Run the forward of an engine, with a state for its backward where gradients are on.

    Args:
        model: the network, within `passes`.
        x, y, h, options, direction: as in `evaluate_batch`, of this part.
        part: which samples it has.
        norms: as from `passes`.
        known: what an engine has found out in other parts.
    """
    engine = engine_called(options.engine, x.device, training_norms=bool(norms))
    if not (part.penalised or engine.any_part):
        engine = LossOnly(folded=engine.exact)
    roots = (root for root in (model, options.loss_fn) if isinstance(root, nn.Module))
    trainable = any(parameter.requires_grad for root in roots for parameter in root.parameters())
    request = Request(
        *(model, options.loss_fn, x, y, h),
        power=options.power,
        loss_at=options.loss_at,
        direction=direction,
        differentiable=trainable and torch.is_grad_enabled(),
        with_loss=options.batch_stats != "split",
        penalised=part.penalised,
        tracking=tuple(norms) if part.updates_buffers else (),
        known={} if known is None else known,
    )
    warn_of_small_step(model, x, h)
    with torch.enable_grad(), first_batch(request):
        evaluation = engine.forward(request)
    request.update_buffers()
    return engine, evaluation


def check_arguments(x: Tensor, y: Tensor, h: float | Tensor, direction: Tensor | None = None) -> None:
    """Check the arguments of a batch; it raises what `fastcure.curvature` says."""
    not_inside_torch_compile()
    check_batch(x, y, direction)
    check_positive("h", h, batch=len(x))
    refuse_transforms()
    refuse_static_graph()


def training_norms(*roots: object) -> list[nn.Module]:
    """Return the batch norms in training mode.

    Raises:
        ValueError: if one has no double backward.
    """
    named = (pair for root in roots if isinstance(root, nn.Module) for pair in root.named_modules())
    norms = {module: name for name, module in named if module.training and isinstance(module, NORMS)}
    for module, name in norms.items():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"batch_stats='train' must have batch norms with a double backward, got the SyncBatchNorm {name}: keep "
                "nn.BatchNorm, whose statistics are each process's own, or batch_stats='frozen'"
            )
    return list(norms)


def _joined(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(values)
