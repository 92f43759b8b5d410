"""fastcure: curvature regularisation (CURE) for image classifiers, exact and fast.

`CURE` is the objective of a training step and returns a `CUREOutput`, which is `fastcure.objectives.ObjectiveOutput`;
`curvature` gives the penalty of each sample.
"""

from importlib import import_module
from types import ModuleType

from fastcure._curvature import Curvature, curvature
from fastcure._explain import explain
from fastcure._folding.prepare import prepare
from fastcure.objectives.cure import CURE, CUREOutput
from fastcure.rules import double_backward
from fastcure.schedules import Schedule, schedule
from fastcure.units import eps_to_h, h_to_eps

__version__ = "0.1.0"

_MODULES = (
    "analysis",
    "attacks",
    "data",
    "evaluation",
    "integrations",
    "models",
    "objectives",
    "profiling",
    "training",
)


def __getattr__(name: str) -> ModuleType:
    """Import a part of the library when it is first named, as in `fastcure.attacks.pgd`."""
    if name in _MODULES:
        return import_module(f"fastcure.{name}")
    raise AttributeError(f"module 'fastcure' has no attribute {name!r}")


__all__ = [
    "CURE",
    "CUREOutput",
    "Curvature",
    "Schedule",
    "__version__",
    "curvature",
    "double_backward",
    "eps_to_h",
    "explain",
    "h_to_eps",
    "prepare",
    "schedule",
]
