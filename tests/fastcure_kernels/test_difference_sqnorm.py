import os

import pytest
import torch
import torch.nn.functional as F
from fastcure_kernels import difference_sqnorm, direction_step
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(5,), (2, 7), (3, 3, 9, 7), (2, 16, 16), (2, 4099), (0, 5), (3, 0)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """All tests of this file."""


def check(a, b, close, wanted=(True, True)):
    """Norms and gradients, under a weight for each sample, against float64."""
    w = torch.randn(a.shape[0])
    a, b = (t.detach().requires_grad_(want) for t, want in zip((a, b), wanted, strict=True))
    norms = difference_sqnorm(a, b)
    assert norms.dtype == torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    d = a.detach().cpu().double() - b.detach().cpu().double()
    close(norms, torch.stack([(row * row).sum() for row in d]) if len(d) else d.new_zeros(0))
    norms.backward(w.to(norms))
    expected = 2 * w.to(norms).cpu().double().view(-1, *[1] * (d.ndim - 1)) * d
    for t, want, sign in zip((a, b), wanted, (1, -1), strict=True):
        if want:
            assert t.grad.dtype == t.dtype
            close(t.grad, sign * expected)
        else:
            assert t.grad is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype):
    check(*torch.randn(2, 3, 3, 9, 7).to(device, dtype), close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape):
    check(*torch.randn(2, *shape).to(device), close)


@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
def test_layouts(device, close, lay, a_layout, b_layout):
    a, b = torch.randn(2, 3, 4, 6, 5).to(device)
    check(lay(a, a_layout), lay(b, b_layout), close)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["a", "b"])
def test_one_gradient(device, close, wanted):
    check(*torch.randn(2, 3, 33).to(device), close, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(device, close, dtype):
    a, b = torch.randn(2, 3, 33).to(device)
    check(a.bfloat16(), b.to(dtype), close)
    check(b.to(dtype), a.bfloat16(), close)


def test_expanded_operand_and_weight(device, close):
    a = torch.randn(3, 4, 6, device=device, requires_grad=True)
    b = torch.randn(3, 1, 6, device=device).expand(3, 4, 6)
    difference_sqnorm(a, b).sum().backward()
    close(a.grad, 2 * (a.detach().double() - b.double()))


def test_nan_stays_in_its_sample(device, close):
    a, b = torch.randn(2, 3, 33).to(device)
    a[1, 7] = torch.nan
    check(a, b, close)
    assert difference_sqnorm(a, b).isnan().tolist() == [False, True, False]


def test_low_precision_accumulates_in_float32(device):
    a = torch.full((1, 4096), 8.0, dtype=torch.float16, device=device)
    assert difference_sqnorm(a, -a).item() == 4096 * 256  # beyond the range of float16


def test_low_precision_is_widened_before_the_difference_also_under_create_graph(device, close):
    """-40,000 - 40,000 is infinite in float16; the gradient, weighted by 1e-4, is 16."""
    a = torch.full((2, 5), 40_000.0, dtype=torch.float16, device=device, requires_grad=True)
    b = (-a).detach().requires_grad_()
    w = torch.tensor([1e-4, -1e-4], device=device)
    for create_graph in (False, True):
        grad_a, grad_b = grad(difference_sqnorm(a, b), (a, b), w, create_graph=create_graph)
        expected = 2 * w.double().view(2, 1).cpu() * torch.full((2, 5), 80_000.0, dtype=torch.float64)
        close(grad_a, expected)
        close(grad_b, -expected)


def test_gradcheck(device):
    a, b = (t.requires_grad_() for t in torch.randn(2, 2, 3, 4, dtype=torch.float64).to(device))
    assert gradcheck(difference_sqnorm, (a, b))
    assert gradgradcheck(difference_sqnorm, (a, b))


def test_gradgradcheck_in_a_network(device):
    def penalty(x, weight, b):
        return difference_sqnorm(torch.tanh(F.conv2d(torch.tanh(x), weight)), b).log1p()

    x, weight, b = (
        torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()
        for shape in [(2, 2, 4, 4), (2, 2, 3, 3), (2, 2, 2, 2)]
    )
    atomics = 1e-12  # of cuDNN, in the weight's gradient
    assert gradcheck(penalty, (x, weight, b), nondet_tol=atomics)
    assert gradgradcheck(penalty, (x, weight, b), nondet_tol=atomics, fast_mode=True)


def test_curvature_penalty_of_a_network(device, close):
    """Parameter gradients of ||g(x + h z) - g(x)||^2 against the same written out in torch, on the CPU."""
    torch.manual_seed(0)
    parameters = [torch.randn(4, 3, 3, 3, dtype=torch.float64) / 3, torch.randn(5, 4, dtype=torch.float64)]
    x, y = torch.rand(3, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 3, 4])

    def gradients(step, sqnorm, device):
        w, v = (p.to(device).requires_grad_() for p in parameters)

        def input_gradient(x):
            x = x.requires_grad_()
            logits = F.linear(F.softplus(F.conv2d(x, w)).mean((2, 3)), v)
            loss = F.cross_entropy(logits, y.to(device), reduction="sum")
            return grad(loss, x, create_graph=True)[0]

        x0 = x.to(device)
        g = input_gradient(x0.clone())
        penalty = sqnorm(input_gradient(step(x0, g, 0.7)), g)
        return grad((penalty * torch.tensor([1.0, 2.0, 3.0]).to(device)).sum(), (w, v))

    def plain_step(x, g, h):
        z = g.detach().sign().flatten(1)
        return x + (h * z / z.norm(dim=1, keepdim=True)).view_as(x)

    expected = gradients(plain_step, lambda a, b: ((a - b) ** 2).sum((1, 2, 3)), "cpu")
    for actual, wanted in zip(gradients(direction_step, difference_sqnorm, device), expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("mode", ["dual", "jvp"])
def test_forward_mode_is_right_or_refused(device, close, mode):
    a, b, tangent = torch.randn(3, 3, 5, dtype=torch.float64).to(device)

    def derivative():
        if mode == "jvp":
            return torch.func.jvp(lambda a: difference_sqnorm(a, b), (a,), (tangent,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(difference_sqnorm(forward_ad.make_dual(a, tangent), b)).tangent

    if os.environ["FASTCURE_BACKEND"] == "triton":
        with pytest.raises(NotImplementedError, match="forward-mode"):
            derivative()
    else:
        close(derivative(), (2 * (a - b) * tangent).sum(1))
