"""Kernels and their references against float64 formulas on random shapes, layouts, types and values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastcure_kernels import difference_sqnorm, direction_step, l2_step, linf_step
from fuzzing import TRIED, cases
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("guarded")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = ["contiguous", "batch_last", "sliced", "rows_apart"]


@st.composite
def operands(draw: Any) -> tuple[Callable[..., list[Tensor]], torch.dtype]:
    """Makes n tensors of one shape, each in a layout of its own; a few values are zero, and perhaps one is NaN."""
    shape = (draw(st.integers(0, 4)), *draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    dtype, seed, nan = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**20)), draw(st.booleans())

    def tensors(count: int, device: str, lay: Callable[[Tensor, str], Tensor]) -> list[Tensor]:
        torch.manual_seed(seed)
        made = [torch.where(torch.rand(shape) < 0.2, 0.0, torch.randn(shape)) for _ in range(count)]
        if nan and made[0].numel():
            made[1].view(-1)[seed % made[1].numel()] = torch.nan
        return [lay(t.to(device, dtype), layout) for t, layout in zip(made, layouts, strict=False)]

    return tensors, dtype


lengths = st.floats(0.01, 4.0)


def one_each(values: list[float], x: Tensor) -> Tensor:
    """One a sample, (B,)."""
    return torch.tensor(values, dtype=torch.float64, device=x.device)[: len(x)]


def columns(values: list[float], x: Tensor) -> Tensor:
    """One a sample, (B, 1, ...)."""
    return one_each(values, x).reshape(-1, *[1] * (x.dim() - 1))


def norm(t: Tensor) -> Tensor:
    return t.flatten(1).norm(dim=1).reshape(-1, *[1] * (t.dim() - 1))


def sign(g: Tensor) -> Tensor:
    return torch.where(g.isnan(), g, g.sign())


@cases(20)
@given(operands(), st.lists(lengths, min_size=4, max_size=4))
def test_direction_step(device: str, close: Any, lay: Any, made: Any, h: list[float]) -> None:
    x, grad = made[0](2, device, lay)
    wide, g = x.double().cpu(), grad.double().cpu()
    z = sign(g) / norm(sign(g)).masked_fill(norm(sign(g)) == 0, 1.0)
    out = direction_step(x, grad, one_each(h, x))
    close(out, wide + columns(h, wide) * z, looser=2.0)
    TRIED["direction_step, kernel and reference"] += 1


@cases(20)
@given(operands())
def test_difference_sqnorm(device: str, close: Any, lay: Any, made: Any) -> None:
    a, b = (t.detach().requires_grad_() for t in made[0](2, device, lay))
    d = a.detach().double().cpu() - b.detach().double().cpu()
    norms = difference_sqnorm(a, b)
    close(norms, d.square().flatten(1).sum(1), looser=2.0)
    weights = torch.linspace(0.5, 2.0, len(d), dtype=torch.float64)
    norms.backward(weights.to(norms))
    expected = 2 * weights.reshape(-1, *[1] * (d.dim() - 1)) * d
    close(a.grad, expected, looser=2.0)
    close(b.grad, -expected, looser=2.0)
    TRIED["difference_sqnorm and its gradient, kernel and reference"] += 1


@cases(20)
@given(operands(), st.lists(lengths, min_size=4, max_size=4), lengths)
def test_linf_step(device: str, close: Any, lay: Any, made: Any, eps: list[float], step: float) -> None:
    adv, grad, x = made[0](3, device, lay)
    a, g, c = (t.double().cpu() for t in (adv, grad, x))
    r = columns(eps, c)
    moved = a + step * sign(g)
    moved = torch.where(moved.isnan(), moved, moved.minimum(c + r).maximum(c - r))
    close(linf_step(adv, grad, x, step, one_each(eps, x)), moved.clamp(0, 1), looser=4.0)
    TRIED["linf_step, kernel and reference"] += 1


@cases(20)
@given(operands(), st.lists(lengths, min_size=4, max_size=4), lengths)
def test_l2_step(device: str, close: Any, lay: Any, made: Any, eps: list[float], step: float) -> None:
    adv, grad, x = made[0](3, device, lay)
    a, g, c = (t.double().cpu() for t in (adv, grad, x))
    d = a + step * g / norm(g).masked_fill(norm(g) == 0, 1.0) - c
    r, length = columns(eps, c), norm(d)
    d = torch.where((length > r) | length.isnan(), d * r / length, d)
    close(l2_step(adv, grad, x, step, one_each(eps, x)), (c + d).clamp(0, 1), looser=4.0)
    TRIED["l2_step, kernel and reference"] += 1
