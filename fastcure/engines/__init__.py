"""The engines: ways to compute a loss, its curvature penalty and their parameter gradients."""

from __future__ import annotations

import torch

from fastcure.engines._loss_only import LossOnly
from fastcure.engines.auto import Auto
from fastcure.engines.base import Engine, Evaluation, LossAt, Request
from fastcure.engines.compile import Compile
from fastcure.engines.cuda_graph import CudaGraph
from fastcure.engines.eager import Eager
from fastcure.engines.first_order import FirstOrder
from fastcure.engines.reference import Reference

ENGINES: dict[str, Engine] = {
    "auto": Auto(),
    "eager": Eager(),
    "compile": Compile(),
    "cuda_graph": CudaGraph(),
    "first_order": FirstOrder(),
    "reference": Reference(),
}


def engine_called(name: str, device: torch.device | None = None, *, training_norms: bool = False) -> Engine:
    """Return an engine, for what it is asked to do.

    Args:
        name: one of `ENGINES`.
        device: of the images, if they are there.
        training_norms: whether batch norms are in training mode.

    Raises:
        ValueError: for a name that is not one, or an engine that cannot do this.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]
    if training_norms and not engine.training_norms:
        able = ", ".join(repr(other) for other in ENGINES if ENGINES[other].training_norms)
        raise ValueError(f"batch_stats='train' must have an engine among {able}, got {name!r}")
    if device is not None and engine.device not in (None, device.type):
        raise ValueError(f"engine={name!r} wants tensors on {engine.device}, got {device}: use engine='auto'")
    return engine


__all__ = ["ENGINES", "Engine", "Evaluation", "LossAt", "LossOnly", "Request", "engine_called"]
