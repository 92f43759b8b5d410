"""Deferred `triton.jit`: triton is imported when a kernel is first launched, not before."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

LISTENERS: list[Callable[[tuple[object, ...]], None]] = []
"""Are told the arguments of each launch: a dispatch mode sees operators only."""


class Kernel:
    """A Triton kernel that is not compiled, nor triton imported, until it is needed; see `kernel`."""

    def __init__(self, fn: Callable[..., None]) -> None:
        self.fn = fn
        self.__doc__ = fn.__doc__

    @cached_property
    def jitted(self) -> Any:
        """The function under `triton.jit`, with `tl` bound in its module."""
        import triton
        import triton.language as tl

        self.fn.__globals__["tl"] = tl
        return triton.jit(self.fn)

    def launch(self, grid: tuple[int, ...], *args: object, **options: object) -> None:
        """Run the kernel on the device of its first argument; an empty grid runs nothing.

        Products and sums are not contracted, so that kernels round as their reference implementations do: they wait
        for memory in any case.
        """
        if 0 in grid:
            return
        for listener in LISTENERS:
            listener(args)
        with torch.cuda.device_of(args[0]):
            self.jitted[grid](*args, **options, enable_fp_fusion=False)


def kernel(fn: Callable[..., None]) -> Kernel:
    """Decorate a kernel written in `tl`, a name that its module imports for type checkers only.

    With `from __future__ import annotations`, `tl.constexpr` stays the string that triton accepts as well.
    """
    return Kernel(fn)
