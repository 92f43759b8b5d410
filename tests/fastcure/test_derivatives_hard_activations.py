"""Hardsigmoid and hardswish, of which torch has no second derivative."""

import copy
from collections.abc import Callable

import pytest
import torch
from definitions import Lambda, check_right, definition, images, network, of_torch, ours, seeded, unit
from networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import curvature, double_backward, prepare
from fastcure.rules.plain_operators import PlainOperators

pytestmark = seeded


@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish])
def test_the_slope_at_a_kink_is_torchs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-3.0, 3.0], dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(function(x).sum(), x)
    with double_backward():
        (ours,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert torch.equal(ours, theirs)


class Hardsigmoid(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return torch.where((t > -3) & (t < 3), t / 6 + 0.5, (t > 0).to(t))


class Hardswish(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return torch.where(t <= -3, 0 * t, torch.where(t < 3, t * (t + 3) / 6, t))


HARD = {
    "hardsigmoid": (nn.Hardsigmoid(), Hardsigmoid()),
    "hardsigmoid in place": (nn.Hardsigmoid(inplace=True), Hardsigmoid()),
    "hardsigmoid called": (Lambda(F.hardsigmoid), Hardsigmoid()),
    "hardswish": (nn.Hardswish(), Hardswish()),
    "hardswish in place": (nn.Hardswish(inplace=True), Hardswish()),
    "hardswish called": (Lambda(F.hardswish), Hardswish()),
}


def hard_network(layer: nn.Module) -> nn.Module:
    """Many activations below -3 and above 3."""
    model = network(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), layer)
    nn.init.normal_(model[1].weight, std=4)
    return model


@pytest.mark.filterwarnings("ignore:the first-order engine misses")
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("prepared", [False, True])
def test_hard_activations(name: str, prepared: bool) -> None:
    layer, plain_layer = HARD[name]
    model = hard_network(layer)
    plain = copy.deepcopy(model)
    plain[2] = plain_layer
    if prepared:
        prepare(model, images()[0])
    check_right(model, plain, first_order=False)


@pytest.mark.parametrize("name", HARD)
def test_hard_activations_are_torchs_at_their_edges(name: str) -> None:
    """Value and first derivative, and NaN passes."""
    layer, _ = HARD[name]
    x = torch.tensor([-4, -3, -2.9, -0.0, 0, 1, 2.9, 3, 4, float("nan")], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad((value := layer(x + 0)).sum(), x)
    with PlainOperators():
        (plain_derivative,) = torch.autograd.grad((plain_value := layer(x + 0)).sum(), x)
    torch.testing.assert_close(plain_value, value, equal_nan=True)
    torch.testing.assert_close(plain_derivative[:-1], derivative[:-1])


@of_torch
@pytest.mark.parametrize("name", ["hardsigmoid", "hardswish", "hardswish called"])
def test_hard_activations_compiled(name: str, aot_eager: None) -> None:
    layer, plain_layer = HARD[name]
    model, (x, y) = hard_network(layer).eval(), images()
    plain, z = copy.deepcopy(model), unit(x)
    plain[2] = plain_layer
    assert relative(ours(model, x, y, z, engine="compile")[1], definition(plain, x, y, z)[1]) < 1e-9


@of_torch
def test_hardsigmoid_called_and_compiled_is_one_error(aot_eager: None) -> None:
    x, y = images()
    with pytest.raises(RuntimeError, match="no second derivative of hardsigmoid: use engine='eager'"):
        curvature(hard_network(Lambda(F.hardsigmoid)), x, y, engine="compile").penalty.sum().backward()
