"""The curvature penalty of CURE, per sample and differentiable in the parameters.

For images x, labels y and a per-sample loss l, with g(x) = dl/dx and h an L2 length in input units:

    z = sign(g(x)) / ||sign(g(x))||_2        the direction, detached
    d = g(x + h z) - g(x)                    a finite-difference Hessian-vector product
    R = ||d||_2^2                            the penalty

Moosavi-Dezfooli, Fawzi, Uesato, Frossard: "Robustness via curvature regularization, and vice versa", CVPR 2019,
equations 8 to 10, with 1/h^2 absorbed in gamma. Both gradients are differentiated.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastcure._batch import Options, Part, check_arguments, evaluate_batch
from fastcure._defaults import BATCH_STATS, BatchStats, H
from fastcure._functional import LossFn, cross_entropy
from fastcure.engines import LossAt


class Curvature(NamedTuple):
    """What `curvature` returns, sample by sample."""

    logits: Tensor
    """(B, C), detached."""
    loss: Tensor
    """(B,), differentiable in the parameters."""
    penalty: Tensor
    """(B,), differentiable in the parameters: ||g(x + h z) - g(x)||_2^2, or its root if power=1."""


def curvature(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    h: float | Tensor = H,
    *,
    loss_fn: LossFn = cross_entropy,
    power: int = 2,
    engine: str = "auto",
    batch_stats: BatchStats = BATCH_STATS,
    loss_at: LossAt = "x",
    direction: Tensor | None = None,
) -> Curvature:
    """Evaluate the loss and the curvature penalty of each sample.

    The exact gradient costs 12 forward passes in all, 4 of them here and 8 in the backward; the gradient of `loss`
    rides along. Under `torch.no_grad()` nothing is kept for a backward.

    Args:
        model: the network; its normalisation is a layer of it. Flags, `.grad`s and buffers come back as they were.
            Compiled modules in it run uncompiled here.
        x: `(B, ...)` images, floating point, pixels in [0, 1]. A model's first batch is warned of if not.
        y: class indices `(B,)` or probabilities `(B, C)`; whatever `loss_fn` takes.
        h: L2 length of the finite step in input units, `> 0`; one number, or one per sample `(B,)`. On N values it is
            an FGSM step of `h / sqrt(N)` per pixel (`fastcure.h_to_eps`); one too short for the precision is warned of.
        loss_fn: `(logits, y) -> (B,)`; if it is a module, its parameters are trained too.
        power: 2 for the squared norm of the paper's equations, 1 for the norm of its published code.
        engine: "auto", "eager", "compile", "cuda_graph", "first_order" (an estimator, for models without second
            derivatives) or "reference" (the definitions, one by one); see `fastcure.engines`.
        batch_stats: "frozen" runs everything in evaluation mode and changes no buffer. "split", the published
            code's way, takes loss and logits from one forward with every module's flag as it stands, which updates
            buffers once and costs 3 forward passes more; the penalty stays in evaluation mode. "train" has batch norms
            compute as their flags say in every pass, and all else in evaluation mode: a sample's loss and penalty
            then depend on its batch. Buffers change once, by the pass at x.
        loss_at: "step" takes the loss, not the logits, at `x + h z`: the point of FGSM, whose forward the penalty
            makes anyhow. It is no part of the paper; it trains on adversarial images at no further cost.
        direction: `(B, ...)` in place of z, for tests and studies.

    Returns:
        `Curvature(logits, loss, penalty)`.

    Raises:
        TypeError: if `model` or `x` is of the wrong kind.
        ValueError: if an argument is out of range, `x` requires grad, a trainable tensor that is no parameter of the
            model or of `loss_fn` takes part, or the model is random in evaluation mode (`F.dropout` left on).
        RuntimeError: within forward-mode AD, `torch.func` transforms or inference mode; while another thread uses the
            model here; if the loss does not depend on `x`; if an exact engine meets scripted code or an operator that
            has no second derivative, here or in backward; in backward, at a second derivative, a second backward
            without `retain_graph=True` or within DistributedDataParallel, and where a DistributedDataParallel holds the
            model but the penalty is not called through it.

    Examples:
        >>> import torch, fastcure
        >>> model = fastcure.models.resnet8()
        >>> x, y = torch.rand(2, 3, 16, 16), torch.tensor([3, 7])
        >>> result = fastcure.curvature(model, x, y, h=1.0)
        >>> result.loss.shape, result.penalty.shape
        (torch.Size([2]), torch.Size([2]))
        >>> (result.loss + 0.5 * result.penalty).mean().backward()
    """
    options = Options(loss_fn, power, engine, batch_stats, loss_at)
    check_arguments(x, y, h, direction)
    whole = [Part(slice(0, len(x)))]
    logits, loss, penalty, _ = evaluate_batch(model, x, y, h, options, whole, direction=direction)
    return Curvature(logits, loss, penalty)
