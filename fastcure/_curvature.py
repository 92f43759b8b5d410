"""The curvature penalty of CURE, per sample and differentiable in the parameters.

For images x, labels y and a per-sample loss l, with g(x) = dl/dx and h an L2 length in input units:

    z = sign(g(x)) / ||sign(g(x))||_2        the direction, detached
    d = g(x + h z) - g(x)                    a finite-difference Hessian-vector product
    R = ||d||_2^2                            the penalty

Moosavi-Dezfooli, Fawzi, Uesato, Frossard: "Robustness via curvature regularization, and vice versa", CVPR 2019,
equations 8 to 10, with 1/h^2 absorbed in gamma. Both gradients are differentiated.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastcure._diagnostics.first_batch import first_batch, warn_of_small_step
from fastcure._diagnostics.modes import regularisation_left_out, warn_of_idle_norms
from fastcure._distributed import averaged_once, refuse_static_graph, refuse_wrappers_within
from fastcure._functional import LossFn, ModelWithLoss, Objective, cross_entropy, evaluation_mode, unwrap
from fastcure._one_thread import one_thread
from fastcure._validation import check_batch, check_positive, not_inside_torch_compile, refuse_transforms
from fastcure.engines import Engine, Evaluation, LossOnly, engine_called

BatchStats = Literal["frozen", "split", "train"]
LossAt = Literal["x", "step"]
NORMS = (nn.modules.batchnorm._BatchNorm,)
_loss_only = LossOnly()


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
    h: float | Tensor = 1.25,
    *,
    loss_fn: LossFn = cross_entropy,
    power: int = 2,
    engine: str = "auto",
    batch_stats: BatchStats = "frozen",
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
        h: L2 length of the finite step in input units, `> 0`; one number, or one a sample `(B,)`. On N values it is
            an FGSM step of `h / sqrt(N)` a pixel (`fastcure.h_to_eps`); one too short for the precision is warned of.
        loss_fn: `(logits, y) -> (B,)`; if it is a module, its parameters are trained too.
        power: 2 for the squared norm of the paper's equations, 1 for the norm of its published code.
        engine: "auto", "eager", "compile", "cuda_graph", "first_order" (an estimator, for models without second
            derivatives) or "reference" (the oracle); see `fastcure.engines`.
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
    """
    check_arguments(x, y, h, power, batch_stats, loss_at, direction)
    model = unwrap(model)
    warn_of_idle_norms(model, batch_stats)
    called = ModelWithLoss(model, loss_fn)(x, y) if batch_stats == "split" else None
    with regularisation_left_out(model, loss_fn, engine, batch_stats):
        chosen, evaluation = evaluate(
            *(model, x, y, h),
            loss_fn=loss_fn,
            power=power,
            engine=engine,
            direction=direction,
            stepped=loss_at == "step",
            batch_norms_train=batch_stats == "train",
        )
    logits, (loss, penalty) = evaluation.logits, attach(chosen, evaluation)
    if called is not None:
        logits, loss = called[0].detach(), called[1]
    return Curvature(logits, *averaged_once((model, loss_fn), loss, penalty))


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    h: float | Tensor,
    *,
    loss_fn: LossFn,
    power: int,
    engine: str,
    direction: Tensor | None = None,
    stepped: bool = False,
    batch_norms_train: bool = False,
    moves: bool = True,
    penalised: bool = True,
) -> tuple[Engine, Evaluation]:
    """Run the forward of an engine in evaluation mode, with a state for its backward where gradients are on.

    With `batch_norms_train` the flags of batch norms stay as they are, and if `moves` their statistics move once.
    Without `penalised` the penalty is 0, and costs nothing.
    """
    refuse_wrappers_within(model, loss_fn)
    with one_thread(model, loss_fn):
        chosen = engine_called(engine) if penalised else _loss_only
        norms = training_norms(model, loss_fn) if batch_norms_train else []
        if norms:
            check_training_norms(norms, engine)
        objective = Objective(model, loss_fn, moving=[module for _, module in norms] if moves else ())
        differentiable = objective.trainable and torch.is_grad_enabled()
        warn_of_small_step(model, x, h)
        flags = evaluation_mode(model, loss_fn, but=NORMS if norms else ())
        with torch.enable_grad(), flags, first_batch(objective, x, y):
            evaluation = chosen.forward(
                *(objective, x, y, h), power=power, direction=direction, differentiable=differentiable, stepped=stepped
            )
        objective.move_buffers()
        return chosen, evaluation


