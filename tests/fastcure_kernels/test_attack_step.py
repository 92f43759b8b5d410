"""The steps of attacks, in L-infinity and in L2, against their definitions in float64."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from fastcure_kernels import l2_step, linf_step
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(5,), (2, 7), (3, 3, 9, 7), (2, 16, 16), (2, 1025), (2, 4099), (0, 5), (3, 0)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]
EVERYWHERE = (float("-inf"), float("inf"))
pytestmark = pytest.mark.usefixtures("guarded")


class Step(NamedTuple):
    run: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    size: float
    eps: float
    """Some of the `samples` lie outside of this ball."""

    def samples(self, shape, dtype, device):
        """Points in and out of the ball about images, gradients with zeros, and the images."""
        x, d = torch.rand(shape), torch.randn(shape)
        adv = x + (0.3 * d / max(d[:1].norm(), 1e-9) if self.run is l2_step else 0.1 * d.clamp(-1, 1))
        grad = torch.where(torch.rand(shape) < 0.2, 0.0, torch.randn(shape))
        return [t.to(device, dtype) for t in (adv, grad, x)]

    def check(self, close, operands, *parameters):
        y = self.run(*operands, *parameters)
        close(y, self.truth(*operands, *parameters))
        return y


def wide(adv, grad, x, step_size, eps):
    """Operands, and parameters (B, 1, ...), in float64."""
    rows = (torch.as_tensor(v, dtype=torch.float64).cpu().expand(len(x)) for v in (step_size, eps))
    return [t.double().cpu() for t in (adv, grad, x)] + [v.view(-1, *[1] * (x.ndim - 1)) for v in rows]


def linf_truth(adv, grad, x, step_size, eps, lower=0.0, upper=1.0):
    adv, grad, x, step_size, eps = wide(adv, grad, x, step_size, eps)
    moved = adv + step_size * torch.where(grad == 0, 0.0, grad / grad.abs())
    moved = torch.where(moved > x + eps, x + eps, torch.where(moved < x - eps, x - eps, moved))
    return torch.where(moved > upper, upper, torch.where(moved < lower, lower, moved))


def l2_truth(adv, grad, x, step_size, eps, lower=0.0, upper=1.0):
    rows = []
    for a, g, c, s, e in zip(*wide(adv, grad, x, step_size, eps), strict=True):
        if (g != 0).any():
            a = a + s * g / (g * g).sum().sqrt()
        d = a - c
        length = (d * d).sum().sqrt()
        rows.append(c + (d * e / length if length > e or length.isnan() else d))
    return torch.stack(rows).clamp(lower, upper) if rows else x


LINF, L2 = Step(linf_step, linf_truth, 0.03, 0.07), Step(l2_step, l2_truth, 0.5, 0.4)
both = pytest.mark.parametrize("step", [LINF, L2], ids=["linf", "l2"])


@pytest.mark.parametrize("step", [LINF, L2, L2._replace(eps=5.0)], ids=["linf", "l2-outside", "l2-inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype, step):
    assert step.check(close, step.samples((3, 3, 9, 7), dtype, device), step.size, step.eps).dtype == dtype


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape, step):
    step.check(close, step.samples(shape, torch.float32, device), step.size, step.eps)


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(device, close, lay, layout, other, step):
    adv, grad, x = step.samples((3, 4, 6, 5), torch.float32, device)
    adv, grad, x = lay(adv, layout), lay(grad, other), lay(x, layout)
    assert step.check(close, (adv, grad, x), step.size, step.eps).stride() == adv.clone().stride()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [1.0, torch.tensor(1.0), torch.tensor([1.0, 0.0, 5.0])], ids=["float", "0-dim", "B"])
def test_parameters(device, close, dtype, value, step):
    operands = step.samples((3, 33), dtype, device)
    value = value.to(device, dtype) if isinstance(value, Tensor) else value
    step.check(close, operands, step.size * value, step.eps)
    step.check(close, operands, step.size / 4, step.eps * value)


@both
@pytest.mark.parametrize("bounds", [(0, 1), (0.1, 0.7), (-0.3, 2.5), EVERYWHERE], ids=str)
def test_bounds(device, close, bounds, step):
    for size in (0.3, -0.5):
        step.check(close, step.samples((3, 33), torch.float64, device), size, 0.7, *bounds)


@both
def test_negative_step_descends(device, close, step):
    step.check(close, step.samples((3, 33), torch.float32, device), -step.size, step.eps)


@both
def test_result_is_detached(device, step):
    operands = [t.requires_grad_() for t in step.samples((3, 33), torch.float32, device)]
    assert not step.run(*operands, step.size, step.eps).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_on_in_linf(device, dtype):
    adv, grad, x = LINF.samples((3, 33), dtype, device)
    adv[0, 3] = grad[1, 4] = x[2, 5] = torch.nan
    assert linf_step(adv, grad, x, 0.03, 0.07).isnan().nonzero().tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["adv", "grad", "x"])
def test_nan_fills_its_sample_alone_in_l2(device, dtype, operand):
    operands = L2.samples((3, 33), dtype, device)
    operands[operand][1, 4] = torch.nan
    assert l2_step(*operands, 0.5, 0.4).isnan().sum(1).tolist() == [0, 33, 0]


def test_infinite_gradient_fills_its_sample_with_nan(device):
    adv, grad, x = L2.samples((3, 33), torch.float32, device)
    grad[1, 4] = torch.inf
    assert l2_step(adv, grad, x, 0.5, 0.4).isnan().sum(1).tolist() == [0, 33, 0]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, 1e-40),  # subnormal
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.float32, 1e38),  # the norm exceeds the range
        (torch.float16, 6e-7),
        (torch.float16, 6e4),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e38),
        (torch.float64, 1e-100),
        (torch.float64, 1e100),
    ],
    ids=str,
)
def test_gradients_of_extreme_size_have_an_l2_norm(device, close, dtype, size):
    adv = x = torch.zeros(2, 40, dtype=dtype, device=device)
    grad = (size * torch.randint(-3, 4, (2, 40)).double() / 3).to(device, dtype)
    L2.check(close, (adv, grad, x), 0.5, 1.0, *EVERYWHERE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradient_does_not_move_in_l2(device, dtype):
    adv, grad, x = L2.samples((3, 33), dtype, device)
    grad[1], adv[1] = 0, x[1]
    assert torch.equal(l2_step(adv, grad, x, 0.5, 0.4)[1], x[1])
    assert torch.equal(l2_step(x, 0 * grad, x, 0.5, 0.0), x)
