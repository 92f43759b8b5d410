"""The convolution's rules against torch's own, to the third order, and what the double backward really runs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from networks import relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcure import curvature, double_backward
from fastcure.profiling.flops import FlopCounter

TORCH = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Geometry(NamedTuple):
    """How a convolution moves over its input, one number a spatial dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Shape(NamedTuple):
    image: tuple[int, ...]
    """(B, C, ...)"""
    kernel: tuple[int, ...]
    """(K, C / groups, ...)"""
    geometry: Geometry
    bias: bool = True


SHAPES = {
    "1d": Shape((2, 3, 7), (4, 3, 3), Geometry([1], [1], [1], 1)),
    "1d-strided-grouped": Shape((2, 4, 9), (6, 2, 2), Geometry([3], [2], [2], 2), bias=False),
    "2d": Shape((2, 3, 5, 4), (2, 3, 3, 3), Geometry([1, 1], [1, 1], [1, 1], 1)),
    "2d-no-bias": Shape((2, 2, 4, 5), (3, 2, 3, 2), Geometry([1, 1], [0, 1], [1, 1], 1), bias=False),
    "2d-stride-drops-a-row": Shape((2, 2, 6, 7), (3, 2, 3, 3), Geometry([2, 3], [1, 0], [1, 1], 1)),
    "2d-dilated": Shape((2, 2, 7, 6), (2, 2, 3, 2), Geometry([1, 1], [2, 1], [2, 3], 1)),
    "2d-depthwise": Shape((2, 4, 5, 5), (8, 1, 3, 3), Geometry([2, 1], [1, 1], [1, 1], 4)),
    "2d-pointwise": Shape((2, 3, 3, 5), (4, 3, 1, 1), Geometry([2, 2], [0, 0], [1, 1], 1), bias=False),
    "2d-one-image": Shape((1, 3, 5, 3), (2, 3, 3, 3), Geometry([1, 1], [1, 1], [1, 1], 1)),
    "2d-one-channel": Shape((3, 1, 4, 4), (1, 1, 2, 4), Geometry([1, 2], [0, 0], [1, 1], 1)),
    "2d-much-padding": Shape((2, 4, 3, 3), (2, 2, 2, 2), Geometry([2, 2], [3, 2], [1, 1], 2)),
    "3d": Shape((2, 2, 4, 3, 4), (2, 2, 2, 3, 2), Geometry([1, 1, 1], [1, 1, 0], [1, 1, 1], 1)),
    "3d-strided-grouped": Shape((1, 4, 5, 4, 3), (4, 2, 3, 2, 1), Geometry([2, 1, 1], [1, 0, 0], [1, 2, 1], 2)),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every-second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}
every_shape = pytest.mark.parametrize("name", SHAPES)
# The longest sums, of a kernel's gradient, have fewer than 100 terms; a gradient is up to ten times as sensitive.
LIMIT = rounding(torch.float64, 100, condition=10)


