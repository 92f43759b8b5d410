"""Operators inside `fastcure.double_backward()`: values, and derivatives to the third order by finite differences."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from fastcure_kernels.jit import Kernel
from networks import relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import double_backward
from fastcure.profiling.flops import FlopCounter
from fastcure.profiling.traffic import TrafficCounter

Function = Callable[..., Tensor]
LIMIT = rounding(torch.float64, 100, condition=10)
"""Of two ways to a derivative: sums of at most 100 terms, of which some cancel."""


def batch_norm(training: bool) -> Function:
    """Of statistics that are made anew: in training mode they change in place. They are never in half precision."""

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        mean, var = torch.linspace(-1, 1, x.shape[1]), torch.linspace(0.5, 2, x.shape[1])
        if x.dtype == torch.float64:
            mean, var = mean.double(), var.double()
        return F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-3)

    return run


OPERATORS: dict[str, tuple[Function, Sequence[tuple[int, ...]]]] = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), [(2, 3, 7), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w: F.conv2d(x, w, None, 2, 1), [(2, 3, 5, 4), (2, 3, 3, 3)]),
    "conv2d-same": (lambda x, w, b: F.conv2d(x, w, b, padding="same", groups=2), [(2, 4, 3, 4), (2, 2, 1, 3), (2,)]),
    "conv3d": (lambda x, w: F.conv3d(x, w, None, 1, 1), [(1, 2, 3, 2, 3), (2, 2, 2, 3, 2)]),
    "conv_transpose1d": (lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1), [(2, 3, 4), (3, 2, 3), (2,)]),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), 1, (1, 0), 2, (1, 2)),
        [(2, 4, 3, 3), (4, 1, 2, 3), (2,)],
    ),
    "batch_norm": (batch_norm(True), [(3, 2, 2, 3), (2,), (2,)]),
    "batch_norm-no-bias": (batch_norm(True), [(5, 3), (3,)]),
    "batch_norm-alone": (batch_norm(True), [(3, 2, 4)]),
    "batch_norm-given": (batch_norm(False), [(2, 3, 2, 2), (3,), (3,)]),
    "batch_norm-given-alone": (batch_norm(False), [(2, 3, 4)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3, 2), w, b), [(2, 2, 3, 2), (3, 2), (3, 2)]),
    "layer_norm-no-bias": (lambda x, w: F.layer_norm(x, (5,), w), [(3, 5), (5,)]),
    "layer_norm-alone": (lambda x: F.layer_norm(x, (4,)), [(2, 4)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
    "group_norm-alone": (lambda x: F.group_norm(x, 1), [(2, 4, 2, 2)]),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), [(2, 3, 5), (3,), (3,)]),
    "gelu": (F.gelu, [(2, 7)]),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), [(3, 5)]),
    "hardsigmoid": (lambda x: F.hardsigmoid(3 * x), [(2, 7)]),
    "hardswish": (lambda x: F.hardswish(3 * x), [(2, 7)]),
    "hardswish_": (lambda x: F.hardswish(3 * x, inplace=True), [(2, 7)]),
    "attention": (F.scaled_dot_product_attention, [(2, 3, 2), (2, 4, 2), (2, 4, 3)]),
    "attention-causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        [(1, 3, 2), (1, 3, 2), (1, 3, 2)],
    ),
}


every_operator = pytest.mark.parametrize("name", OPERATORS)


def inputs_of(name: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in OPERATORS[name][1]]


def ours(name: str) -> Function:
    def run(*inputs: Tensor) -> Tensor:
        with double_backward():
            return OPERATORS[name][0](*inputs)

    return run


def gradients(run: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    """First derivatives, with a graph."""
    return torch.autograd.grad(run(*inputs).sin().sum(), inputs, create_graph=True)


@every_operator
def test_values_and_gradients_are_those_of_torch(name: str) -> None:
    inputs = inputs_of(name)
    a, b = ours(name), OPERATORS[name][0]
    assert relative(a(*inputs), b(*inputs)) < rounding(torch.float64, max(x.numel() for x in inputs))
    # Torch divides by 6 in single precision there.
    limit = torch.finfo(torch.float32).eps if name == "hardsigmoid" else LIMIT
    assert relative(gradients(a, *inputs), gradients(b, *inputs)) < limit


@every_operator
def test_second_derivatives_by_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(ours(name), inputs_of(name))
    assert torch.autograd.gradgradcheck(ours(name), inputs_of(name))


@every_operator
def test_third_derivatives_by_finite_differences(name: str) -> None:
    inputs = inputs_of(name)
    assert torch.autograd.gradgradcheck(lambda *inputs: gradients(ours(name), *inputs), inputs, fast_mode=True)


ROW_NORMS = ("layer_norm", "layer_norm-alone", "group_norm", "group_norm-alone")


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh", *ROW_NORMS])
def test_second_and_third_derivatives_where_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(name)
    truth = [gradients(OPERATORS[name][0], *inputs)]
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    with mock.patch.object(Kernel, "launch", autospec=True, side_effect=Kernel.launch) as launch:
        assert relative(gradients(ours(name), *inputs), truth[0]) < LIMIT
        assert torch.autograd.gradgradcheck(ours(name), inputs, fast_mode=True)
        assert launch.called
    assert torch.autograd.gradgradcheck(lambda *inputs: gradients(ours(name), *inputs), inputs, fast_mode=True)
    if name.startswith("gelu"):  # where torch's own third derivatives are right
        thirds = []
        for run in (ours(name), OPERATORS[name][0]):
            (second,) = torch.autograd.grad(gradients(run, *inputs)[0].sin().sum(), inputs, create_graph=True)
            thirds.append(torch.autograd.grad(second.sin().sum(), inputs)[0])
        assert relative(*thirds) < LIMIT


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "in place": lambda x: F.relu_(x * 1),
    "of a view in place": lambda x: F.relu_((x * 1).view_as(x)),
}


@pytest.mark.parametrize("name", RELUS)
def test_relu_where_kernels_run_is_torch_s_without_its_zeros(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 3, 5, 4, dtype=torch.float64).requires_grad_().unbind()
    x.data[0, 0, 0] = torch.nan

    def derivatives(context: Any) -> tuple[list[Tensor], int]:
        with context():
            y = RELUS[name](x)
            (first,) = torch.autograd.grad((y * w).sin().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.nan_to_num().square().sum(), w, create_graph=True)
        with TrafficCounter() as counter:
            third = torch.autograd.grad((second.nan_to_num() ** 3).sum(), (x, w), retain_graph=True)
        return [y, first, second, *third], counter.total

    truth, most = derivatives(nullcontext)
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    values, moved = derivatives(double_backward)
    for value, expected in zip(values, truth, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    assert moved == most if name == "of a view in place" else moved < most


def test_a_leaf_that_changes_in_place_is_torch_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    with double_backward(), pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        F.relu_(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_of_torch(name: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(name, torch.float32)
    outputs = []
    for run in (ours(name), OPERATORS[name][0]):
        with torch.autocast(inputs[0].device.type, dtype):
            out = run(*inputs)
        outputs.append((out, torch.autograd.grad(out.float().sin().sum(), inputs)))
    (a, ours_), (b, theirs) = outputs
    assert a.dtype == b.dtype
    assert [g.dtype for g in ours_] == [g.dtype for g in theirs]
    epsilon = torch.finfo(a.dtype).eps  # both round up to 8 results in between by half of it, and as many again
    assert relative(a, b) < 8 * epsilon
    assert relative(ours_, theirs) < 16 * epsilon


@every_operator
def test_half_precision_is_near_the_truth(name: str) -> None:
    """Second derivatives of a bf16 network, against double precision at the same values."""
    inputs = inputs_of(name, torch.bfloat16)
    if name.startswith("batch_norm"):  # as under autocast: parameters are fp32
        inputs[1:] = [t.detach().float().requires_grad_() for t in inputs[1:]]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    found, truth = (
        torch.autograd.grad(sum(g.square().sum() for g in gradients(ours(name), *values)), values)
        for values in (inputs, wide)
    )
    assert relative(found, truth) < 16 * torch.finfo(torch.bfloat16).eps  # rounded in about 32 places, by half of it


def test_batched_gradients_are_refused() -> None:
    x, w = torch.rand(1, 2, 4, 4, requires_grad=True), torch.rand(2, 2, 3, 3, requires_grad=True)
    with double_backward():
        y = F.conv2d(x, w)
        with pytest.raises(RuntimeError, match=r"does not support is_grads_batched=True.*once for each gradient"):
            torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)


def test_a_thread_outside_of_the_context_has_torchs_operators() -> None:
    x, w = torch.rand(1, 2, 4, 4), torch.rand(2, 2, 3, 3, requires_grad=True)
    names: list[str] = []

    def work() -> None:
        names.append(type(F.conv2d(x, w).grad_fn).__name__)
        with double_backward():
            names.append(type(F.conv2d(x, w).grad_fn).__name__)

    with double_backward():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        names.append(type(F.conv2d(x, w).grad_fn).__name__)
    names.append(type(F.conv2d(x, w).grad_fn).__name__)
    assert names == ["ConvolutionBackward0", "_ConvolutionBackward", "_ConvolutionBackward", "ConvolutionBackward0"]


def test_contexts_nest_and_end_with_an_exception() -> None:
    x, w = torch.rand(1, 2, 4, 4), torch.rand(2, 2, 3, 3, requires_grad=True)
    with double_backward():
        with pytest.raises(ZeroDivisionError), double_backward():
            raise ZeroDivisionError
        assert type(F.conv2d(x, w).grad_fn).__name__ == "_ConvolutionBackward"
    assert type(F.conv2d(x, w).grad_fn).__name__ == "ConvolutionBackward0"


def test_a_pass_for_the_gradient_of_the_image_computes_no_gradient_of_a_weight() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)), torch.rand(2, 3, 8, 8)
    with double_backward(), FlopCounter() as counter:
        point = x.clone().requires_grad_()
        y = model(point).sum()
        forward = counter.total
        torch.autograd.grad(y, point, create_graph=True)
    assert counter.total == 2 * forward


def test_subclasses_of_tensor_keep_the_derivatives_of_torch() -> None:
    class Subclass(Tensor):
        pass

    x, weight = torch.rand(1, 2, 4, 4, requires_grad=True), torch.rand(3, 2, 3, 3)
    with double_backward():
        ordinary, other = F.conv2d(x, weight), F.conv2d(x.as_subclass(Subclass), weight)
    assert ordinary.grad_fn.name() == "_ConvolutionBackward"
    assert other.grad_fn.next_functions[0][0].name() == "ConvolutionBackward0"  # below what makes it a Subclass
