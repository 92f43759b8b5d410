"""A training-mode batch norm that is not computed before something takes it: a ReLU takes all of it in one pass.

It waits as a tensor without memory. An addition may join it; whatever else reads it finds the values, computed once. To
autograd it is an ordinary tensor, behind which stands the norm's own node, so hooks, second uses, changes in place and
`torch.autograd.grad` with respect to it are as ever. The ReLU's node passes it by, straight to x, unless somebody can
tell what gradient arrives at it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from fastcure_kernels import batch_norm as passes
from fastcure_kernels.split_gradient import reads_parts, watched
from fastcure_kernels.waiting import Waiting
from torch import Tensor
from torch.autograd.graph import increment_version

from fastcure._torch_compat import (
    operator_name,
    tree_map,
    version,
    without_storage,
    written_arguments,
)

aten = torch.ops.aten


class Seen:
    """Whether anybody can tell what gradient arrives at a tensor: holds it, or has asked for its hooks or its node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Callable[[], Tensor | None] = ref(tensor)
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked or self.tensor() is not None

    def overwritten(self) -> None:
        """Whoever holds the tensor sees other values from now on."""
        self.tensor = lambda: None


class Sum(NamedTuple):
    """What waits: the norm of x, and what is added to it."""

    norm: passes.Norm
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    residual: Tensor | None = None
    versions: tuple[int, ...] = ()
    seen: tuple[Seen, ...] = ()
    """Of the norm's output, and of the sum's."""

    def plus(self, residual: Tensor | None) -> Sum:
        """The sum with a residual; it notices changes of its terms from now on."""
        total = self._replace(residual=residual)
        return total._replace(versions=total._versions_now())

    def finish(self, relu: bool = False) -> tuple[Tensor, passes.Norm]:
        """Compute the sum, or its ReLU, without a history; with what the backward passes read of it.

        Raises:
            RuntimeError: if a term was changed in place in between: what it was is gone.
        """
        if self.versions != self._versions_now():
            raise RuntimeError(
                "what went into a batch norm, or was added to its output, was changed in place before that output was "
                "used, for which it waits under fastcure.double_backward(): change a copy of it, or set "
                "FASTCURE_BACKEND=torch"
            )
        with torch.no_grad():
            return passes.finish(self.norm, None if self.residual is None else values(self.residual), relu)

    def _versions_now(self) -> tuple[int, ...]:
        return tuple(version(term) for term in (self.x, self.residual) if term is not None)


class PendingNorm(Waiting):
    """A sum that waits, or the values in memory that it became."""

    total: Sum | None
    """What waits, or waited; None once it was changed in place."""
    plain: Tensor | None
    """The values, once computed, without a history."""
    became: Tensor | None
    """What a ReLU in place has made of it, with the history, that this tensor has as well."""
    seen: Seen

    @classmethod
    def of(cls, total: Sum) -> PendingNorm:
        """Write down a sum."""
        out = without_storage(cls, total.norm.x, strides=True)
        out.seen, out.plain, out.became = Seen(out), None, None
        out.total = total._replace(seen=(*total.seen, out.seen))
        return out

    def waiting(self) -> Sum | None:
        """Return the sum, if nothing has read it, so that there are no views of it, nor cut off its history."""
        return None if self.plain is not None or self.is_leaf or not torch.is_grad_enabled() else self.total

    def becomes(self, y: Tensor) -> PendingNorm:
        """Turn into `y`, as an operator in place does."""
        self.total, self.plain, self.became = None, y.detach(), y
        same: PendingNorm = _Same.apply(self, y)
        return same

    def settled(self) -> Tensor:
        """Return a plain tensor of these values and this history."""
        return self.clone() if self.became is None else torch.ops.aten.alias(self)

    def register_hook(self, *args: Any) -> Any:
        """As in torch."""
        self.seen.asked = True
        return super().register_hook(*args)

    def retain_grad(self) -> None:
        """As in torch."""
        self.seen.asked = True
        super().retain_grad()

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """As in torch."""
        self.seen.asked = True
        return super().grad_fn

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Below autograd, which gives the result its history.
        kwargs = kwargs or {}
        if func in (aten.add.Tensor, aten.add_.Tensor) and kwargs in ({}, {"alpha": 1}):
            joined = _joined(*args, in_place=func is aten.add_.Tensor)
            if joined is not None:
                return joined
        if func is aten.clone.default and not kwargs and args[0].plain is None:
            return args[0].total.finish()[0]
        written = [arg for arg in written_arguments(func, args, kwargs) if isinstance(arg, PendingNorm)]
        plain = [values(arg) for arg in written]
        args, kwargs = tree_map(_values_of_pending, (args, kwargs))
        out = func(*args, **kwargs)
        for each, memory in zip(written, plain, strict=True):
            if memory.shape != each.shape:
                raise RuntimeError(
                    f"{operator_name(func)} changed the shape of a batch norm's output in place, which it may not "
                    "under fastcure.double_backward(): use the operator that returns another tensor"
                )
            each.total = each.became = None
            increment_version(memory)
            out = each if out is memory else out
        return out


def values(x: Tensor) -> Tensor:
    """Return the values of `x`, computed if they wait, without a history that matters."""
    if not isinstance(x, PendingNorm):
        return x
    if x.plain is None:
        assert x.total is not None
        x.plain = x.total.finish()[0]
    return x.plain


def _values_of_pending(leaf: Any) -> Any:
    return values(leaf) if isinstance(leaf, PendingNorm) else leaf


def _joined(a: Any, b: Any, *, in_place: bool) -> PendingNorm | None:
    """Return `a + b` as a sum that waits; None if it takes a pass of its own."""
    if not all(isinstance(t, PendingNorm) or type(t) in (Tensor, torch.nn.Parameter) for t in (a, b)):
        return None
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or (in_place and a is b):
        return None
    for first, other in [(a, b)] if in_place else [(a, b), (b, a)]:
        total = first.waiting() if isinstance(first, PendingNorm) else None
        if total is None or total.residual is not None:
            continue
        total = total.plus(other)
        if not in_place:
            return PendingNorm.of(total)
        first.total = total
        return first
    return None


class _Same(torch.autograd.Function):
    """Gives a pending norm the history of what it became."""

    @staticmethod
    def forward(ctx: Any, pending: PendingNorm, y: Tensor) -> Tensor:
        ctx.mark_dirty(pending)
        seen, holder = pending.seen, ref(pending)
        reads_parts(ctx, lambda: seen.asked or watched(holder))
        return pending

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, g
