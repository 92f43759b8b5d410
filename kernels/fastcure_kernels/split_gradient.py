"""A gradient in two parts, which the kernel that reads it adds up.

Autograd adds the gradients of a tensor that is used twice, reading both and writing one, before the node behind that
tensor sees them. Where that node runs a kernel, one use may hand its gradient on as a `SplitGradient`: adding to it
writes the other down and moves nothing. Should another operator get it, it is a tensor with the values of the sum, to
the bit. Where somebody holds the tensor whose gradient it is, or listens to it, none is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .torch_compat import has_gradient_hooks, tree_map, without_storage
from .waiting import Waiting


class SplitGradient(Waiting):
    """A tensor that waits for another to be added, or the sum of both, without memory until something reads it."""

    parts: tuple[Tensor, ...]

    @classmethod
    def of(cls, g: Tensor) -> Tensor:
        """`g`, with its history, to which another may be added."""
        out = g.as_subclass(cls)
        out.parts = (g,)
        return out

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Below autograd, which gives the result its history.
        kwargs = kwargs or {}
        if func is torch.ops.aten.add.Tensor and not kwargs and (joined := _joined(*args)) is not None:
            return joined
        out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        for each in args:
            if isinstance(each, SplitGradient) and out is each.parts[0]:  # changed in place
                increment_version(out)
                return each
        return out


def parts_of(g: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what adds up to `g`: itself, if it is in memory."""
    if not isinstance(g, SplitGradient):
        return g, None
    return g.parts[0], g.parts[1] if len(g.parts) == 2 else None


def reads_parts(ctx: Any, watched: Callable[[], bool] | None = None) -> None:
    """Say, in the forward of a Function of one output that matters, that its backward reads gradients by `parts_of`.

    Args:
        ctx: of the Function.
        watched: tells whether anybody can tell what gradient arrives at the output; without it the output is looked at.
    """
    ctx.fastcure_uses, ctx.fastcure_watched = 0, watched


class Branch:
    """One use of a tensor, whose gradient may be a `SplitGradient`."""

    def __init__(self, x: Tensor, *, even_if_first: bool) -> None:
        node: Any = x.grad_fn
        if type(node).__name__ == "AliasBackward0":  # hands its gradient on
            behind = node.next_functions[0][0]
            node = behind if getattr(behind, "fastcure_watched", None) else node
        uses: int | None = getattr(node, "fastcure_uses", None)
        self._read_in_parts = uses is not None and (even_if_first or uses > 0)
        self._watched = partial(watched, ref(x))
        if uses is not None:
            node.fastcure_uses = uses + 1
            self._watched = node.fastcure_watched or self._watched

    def may_split(self) -> bool:
        """Tell whether the node behind reads parts, and nobody else can see them; ask before the tensor is unpacked."""
        return self._read_in_parts and not self._watched()


def watched(tensor: Callable[[], Tensor | None]) -> bool:
    """Tell whether anybody can tell what gradient arrives at a tensor: holds it, or listens to it."""
    if tensor() is None:
        return False
    if _holders(tensor) > _holders_if_autograd_alone():
        return True
    x = tensor()
    return x is not None and (has_gradient_hooks(x) or x.retains_grad)


def _holders(tensor: Callable[[], Tensor | None]) -> int:
    return sys.getrefcount(tensor())


@cache
def _holders_if_autograd_alone() -> int:
    with torch.enable_grad():  # a backward, in which this is asked for, has it off
        x = torch.ones(1, requires_grad=True) * 1
        graph = x * x
    tensor = ref(x)
    del x
    assert graph.requires_grad
    return _holders(tensor)


def _joined(a: Any, b: Any) -> SplitGradient | None:
    """Return `a + b` in two parts; None if one of them has two, or if they differ in more than values."""
    first, second = (t.parts if isinstance(t, SplitGradient) else (t,) for t in (a, b))
    parts = (*first, *second)
    if len(parts) != 2 or any(type(part) is not Tensor for part in parts):
        return None
    a, b = parts
    if (a.shape, a.stride(), a.dtype, a.device) != (b.shape, b.stride(), b.dtype, b.device):
        return None
    out = without_storage(SplitGradient, a, strides=True)
    out.parts = parts
    return out


def _plain(leaf: Any) -> Any:
    if not isinstance(leaf, SplitGradient):
        return leaf
    if len(leaf.parts) == 2:
        leaf.parts = (leaf.parts[0] + leaf.parts[1],)
    return leaf.parts[0]
