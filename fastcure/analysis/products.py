"""Products of the loss's input Hessian with vectors, exact or by finite differences, many samples together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure._diagnostics.first_pass import look_before_measure, takes_logits
from fastcure._folding.layers import folded_layers
from fastcure._functional import FunctionalLoss, LossFn, cross_entropy, evaluation_mode, input_gradient, unwrap
from fastcure._model_lock import one_thread
from fastcure._validation import check_batch, check_labels, check_positive
from fastcure.rules import double_backward
from fastcure.rules.second_derivatives import Twice, missing_derivatives

Method = Literal["exact", "finite"]
Progress = Callable[[Iterable[slice]], Iterable[slice]]
"""Passes on what it is given, a slice of samples at a time, and shows how far it is (`tqdm`, for one)."""


class Products:
    """The map v -> H v of a few samples, in float64 outside of the model.

    Exact: one graph of g(x), kept, costs 2 forward passes; then each product is one backward through it, 2 passes
    with respect to the input alone, which is no more than a finite difference costs. Several vectors of one sample
    go through the model together as copies of that sample.

    Finite: `||v|| (g(x + h v / ||v||) - g(x)) / h`, which is neither linear in v nor symmetric.

    Args:
        functional: the model in evaluation mode, with its loss.
        x: `(G, ...)` images.
        y: their labels.
        copies: vectors per sample that go through the model together.
        h: `(G,)` L2 lengths of the finite step; None for exact products.
        graph: whether exact products will be asked for.
        first: number of the first sample, for messages.
    """

    loss: Tensor
    """(G,)"""
    gradient: Tensor
    """(G, N), g(x)."""

    def __init__(
        self,
        functional: FunctionalLoss,
        x: Tensor,
        y: Tensor,
        *,
        copies: int,
        h: Tensor | None,
        graph: bool,
        first: int = 0,
    ) -> None:
        self._functional, self._x, self._y, self._h, self._first = functional, x, y, h, first
        self._copies = copies
        repeats = copies if graph else 1
        self._point, loss, self._g = self._differentiate(_repeat(x, repeats), _repeat(y, repeats), graph)
        self.loss = loss[::repeats].double()
        self.gradient = self._g.detach()[::repeats].flatten(1).double()
        self._finite_only(torch.cat([self.loss[:, None], self.gradient], 1))

    def __call__(self, v: Tensor) -> Tensor:
        """Return the products with `v` `(G, n, N)`, in its shape, by the method that `h` stands for."""
        return self.exact(v) if self._h is None else self.finite(v)

    def exact(self, v: Tensor) -> Tensor:
        """Return H v, `(G, n, N)`."""
        if not self._g.requires_grad:  # g does not depend on x
            return torch.zeros_like(v)
        products = []
        for part in v.split(self._copies, 1):
            rows = F.pad(part, (0, 0, 0, self._copies - part.shape[1])).reshape(self._point.shape).to(self._x.dtype)
            with missing_derivatives():
                (product,) = torch.autograd.grad(
                    self._g, self._point, rows, retain_graph=True, allow_unused=True, materialize_grads=True
                )
            products.append(product.reshape(len(v), self._copies, -1)[:, : part.shape[1]].double())
        return self._finite_only(torch.cat(products, 1))

    def finite(self, v: Tensor) -> Tensor:
        """Return the finite differences along v, `(G, n, N)`, scaled to the length of v."""
        assert self._h is not None
        h = self._h[:, None, None].double()
        length = v.norm(dim=2, keepdim=True)
        step = h * v / torch.where(length == 0, 1.0, length)
        differences = []
        for part in step.split(self._copies, 1):
            points = (self._x.flatten(1).double()[:, None] + part).to(self._x.dtype)
            n = points.shape[1]
            _, _, g = self._differentiate(points.view(-1, *self._x.shape[1:]), _repeat(self._y, n), False)
            differences.append(g.reshape(len(v), n, -1).double() - self.gradient[:, None])
        return self._finite_only(torch.cat(differences, 1) * length / h)

    def _differentiate(self, x: Tensor, y: Tensor, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the points, their losses and their input gradients, of which only the last may have a graph."""
        with torch.enable_grad(), _second_derivatives(self._functional.model) if graph else nullcontext():
            point = x.detach().requires_grad_()
            loss = (Twice(self._functional) if graph else self._functional)(point, y)[1]
            g = input_gradient(loss, point, create_graph=graph)
        return point, loss.detach(), g

    def _finite_only(self, products: Tensor) -> Tensor:
        """Return `(G, ...)` itself."""
        bad = (~products.isfinite()).flatten(1).any(1).nonzero().flatten()
        if len(bad):
            raise FloatingPointError(
                f"the curvature of sample {self._first + int(bad[0])} is not a finite number: check its pixels, the "
                f"model's weights and the dtype (fp16 overflows at 65504); its loss is {float(self.loss[bad[0]]):.3g}"
            )
        return products


