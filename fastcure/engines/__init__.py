"""The engines: ways to compute a loss, its curvature penalty and their parameter gradients."""

from __future__ import annotations

from fastcure.engines.auto import Auto
from fastcure.engines.base import Engine, Evaluation
from fastcure.engines.compile import Compile
from fastcure.engines.cuda_graph import Graphed
from fastcure.engines.eager import Eager
from fastcure.engines.first_order import FirstOrder
from fastcure.engines.loss_only import LossOnly
from fastcure.engines.reference import Reference

_compile = Compile()
ENGINES: dict[str, Engine] = {
    "auto": Auto(_compile),
    "eager": Eager(),
    "compile": _compile,
    "cuda_graph": Graphed(),
    "first_order": FirstOrder(),
    "reference": Reference(),
}


def engine_called(name: str) -> Engine:
    """Return an engine.

    Raises:
        ValueError: for a name that is not one.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    return ENGINES[name]


__all__ = ["ENGINES", "Engine", "Evaluation", "LossOnly", "engine_called"]
