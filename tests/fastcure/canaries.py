"""Tests that say what is broken where they fail."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def breaks(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a failure of the test, of whatever kind, say what torch has broken."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: object, **kwargs: object) -> None:
            try:
                test(*args, **kwargs)
            except BaseException as error:
                raise AssertionError(f"torch {torch.__version__} has moved: {what}") from error

        return run

    return decorate
