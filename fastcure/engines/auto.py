"""The engine "auto": eager at once; on a CPU compiled, when a shape has been worked on for some minutes.

Compiled, a step is 4 to 20 % shorter on a CPU (docs/performance.md), but the compilation takes from half a minute to
some minutes: so it waits until several times as much has gone into eager steps. That is counted in floating-point
operations and not in seconds, so that a run with the same seed changes over at the same step.

A model that cannot be compiled whole, or is compiled again and again, stays with the eager engine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastcure._functional import Objective
from fastcure.engines.autograd import GraphEngine
from fastcure.engines.base import Evaluation
from fastcure.engines.compile import Compile, compilations, has_compiler
from fastcure.engines.eager import Eager

logger = logging.getLogger("fastcure")

HOT = 1e14
"""FLOPs of eager steps after which a shape is compiled: ten minutes or so of two CPU cores."""
MOST_COMPILATIONS = 3
"""Of one shape; a model that needs more of them reads something that changes."""


@dataclass
class Shape:
    """What has been done for a model and a shape."""

    step: float | None = None
    """FLOPs of an eager step."""
    spent: float = 0.0
    """FLOPs of all of them."""
    compilations: int = 0
    eager: bool = False
    """Whether it stays so."""


class Auto(GraphEngine):
    """Exact.

    Args:
        compiled: the engine to change over to.
        hot: FLOPs of eager steps after which to do so.
    """

    def __init__(self, compiled: Compile, hot: float = HOT) -> None:
        self.compiled, self.hot = compiled, hot
        self._eager = Eager()
        self._shapes: WeakKeyDictionary[nn.Module, dict[Any, Shape]] = WeakKeyDictionary()

    def forward(
        self,
        objective: Objective,
        x: Tensor,
        y: Tensor,
        h: float | Tensor,
        *,
        power: int,
        direction: Tensor | None,
        differentiable: bool,
        stepped: bool = False,
    ) -> Evaluation:
        """Evaluate loss and penalty by the engine whose turn it is."""
        arguments = (objective, x, y, h)
        options: dict[str, Any] = {"power": power, "direction": direction}
        options |= {"differentiable": differentiable, "stepped": stepped}
        if not (differentiable and _may_be_compiled(objective.model, x)):
            return self._eager.forward(*arguments, **options)
        key = (x.shape, x.dtype, y.shape, y.dtype, power, stepped, direction is None, isinstance(h, Tensor) and h.shape)
        shape = self._shapes.setdefault(objective.model, {}).setdefault(key, Shape())
        if shape.step is None:
            from fastcure.profiling.flops import FlopCounter  # torch's table of costs takes long to import

            with FlopCounter() as counter:
                evaluation = self._eager.forward(*arguments, **options)
            shape.step = 3.0 * counter.total  # four of twelve passes
            shape.spent += shape.step
            return evaluation
        shape.eager = shape.eager or (shape.spent >= self.hot and not has_compiler())
        if shape.eager or shape.spent < self.hot:
            shape.spent += shape.step
            return self._eager.forward(*arguments, **options)
        before = compilations()
        try:
            evaluation = self.compiled.forward(*arguments, **options)
        except Exception as error:
            evaluation = self._eager.forward(*arguments, **options)  # it raises as well if the batch is at fault
            shape.eager = True
            logger.warning("fastcure: steps stay as they are: %s", " ".join(str(error).split())[:300])
            return evaluation
        shape.compilations += compilations() > before
        if shape.compilations > MOST_COMPILATIONS:
            shape.eager = True
            logger.warning("fastcure: compiled %d times over; steps are eager from now on", shape.compilations)
        return evaluation


def _may_be_compiled(model: nn.Module, x: Tensor) -> bool:
    """Tell whether the compile engine takes it, and is known to be faster."""
    known = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return known and not any(module.training for module in model.modules())
