"""Convolutions by constant weights: torch's numbers, and derivatives of the input that are right to second order."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fastcure.analysis.convolution import ConstantConvolutions

CASES = {
    "1d": (F.conv1d, (2, 4, 9), (6, 2, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "2d": (F.conv2d, (2, 3, 6, 5), (4, 3, 3, 2), {"padding": (1, 0), "stride": (2, 1)}),
    "2d-dilated": (F.conv2d, (1, 2, 7, 7), (2, 2, 3, 3), {"dilation": 2}),
    "2d-depthwise": (F.conv2d, (2, 3, 5, 5), (3, 1, 3, 3), {"groups": 3, "stride": 3, "padding": 2}),
    "3d": (F.conv3d, (1, 2, 4, 4, 3), (2, 2, 2, 3, 2), {"stride": 2, "padding": 1}),
    "same": (F.conv2d, (2, 3, 5, 5), (4, 3, 3, 3), {"padding": "same"}),
    "unbatched": (F.conv2d, (3, 5, 5), (4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_derivatives(name: str, with_bias: bool) -> None:
    function, shape, weights, options = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(weights).double(), torch.randn(weights[0]).double() if with_bias else None

    def convolve(x: Tensor) -> Tensor:
        with ConstantConvolutions():
            return function(x, weight, bias, **options)

    torch.testing.assert_close(convolve(x), function(x, weight, bias, **options))
    assert gradcheck(convolve, x)
    assert gradgradcheck(convolve, x)


@pytest.mark.parametrize("learned", ["weight", "bias"])
def test_learned_weights_keep_their_gradients(learned: str) -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.rand(1, 2, 5, 5)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == learned)
    with ConstantConvolutions():
        layer(x).square().sum().backward()
    assert getattr(layer, learned).grad.norm() > 0


def test_autocast_is_left_alone() -> None:
    layer = nn.Conv2d(2, 3, 3).requires_grad_(False)
    x = torch.rand(1, 2, 5, 5, requires_grad=True)
    with ConstantConvolutions(), torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    (g,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    torch.autograd.grad(g.sum(), x)
