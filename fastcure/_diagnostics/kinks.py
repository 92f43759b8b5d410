"""Kinks: places where the gradient jumps. The first-order engine does not see what happens in them, and warns.

Some operators always have them, and the graph names those. Others (clamp, maximum, where, a user's own) have them or
not, depending on how they are used: a floor under a square root is never met, and a softmax subtracts its maximum. So
where the graph names none, the gradient is followed on the way from x to x + h z. The place where it changes most
abruptly is magnified: a smooth change shrinks with the square of the magnification, a jump remains.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcure._diagnostics.warning import warn
from fastcure._functional import FunctionalLoss, graph_nodes
from fastcure._torch_compat import elu_slope

ALWAYS = re.compile(
    r"(Relu|LeakyRelu|PreluKernel|RreluWithNoise|Hardtanh|Hardsigmoid|Hardswish|Threshold|Softshrink|Hardshrink"
    r"|(?:Adaptive|Fractional)?MaxPool\w*)Backward\d"
)
PERHAPS = re.compile(
    r"(Abs|Clamp|ClampMin|ClampMax|Maximum|Minimum|Max|Min|Amax|Amin|Aminmax|Fmax|Fmin|Where|Sort|Topk|Kthvalue|Median"
    r"|Nanmedian|Mode|Cummax|Cummin)Backward\d"
)
SAMPLES, PARTS, TIMES = 4, 16, 6
"""The way of so many samples is divided into parts, and two of them again, so many times: 4e-6 of the way at last."""

_examined: WeakSet[nn.Module] = WeakSet()


def warn_of_kinks(functional: FunctionalLoss, loss: Tensor, x: Tensor, step: Tensor, y: Tensor) -> None:
    """Warn, once per model, if the gradient jumps in the model or its loss.

    Args:
        functional: the model and its loss.
        loss: `(B,)`, with its graph.
        x: `(B, ...)` images.
        step: `(B, ...)`, x + h z.
        y: labels.
    """
    if functional.model in _examined:
        return
    _examined.add(functional.model)
    nodes = graph_nodes(loss)
    names = _names(nodes, ALWAYS) | {"Elu" for node in nodes if _is_selu(node)}
    if not names:
        try:
            jumps = jumps_between(functional, x, step, y)
        except Exception:  # of the model: not every one takes float64, or another number of images
            jumps = bool(_names(nodes, PERHAPS))
        if not jumps:
            return
        names = _names(nodes, PERHAPS) or {"seen in its gradients"}
    warn(
        f"the first-order engine misses what happens in kinks, and this model has some ({', '.join(sorted(names))}): "
        "its gradients have a cosine of 0.3 to 0.6 with the exact ones; use engine='eager', or smooth activations such "
        "as GELU"
    )


def jumps_between(functional: FunctionalLoss, x: Tensor, step: Tensor, y: Tensor) -> bool:
    """Tell whether the gradient jumps between `x` and `step` `(B, ...)`, by float64 values for the first samples.

    A jump counts if it is a thousandth of what the gradient changes on the way.
    """
    start, y = x[:SAMPLES].double(), y[:SAMPLES]
    way = step[:SAMPLES].detach().double() - start
    state = {name: t.detach().double() if t.is_floating_point() else t for name, t in functional.state.items()}

    def slopes(t: Tensor) -> Tensor:
        """Slopes of the loss `(n, m)` along the way at `t` `(n, m)`, fractions of it."""
        points = start[:, None] + t.view(*t.shape, *[1] * (x.dim() - 1)) * way[:, None]
        labels, found = y.repeat_interleave(t.shape[1], 0), []
        for part, of_part in zip(points.flatten(0, 1).split(size), labels.split(size), strict=True):
            point = part.detach().requires_grad_()
            loss = functional_call(functional.module, state, (point, of_part))[1]
            found.append(torch.autograd.grad(loss.sum(), point)[0])
        return (torch.cat(found).view_as(points) * way[:, None]).flatten(2).sum(2)

    size = max(len(x), PARTS)
    grid = torch.linspace(0, 1, PARTS + 1, dtype=torch.float64, device=x.device)
    low, width = torch.zeros(len(start), 1).to(grid), 1.0
    with torch.autocast(x.device.type, enabled=False):
        if not torch.allclose(slopes(low), slopes(low), rtol=1e-6):
            return False  # a random model, which is an error of its own
        for time in range(TIMES):
            u = slopes(low + width * grid)
            if time == 0:
                least = 1e-3 * (u.amax(1) - u.amin(1)) + 1e-9 * u.abs().amax(1)
            bend, place = u.diff(n=2).abs().max(1)
            low = low + width * grid[place][:, None]
            width *= 2 / PARTS
    return bool((bend > least).any())


def _names(nodes: list[Any], kinds: re.Pattern[str]) -> set[str]:
    found = map(kinds.fullmatch, {type(node).__name__ for node in nodes})
    return {match[1] for match in found if match}


def _is_selu(node: Any) -> bool:
    """Tell an ELU whose slope jumps at 0: SELU, or an alpha other than 1 (CELU's does not)."""
    return type(node).__name__.startswith("EluBackward") and elu_slope(node) != 1
