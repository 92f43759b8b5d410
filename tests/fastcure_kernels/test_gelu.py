"""The double backward of GELU against autograd of its definition in float64."""

import math

import pytest
import torch
from fastcure_kernels import gelu

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """All tests of this file."""


def truth(v, w, x, approximate):
    v, w, x = (t.detach().cpu().double() for t in (v, w, x))
    w, x = w.requires_grad_(), x.requires_grad_()
    if approximate == "none":
        y = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    else:
        y = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    (q,) = torch.autograd.grad(y, x, w, create_graph=True)
    return torch.autograd.grad(q, (w, x), v)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_values(device, close, lay, layout, dtype, approximate):
    torch.manual_seed(0)
    v, w, x = (lay(2 * torch.randn(3, 7, 11, 5).to(device, dtype), layout) for _ in range(3))
    found = gelu.double_backward(v, w, x, approximate)
    assert all(t.dtype == dtype for t in found)
    for ours, theirs in zip(found, truth(v, w, x, approximate), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_far_from_zero_and_not_a_number(device, approximate):
    x = torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4, math.nan]).to(device)
    one = torch.ones_like(x)
    u, e = gelu.double_backward(one, one, x, approximate)
    assert u[:5].cpu().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert e[[0, 1, 3, 4]].cpu().tolist() == [0.0] * 4
    assert u[5].isnan()
    assert e[5].isnan()


@pytest.mark.parametrize("shape", [(0, 3), (1,), ()], ids=str)
def test_small_shapes(device, shape):
    x = torch.full(shape, 0.3, device=device)
    for ours, theirs in zip(gelu.double_backward(x, x, x), truth(x, x, x, "none"), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, atol=0, rtol=1e-6)
