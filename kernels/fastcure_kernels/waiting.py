"""Tensors that are computed when an operator reads them, and what reads memory without one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .torch_compat import without_torch_function

READERS = frozenset(
    [
        *(Tensor.__repr__, Tensor.__deepcopy__, Tensor.__reduce_ex__, Tensor.__array__, Tensor.__dlpack__),
        *(Tensor.numpy, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage),
    ]
)


class Waiting(Tensor):
    """Base of subclasses without memory, whose `__torch_dispatch__` returns plain tensors.

    What passes operators by is given a plain tensor of the values, detached: printing, copying, saving, numpy.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_torch_function():
            if func in READERS:
                args = (args[0].detach(), *args[1:])
            return func(*args, **(kwargs or {}))