def attach(engine: Engine, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """Return loss and penalty `(B,)`, differentiable in the parameters through the engine's backward."""
    loss, penalty = _Attach.apply(engine, evaluation, *evaluation.parameters)
    return loss, penalty


def check_arguments(
    x: Tensor,
    y: Tensor,
    h: float | Tensor,
    power: int,
    batch_stats: str,
    loss_at: str,
    direction: Tensor | None = None,
) -> None:
    """Check the arguments of `curvature`; it raises what that says."""
    not_inside_torch_compile()
    check_batch(x, y, direction)
    check_positive("h", h, batch=len(x))
    check_modes(power, batch_stats, loss_at)
    refuse_transforms()
    refuse_static_graph()


def check_modes(power: int, batch_stats: str, loss_at: str) -> None:
    """Check the settings that are choices."""
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}")
    if batch_stats not in ("frozen", "split", "train"):
        raise ValueError(f"batch_stats must be 'frozen', 'split' or 'train', got {batch_stats!r}")
    if loss_at not in ("x", "step"):
        raise ValueError(f"loss_at must be 'x' or 'step', got {loss_at!r}")
    if loss_at == "step" and batch_stats == "split":
        raise ValueError(
            "loss_at='step' must have batch_stats 'frozen' or 'train', got 'split', which takes the loss from a "
            "forward of its own at x"
        )


def training_norms(*roots: object) -> list[tuple[str, nn.Module]]:
    """Return the batch norms in training mode, each with its name, which is that within its root."""
    modules = (named for root in roots if isinstance(root, nn.Module) for named in root.named_modules())
    return [(name, module) for name, module in modules if module.training and isinstance(module, NORMS)]


def check_training_norms(norms: list[tuple[str, nn.Module]], engine: str) -> None:
    """Check that the engine can run batch norms in training mode, and that they have a double backward."""
    if engine not in ("auto", "eager", "reference"):
        raise ValueError(f"batch_stats='train' must run on engine='eager' (or 'auto'), got {engine!r}")
    for name, module in norms:
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"batch_stats='train' must have batch norms with a double backward, got the SyncBatchNorm {name}: keep "
                "nn.BatchNorm, whose statistics are each process's own, or batch_stats='frozen'"
            )


class _Attach(torch.autograd.Function):
    """Gives an engine's detached values the parameters as their history, and the engine as their derivative."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, evaluation: Evaluation, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        ctx.engine, ctx.state = engine, evaluation.state
        ctx.set_materialize_grads(False)  # an output that nobody uses has weight None, and costs nothing
        return evaluation.loss, evaluation.penalty

    @staticmethod
    def backward(ctx: Any, w_loss: Tensor | None, w_penalty: Tensor | None) -> tuple[Any, ...]:
        state, retain = take_state(ctx)
        return None, None, *ctx.engine.backward(state, w_loss, w_penalty, retain=retain)


def take_state(ctx: Any) -> tuple[Any, bool]:
    """Return `ctx.state` and whether another backward may want it; else it is freed.

    Raises:
        RuntimeError: in a backward with create_graph=True, and if an earlier one has freed it.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the curvature penalty has no second derivative: call backward without create_graph=True")
    if ctx.state is None:
        raise RuntimeError("the graph of this penalty was freed by an earlier backward: retain_graph=True keeps it")
    state, retain = ctx.state, torch._C._autograd._get_current_graph_task_keep_graph()
    if not retain:  # freed node by node while the inner backward runs, not when the caller drops the outputs
        ctx.state = None
    return state, retain
