"""Convolutions inside the penalty that are no plain layer: each keeps its own ways."""

import pytest
import torch
from networks import Network, make, relative
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastcure import curvature


class Scaled(nn.Conv2d):
    """A subclass may compute anything."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x).tanh()


class ByName(nn.Module):
    """Gives its layer's argument by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class OneByOne(ByName):
    """Gives its layer images without a batch dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layer(image) for image in x])


class Centred(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean()


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, out: out.sin())
    return layer


def pre_hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: args[0].exp())
    return layer


def with_a_forward_of_its_own(layer: nn.Module) -> nn.Module:
    original = layer.forward
    layer.forward = lambda x: original(x).cos()
    return layer


def parametrised(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Centred())
    return layer


MAPS = {
    "plain": lambda: nn.Conv2d(2, 4, 3),
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="replicate"),
    "same": lambda: nn.Conv2d(2, 4, (2, 3), padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(2, 4, 3, stride=2, padding="valid"),
    "one-number": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
    "by-name": lambda: ByName(nn.Conv2d(2, 4, 3)),
    "unbatched": lambda: OneByOne(nn.Conv2d(2, 4, 3)),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1),
    "subclass": lambda: Scaled(2, 4, 3),
    "hook": lambda: hooked(nn.Conv2d(2, 4, 3)),
    "pre-hook": lambda: pre_hooked(nn.Conv2d(2, 4, 3)),
    "own-forward": lambda: with_a_forward_of_its_own(nn.Conv2d(2, 4, 3)),
    "weight-norm": lambda: parametrizations.weight_norm(nn.Conv2d(2, 4, 3)),
    "parametrised": lambda: parametrised(nn.Conv2d(2, 4, 3)),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 4, 5, stride=3)),
    "3d": lambda: nn.Sequential(nn.Unflatten(1, (2, 1)), nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 0))),
}


@pytest.mark.parametrize("name", MAPS)
def test_every_kind_of_convolution_equals_the_reference(name: str) -> None:
    def network() -> nn.Module:
        return nn.Sequential(MAPS[name](), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))

    case = make(Network(network, (2, 6, 5), True), 3, seed=0)

    def gradients(engine: str) -> list[Tensor]:
        out = curvature(*case, h=0.7, engine=engine)
        total = (out.loss + 3 * out.penalty).sum()
        return [out.logits, out.loss, out.penalty, *torch.autograd.grad(total, list(case.model.parameters()))]

    before = {module: dict(vars(module)) for module in case.model.modules()}
    for value, truth in zip(gradients("eager"), gradients("reference"), strict=True):
        assert relative(value, truth) < 1e-9
    assert {module: dict(vars(module)) for module in case.model.modules()} == before


def test_hooks_on_a_convolution_fire() -> None:
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    curvature(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    assert seen == [(2, 2, 2, 2)] * 2


def test_a_hook_on_all_modules_sees_each_layer() -> None:
    seen = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        curvature(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == seen.count(nn.BatchNorm2d) == 2
