"""Batches: order, augmentation, and that seeded epochs repeat bit for bit."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcure.data import Augment, Loader, default_augmentation

N, C, H, W = 23, 3, 6, 5


def pixels() -> Tensor:
    """No zero, and every image different."""
    return torch.randint(1, 256, (N, C, H, W), dtype=torch.uint8, generator=seeded(0))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loader(batch_size: int = 4, seed: int = 1, **options: Any) -> Loader:
    return Loader(pixels(), torch.arange(N), batch_size, generator=seeded(seed), **options)


def epoch(batches: Loader) -> tuple[Tensor, Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [
        (4, False, [4] * 5 + [3]),
        (4, True, [4] * 5),
        (23, True, [23]),
        (11, False, [11, 11, 1]),
        (40, False, [23]),
        (1, True, [1] * 23),
    ],
)
def test_length_and_batch_sizes(batch_size: int, drop_last: bool, sizes: list[int]) -> None:
    batches = loader(batch_size, drop_last=drop_last)
    assert [len(y) for _, y in batches] == sizes
    assert len(batches) == len(sizes)


def test_unshuffled_batches_are_the_images_in_order() -> None:
    x, y = epoch(loader(shuffle=False))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert torch.equal(x, pixels().float() / 255)
    assert y.tolist() == list(range(N))


def test_pixels_are_float32_whatever_the_default_type() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert next(iter(loader()))[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_shuffling_keeps_pairs_and_changes_each_epoch() -> None:
    batches = loader()
    first, second = epoch(batches), epoch(batches)
    for x, y in (first, second):
        assert sorted(y.tolist()) == list(range(N))
        assert torch.equal(x, pixels()[y].float() / 255)
    assert first[1].tolist() != second[1].tolist()


@pytest.mark.parametrize("augment", [None, Augment(pad=2, flip=True)])
def test_seeded_epochs_repeat_bit_for_bit(augment: Augment | None) -> None:
    left, right, other = (loader(seed=seed, augment=augment) for seed in (1, 1, 2))
    for _ in range(3):
        (x, y), (x_again, y_again) = epoch(left), epoch(right)
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert epoch(left)[1].tolist() != epoch(other)[1].tolist()


def test_generator_state_resumes_and_is_drawn_when_iteration_starts() -> None:
    batches = loader(augment=Augment(pad=2, flip=True))
    epoch(batches)
    assert batches.generator is not None
    state = batches.generator.get_state()
    started = iter(batches)
    drawn = batches.generator.get_state()
    assert not torch.equal(state, drawn)
    expected = [next(started) for _ in range(3)]
    assert torch.equal(batches.generator.get_state(), drawn)  # however far the epoch goes
    resumed = loader(seed=99, augment=Augment(pad=2, flip=True))
    assert resumed.generator is not None
    resumed.generator.set_state(state)
    for (x, y), (x_again, y_again) in zip(expected, itertools.islice(resumed, 3), strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    assert torch.equal(resumed.generator.get_state(), drawn)


def test_without_a_generator_torch_seeds_and_evaluation_draws_nothing() -> None:
    batches = Loader(pixels(), torch.arange(N), 4)
    orders = []
    for _ in range(2):
        torch.manual_seed(3)
        orders.append(epoch(batches)[1].tolist())
    assert orders[0] == orders[1]
    state = torch.get_rng_state()
    epoch(Loader(pixels(), torch.arange(N), 4, shuffle=False))
    assert torch.equal(torch.get_rng_state(), state)


def candidates(image: Tensor, pad: int, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """Every augmented version of one image (C, H, W), by plain loops."""
    versions = {}
    for down, right in itertools.product(range(-pad, pad + 1), repeat=2):
        moved = torch.zeros_like(image)
        for row, column in itertools.product(range(H), range(W)):
            if 0 <= row - down < H and 0 <= column - right < W:
                moved[:, row, column] = image[:, row - down, column - right]
        versions[down, right, False] = moved
        if flip:
            versions[down, right, True] = moved.flip(2)
    return versions


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (1, False), (2, True)])
def test_augmented_images_are_shifts_and_mirrors(pad: int, flip: bool) -> None:
    versions = [candidates(image, pad, flip) for image in pixels().float() / 255]
    batches, seen = loader(augment=Augment(pad, flip)), set()
    for _ in range(12):
        for image, label in zip(*epoch(batches), strict=True):
            matches = [key for key, version in versions[label].items() if torch.equal(version, image)]
            assert len(matches) == 1
            seen.add(matches[0])
    assert seen == set(versions[0])  # 276 draws of at most 50 versions


def test_shifts_and_mirrors_are_even() -> None:
    x = torch.zeros(6000, 1, 3, 3, dtype=torch.uint8)
    x[:, 0, 1, 1] = 255
    batches = Loader(x, torch.zeros(6000, dtype=torch.int64), 100, generator=seeded(0), augment=Augment(pad=1))
    assert (epoch(batches)[0].mean(0)[0] - 1 / 9).abs().max() < 0.02
    x = torch.zeros(6000, 1, 1, 2, dtype=torch.uint8)
    x[..., 0] = 255
    batches = Loader(x, torch.zeros(6000, dtype=torch.int64), 100, generator=seeded(0), augment=Augment(flip=True))
    assert (epoch(batches)[0].mean(0) - 1 / 2).abs().max() < 0.03


def test_augmentation_leaves_the_images_alone() -> None:
    x = pixels()
    batches = Loader(x, torch.arange(N), 4, generator=seeded(0), augment=Augment(pad=2, flip=True))
    epoch(batches)
    assert torch.equal(x, pixels())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": pixels().float()}, r"x must be uint8 \(N, C, H, W\), got torch.float32"),
        ({"x": pixels()[0]}, r"x must be uint8 .* got torch.uint8 \(3, 6, 5\)"),
        ({"y": torch.arange(N - 1)}, r"y must be int64 \(23,\), got torch.int64 \(22,\)"),
        ({"y": torch.arange(N).int()}, r"y must be int64 \(23,\), got torch.int32"),
        ({"batch_size": 0}, "batch_size must be > 0, .* got 0"),
        ({"batch_size": 24, "drop_last": True}, "with drop_last <= 23 images, got 24"),
        ({"augment": Augment(pad=5)}, r"augment.pad must lie in 0\.\.4 for 6 x 5 images, got 5"),
        ({"augment": Augment(pad=-1)}, "augment.pad must lie in .* got -1"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    arguments = {"x": pixels(), "y": torch.arange(N), "batch_size": 4, **options}
    with pytest.raises(ValueError, match=message):
        Loader(**arguments)


def test_default_augmentation() -> None:
    assert {name: default_augmentation(name) for name in ("digits", "fashion-mnist", "svhn", "cifar10")} == {
        "digits": Augment(pad=1, flip=False),
        "fashion-mnist": Augment(pad=2, flip=True),
        "svhn": Augment(pad=4, flip=False),
        "cifar10": Augment(pad=4, flip=True),
    }
    assert default_augmentation("npz:mine.npz") is None


@pytest.mark.gpu
def test_devices_agree() -> None:
    on_cpu, on_gpu = (loader(augment=Augment(2, True), device=device) for device in ("cpu", "cuda"))
    (x, y), (x_gpu, y_gpu) = epoch(on_cpu), epoch(on_gpu)
    assert x_gpu.is_cuda
    assert torch.equal(y, y_gpu.cpu())
    torch.testing.assert_close(x, x_gpu.cpu(), rtol=1e-6, atol=0)  # a GPU divides by multiplying


@pytest.mark.gpu
def test_generator_must_be_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="generator must be on the CPU, got cuda"):
        Loader(pixels(), torch.arange(N), 4, generator=torch.Generator("cuda"))
