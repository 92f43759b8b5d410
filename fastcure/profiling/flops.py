"""FLOPs of a piece of code, counted operator by operator at torch's dispatcher: exact, and the same every time."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import flop_registry

from fastcure._torch_compat import TorchDispatchMode, operator_packet


class FlopCounter(TorchDispatchMode):
    """Counts convolutions and matrix products in its `with` block, forward and backward of any order.

    Unlike `torch.utils.flop_counter.FlopCounterMode` it tracks no modules, whose hooks fail under
    `torch.autograd.grad`. A compiled region is invisible to it.

    Examples:
        >>> import torch
        >>> from fastcure.profiling.flops import FlopCounter
        >>> with FlopCounter() as counter:
        ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> counter.total
        48
    """

    total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(operator_packet(func))) is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=out))
        return out
