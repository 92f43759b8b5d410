"""The engines: ways to compute a loss, its curvature penalty and their parameter gradients."""

from __future__ import annotations

from torch import nn

from fastcure.engines.compiled import Compile
from fastcure.engines.eager import Eager
from fastcure.engines.first_order import FirstOrder
from fastcure.engines.graphed import Graphed
from fastcure.engines.oracle import Reference
from fastcure.engines.protocol import Engine, Evaluation

ENGINES: dict[str, Engine] = {
    "eager": Eager(),
    "compile": Compile(),
    "cuda_graph": Graphed(),
    "first_order": FirstOrder(),
    "reference": Reference(),
}


def select(name: str, model: nn.Module) -> tuple[str, str]:
    """Return the engine that `name` stands for on this model, and why.

    Raises:
        ValueError: for a name that is not an engine.
    """
    if name == "auto":
        return "eager", "exact, and it needs nothing but operators with a double backward"
    if name not in ENGINES:
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}, got {name!r}")
    return name, "chosen by the caller"


__all__ = ["ENGINES", "Engine", "Evaluation", "select"]
