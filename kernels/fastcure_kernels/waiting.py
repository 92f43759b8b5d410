"""Tensors that are computed when an operator reads them, and what reads memory without one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .torch_compat import no_torch_function

READERS = [
    *("__repr__", "__deepcopy__", "__reduce_ex__", "__array__", "__dlpack__"),
    *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "share_memory_"),
]


class Waiting(Tensor):
    """Base of subclasses without memory, whose `__torch_dispatch__` returns plain tensors.

    What passes operators by is given a plain tensor of the values, detached: printing, copying, saving, numpy.
    """

    __torch_function__ = no_torch_function


def _of_values(name: str) -> Any:
    def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.detach(), name)(*args, **kwargs)

    return read


for _name in READERS:
    setattr(Waiting, _name, _of_values(_name))
