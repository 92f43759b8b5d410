"""Memory traffic of a piece of code, convolutions and matrix products apart: counted operator by operator, exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fastcure_kernels.jit import LISTENERS
from fastcure_kernels.split_gradient import SplitGradient
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fastcure._torch_compat import TorchDispatchMode, operator_packet, tree_leaves, unsafe_view
from fastcure.rules.pending_norm import PendingNorm

aten = torch.ops.aten
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
READ_TWICE = {aten.native_batch_norm: (1, 5), aten.native_batch_norm_backward: (2, 7)}
"""Operators that sum their first so many arguments and then read them again, if the argument at that place is true."""


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes that operators take and return in its `with` block, as if no cache kept anything between two.

    Launches of our kernels outside of operators count with their tensors, each once. A batch norm of torch's that uses
    the statistics of the batch reads its input twice, as on a GPU. Convolutions and matrix products, which wait for
    arithmetic, and views and allocations, which move nothing, do not count. An expanded tensor has the size of what is
    in memory. A compiled region is invisible to it.

    Examples:
        >>> import torch
        >>> from fastcure.profiling.traffic import TrafficCounter
        >>> with TrafficCounter() as counter:
        ...     total = torch.ones(2, 3) + torch.ones(3)
        >>> counter.total
        96
    """

    total: int = 0
    launches: int = 0
    """How many of them move anything: one of torch's may launch several kernels, or none of its own on a CPU."""
    _in_operator: bool = False

    def __enter__(self) -> TrafficCounter:
        LISTENERS.append(self._launched)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        LISTENERS.remove(self._launched)
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, PendingNorm | SplitGradient) for kind in types):
            return NotImplemented  # these compute their values if they must, and call plain operators
        self._in_operator = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._in_operator = False
        packet = operator_packet(func)
        if not (func.is_view or func is unsafe_view or packet in flop_registry or packet in ALLOCATIONS):
            inputs, flag = READ_TWICE.get(packet, (0, 0))
            again = args[:inputs] if inputs and args[flag] else ()
            moved = tree_leaves((args, kwargs, out, again))
            self._add(leaf for leaf in moved if isinstance(leaf, Tensor))
        return out

    def _launched(self, args: tuple[object, ...]) -> None:
        """Count a launch, unless it is the inside of an operator, whose arguments count."""
        if not self._in_operator:
            # One that a launch does not need is stood in for by another.
            tensors = {arg.data_ptr(): arg for arg in args if isinstance(arg, Tensor)}
            self._add(tensors.values())

    def _add(self, tensors: Iterable[Tensor]) -> None:
        moved = sum(map(_bytes, tensors))
        self.total += moved
        self.launches += moved > 0


def _bytes(x: Tensor) -> int:
    entries = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        entries *= size if stride or not size else 1
    return entries * x.element_size()
