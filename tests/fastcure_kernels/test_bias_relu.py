import os
import sys

import pytest
import torch
from fastcure_kernels import bias_relu
from fastcure_kernels.split_gradient import parts_of
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(2, 5), (2, 3, 7), (3, 3, 9, 7), (2, 16, 4, 4), (3, 2, 2, 3, 2), (2, 1030, 1, 1), (1, 1), (0, 5), (3, 0, 2)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]
OPERANDS = {"x": (0, 0), "bias": (1, 0), "residual": (0, 1), "both": (1, 1)}


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """All tests of this file."""


def steps(*shape, offset=0.0):
    """Multiples of 1/8, which add up exactly in every dtype; with an offset of 1/16 no sum of them is zero."""
    return torch.randint(-16, 17, shape) / 8 + offset


def operands(shape, dtype=torch.float32, device="cpu", bias=True, residual=True):
    x = steps(*shape, offset=1 / 16).to(device, dtype)
    b = steps(shape[1]).to(device, dtype) if bias else None
    return x, b, steps(*shape).to(device, dtype) if residual else None


def leaves(*tensors):
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def derivatives(function, tensors, w, directions):
    """The value, its gradients under `w`, and the gradient at `w` of the gradients under `directions`."""
    tensors = leaves(*tensors)
    present = [t for t in tensors if t is not None]
    w = w.detach().requires_grad_()
    y = function(*tensors)
    first = grad(y, present, w, create_graph=True)
    second = grad(first, w, [v.to(t) for v, t in zip(directions, present, strict=True)])
    return [y, *first, *second]


def plainly(x, bias=None, residual=None):
    total = x if bias is None else x + bias.view(-1, *[1] * (x.ndim - 2))
    return torch.relu(total if residual is None else total + residual)


def check(x, bias, residual, close, w=None):
    w = steps(*x.shape).to(x) if w is None else w
    directions = [steps(*t.shape) for t in (x, bias, residual) if t is not None]
    values = derivatives(bias_relu, (x, bias, residual), w, directions)
    wide = [t if t is None else t.cpu().double() for t in (x, bias, residual, w)]
    truths = derivatives(plainly, wide[:3], wide[3], directions)
    dtypes = [t.dtype for t in (x, x, bias, residual, w) if t is not None]
    for value, truth, dtype in zip(values, truths, dtypes, strict=True):
        assert value.dtype == dtype
        close(value, truth)
    return values


@pytest.mark.parametrize("which", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype, which):
    check(*operands((3, 3, 9, 7), dtype, device, *OPERANDS[which]), close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape):
    check(*operands(shape, device=device), close)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(device, close, lay, layout, other):
    x, bias, residual = operands((3, 4, 6, 5), device=device)
    w = lay(steps(3, 4, 6, 5).to(device), other)
    y, g_x, *_ = check(lay(x, layout), bias, lay(residual, other), close, w)
    if layout in ("contiguous", "channels_last"):
        assert y.stride() == lay(x, layout).stride()
    if layout == other == "channels_last":
        assert g_x.stride() == y.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_another_dtype(device, close, dtype):
    x, bias, residual = operands((2, 3, 5, 4), torch.bfloat16, device)
    check(x, bias.to(dtype), residual, close)


def test_bias_that_is_not_contiguous_and_weights_that_are_expanded(device, close):
    x, _, residual = operands((2, 3, 5, 4), device=device)
    check(x, steps(6).to(device)[::2], residual, close, torch.ones(1, 1, 1, 1, device=device).expand_as(x))


def test_what_is_not_finite_passes_on_as_in_relu(device):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0, -1.0, 0.0]], device=device)
    for residual in (None, x.clone()):
        point = x.clone().requires_grad_()
        y = bias_relu(point, residual=residual)
        truth = plainly(point, residual=residual)
        torch.testing.assert_close(y, truth, rtol=0, atol=0, equal_nan=True)
        w = torch.tensor([[1.0, torch.nan, torch.nan, torch.inf, torch.inf, 2.0]], device=device)
        gradients = (grad(value, point, w)[0] for value in (y, truth))
        torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)


def test_nan_in_bias_and_residual(device):
    x, bias, residual = operands((2, 3, 4), device=device)
    bias[1] = residual[0, 2, 3] = torch.nan
    y = bias_relu(x, bias, residual)
    assert torch.equal(y.isnan(), plainly(x, bias, residual).isnan())


def test_gradcheck(device):
    x, bias, residual = leaves(*operands((2, 2, 3), torch.float64, device))
    for inputs in ((x, bias, residual), (x, bias)):
        assert gradcheck(bias_relu, inputs)
        assert gradgradcheck(bias_relu, inputs)


