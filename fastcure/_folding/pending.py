"""A sum `x + bias[c] + residual` that is not computed before something takes it: a ReLU takes all of it in one pass."""

from __future__ import annotations

from typing import Any

import torch
from fastcure_kernels import bias_relu
from torch import Tensor
from torch.nn import functional as F

from fastcure._torch_compat import (
    is_in_place,
    operator_name,
    tree_leaves,
    tree_map,
    version,
    without_storage,
    without_torch_function,
)

METADATA = frozenset(
    [
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_leaf", "is_cuda", "is_meta", "is_sparse", "is_quantized")),
        *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__")),
        *(Tensor.is_contiguous, Tensor.element_size, Tensor.get_device, torch.numel),
        *(Tensor.is_floating_point, torch.is_floating_point, Tensor.is_complex, torch.is_complex),
    ]
)
RELU = frozenset([F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_])
ADD = frozenset([torch.add, Tensor.add, Tensor.add_])
IN_PLACE = frozenset([torch.relu_, Tensor.relu_, Tensor.add_])


class OverwrittenError(RuntimeError):
    """A term of a pending sum was changed in place before the sum was taken."""

    def __init__(self) -> None:
        super().__init__(
            "what is added to the output of a batch norm waits for the ReLU behind it, and was changed in place in "
            "between: call fastcure.prepare again after a change to the model, and not at all if its path depends on "
            "its input"
        )


class Pending(Tensor):
    """The sum of `x` `(B, C, ...)`, `bias` `(C,)` and `residual` `(B, C, ...)`, of which the last two may be None.

    One addition may join it, and a ReLU takes what there is; metadata is at hand; anything else computes the sum, once,
    and goes on with that plain tensor. It has no storage, but the history of the sum, so that values and gradients are
    also right where operators pass Python by.

    Raises:
        OverwrittenError: when it is used, if a term was changed in place; nothing else could be right.
    """

    x: Tensor
    bias: Tensor | None
    residual: Tensor | None
    takers: tuple[list[str], ...]
    """To each, the name of whatever takes the sum is added."""
    aliased: bool
    """Whether somebody holds the sum as a plain tensor too, and must see what is done to it in place."""

    @classmethod
    def of(cls, x: Tensor, bias: Tensor | None, residual: Tensor | None, takers: tuple[list[str], ...]) -> Pending:
        """Write down a sum of plain tensors of one dtype."""
        out = without_storage(cls, x, strides=True)
        out.takers, out.aliased = takers, False
        if torch.is_grad_enabled():
            return out.becomes(x, bias, residual)
        # What is made without a history has none later either.
        return out.becomes(x.detach(), *(term if term is None else term.detach() for term in (bias, residual)))

    def becomes(self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Pending:
        """Change to another sum, as an operator in place does: for everybody who holds this object."""
        self.x, self.bias, self.residual = x, bias, residual
        self._versions = self._versions_now()
        with without_torch_function():  # autograd sets attributes
            return _History.apply(self, x, bias, residual)

    def terms(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the terms as they were when they were written down."""
        if self._versions != self._versions_now():
            self.taken_by("a change in place of one of its terms")
            raise OverwrittenError
        return self.x, self.bias, self.residual

    def value(self) -> Tensor:
        """Return the sum as a plain tensor, which it is from now on."""
        x, bias, residual = self.terms()
        if bias is not None or residual is not None:
            with torch.enable_grad():  # it may be asked for where it is off, and needed again where it is on
                self.x, self.bias, self.residual = _sum(x, bias, residual), None, None
            self._versions = self._versions_now()
        self.aliased = True
        return self.x

    @property
    def is_free(self) -> bool:
        """Whether an operator in place may give this object another sum, instead of changing a tensor."""
        return torch.is_grad_enabled() and not self.aliased

    def taken_by(self, name: str) -> None:
        """Write down what takes the sum."""
        for names in self.takers:
            names.append(name)

    def _versions_now(self) -> list[int]:
        """Versions of the terms; of one alone, which is the sum itself, every version is right."""
        terms = [term for term in (self.x, self.bias, self.residual) if term is not None]
        return [version(term) for term in terms] if len(terms) > 1 else []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with without_torch_function():
                return func(*args, **kwargs)
        if func in RELU:
            first = args[0] if args else kwargs["input"]
            in_place = func in IN_PLACE or kwargs.get("inplace", False)
            first.taken_by("relu")
            if not in_place or first.is_free:
                y = bias_relu(*first.terms())
                if in_place:
                    first.becomes(y).aliased = True
                return y
        elif func in ADD and len(args) == 2 and kwargs in ({}, {"alpha": 1}):
            joined = _joined(*args, in_place=func in IN_PLACE)
            if joined is not None:
                return joined
        return _on_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Called from C++, below autograd, which has given the result the history of this object.
        if is_in_place(func) and isinstance(args[0], Pending):
            args[0].taken_by(operator_name(func))
            raise OverwrittenError

        def plain(leaf: Any) -> Any:
            if not isinstance(leaf, Pending):
                return leaf
            leaf.taken_by(operator_name(func))
            return _sum(*leaf.terms())

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` on sums instead of those that are pending, which see it if it changes them in place."""
    pending = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pending)]
    for each in pending:
        if func not in RELU:
            each.taken_by(getattr(func, "__name__", str(func)))
    args, kwargs = tree_map(lambda leaf: leaf.value() if isinstance(leaf, Pending) else leaf, (args, kwargs))
    versions = [version(each.x) for each in pending]
    out = func(*args, **kwargs)
    for each, before in zip(pending, versions, strict=True):
        if version(each.x) != before:
            if each.x.shape != each.shape:
                raise OverwrittenError
            each.becomes(each.x)
    return out


def _joined(a: Any, b: Any, *, in_place: bool) -> Pending | None:
    """Return `a + b` as a pending sum, with one of them as residual; None if it takes a pass of its own."""
    if not all(isinstance(t, Pending) or type(t) is Tensor for t in (a, b)):
        return None
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return None
    first, other = (a, b) if in_place or (isinstance(a, Pending) and a.residual is None) else (b, a)
    if not isinstance(first, Pending) or first.residual is not None or (in_place and not first.is_free):
        return None
    takers, (x, bias, _) = first.takers, first.terms()
    if isinstance(other, Pending) and other.residual is None:
        residual, more, _ = other.terms()
        takers = (*takers, *other.takers)
        bias = more if bias is None else bias if more is None else bias + more
    else:
        residual = other.value() if isinstance(other, Pending) else other
    if in_place:
        first.takers = takers
        return first.becomes(x, bias, residual)
    return Pending.of(x, bias, residual, takers)


def _sum(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    total = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    return total if residual is None else total + residual


class _History(torch.autograd.Function):
    """Gives a pending sum the derivative of the sum."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        ctx.mark_dirty(pending)
        return pending

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        _, want_x, want_bias, want_residual = ctx.needs_input_grad
        g_bias = g.sum([dim for dim in range(g.dim()) if dim != 1]) if want_bias else None
        return None, g if want_x else None, g_bias, g if want_residual else None
