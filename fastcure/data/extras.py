"""Packages that only some formats need, imported when they are needed."""

from importlib import import_module
from typing import Any


def extra(module: str) -> Any:
    """Import ``module``; where it is not installed, say which extra brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        mend = 'pip install "fastcure[train]"'
        raise ModuleNotFoundError(f"{module} is needed to read this dataset: {mend}", name=error.name) from error
