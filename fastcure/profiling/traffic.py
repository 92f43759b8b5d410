"""Memory traffic of a piece of code, convolutions and matrix products apart: counted operator by operator, exact."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fastcure._torch_compat import TorchDispatchMode, operator_packet, tree_leaves, unsafe_view


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes that operators take and return in its `with` block, as if no cache kept anything between two.

    Convolutions and matrix products, which wait for arithmetic, and views, which move nothing, do not count. An
    expanded tensor has the size of what is in memory. A compiled region is invisible to it.

    Examples:
        >>> import torch
        >>> from fastcure.profiling.traffic import TrafficCounter
        >>> with TrafficCounter() as counter:
        ...     total = torch.ones(2, 3) + torch.ones(3)
        >>> counter.total
        96
    """

    total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        view = func.is_view or func is unsafe_view
        if not view and operator_packet(func) not in flop_registry:
            self.total += sum(_bytes(leaf) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out


def _bytes(x: Tensor) -> int:
    entries = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        entries *= size if stride or not size else 1
    return entries * x.element_size()
