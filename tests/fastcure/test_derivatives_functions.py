"""Operators of one's own, and those of torch without a second derivative: right, or one clear error."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from definitions import H, Lambda, check_refused, check_right, definition, images, network, of_torch, ours, seeded, unit
from networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import attacks, curvature
from fastcure.analysis import curvature_along_gradient

pytestmark = seeded


def finite_differences(model: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The penalty, and its gradients by central differences in every parameter: of first-order gradients alone."""
    model = copy.deepcopy(model).eval()

    def penalties() -> Tensor:
        ends = []
        for point in (x + H * z, x.clone()):
            point.requires_grad_()
            ends += torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
        return (ends[0] - ends[1]).flatten(1).square().sum(1)

    grads, e = [], 1e-5
    with torch.no_grad():
        for values in (parameter.view(-1) for parameter in model.parameters()):
            for i in range(len(values)):
                sides = []
                for side in (e, -2 * e, e):
                    values[i] += side
                    with torch.enable_grad():
                        sides.append(penalties().mean())
                grads.append((sides[0] - sides[1]) / (2 * e))
    return penalties().detach(), torch.stack(grads)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class OnceSquare(Square):
    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))


class OpaqueSquare(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (2 * g * ctx.saved_tensors[0]).detach()


class OpaqueSum(Square):
    """As a fused loss: what comes into its backward has no history of its own."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return (t * t).sum(1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g[:, None].detach() * ctx.saved_tensors[0].detach()


class LeadByConstant(Square):
    """The gradient of its first argument is None, that of the second has no graph."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        return None, (2 * g * ctx.saved_tensors[0]).detach()


def test_a_gradient_that_is_none_hides_no_other() -> None:
    model = network(nn.Conv2d(1, 2, 3), Lambda(lambda t: LeadByConstant.apply(torch.ones(()), t)))
    check_refused(model, "LeadByConstantBackward has no second derivative")


@pytest.mark.parametrize("function", [OnceSquare, OpaqueSquare])
@pytest.mark.parametrize("residual", [False, True])
def test_a_function_without_a_second_derivative_is_one_error(function: Any, residual: bool) -> None:
    def square(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: apply(t) + (t.tanh() if residual else 0)

    model = network(nn.Conv2d(1, 2, 3), Lambda(square(function.apply)))
    check_refused(
        model, rf"{function.__name__}Backward has no second derivative.*engine='first_order'.*method='finite'"
    )
    x, y = images()
    z, plain = unit(x), copy.deepcopy(model)
    plain[1] = Lambda(square(lambda t: t * t))
    assert relative(ours(model, x, y, z, engine="first_order")[1], definition(plain, x, y, z)[1]) < 1e-6
    values = [curvature_along_gradient(m, x, y, method="finite", h=0.1).value for m in (model, plain)]
    assert relative(*values) < 1e-9
    attacks.pgd(model, x, y)


@pytest.mark.parametrize("function", [OnceSquare, OpaqueSum])
def test_so_it_is_in_the_loss(function: Any) -> None:
    model = network(nn.Conv2d(1, 2, 3), nn.Tanh())
    check_refused(
        model, "has no second derivative", loss_fn=lambda logits, y: function.apply(logits).reshape(len(y), -1)[:, 0]
    )


def test_so_it_is_where_it_joins_a_model_later() -> None:
    model, (x, y) = network(nn.Conv2d(1, 2, 3), nn.Tanh()), images()
    curvature(model, x, y)
    model[1] = Lambda(OnceSquare.apply)
    with pytest.raises(RuntimeError, match="OnceSquareBackward has no second derivative"):
        curvature(model, x, y)


@of_torch
@pytest.mark.parametrize("function", [OnceSquare, OpaqueSquare])
def test_so_it_is_compiled(function: Any, aot_eager: None) -> None:
    model, (x, y) = network(nn.Conv2d(1, 2, 3), Lambda(function.apply)), images()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        curvature(model, x, y, engine="compile")


def test_functions_that_have_one_are_right() -> None:
    class Stop(Square):
        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.zeros_like(g)

    model = network(nn.Conv2d(1, 2, 3), Lambda(lambda t: Square.apply(t) + Stop.apply(t)))
    plain = copy.deepcopy(model)
    plain[1] = Lambda(lambda t: t * t + (t * t).detach())
    check_right(model, plain, first_order=False)  # which sees values change that are given no gradient


# Operators without a second derivative in torch


def test_an_operator_without_a_second_derivative_is_one_error() -> None:
    def segments(t: Tensor) -> Tensor:
        return torch.segment_reduce(t, "sum", lengths=torch.ones(len(t), dtype=torch.int64))

    model = network(nn.Conv2d(1, 2, 3), nn.Flatten(), Lambda(segments))
    check_refused(model, "no second derivative of _segment_reduce: replace it, or use CURE's engine='first_order'")


def test_an_operator_with_a_backward_in_code_of_its_own_is_one_error() -> None:
    @torch.library.custom_op("fastcure_tests::square", mutates_args=())
    def square(t: Tensor) -> Tensor:
        return t * t

    @torch.library.custom_op("fastcure_tests::square_backward", mutates_args=())
    def square_backward(g: Tensor, t: Tensor) -> Tensor:
        return 2 * g * t

    square.register_autograd(
        lambda ctx, g: square_backward(g, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    check_refused(network(nn.Conv2d(1, 2, 3), Lambda(square)), "no second derivative of fastcure_tests.square_backward")


def test_the_definition_agrees_with_finite_differences() -> None:
    """Where nothing but first derivatives is used."""
    for layer in (nn.Tanh(), Lambda(OpaqueSquare.apply)):
        model, (x, y) = network(nn.Conv2d(1, 2, 3), layer, nn.AvgPool2d(3)), images()
        z = unit(x)
        plain = copy.deepcopy(model)
        if isinstance(layer, Lambda):
            plain[1] = Lambda(lambda t: t * t)
        assert relative(definition(plain, x, y, z)[1], finite_differences(model, x, y, z)[1]) < 1e-5
