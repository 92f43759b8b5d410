"""Operators whose second or third derivative torch lacks or gets wrong, computed by operators that have them all.

torch has no second derivative of hardsigmoid. Its derivatives of layer norm and batch norm take the
statistics for constants from the third order on, which a model needs that differentiates itself; instance norm is made
of batch norm. Values and first derivatives are those of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastcure._torch_compat import hardsigmoid_in_c, hardswish_in_c
from fastcure.rules.arithmetic import all_but_channels, as_channels, normalised, wide


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """Compute `min(max(x + 3, 0), 6) / 6`; the derivative at -3 and 3 is 0, as torch's."""
    x = input.clone() if inplace else input
    y = torch.where(x.abs() < 3, x, x.detach().clamp(-3, 3)) / 6 + 0.5
    return input.copy_(y) if inplace else y


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """Compute `x min(max(x + 3, 0), 6) / 6`; the derivative at -3 is 0 and at 3 is 1, as torch's."""
    x = input.clone() if inplace else input
    y = torch.where(x <= -3, 0.0, torch.where(x < 3, x * (x / 6 + 0.5), x))
    return input.copy_(y) if inplace else y


def layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Compute `torch.nn.functional.layer_norm`."""
    return _affine(input, normalised(wide(input), range(-len(normalized_shape), 0), eps), weight, bias)


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `torch.nn.functional.batch_norm`; running statistics change as there."""
    x = wide(input)
    if training:
        with torch.no_grad():
            F.batch_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
        y = normalised(x, all_but_channels(x), eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        y = (x - as_channels(running_mean, x)) * as_channels(torch.rsqrt(running_var + eps), x)
    return _affine(input, y, *(None if t is None else as_channels(t, x) for t in (weight, bias)))


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute `torch.nn.functional.instance_norm`; running statistics change as there."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    with torch.no_grad():
        F.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    y = normalised(wide(input), range(2, input.dim()), eps)
    return _affine(input, y, *(None if t is None else as_channels(t, y) for t in (weight, bias)))


RULES: dict[Any, Callable[..., Tensor]] = {
    F.hardsigmoid: hardsigmoid,
    hardsigmoid_in_c: hardsigmoid,
    F.hardswish: hardswish,
    hardswish_in_c: hardswish,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}


class PlainOperators(TorchFunctionMode):
    """Within its `with` block the operators of `RULES` are computed as here, whoever calls them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return RULES.get(func, func)(*args, **(kwargs or {}))


def _affine(x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `y weight + bias` in the dtype of torch's norm of `x`: autocast keeps norms in float32."""
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