def tensors(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Image, kernel and, where there is one, bias."""
    torch.manual_seed(0)
    sizes = [shape.image, shape.kernel, shape.kernel[:1]][: 3 if shape.bias else 2]
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def ours(geometry: Geometry) -> Callable[..., Tensor]:
    def convolution(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        with double_backward():
            return torchs(geometry)(x, w, b)

    return convolution


def torchs(geometry: Geometry) -> Callable[..., Tensor]:
    return lambda x, w, b=None: TORCH[len(geometry.stride)](x, w, b, *geometry)


def derivatives(run: Callable[..., Tensor], inputs: Sequence[Tensor], orders: int) -> list[Tensor]:
    """The output, and the gradients of a scalar of each order's results, as deep as `orders`.

    Results enter the scalar scaled to unit length: the sine of 1e9 would turn rounding into errors of 1e-7.
    """
    results, found = [run(*inputs)], []
    for _ in range(orders):
        found += results
        units = [result / result.detach().norm().clamp(min=1e-300) for result in results]
        scalar = sum((unit * (1 + unit).sin()).sum() for unit in units)
        results = list(torch.autograd.grad(scalar, inputs, create_graph=True))
    return found + results


@every_shape
def test_equals_torch_to_the_third_derivative(name: str) -> None:
    shape = SHAPES[name]
    inputs = tensors(shape)
    results = (derivatives(rule(shape.geometry), inputs, 3) for rule in (ours, torchs))
    for value, truth in zip(*results, strict=True):
        assert value.shape == truth.shape
        assert relative(value, truth) < LIMIT


@every_shape
def test_first_and_second_derivatives_against_numerical_differences(name: str) -> None:
    shape = SHAPES[name]
    assert torch.autograd.gradcheck(ours(shape.geometry), tensors(shape), fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(shape.geometry), tensors(shape), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_kernels_and_gradients_of_any_layout(layout: str) -> None:
    shape = Shape((2, 4, 5, 4), (6, 2, 3, 2), Geometry([1, 2], [1, 1], [1, 1], 2))
    x, w, b = (t.detach() for t in tensors(shape))
    v = LAYOUTS[layout](torch.randn_like(x))
    x, w = (LAYOUTS[layout](t).requires_grad_() for t in (x, w))
    b.requires_grad_()

    def run(convolution: Callable[..., Tensor]) -> list[Tensor]:
        out = convolution(x, w, b)
        g = LAYOUTS[layout](torch.ones_like(out)).requires_grad_()
        (g_x,) = torch.autograd.grad(out, x, g, create_graph=True)
        return [out, g_x, *torch.autograd.grad(g_x, (w, g), v, retain_graph=True), *torch.autograd.grad(out, (w, b), g)]

    values, truths = run(ours(shape.geometry)), run(torchs(shape.geometry))
    assert values[0].stride() == truths[0].stride()
    for value, truth in zip(values, truths, strict=True):
        assert relative(value, truth) < LIMIT


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradients_of_those_alone_that_are_asked_for(wanted: tuple[int, ...]) -> None:
    shape = SHAPES["2d"]
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors(shape))]
    asked = [inputs[i] for i in wanted]
    for create_graph in (False, True):
        values, truths = (
            torch.autograd.grad(rule(shape.geometry)(*inputs).sin().sum(), asked, create_graph=create_graph)
            for rule in (ours, torchs)
        )
        assert relative(values, truths) < LIMIT


def test_no_image_at_all() -> None:
    x, w, b = tensors(SHAPES["2d"])
    results = [derivatives(rule(SHAPES["2d"].geometry), (x[:0], w, b), 2) for rule in (ours, torchs)]
    for value, truth in zip(*results, strict=True):
        torch.testing.assert_close(value, truth)


def test_without_a_record_nothing_is_kept() -> None:
    inputs = tensors(SHAPES["2d"])
    with torch.no_grad():
        assert not ours(SHAPES["2d"].geometry)(*inputs).requires_grad


def test_forward_mode_is_that_of_torch() -> None:
    x, w, b = (t.detach() for t in tensors(SHAPES["2d"]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.rand_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(run(SHAPES["2d"].geometry)(dual, w, b)).tangent
            for run in (ours, torchs)
        ]
    assert torch.equal(*tangents)


# What it costs: which gradients are computed, the kernels' sizes, the operations


def flops(run: Callable[[], object]) -> int:
    with FlopCounter() as counter:
        run()
    return counter.total


@pytest.mark.parametrize("create_graph", [False, True])
def test_only_gradients_that_the_pass_asks_for_are_computed(create_graph: bool) -> None:
    shape = SHAPES["2d-dilated"]
    inputs = tensors(shape)
    forward = flops(lambda: ours(shape.geometry)(*inputs))

    def gradients(out: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sin().sum(), wanted, retain_graph=True, create_graph=create_graph)

    truth, out = torchs(shape.geometry)(*inputs), ours(shape.geometry)(*inputs)
    for wanted, passes in ((inputs[:1], 1), (inputs[1:], 1), (inputs[:2], 2), (inputs, 2)):
        assert relative(gradients(out, wanted), gradients(truth, wanted)) < LIMIT
        assert flops(lambda wanted=wanted: gradients(out, wanted)) == passes * forward


@every_shape
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,)])
def test_a_weight_that_depends_on_the_image(name: str, frozen: tuple[int, ...]) -> None:
    """Its gradient is part of that of the image; here also where another argument requires no gradient."""
    shape = SHAPES[name]
    inputs = [tensor.detach().requires_grad_(i not in frozen) for i, tensor in enumerate(tensors(shape))]
    u = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def run(convolution: Callable[..., Tensor]) -> list[Tensor]:
        image, weight, *bias = inputs
        out = convolution(image * u[1].sin(), weight * u[0].sin(), *bias)
        (g,) = torch.autograd.grad(out.sin().sum(), u, create_graph=True)
        wanted = [u, *(tensor for tensor in inputs if tensor.requires_grad)]
        return [g, *torch.autograd.grad(g.square().sum() + out.cos().sum(), wanted)]

    for value, truth in zip(run(ours(shape.geometry)), run(torchs(shape.geometry)), strict=True):
        assert relative(value, truth) < 1e-10


@every_shape
def test_after_a_pass_for_the_image_every_second_derivative_is_right(name: str) -> None:
    shape = SHAPES[name]
    inputs = tensors(shape)

    def run(convolution: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        out = convolution(*inputs)
        (g,) = torch.autograd.grad(out.sin().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(g.square().sum() + out.cos().sum(), inputs)

    for value, truth in zip(run(ours(shape.geometry)), run(torchs(shape.geometry)), strict=True):
        assert relative(value, truth) < LIMIT


class Kernels(TorchDispatchMode):
    """Collects the spatial sizes of the kernels that convolutions run with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.sizes.add(tuple(args[1].shape[2:]))
        return func(*args, **(kwargs or {}))


def penalty_of(model: nn.Module, x: Tensor) -> None:
    """Differentiate the squared norm of the gradient of a nonlinear function, with respect to the parameters."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()


def test_the_double_backward_has_no_kernel_of_the_images_size() -> None:
    torch.manual_seed(0)
    image = (2, 3, 12, 12)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
    with Kernels() as torchs_own:
        penalty_of(layers, torch.rand(image))
    assert torchs_own.sizes == {(3, 3), (12, 12)}  # what this file is there to avoid; were it gone, so could the file
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 12 * 12, 5))
    with Kernels() as kernels:
        out = curvature(model, torch.rand(image), torch.tensor([0, 1]))
        (out.loss + out.penalty).sum().backward()
    assert kernels.sizes == {(3, 3)}


# torch counts the weight gradient of a grouped convolution as that of a dense one.
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.geometry.groups == 1])
def test_the_double_backward_has_no_more_operations_than_torchs(name: str) -> None:
    shape = SHAPES[name]
    inputs = tensors(shape)

    def spent(convolution: Callable[..., Tensor]) -> int:
        out = convolution(*inputs)
        (g,) = torch.autograd.grad(out.sin().sum(), inputs[0], create_graph=True)
        return flops(lambda: torch.autograd.grad(g.square().sum(), inputs[:2]))

    double = spent(ours(shape.geometry))
    assert double <= spent(torchs(shape.geometry))
    assert double == 4 * flops(lambda: ours(shape.geometry)(*inputs))


# Under autocast, as torch's


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("enabled", [True, False])
def test_dtypes_under_autocast_are_those_of_torch(dtype: torch.dtype, enabled: bool) -> None:
    shape = SHAPES["2d"]
    inputs = tensors(shape, dtype)
    results = []
    for rule in (ours, torchs):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = rule(shape.geometry)(*inputs)
            (g,) = torch.autograd.grad(out.float().square().sum(), inputs[0], create_graph=True)
            results.append([out, g, *torch.autograd.grad(g.double().square().sum(), inputs)])
    for value, truth in zip(*results, strict=True):
        assert value.dtype == truth.dtype
        assert relative(value, truth) < rounding(out.dtype, 1 if out.dtype == torch.bfloat16 else inputs[0].numel())
