import pytest
import torch
from fastcure_kernels import linf_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(5,), (2, 7), (3, 3, 9, 7), (2, 16, 16), (2, 1025), (0, 5), (3, 0)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]
pytestmark = pytest.mark.usefixtures("guarded")


def expected_step(adv, grad, x, step_size, eps, lower=0.0, upper=1.0):
    adv, grad, x = (t.double().cpu() for t in (adv, grad, x))
    step_size, eps = (
        torch.as_tensor(v, dtype=torch.float64).cpu().expand(len(x)).view(-1, *[1] * (x.ndim - 1))
        for v in (step_size, eps)
    )
    moved = adv + step_size * torch.where(grad == 0, 0.0, grad / grad.abs())
    moved = torch.where(moved > x + eps, x + eps, torch.where(moved < x - eps, x - eps, moved))
    return torch.where(moved > upper, upper, torch.where(moved < lower, lower, moved))


def samples(shape, dtype, device):
    """Images, points in and out of the ball about them, and gradients with zeros."""
    x = torch.rand(shape)
    adv = x + 0.2 * torch.rand(shape) - 0.1
    grad = torch.where(torch.rand(shape) < 0.2, 0.0, torch.randn(shape))
    return (t.to(device, dtype) for t in (adv, grad, x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype):
    adv, grad, x = samples((3, 3, 9, 7), dtype, device)
    y = linf_step(adv, grad, x, 0.03, 0.07)
    assert y.dtype == dtype
    close(y, expected_step(adv, grad, x, 0.03, 0.07))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape):
    adv, grad, x = samples(shape, torch.float32, device)
    close(linf_step(adv, grad, x, 0.03, 0.07), expected_step(adv, grad, x, 0.03, 0.07))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(device, close, lay, layout, other):
    adv, grad, x = samples((3, 4, 6, 5), torch.float32, device)
    adv, grad, x = lay(adv, layout), lay(grad, other), lay(x, layout)
    y = linf_step(adv, grad, x, 0.03, 0.07)
    assert y.stride() == adv.clone().stride()
    close(y, expected_step(adv, grad, x, 0.03, 0.07))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "value", [0.03, torch.tensor(0.03), torch.tensor([0.03, 0.0, 0.2])], ids=["float", "0-dim", "B"]
)
def test_parameters(device, close, dtype, value):
    adv, grad, x = samples((3, 33), dtype, device)
    value = value.to(device, dtype) if isinstance(value, torch.Tensor) else value
    close(linf_step(adv, grad, x, value, 0.07), expected_step(adv, grad, x, value, 0.07))
    close(linf_step(adv, grad, x, 0.01, value), expected_step(adv, grad, x, 0.01, value))


@pytest.mark.parametrize("bounds", [(0, 1), (0.1, 0.7), (-0.3, 2.5), (float("-inf"), float("inf"))], ids=str)
def test_bounds(device, close, bounds):
    adv, grad, x = samples((3, 33), torch.float64, device)
    close(linf_step(adv, grad, x, 0.3, 0.7, *bounds), expected_step(adv, grad, x, 0.3, 0.7, *bounds))


def test_negative_step_descends(device, close):
    adv, grad, x = samples((3, 33), torch.float32, device)
    close(linf_step(adv, grad, x, -0.03, 0.07), expected_step(adv, grad, x, -0.03, 0.07))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_on(device, close, dtype):
    adv, grad, x = samples((3, 33), dtype, device)
    adv[0, 3] = grad[1, 4] = x[2, 5] = torch.nan
    y = linf_step(adv, grad, x, 0.03, 0.07)
    assert y.isnan().nonzero().tolist() == [[0, 3], [1, 4], [2, 5]]


def test_result_is_detached(device):
    adv, grad, x = (t.requires_grad_() for t in samples((3, 33), torch.float32, device))
    assert not linf_step(adv, grad, x, 0.03, 0.07).requires_grad
