"""The first-order engine warns where gradients jump, and only there."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from definitions import Lambda
from networks import NETWORKS, Case, make
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature
from fastcure._diagnostics import kinks


class OwnReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * (t > 0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu,
    "LeakyRelu": F.leaky_relu,
    "PreluKernel": nn.PReLU(),
    "RreluWithNoise": F.rrelu,
    "Hardtanh": F.relu6,
    "Hardsigmoid": F.hardsigmoid,
    "Hardswish": F.hardswish,
    "Threshold": lambda t: F.threshold(t, 0.1, 0.0),
    "Softshrink": F.softshrink,
    "Hardshrink": F.hardshrink,
    "MaxPool2DWithIndices": lambda t: F.max_pool2d(t, 2),
    "AdaptiveMaxPool2D": lambda t: F.adaptive_max_pool2d(t, 2),
    "Elu": F.selu,
    "Elu ": lambda t: F.elu(t, 0.5),
    "Abs": torch.abs,
    "Clamp": lambda t: t.clamp(min=0),
    "ClampMin": lambda t: t.clamp_min(0),
    "Maximum": lambda t: torch.maximum(t, -0.5 * t),
    "Minimum": lambda t: torch.minimum(t, 0.3 * t),
    "Fmax": lambda t: torch.fmax(t, -t),
    "Where": lambda t: torch.where(t > 0, t, 0 * t),
    "Amax": lambda t: t.unflatten(1, (4, 2)).amax(2),  # maxout
    "Max": lambda t: t.unflatten(1, (4, 2)).max(2)[0],
    "Sort": lambda t: t.sort(1)[0],
    "Topk": lambda t: t.topk(2, 1)[0],
    "Kthvalue": lambda t: t.kthvalue(2, 1)[0],
    "Median": lambda t: t.median(1)[0],
    "Cummax": lambda t: t.cummax(1)[0],
    "seen in its gradients": lambda t: t * (t > 0),
    "seen in its gradients ": OwnReLU.apply,
}


def softmax(t: Tensor) -> Tensor:
    e = torch.exp(t - t.amax(1, keepdim=True))
    return e / e.sum(1, keepdim=True)


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda t: t,
    "square": torch.square,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "steep": lambda t: torch.tanh(50 * t),
    "elu": F.elu,  # the gradient bends, but does not jump
    "celu": lambda t: F.celu(t, 0.5),
    "smooth l1": lambda t: F.smooth_l1_loss(t, torch.zeros_like(t), reduction="none"),
    "power of relu": lambda t: t.clamp(min=0) ** 3,
    "normalize": F.normalize,  # has a clamp that is never met
    "softmax": softmax,  # has a maximum that cancels
    "constant mask": lambda t: torch.where(torch.arange(8).view(8, 1, 1) > 3, t.tanh(), t.sin()),
}


def warned(case: Case, h: float = 0.5, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        curvature(*case, h, engine="first_order", **options)
    return [str(warning.message) for warning in seen if "kinks" in str(warning.message)]


def network(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    x, y = torch.rand(5, 1, 8, 8, dtype=dtype), torch.tensor([0, 1, 2, 0, 1])
    layer = copy.deepcopy(function) if isinstance(function, nn.Module) else Lambda(function)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), layer, nn.Flatten(), nn.LazyLinear(3)).to(dtype)
    model(x)
    return Case(model, x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KINKS)
def test_every_kink_is_warned_of_once_a_model(name: str, dtype: torch.dtype) -> None:
    case = network(KINKS[name], dtype)
    (message,) = warned(case)
    assert f"this model has some ({name.strip()})" in message
    assert "use engine='eager'" in message
    assert not warned(case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("h", [0.01, 0.5, 3.0])
def test_smooth_networks_are_not(name: str, dtype: torch.dtype, h: float) -> None:
    assert not warned(network(SMOOTH[name], dtype), h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_alone_tell_networks_with_kinks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinks, "ALWAYS", kinks.re.compile("nothing"))
    for h in (0.1, 1.5):
        assert bool(warned(make(NETWORKS[name], 6, seed=3, dtype=dtype), h)) == (not NETWORKS[name].smooth)


def test_kinks_of_the_loss_are_seen() -> None:
    case = network(torch.tanh, torch.float64)
    threshold = float(case.model(case.x)[0, 0].detach()) + 0.05

    def bent(logits: Tensor, y: Tensor) -> Tensor:
        return torch.maximum(logits[:, 0], 3 * logits[:, 0] - 2 * threshold)

    assert not warned(case, 3.0)
    assert warned(case.copy(), 3.0, loss_fn=bent)


def test_where_float64_is_impossible_names_decide() -> None:
    def narrow(t: Tensor) -> Tensor:
        if t.dtype == torch.float64:
            raise TypeError("no float64")
        return t

    assert warned(network(lambda t: narrow(t).abs(), torch.float32))
    assert not warned(network(lambda t: narrow(t).tanh(), torch.float32))


def test_the_examination_leaves_the_result_as_it_is() -> None:
    case = network(lambda t: t.clamp(min=0), torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = (curvature(*case, 0.5, engine="first_order") for _ in range(2))
    assert torch.equal(first.penalty, second.penalty)
