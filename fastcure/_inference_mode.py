"""Leaving torch.inference_mode: validation loops run in it, while attacks and measures need gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` run outside of torch.inference_mode, on clones of arguments that were made inside.

    Autograd cannot save tensors made inside. As inside, gradients are off until `function` switches them on. What it
    returns are ordinary tensors.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as contexts:
            if torch.is_inference_mode_enabled():
                contexts.enter_context(torch.inference_mode(False))
                contexts.enter_context(torch.no_grad())
            return function(*map(_ordinary, args), **{name: _ordinary(value) for name, value in kwargs.items()})

    return call


def _ordinary(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
