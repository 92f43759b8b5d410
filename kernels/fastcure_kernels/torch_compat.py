"""The private names of torch's that the kernels use."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map as tree_map

SomeTensor = TypeVar("SomeTensor", bound=Tensor)

no_torch_function: Any = torch._C._disabled_torch_function_impl
"""As `__torch_function__` of a subclass: functions take it for a tensor, and operators alone tell it apart."""


def engine_will_execute(node: Any) -> bool:
    """Tell whether the backward that runs now goes through `node`; `needs_input_grad` knows the forward alone.

    Raises:
        RuntimeError: for a leaf for whose gradient `torch.autograd.grad` was called.
    """
    return torch._C._will_engine_execute_node(node)


def without_storage(cls: type[SomeTensor], like: Tensor, strides: bool = False) -> SomeTensor:
    """Make a tensor of a subclass that has a shape but no memory; the public constructors all allocate."""
    laid = like.stride() if strides else None
    return Tensor._make_wrapper_subclass(cls, like.shape, laid, dtype=like.dtype, device=like.device)


def has_gradient_hooks(x: Tensor) -> bool:
    """Tell whether a hook was registered on a tensor; hooks can be registered, but not listed."""
    return bool(x._backward_hooks)
