"""Batch norms in training mode: their own second-order rule."""

import copy
from typing import Any

import pytest
import torch
from networks import relative, rounding
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

from fastcure import double_backward

SHAPES = [(4, 3), (4, 3, 5), (2, 3, 3, 2), (2, 2, 2, 1, 2), (3, 1, 2, 2)]
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def norm_for(shape: tuple[int, ...], **options: Any) -> Any:
    """A batch norm with random weights, in training mode."""
    norm = KINDS[len(shape)](shape[1], **options).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def as_function(norm: Any) -> Any:
    """The rule as a function of x, weight and bias."""

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        if parameters:
            norm._parameters.update(zip(("weight", "bias"), parameters, strict=True))
        return normalise(norm, x)

    return function


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    with double_backward():
        return norm(x)


@pytest.mark.parametrize(
    ("shape", "affine", "backend"),
    [
        *((shape, affine, "auto") for shape in SHAPES for affine in (True, False)),
        ((4, 3, 5), False, "triton"),
        ((2, 3, 3, 2), True, "triton"),
    ],
)
def test_derivatives(shape: tuple[int, ...], affine: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm = norm_for(shape, affine=affine)
    inputs = [torch.randn(shape, dtype=torch.float64), *norm.parameters()]
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    function = as_function(norm)
    fast = backend == "triton"  # interpreted: along one random direction
    assert gradcheck(function, inputs, fast_mode=fast)
    assert gradgradcheck(function, inputs, fast_mode=fast)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_third_derivatives(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm = norm_for((3, 2, 2, 2))
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)

    def deep(function: Any) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (x, norm.weight, norm.bias)]
        # Scaled so that no order is far above 1: the cosine of t multiplies the rounding of t by |t|.
        scalar, found = ((function(*leaves) / 8) ** 3).sum(), list[Tensor]()
        for _ in range(3):
            found += grad(scalar, leaves, create_graph=True)
            scalar = torch.stack([(t * t.cos()).sum() for t in found[-3:]]).sum()
        return found

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        deviation = (x.var((0, 2, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
        centred = x - x.mean((0, 2, 3), keepdim=True)
        return centred / deviation * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    for ours, truth in zip(deep(as_function(norm)), deep(torchs), strict=True):
        assert relative(ours, truth) < 1e-9


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_second_derivatives_in_every_layout_and_in_fp32(layout: str) -> None:
    x = torch.randn(5, 4, 6, 3)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.repeat_interleave(2, -1)[..., ::2]
    norm = norm_for((5, 4, 6, 3))
    wide = copy.deepcopy(norm)
    w, v = torch.randn(5, 4, 6, 3), torch.randn(5, 4, 6, 3)

    def second(norm: Any, run: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        point, weights = x.to(dtype).detach().requires_grad_(), w.to(dtype).requires_grad_()
        (first,) = grad(run(point), point, weights, create_graph=True)
        return first, *grad(first, (weights, point, norm.weight), v.to(dtype))

    ours = second(norm.float(), lambda x: normalise(norm, x), torch.float32)
    for value, truth in zip(ours, second(wide, wide, torch.float64), strict=True):
        assert relative(value, truth) < rounding(torch.float32, 5 * 6 * 3)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    deviation = (centred.square().mean((0, 2, 3), keepdim=True) + eps).sqrt()
    return centred / deviation * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def one_norm(dtype: torch.dtype = torch.float64) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A norm, its inputs and two gradients at its output."""
    torch.manual_seed(0)
    norm = norm_for((3, 2, 4, 4)).to(dtype)
    leaves = [torch.randn(3, 2, 4, 4, dtype=dtype), norm.weight, norm.bias]
    return norm, [t.detach().requires_grad_() for t in leaves], list(torch.randn(3, 3, 2, 4, 4, dtype=dtype).unbind())


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_several_gradients_of_one_norm_meet_in_one_backward(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm, leaves, (w, other, v) = one_norm()

    def objective(function: Any) -> Tensor:
        y = function(*leaves)
        first = grad(y, leaves[0], w * y.detach(), create_graph=True)[0]
        again = grad(y, leaves[0], other, create_graph=True)[0]
        return (first * v).sum() + (again * first.detach()).sum() + (y**3).sum()

    for ours, truth in zip(
        grad(objective(as_function(norm)), leaves), grad(objective(plain_norm), leaves), strict=True
    ):
        assert relative(ours, truth) < 1e-11


def test_a_backward_that_takes_one_path_alone_leaves_nothing_to_the_next() -> None:
    norm, leaves, (w, other, v) = one_norm()
    w.requires_grad_()

    def run(function: Any) -> list[Tensor]:
        y = function(*leaves)
        (first,) = grad(y, leaves[0], w, create_graph=True)
        found = list(grad(first, w, v, retain_graph=True))  # stops before the norm
        with pytest.raises(ZeroDivisionError):
            (first * v + y * Failing.apply(other.clone().requires_grad_())).sum().backward(retain_graph=True)
        for leaf in (*leaves, w):
            leaf.grad = None
        found += grad(y, leaves, other, retain_graph=True)
        found += grad(first, leaves[:2], v, retain_graph=True)
        return found + list(grad((first, y), leaves, (v, other)))

    for ours, truth in zip(run(as_function(norm)), run(plain_norm), strict=True):
        assert relative(ours, truth) < 1e-11


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 / 0)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_bf16_images_with_fp32_parameters(
    backend: str, form: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    norm, leaves, directions = one_norm(torch.bfloat16)
    norm = norm.float()
    leaves = [leaves[0].detach().to(memory_format=form).requires_grad_(), norm.weight, norm.bias]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def run(function: Any, leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        w, other, v = (t.to(dtype).requires_grad_() for t in directions)
        y = function(*leaves)
        (first,) = grad(y, leaves[0], w, create_graph=True)
        return [y, first, *grad(((first, y)), (*leaves, w), (v, other))]

    ours = run(lambda x, *_: normalise(norm, x), leaves, torch.bfloat16)
    limit = rounding(torch.bfloat16, 48)
    for value, truth in zip(ours, run(plain_norm, wide, torch.float64), strict=True):
        assert relative(value.double(), truth) < limit


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"momentum": 0.3}, {"track_running_stats": False}, {"affine": False}], ids=str
)
def test_a_forward_is_that_of_the_module(options: dict[str, Any]) -> None:
    ours, theirs = norm_for((6, 3, 4, 4), **options), None
    theirs = copy.deepcopy(ours)
    for _ in range(3):
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
        assert torch.equal(normalise(ours, x), theirs(x))
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(one, other)
