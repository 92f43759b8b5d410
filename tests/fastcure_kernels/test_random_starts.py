from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from fastcure_kernels import l2_start, linf_start
from fastcure_kernels.jit import kernel
from fastcure_kernels.philox import normal, philox, uniform

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(5,), (2, 7), (3, 3, 9, 7), (2, 16, 16), (2, 4099), (0, 5), (3, 0)]
LAYOUTS = ["contiguous", "channels_last", "batch_last", "sliced", "rows_apart"]
EVERYWHERE = (float("-inf"), float("inf"))
STARTS = pytest.mark.parametrize("start", [linf_start, l2_start])


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """All tests of this file."""


@kernel
def _numbers_kernel(uniform_ptr, normal_ptr, seed_ptr, counter_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    seed, counter = tl.load(seed_ptr), tl.load(counter_ptr + lanes)
    tl.store(uniform_ptr + lanes, tl.rand(seed, counter))
    tl.store(normal_ptr + lanes, tl.randn(seed, counter))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(start, shape, eps, seed, device, dtype=torch.float32):
    return start(torch.zeros(shape, dtype=dtype, device=device), eps, *EVERYWHERE, generator=seeded(seed))


def test_philox_gives_the_published_words():
    words = philox(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert [word.item() & 0xFFFFFFFF for word in words] == [0x6627E8D5, 0xE169C58D]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**62 + 12345, 2**63 - 1])
@pytest.mark.parametrize("first", [0, 2**31 - 128, 2**32 - 128, 2**40, 2**62])
def test_twin_gives_the_numbers_of_triton(triton_device, close, seed, first):
    device = triton_device
    seed = torch.tensor([seed], device=device)
    counter = first + torch.arange(256, device=device)
    u, n = uniform(seed, counter), normal(seed, counter)
    expected_u, expected_n = torch.full_like(u, torch.nan), torch.full_like(u, torch.nan)
    _numbers_kernel.launch((1,), expected_u, expected_n, seed, counter, BLOCK=256)
    assert torch.equal(u, expected_u)
    close(n, expected_n, looser=10)  # logarithm and cosine are approximate on a GPU


@STARTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_and_twin_draw_the_same(triton_device, close, monkeypatch, start, shape):
    x = torch.rand(shape, device=triton_device)
    y = start(x, 0.3, generator=seeded(1))
    monkeypatch.setenv("FASTCURE_BACKEND", "torch")
    twin = start(x.cpu(), 0.3, generator=seeded(1))
    if start is linf_start:
        assert torch.equal(y.cpu(), twin)
    close(y, twin, looser=10)


@STARTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_draw_the_same(device, close, start, dtype):
    y = noise(start, (3, 3, 9, 7), 0.25, 2, device, dtype)
    assert y.dtype == dtype
    wide = noise(start, (3, 3, 9, 7), 0.25, 2, device)
    close(y.float() if dtype == torch.float64 else y, wide)


@STARTS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_draw_in_memory_order(device, close, lay, start, layout):
    x = lay(torch.rand(3, 4, 6, 5, device=device), layout)
    y = start(x, 0.25, *EVERYWHERE, generator=seeded(3))
    assert y.stride() == x.clone().stride()
    samples = noise(start, (3, 120), 0.25, 3, device)
    order = (0, 2, 3, 1) if layout == "channels_last" else (0, 1, 2, 3)
    drawn = samples.view([x.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
    close(y, x + drawn)


@STARTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_radii_for_each_sample(device, close, start, dtype):
    eps = torch.tensor([0.1, 0.0, 3.0], dtype=dtype, device=device)
    unit = noise(start, (3, 33), 1.0, 4, device, dtype)
    close(noise(start, (3, 33), eps, 4, device, dtype), eps[:, None] * unit)
    close(noise(start, (3, 33), eps[2], 4, device, dtype), 3 * unit)


@STARTS
def test_bounds_and_nan(device, start):
    x = torch.rand(3, 33, device=device)
    x[1, 4] = torch.nan
    y = start(x, 5.0, 0.2, 0.7, generator=seeded(5))
    assert y.isnan().nonzero().tolist() == [[1, 4]]
    values = y[~y.isnan()]
    assert values.min() == torch.tensor(0.2)
    assert values.max() == torch.tensor(0.7)


@STARTS
def test_generators(device, start):
    x = torch.rand(2, 33, device=device)

    def draw(generator=None):
        return start(x, 0.3, generator=generator)

    assert torch.equal(draw(seeded(6)), draw(seeded(6)))
    assert not torch.equal(draw(seeded(6)), draw(seeded(7)))
    generator = seeded(6)
    assert not torch.equal(draw(generator), draw(generator))
    torch.manual_seed(8)
    first = draw()
    assert not torch.equal(first, draw())
    torch.manual_seed(8)
    assert torch.equal(first, draw())


@STARTS
def test_result_is_detached(device, start):
    assert not start(torch.rand(2, 33, device=device, requires_grad=True), 0.3).requires_grad


def test_linf_noise_is_uniform(monkeypatch):
    monkeypatch.setenv("FASTCURE_BACKEND", "torch")
    count, eps = 400_000, 0.3
    y = noise(linf_start, (4, count // 4), eps, 9, "cpu").double()
    assert y.abs().max() <= eps
    assert abs(y.mean()) < 5 * eps / math.sqrt(3 * count)
    assert y.square().mean().item() == pytest.approx(eps**2 / 3, rel=5 / math.sqrt(count))
    histogram = torch.histc(y, 20, -eps, eps)
    chi_square = ((histogram - count / 20) ** 2 / (count / 20)).sum()
    assert chi_square < 19 + 5 * math.sqrt(2 * 19)
    assert abs(torch.corrcoef(torch.stack([y.flatten()[:-1], y.flatten()[1:]]))[0, 1]) < 5 / math.sqrt(count)


def test_l2_noise_is_uniform_in_the_ball(monkeypatch):
    monkeypatch.setenv("FASTCURE_BACKEND", "torch")
    count, N, eps = 100_000, 3, 0.5
    y = noise(l2_start, (count, N), eps, 10, "cpu").double()
    radius = y.norm(dim=1) / eps
    assert radius.max() <= 1 + 1e-6
    volumes = torch.histc(radius**N, 20, 0, 1)  # uniform volumes
    assert ((volumes - count / 20) ** 2 / (count / 20)).sum() < 19 + 5 * math.sqrt(2 * 19)
    assert y.mean(0).abs().max() < 5 * eps / math.sqrt((N + 2) * count)
    covariance = torch.cov(y.T) * (N + 2) / eps**2  # of the uniform ball: the identity
    assert (covariance - torch.eye(N)).abs().max() < 5 * 1.5 / math.sqrt(count)
