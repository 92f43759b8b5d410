"""The double backward of normalised rows against autograd of the definition in float64."""

import pytest
import torch
from fastcure_kernels import row_norm

EPS = 0.1


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """All tests of this file."""


def operands(shape, dtype, device):
    torch.manual_seed(0)
    v, w, x = (torch.randn(shape).to(device, dtype) for _ in range(3))
    wide = (x + 0.5).to(dtype if dtype == torch.float64 else torch.float32)
    m = wide.mean(1, keepdim=True)
    return v, w, wide.to(dtype), m, ((wide - m).square().mean(1, keepdim=True) + EPS).rsqrt()


def truth(v, w, x):
    v, w, x = (t.detach().cpu().double() for t in (v, w, x))
    w, x = w.requires_grad_(), x.requires_grad_()
    centred = x - x.mean(1, keepdim=True)
    x_hat = centred * (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    (q,) = torch.autograd.grad(x_hat, x, w, create_graph=True)
    return torch.autograd.grad(q, (w, x), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (130, 17), (3, 192), (2, 2500), (2, 8193), (0, 4)], ids=str)
def test_values(device, close, shape, dtype):
    v, w, x, m, r = operands(shape, dtype, device)
    for ours, theirs in zip(row_norm.double_backward(v, w, x, m, r), truth(v, w, x), strict=True):
        close(ours, theirs, looser=2)  # a difference of sums


def test_any_layout(device, close):
    v, w, x, m, r = operands((6, 40), torch.float32, device)
    v, w, x = (t.T.contiguous().T for t in (v, w, x))
    for ours, theirs in zip(row_norm.double_backward(v, w, x, m, r), truth(v, w, x), strict=True):
        close(ours, theirs, looser=2)


def test_what_is_not_a_number_stays_in_its_row(device):
    v, w, x, m, r = operands((4, 9), torch.float32, device)
    v[1, 3] = torch.nan
    for found in row_norm.double_backward(v, w, x, m, r):
        assert found.isnan().any(1).cpu().tolist() == [False, True, False, False]
