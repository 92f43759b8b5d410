import pytest
import torch
from fastcure_kernels import direction, direction_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(5,), (2, 7), (3, 3, 9, 7), (2, 16, 16), (2, 4099), (0, 5), (3, 0)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]
pytestmark = pytest.mark.usefixtures("guarded")


def expected_direction(grad):
    grad = grad.double().cpu()
    rows = []
    for g in grad:
        count = (g != 0).sum()  # a NaN counts, and its own quotient below is NaN
        sign = torch.where(g == 0, 0.0, g / g.abs())
        rows.append(sign / count.double().sqrt() if count else sign)
        if g.isnan().any():
            rows[-1] = torch.full_like(g, torch.nan)
    return torch.stack(rows) if rows else grad


def expected_step(x, grad, h):
    h = torch.as_tensor(h, dtype=torch.float64).cpu().expand(x.shape[0])
    return x.double().cpu() + h.view(-1, *[1] * (x.ndim - 1)) * expected_direction(grad)


def samples(shape, dtype, device):
    """Inputs smaller than the step, and gradients with zeros."""
    x = (torch.randn(shape) / 20).to(device, dtype)
    grad = torch.where(torch.rand(shape) < 0.2, 0.0, torch.randn(shape)).to(device, dtype)
    return x, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_direction_has_unit_norm(device, close, dtype):
    _, grad = samples((4, 3, 5, 5), dtype, device)
    z = direction(grad)
    assert z.dtype == dtype
    close(z, expected_direction(grad))
    close(torch.linalg.vector_norm(z.flatten(1).double(), dim=1).to(dtype), torch.ones(4))


def test_half_precision_counts_beyond_its_range(device, close):
    """70,000 entries: more than float16 can count, fewer than an ImageNet image has."""
    grad = torch.full((1, 70_000), -1.0, dtype=torch.float16, device=device)
    x = torch.zeros_like(grad)
    close(direction(grad), torch.full((1, 70_000), -(70_000**-0.5)))
    close(direction_step(x, grad, 100.0), torch.full((1, 70_000), -100.0 * 70_000**-0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(device, close, dtype):
    x, grad = samples((3, 3, 9, 7), dtype, device)
    y = direction_step(x, grad, 1.3)
    assert y.dtype == dtype
    close(y, expected_step(x, grad, 1.3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(device, close, shape):
    x, grad = samples(shape, torch.float32, device)
    close(direction_step(x, grad, 1.3), expected_step(x, grad, 1.3))


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(device, close, lay, x_layout, grad_layout):
    x, grad = samples((3, 4, 6, 5), torch.float32, device)
    x, grad = lay(x, x_layout), lay(grad, grad_layout)
    y = direction_step(x, grad, 1.3)
    assert y.stride() == x.clone().stride()
    close(y, expected_step(x, grad, 1.3))


def test_expanded_operands(device, close):
    x, grad = samples((3, 1, 6), torch.float32, device)
    x, grad = x.expand(3, 4, 6), grad[:1].expand(3, 4, 6)
    close(direction_step(x, grad, 1.3), expected_step(x, grad, 1.3))


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_mixed_dtypes(device, close, grad_dtype):
    x, _ = samples((3, 33), torch.bfloat16, device)
    _, grad = samples((3, 33), grad_dtype, device)
    y = direction_step(x, grad, 1.3)
    assert y.dtype == torch.bfloat16
    close(y, expected_step(x, grad, 1.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("h", [0.1, torch.tensor(0.1), torch.tensor([0.1, -2.0, 0.0])], ids=["float", "0-dim", "B"])
def test_step_lengths(device, close, dtype, h):
    x, grad = samples((3, 33), dtype, device)
    h = h.to(device, dtype) if isinstance(h, torch.Tensor) else h
    close(direction_step(x, grad, h), expected_step(x, grad, h))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gradient_does_not_move(device, close, dtype):
    x, grad = samples((3, 33), dtype, device)
    grad[1] = 0
    y = direction_step(x, grad, 1.3)
    assert torch.equal(y[1], x[1])
    close(y, expected_step(x, grad, 1.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_gradient_fills_its_sample_alone(device, close, dtype):
    x, grad = samples((3, 33), dtype, device)
    grad[1, 5] = torch.nan
    y = direction_step(x, grad, 1.3)
    assert y[1].isnan().all()
    close(y, expected_step(x, grad, 1.3))


def test_extreme_gradients_count_as_others(device, close):
    x, grad = samples((3, 33), torch.float32, device)
    grad[0], grad[1, 4], grad[2, 3] = 1e-40, torch.inf, -torch.inf
    expected = expected_step(x, grad.clamp(-1, 1), 1.3)
    close(direction_step(x, grad, 1.3), expected)


def test_result_is_detached(device):
    x, grad = samples((3, 33), torch.float32, device)
    h = torch.tensor(1.3, device=device, requires_grad=True)
    assert not direction_step(x.requires_grad_(), grad.requires_grad_(), h).requires_grad
    assert not direction(grad).requires_grad
