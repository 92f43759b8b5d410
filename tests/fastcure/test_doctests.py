"""Every public function has an example in its docstring, and the examples run."""

import doctest
import importlib
import inspect
from types import FunctionType
from typing import Any

import pytest
import torch

MODULES = (
    "fastcure",
    "fastcure.analysis",
    "fastcure.attacks",
    "fastcure.data",
    "fastcure.evaluation.accuracy",
    "fastcure.evaluation.checklist",
    "fastcure.integrations",
    "fastcure.models",
    "fastcure.objectives",
    "fastcure.profiling.flops",
    "fastcure.profiling.traffic",
    "fastcure.reference",
    "fastcure.units",
)
BASES = ("Augment", "Objective", "ResNet", "WideResNet")
"""Classes for which the functions and classes made of them are the examples."""


def public() -> dict[str, Any]:
    """Return the functions and classes that the API reference shows, by name."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        own = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
        for name in getattr(module, "__all__", own):
            thing = getattr(module, name)
            if isinstance(thing, (FunctionType, type)) and not name.startswith("_"):
                found.setdefault(thing, f"{module.__name__}.{name}")
    return {name: thing for thing, name in found.items()}


@pytest.mark.parametrize("name", public())
def test_its_example_runs(name: str) -> None:
    thing = public()[name]
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    examples = [test for test in tests if test.examples]
    if not (inspect.isclass(thing) and (issubclass(thing, tuple) or thing.__name__ in BASES)):
        assert examples, f"{name} has no example"
    torch.manual_seed(0)
    output: list[str] = []
    for test in examples:
        assert not doctest.DocTestRunner().run(test, out=output.append).failed, "".join(output)
