"""The objective of a batch in parts of N samples: the same numbers and gradients, with the memory of N samples.

The weights of the parts are known beforehand, so their gradients are computed in the forward, part by part, and the
backward only scales their sum.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._curvature import evaluate, take_state
from fastcure._functional import LossFn


class Parts(NamedTuple):
    """Sums over a batch."""

    total: Tensor
    """0-dim, `sum(w_loss * loss + w_penalty * penalty)`; differentiable in the parameters, once."""
    loss: Tensor
    """(B,), detached."""
    penalty: Tensor
    """Of the samples that have one, detached."""
    logits: Tensor
    """(B, C), detached."""


def check_parts(microbatch: int | None, batch_stats: str) -> None:
    """Raise if the batch is to be divided though each of its samples depends on all of it."""
    if microbatch is not None and batch_stats == "train":
        raise ValueError(
            f"microbatch must be None with batch_stats='train', got {microbatch}: each sample depends on the whole "
            "batch; use batch_stats='frozen' or 'split', or a smaller batch"
        )


def in_parts(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    h: float | Tensor,
    w_loss: float,
    w_penalty: float | Tensor,
    microbatch: int,
    *,
    penalised: int,
    loss_fn: LossFn,
    power: int,
    engine: str,
    stepped: bool,
) -> Parts:
    """Evaluate `sum(w_loss * loss + w_penalty * penalty)` in evaluation mode, `microbatch` samples at a time.

    Arguments are those of `fastcure.curvature`, all checked. Of the samples the first `penalised` have a penalty; with
    `w_loss` 0 the gradient of the loss is not computed, and what samples without penalty have is not looked at.
    """
    lengths = h if isinstance(h, Tensor) and h.dim() and len(h) == len(x) else None
    gradients: dict[nn.Parameter, Tensor] = {}
    results = []
    counted = len(x) if w_loss else penalised
    starts = [*range(0, penalised, microbatch), *range(penalised, counted, microbatch)]
    for start, stop in pairwise([*starts, counted]):
        part = slice(start, stop)
        chosen, result = evaluate(
            model,
            x[part],
            y[part],
            h if lengths is None else lengths[part],
            loss_fn=loss_fn,
            power=power,
            engine=engine,
            stepped=stepped,
            penalised=start < penalised,
        )
        results.append(result[:3])
        if not result.parameters:
            continue
        weights = [
            None if isinstance(w, (int, float)) and w == 0 else torch.ones_like(values) * w
            for values, w in ((result.loss, w_loss), (result.penalty, w_penalty))
        ]
        if any(weight is not None for weight in weights):
            found = chosen.backward(result.state, *weights, retain=False)
            for parameter, gradient in zip(result.parameters, found, strict=True):
                if gradient is not None:
                    old = gradients.get(parameter)
                    gradients[parameter] = gradient if old is None else old + gradient  # it may be another's too
    logits, loss, penalty = (torch.cat(values) for values in zip(*results, strict=True))
    penalty = penalty[:penalised]
    total = w_loss * loss.sum() + w_penalty * penalty.sum()
    total = _Scaled.apply(total, tuple(gradients.values()), *gradients)
    return Parts(total, loss, penalty, logits)


class _Scaled(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *parameters: nn.Parameter) -> Tensor:
        ctx.state = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        gradients, _ = take_state(ctx)
        return None, None, *[scale.to(gradient) * gradient for gradient in gradients]
