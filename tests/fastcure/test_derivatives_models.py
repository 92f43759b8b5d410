"""Models that call their layers in other ways: with weights made of the image, under vmap, with complex numbers."""

from typing import Any

import pytest
import torch
from definitions import (
    EXACT,
    along_gradient,
    check_right,
    check_right_in_training,
    definition,
    images,
    ours,
    seeded,
    unit,
)
from networks import relative
from torch import Tensor, nn
from torch.func import functional_call

from fastcure import attacks, explain, prepare
from fastcure.analysis import curvature_along_gradient

# Weights that depend on the image

pytestmark = seeded


class Hyper(nn.Module):
    """Each image makes a weight of `layer` from its own pixels."""

    def __init__(self, layer: nn.Module, name: str, size: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.name, self.size = layer, name, size
        self.make, self.last = nn.Linear(64, int(torch.Size(size).numel())), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            weight = self.make(row.flatten()).view(self.size)
            rows.append(functional_call(self.layer, {self.name: weight}, (row[None],)))
        return self.last(torch.cat(rows).tanh().mean((2, 3)))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias"])
@pytest.mark.parametrize("prepared", [False, True])
def test_weights_that_depend_on_the_image(name: str, norm: bool, prepared: bool) -> None:
    if name.startswith("1") and not norm:
        return
    layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Tanh())
    model = Hyper(layers, name, tuple(layers.get_parameter(name).shape)).double()
    if prepared:
        prepare(model, images()[0])
    check_right(model)


@pytest.mark.parametrize("name", ["1.weight", "1.bias"])
def test_so_do_those_of_a_batch_norm_in_training_mode(name: str) -> None:
    model = Hyper(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), name, (4,)).double()
    check_right_in_training(model)


def test_an_image_as_the_weight_of_a_convolution() -> None:
    class Correlates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 8, padding=2, bias=False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(functional_call(self.conv, {"weight": x}, (x,)).div(20).tanh().mean((2, 3)))

    check_right(Correlates().double(), first_order=False)  # whose steps are of each image on its own


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )
        self.norm, self.last = nn.InstanceNorm2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([x, x.flip(3)], 2)
        frames = torch.vmap(self.norm, in_dims=2, out_dims=2)(frames)
        return self.last(torch.vmap(self.inner, in_dims=2, out_dims=2)(frames).tanh().mean((2, 3, 4)))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.filterwarnings("ignore:the first-order engine misses")
def test_vmap_inside_a_model(prepared: bool) -> None:
    model, (x, y) = Frames().double().eval(), images()
    if prepared:
        prepare(model, x)
        assert "batch norms folded into the layer before: 0 of 2" in explain(model, x)
        assert "inner.1 not: it runs inside a transform of torch.func" in explain(model, x)
    check_right(model, first_order=False)
    attacks.pgd(model, x, y)
    attacks.deepfool(model, x)


def test_vmap_around_a_batch_norm_in_training_mode() -> None:
    model = Frames()
    for i in (1, 4):
        model.inner[i] = nn.BatchNorm2d(4, track_running_stats=False)
    model.inner[2] = nn.Tanh()
    model.double().train()
    check_right_in_training(model)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.complex128}
        self.inner = nn.Sequential(
            nn.Conv2d(1, 4, 3, **options), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1, groups=2, **options)
        )
        self.last = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.to(torch.complex128)).abs().square().mean((2, 3)))


def test_complex_convolutions() -> None:
    model, (x, y) = Complex(), images()
    z = unit(x)
    truth = definition(model, x, y, z)
    for engine in (*EXACT, "first_order"):
        for value, right in zip(ours(model, x, y, z, engine=engine), truth, strict=True):
            assert float((value - right).abs().square().sum().sqrt() / right.abs().square().sum().sqrt()) < 1e-6
    assert relative(curvature_along_gradient(model, x, y).value, along_gradient(model, x, y)) < 1e-9
