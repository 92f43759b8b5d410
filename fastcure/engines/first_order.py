"""Finite differences of parameter gradients, 16 F: for models without second derivatives. A different estimator.

With u = 2 w d the penalty's gradient is that of `sum_i u_i . (g(x_i + h z_i) - g(x_i))` for fixed u, and
`u . g(p) = ||u|| (l(p + e v) - l(p - e v)) / 2e + O(e^2)` along `v = u / ||u||`. So four first-order passes give it: at
both points, a step e to either side. The loss's gradient is taken from the mean of the two passes about its point.

On smooth networks this is right to about 1e-4. On networks with kinks (ReLU, max pooling) the gradient is missing what
happens in the kinks, its cosine with the exact one is 0.3 to 0.6, and training on it costs accuracy: the engine warns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from fastcure_kernels import difference_sqnorm
from torch import Tensor

from fastcure._diagnostics.kinks import warn_of_kinks
from fastcure._functional import evaluation_mode, input_gradient
from fastcure._model_lock import one_thread
from fastcure._torch_compat import version
from fastcure.engines.base import Engine, Evaluation, Request
from fastcure.engines.eager import root, second_point


class Pass(NamedTuple):
    """What backward needs to run the model again."""

    request: Request
    step: Tensor
    """(B, ...), x + h z."""
    difference: Tensor
    """(B, ...), d."""
    leaves: list[Tensor]
    versions: list[int]
    """Of the leaves: a change in between would give the gradient at other weights."""
    autocast: tuple[torch.dtype, bool]


class FirstOrder(Engine):
    """Forward: 4 F, values only. Backward: four forwards with ordinary parameter gradients."""

    exact = False

    def forward(self, request: Request) -> Evaluation:
        """Evaluate loss and penalty; every value is that of the other engines, only the gradient is estimated."""
        functional, x, y, differentiable = request.functional, request.x.detach(), request.y, request.differentiable
        point = x.detach().requires_grad_()
        logits, loss = functional(point, y)
        found = functional.leaves(loss, inputs=(point,)) if differentiable else []
        g = input_gradient(loss, point)
        step = second_point(x, g, request.h, request.direction).requires_grad_()
        loss_step = functional(step, y)[1]
        g_step = input_gradient(loss_step, step)
        if differentiable:
            warn_of_kinks(functional, loss, x, step, y)

        d = g_step - g
        penalty = difference_sqnorm(g_step, g)
        leaves = [leaf for leaf, _ in found]
        versions = [version(leaf) for leaf in leaves]
        device = x.device.type
        autocast = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        state = Pass(request, step.detach(), d, leaves, versions, autocast)
        return Evaluation(
            logits.detach(),
            (loss_step if request.loss_at == "step" else loss).detach(),
            root(penalty) if request.power == 1 else penalty,
            [parameter for _, parameter in found],
            state,
        )

    def backward(
        self, state: Pass, w_loss: Tensor | None, w_penalty: Tensor | None, *, retain: bool
    ) -> tuple[Tensor | None, ...]:
        """Estimate the gradient; with the loss alone it is exact."""
        x, at_step = state.request.x.detach(), state.request.loss_at == "step"
        if w_penalty is None:
            assert w_loss is not None
            return self._accumulate(state, [(state.step if at_step else x, w_loss)])
        length = state.difference.flatten(1).double().norm(dim=1)
        weight = w_penalty * (2 * length if state.request.power == 2 else (length > 0).to(length))  # ||u||
        v = state.difference / torch.where(length == 0, 1.0, length).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        e = step_size(x.dtype)
        slope, half = (weight / (2 * e)).to(x.dtype), 0 if w_loss is None else w_loss / 2
        half_step, half_x = (half, 0) if at_step else (0, half)
        return self._accumulate(
            state,
            [
                (state.step + e * v, half_step + slope),
                (state.step - e * v, half_step - slope),
                (x + e * v, half_x - slope),
                (x - e * v, half_x + slope),
            ],
        )

    def _accumulate(self, state: Pass, points: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
        total: list[Tensor | None] = [None] * len(state.leaves)
        if [version(leaf) for leaf in state.leaves] != state.versions:
            raise RuntimeError(
                "parameters were modified in place since the forward: call backward before the optimiser"
            )
        dtype, enabled = state.autocast
        functional, y = state.request.functional, state.request.y
        autocast = torch.autocast(y.device.type, dtype, enabled=enabled)
        module = functional.module
        with one_thread(module), evaluation_mode(module), torch.enable_grad(), autocast:
            for point, weight in points:
                loss = functional(point, y)[1]
                gradients = torch.autograd.grad(loss, state.leaves, weight.to(loss), allow_unused=True)
                for i, gradient in enumerate(gradients):
                    if gradient is not None:
                        total[i] = gradient if (old := total[i]) is None else old + gradient
        return tuple(total)


def step_size(dtype: torch.dtype) -> float:
    """Return e, an L2 length in input units, for inputs of this dtype: `eps ** (1/3)`.

    The error of a central difference is about `e^2` of truncation and `eps / e` of rounding; their sum is least at
    `e ~ eps^(1/3)`: 6e-6 in float64, 5e-3 in float32. (In float16 and bfloat16, 0.1 and 0.2, little is left.)
    """
    return float(torch.finfo(dtype).eps) ** (1 / 3)