@pytest.mark.parametrize(("shape", "layout"), [((2, 3, 4), "contiguous"), ((2, 3, 2, 3), "channels_last")])
def test_third_derivatives_in_a_network(device, close, lay, shape, layout):
    def deep(function, *tensors):
        x, bias, residual = leaves(*tensors)
        # Scaled so that all orders are near 1: the cosine of t multiplies the rounding of t by |t|.
        scalar = ((function(x, bias, function(residual.sin(), bias.cos())) / 4) ** 3).sum()
        found = []
        for _ in range(3):
            found += grad(scalar, (x, bias, residual), create_graph=True)
            scalar = sum((t * t.cos()).sum() for t in found[-3:])
        return found

    tensors = [lay(t, layout) if t.ndim > 1 else t for t in operands(shape, torch.float64, device)]
    truths = deep(plainly, *(t.cpu() for t in tensors))
    for value, truth in zip(deep(bias_relu, *tensors), truths, strict=True):
        close(value, truth)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_gradients_of_those_alone_that_require_them(device, close, wanted):
    tensors = operands((2, 3, 5), torch.float64, device)
    w, v = steps(2, 3, 5).double(), steps(2, 3, 5).double()

    def run(function, tensors):
        tensors = [t.clone().requires_grad_(bool(want)) for t, want in zip(tensors, wanted, strict=True)]
        weights = w.to(tensors[0].device).requires_grad_()
        present = [t for t in tensors if t.requires_grad]
        first = grad(function(*tensors), present, weights, create_graph=True)
        return [*first, *grad(first, weights, [v.to(t) if t.ndim > 1 else t for t in first])]

    for value, truth in zip(run(bias_relu, tensors), run(plainly, [t.cpu() for t in tensors]), strict=True):
        close(value, truth)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.calls.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_one_kernel_a_derivative_and_no_sum_for_a_bias_whose_gradient_is_not_taken(triton_device):
    x, bias, residual = leaves(*operands((2, 3, 5), device=triton_device))
    w = torch.ones_like(x).requires_grad_()
    with Operators() as forward:
        y = bias_relu(x, bias, residual)
    with Operators() as backward:
        g_x, g_residual = grad(y, (x, residual), w, create_graph=True)
    assert forward.calls == ["gated_sum_and_mask"]
    assert backward.calls == ["gated_sum"]
    with torch.no_grad(), Operators() as forward:
        bias_relu(x, bias, residual)
    assert forward.calls == ["gated_sum"]
    assert g_x.data_ptr() == g_residual.data_ptr()
    with Operators() as backward:
        g_bias = grad(y, bias, w, create_graph=True)
    assert backward.calls == ["gated_sum", "sum"]
    with Operators() as second:
        grad((g_x, g_residual, *g_bias), w, (x, residual, bias))
    assert second.calls.count("gated_sum") == 2
    first = grad(y, (x, residual, bias), w, create_graph=True)
    with Operators() as second:
        grad(first, w, (x, residual, bias))
    assert second.calls == ["gated_sum"]


def test_an_output_that_was_overwritten_is_an_error_or_does_no_harm(device):
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y = bias_relu(x, torch.zeros(3, device=device))
    expected = 2.0 * (y > 0)
    y.mul_(2)
    if os.environ["FASTCURE_BACKEND"] == "torch":  # which reads the mask off it
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert torch.equal(grad(y.zero_().sum(), x)[0], torch.zeros_like(x))
        y = bias_relu(x, torch.zeros(3, device=device))
        assert torch.equal(grad(y.mul_(2).sum(), x)[0], expected)


def test_the_mask_is_that_of_the_output(triton_device):
    tiny = torch.finfo(torch.float16).smallest_normal * 2**-10  # rounds to half of itself, or to 0
    x = torch.full((1, 5), tiny, dtype=torch.float16, device=triton_device).requires_grad_()
    bias = torch.tensor([0, -0.25, -0.75, -1, 1], device=triton_device) * tiny
    y = bias_relu(x, bias)
    assert torch.equal(grad(y.sum(), x)[0], (y > 0).half())
    assert (y == 0).any()


def test_the_kernel_adds_the_gradients_of_a_residual_that_is_used_twice(triton_device, close, monkeypatch):
    read = []
    module = sys.modules["fastcure_kernels.bias_relu"]
    monkeypatch.setattr(module, "parts_of", lambda g: read.append(parts_of(g)) or read[-1])

    def block(function, x, bias):
        y = function(x, bias)
        return grad(function(3 * y, bias, y).sin().sum(), x)[0]

    tensors = leaves(*operands((2, 3, 5), torch.float64, triton_device, residual=False)[:2])
    truth = block(plainly, *leaves(*(t.cpu() for t in tensors)))
    close(block(bias_relu, *tensors), truth)
    assert [second is not None for _, second in read] == [False, True]


def test_operands_are_not_changed(device):
    tensors = operands((2, 3, 5), device=device)
    for present in ((1, 1, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1)):
        given = [t if there else None for t, there in zip(tensors, present, strict=True)]
        before = [t if t is None else t.clone() for t in given]
        bias_relu(*given)
        assert all(t is None or torch.equal(t, old) for t, old in zip(given, before, strict=True))


def test_forward_mode_is_right_or_refused(device):
    x, bias, residual = operands((2, 3, 5), torch.float64, device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(residual, torch.ones_like(x))
        if os.environ["FASTCURE_BACKEND"] == "triton":
            with pytest.raises(NotImplementedError, match="FASTCURE_BACKEND=torch"):
                bias_relu(x, bias, dual)
        else:
            tangent = forward_ad.unpack_dual(bias_relu(x, bias, dual)).tangent
            assert torch.equal(tangent, (plainly(x, bias, residual) > 0).double())


X = torch.rand(2, 3, 4)
MISTAKES = {
    "no channels": (lambda: bias_relu(X[:, 0, 0]), ValueError, r"x must be \(B, C, ...\), got shape \(2,\)"),
    "length": (lambda: bias_relu(X, torch.rand(4)), ValueError, r"bias must be \(3,\), one a channel, got \(4,\)"),
    "shape": (lambda: bias_relu(X, None, X[:1]), ValueError, r"residual must have the shape \(2, 3, 4\) of x"),
    "dtype": (lambda: bias_relu(X, None, X.half()), TypeError, "residual must have the dtype torch.float32 of x"),
    "integers": (lambda: bias_relu(X, torch.ones(3).long()), TypeError, "bias must be float32, .* got torch.int64"),
    "device": (lambda: bias_relu(X, torch.ones(3, device="meta")), ValueError, "bias must be on the device cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()
