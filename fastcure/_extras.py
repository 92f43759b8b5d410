"""Packages that only parts of the library need, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
"""What `pip install` calls a module, where that is not its own name."""


def extra(module: str, purpose: str) -> Any:
    """Import `module`; where its package is missing, say how to install it.

    Raises:
        ModuleNotFoundError: naming package, purpose and command.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(error.name or module, purpose) from error


def need(*modules: str, purpose: str) -> None:
    """Check, without importing them, that modules are installed: before hours of work, not after.

    Raises:
        ModuleNotFoundError: naming the first missing package, purpose and command.
    """
    for module in modules:
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:  # of a parent package, or of an importer
            found = False
        if not found:
            raise _missing(module, purpose)


def _missing(module: str, purpose: str) -> ModuleNotFoundError:
    package = module.partition(".")[0]
    package = DISTRIBUTIONS.get(package, package)
    return ModuleNotFoundError(f"the package {package} is needed {purpose}: pip install {package}", name=module)
