import pytest
import torch
from fastcure_kernels import l2_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(5,), (2, 7), (3, 3, 9, 7), (2, 16, 16), (2, 4099), (0, 5), (3, 0)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]
EVERYWHERE = (float("-inf"), float("inf"))
pytestmark = pytest.mark.usefixtures("guarded")


def expected_step(adv, grad, x, step_size, eps, lower=0.0, upper=1.0):
    adv, grad, x = (t.double().cpu() for t in (adv, grad, x))
    step_size, eps = (torch.as_tensor(v, dtype=torch.float64).cpu().expand(len(x)) for v in (step_size, eps))
    rows = []
    for a, g, c, s, e in zip(adv, grad, x, step_size, eps, strict=True):
        if (g != 0).any():
            a = a + s * g / (g * g).sum().sqrt()
        d = a - c
        length = (d * d).sum().sqrt()
        rows.append(c + (d * e / length if length > e or length.isnan() else d))
    return torch.stack(rows).clamp(lower, upper) if rows else x


def samples(shape, dtype, device):
    """Images, points in the ball about them, and gradients with zeros."""
    x = torch.rand(shape)
    d = torch.randn(shape)
    adv = x + 0.3 * d / max(d[:1].norm(), 1e-9)
    grad = torch.where(torch.rand(shape) < 0.2, 0.0, torch.randn(shape))
    return (t.to(device, dtype) for t in (adv, grad, x))


@pytest.mark.parametrize("eps", [0.4, 5.0], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype, eps):
    adv, grad, x = samples((3, 3, 9, 7), dtype, device)
    y = l2_step(adv, grad, x, 0.5, eps)
    assert y.dtype == dtype
    close(y, expected_step(adv, grad, x, 0.5, eps))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape):
    adv, grad, x = samples(shape, torch.float32, device)
    close(l2_step(adv, grad, x, 0.5, 0.4), expected_step(adv, grad, x, 0.5, 0.4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts(device, close, lay, layout, other):
    adv, grad, x = samples((3, 4, 6, 5), torch.float32, device)
    adv, grad, x = lay(adv, layout), lay(grad, other), lay(x, layout)
    y = l2_step(adv, grad, x, 0.5, 0.4)
    assert y.stride() == adv.clone().stride()
    close(y, expected_step(adv, grad, x, 0.5, 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.0, 2.0])], ids=["float", "0-dim", "B"])
def test_parameters(device, close, dtype, value):
    adv, grad, x = samples((3, 33), dtype, device)
    value = value.to(device, dtype) if isinstance(value, torch.Tensor) else value
    close(l2_step(adv, grad, x, value, 0.4), expected_step(adv, grad, x, value, 0.4))
    close(l2_step(adv, grad, x, 0.1, value), expected_step(adv, grad, x, 0.1, value))


@pytest.mark.parametrize("bounds", [(0, 1), (0.1, 0.7), EVERYWHERE], ids=str)
def test_bounds(device, close, bounds):
    adv, grad, x = samples((3, 33), torch.float64, device)
    close(l2_step(adv, grad, x, -0.5, 0.4, *bounds), expected_step(adv, grad, x, -0.5, 0.4, *bounds))


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
def test_gradients_of_extreme_size(device, close, dtype, size):
    adv = x = torch.zeros(2, 40, dtype=dtype, device=device)
    grad = (size * torch.randint(-3, 4, (2, 40)).double() / 3).to(device, dtype)
    close(l2_step(adv, grad, x, 0.5, 1.0, *EVERYWHERE), expected_step(adv, grad, x, 0.5, 1.0, *EVERYWHERE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradient_does_not_move(device, dtype):
    adv, grad, x = samples((3, 33), dtype, device)
    grad[1], adv[1] = 0, x[1]
    y = l2_step(adv, grad, x, 0.5, 0.4)
    assert torch.equal(y[1], x[1])
    assert torch.equal(l2_step(x, 0 * grad, x, 0.5, 0.0), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["adv", "grad", "x"])
def test_nan_fills_its_sample_alone(device, dtype, operand):
    operands = list(samples((3, 33), dtype, device))
    operands[operand][1, 4] = torch.nan
    y = l2_step(*operands, 0.5, 0.4)
    assert y.isnan().sum(1).tolist() == [0, 33, 0]


def test_infinite_gradient_fills_its_sample_with_nan(device):
    adv, grad, x = samples((3, 33), torch.float32, device)
    grad[1, 4] = torch.inf
    assert l2_step(adv, grad, x, 0.5, 0.4).isnan().sum(1).tolist() == [0, 33, 0]


def test_result_is_detached(device):
    adv, grad, x = (t.requires_grad_() for t in samples((3, 33), torch.float32, device))
    assert not l2_step(adv, grad, x, 0.5, 0.4).requires_grad