@contextmanager
def _second_derivatives(model: nn.Module) -> Iterator[None]:
    # torch's rule for a convolution pays for its weight, wanted or not.
    with folded_layers(model), double_backward(), missing_derivatives():
        yield


def _repeat(x: Tensor, n: int) -> Tensor:
    return x if n == 1 else x.repeat_interleave(n, 0)


def check_measurement(
    x: Tensor, y: Tensor, method: str, h: float | Tensor | None, chunk_size: int, loss_fn: LossFn
) -> None:
    """Check the arguments that all measures share."""
    check_batch(x, y, None)
    if loss_fn is cross_entropy:
        check_labels(y, len(x))
    if not len(x):
        raise ValueError("x must hold at least one sample, got none")
    if method not in ("exact", "finite"):
        raise ValueError(f"method must be 'exact' or 'finite', got {method!r}")
    if (h is None) != (method == "exact"):
        raise ValueError(f"h is the step of method='finite', and of that alone: got method={method!r} with h={h}")
    if h is not None:
        check_positive("h", h, batch=len(x))
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be >= 1, got {chunk_size}")


def by_samples(
    measure: Callable[[Products, slice], tuple[Tensor, ...]],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss_fn: LossFn,
    samples: int,
    copies: int,
    h: float | Tensor | None = None,
    graph: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, ...]:
    """Measure `samples` samples at a time, the model in evaluation mode, and join the results along the batch.

    A `graph` for exact products is made where there is no `h`, if it is None.

    Raises:
        ValueError: if the model is random in evaluation mode.

    Warns:
        UserWarning: once per model, of pixels outside of [0, 1], and of probabilities in place of logits.
    """
    model = unwrap(model)
    loss_fn = _wide_cross_entropy if loss_fn is cross_entropy else loss_fn
    functional = FunctionalLoss(model, loss_fn, trainable=False)
    look_before_measure(functional, x, logits=takes_logits(loss_fn))
    lengths = None if h is None else torch.as_tensor(h, dtype=torch.float64, device=x.device).expand(len(x))
    parts: Iterable[slice] = [slice(i, min(i + samples, len(x))) for i in range(0, len(x), samples)]
    with one_thread(model, loss_fn), evaluation_mode(model, loss_fn):
        results = [
            measure(
                Products(
                    functional,
                    x[part],
                    y[part],
                    copies=copies,
                    h=None if lengths is None else lengths[part],
                    graph=h is None if graph is None else graph,
                    first=part.start,
                ),
                part,
            )
            for part in (parts if progress is None else progress(parts))
        ]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def _wide_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in float64: in float32 a confident sample's 1 - p, and so its curvature, is mostly rounding."""
    return cross_entropy(logits.double(), y.double() if y.is_floating_point() else y)


def copies_for(vectors: int, chunk_size: int, batch: int = 1) -> int:
    """Return how many vectors per sample go together: what `chunk_size` leaves room for.

    But at most a fifth of them, so that the graph of g(x) of all copies adds at most a fifth to the products' cost.
    """
    room = max(1, min(chunk_size // batch, vectors // 5))
    return math.ceil(vectors / math.ceil(vectors / room))  # passes of equal size, the last hardly padded
