"""Random starts against the definition of a uniform distribution in a ball, in every dtype and layout."""

import math

import pytest
import torch
from torch import Tensor

from fastcure.attacks._random_start import uniform_in_ball

EVERYWHERE = (-math.inf, math.inf)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(norm: str, shape: tuple[int, ...], eps: float | Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    return uniform_in_ball(torch.zeros(shape, dtype=dtype), eps, norm, EVERYWHERE, seeded(seed))


def distance_from_uniform(values: Tensor, lower: float, upper: float) -> float:
    """The Kolmogorov-Smirnov statistic times sqrt(n): above 2.2 once in 8,000 uniform samples."""
    expected = (values.double().sort().values - lower) / (upper - lower)
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return float(torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()) * math.sqrt(len(values))


def test_linf_noise_is_uniform_in_each_pixel_and_independent() -> None:
    count, eps = 100_000, 0.3
    y = noise("linf", (count, 3), eps, 9, torch.float32)
    assert y.abs().max() <= eps
    for pixel in y.T:
        assert distance_from_uniform(pixel, -eps, eps) < 2.2
    correlation = torch.corrcoef(torch.cat([y, y.roll(1, 0)], 1).T)  # pixels, and those of the sample before
    assert (correlation - torch.eye(6)).abs().max() < 5 / math.sqrt(count)


@pytest.mark.parametrize("N", [1, 2, 3, 50])
def test_l2_noise_has_uniform_volumes_and_directions(N: int) -> None:
    count, eps = 50_000, 0.5
    y = noise("l2", (count, N), eps, 10, torch.float32).double()
    radius = y.norm(dim=1) / eps
    assert radius.max() <= 1 + 1e-6
    assert distance_from_uniform(radius**N, 0, 1) < 2.2
    # A ball's covariance is eps^2 / (N + 2) times the identity.
    second = y.T @ y / count * (N + 2) / eps**2
    assert (second - torch.eye(N)).abs().max() < 8 / math.sqrt(count)
    assert y.mean(0).abs().max() < 5 * eps / math.sqrt((N + 2) * count)
    if N == 2:
        assert distance_from_uniform(torch.atan2(y[:, 0], y[:, 1]), -math.pi, math.pi) < 2.2


@NORMS
def test_the_result_is_clipped_to_the_box_and_detached(norm: str) -> None:
    x = torch.rand(3, 33, requires_grad=True)
    y = uniform_in_ball(x, 5.0, norm, (0.2, 0.7), seeded(5))
    assert not y.requires_grad
    assert (y.min(), y.max()) == (torch.tensor(0.2), torch.tensor(0.7))


@NORMS
def test_nan_stays_nan(norm: str) -> None:
    x = torch.rand(3, 33)
    x[1, 4] = torch.nan
    assert uniform_in_ball(x, 0.1, norm, (0.0, 1.0)).isnan().nonzero().tolist() == [[1, 4]]


@NORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_has_the_same_points(norm: str, dtype: torch.dtype) -> None:
    single, other = (noise(norm, (3, 3, 9, 7), 0.25, 2, kind) for kind in (torch.float32, dtype))
    assert other.dtype == dtype
    assert torch.equal(other, single.to(dtype))


@NORMS
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_every_layout_has_the_same_points(norm: str, layout: str) -> None:
    x = torch.rand(3, 4, 6, 6)
    laid = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "sliced": torch.stack([x, x], -1)[..., 0],
    }[layout]
    y = uniform_in_ball(laid, 0.1, norm, (0.0, 1.0), seeded(3))
    assert torch.equal(y, uniform_in_ball(x, 0.1, norm, (0.0, 1.0), seeded(3)))
    assert y.stride() == torch.empty_like(laid).stride()


@NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_sample_has_its_radius(norm: str, dtype: torch.dtype) -> None:
    eps = torch.tensor([0.5, 0.0, 3.0], dtype=dtype)
    unit = noise(norm, (3, 33), 1.0, 4, torch.float32)
    torch.testing.assert_close(noise(norm, (3, 33), eps, 4, torch.float32), (eps[:, None] * unit).float())
    torch.testing.assert_close(noise(norm, (3, 33), eps[2], 4, torch.float32), 3 * unit)


@NORMS
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches_and_empty_samples(norm: str, shape: tuple[int, ...]) -> None:
    assert noise(norm, shape, 0.1, 0, torch.float32).shape == shape


@NORMS
def test_the_generator_or_torchs_default_is_drawn_from(norm: str) -> None:
    x = torch.rand(2, 33)

    def draw(generator: torch.Generator | None = None) -> Tensor:
        return uniform_in_ball(x, 0.3, norm, EVERYWHERE, generator)

    state = torch.get_rng_state()
    assert torch.equal(draw(seeded(6)), draw(seeded(6)))
    assert not torch.equal(draw(seeded(6)), draw(seeded(7)))
    assert torch.equal(torch.get_rng_state(), state)
    first = draw()
    assert not torch.equal(first, draw())
    torch.set_rng_state(state)
    assert torch.equal(first, draw())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@NORMS
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_a_generator_of_either_device_serves_without_a_wait(norm: str, device: str) -> None:
    x = torch.rand(4, 3, 32, 32)
    on_cuda, eps = x.cuda(), torch.full((4,), 0.1, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        runs = [
            uniform_in_ball(on_cuda, eps, norm, (0.0, 1.0), torch.Generator(device).manual_seed(1)) for _ in range(2)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(*runs)
    if device == "cpu":
        same = uniform_in_ball(x, 0.1, norm, (0.0, 1.0), seeded(1))
        torch.testing.assert_close(runs[0].cpu(), same, rtol=0, atol=1e-6)
