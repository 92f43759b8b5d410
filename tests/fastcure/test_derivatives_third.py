"""Models that differentiate themselves: third derivatives, which torch's norms have wrong."""

import copy
from typing import Any

import pytest
import torch
from definitions import EXACT, H, Lambda, check_near, check_right, definition, images, ours, seeded, unit
from networks import relative, rounding
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE
from fastcure.rules.plain_operators import PlainOperators

pytestmark = seeded


def test_running_statistics_take_the_momentum_given() -> None:
    x, mean, var = torch.randn(6, 3, 4, dtype=torch.float64), torch.zeros(3).double(), torch.ones(3).double()
    with PlainOperators():
        F.batch_norm(x, mean, var, training=True, momentum=0.3)
    torch.testing.assert_close(mean, 0.3 * x.mean((0, 2)))
    torch.testing.assert_close(var, 0.7 + 0.3 * x.var((0, 2)))


class LayerNorm(nn.LayerNorm):
    def forward(self, t: Tensor) -> Tensor:
        return normalised(t, [-3, -2, -1], self.eps) * self.weight + self.bias


class GroupNorm(nn.GroupNorm):
    def forward(self, t: Tensor) -> Tensor:
        groups = t.unflatten(1, (self.num_groups, -1))
        return affine(normalised(groups, [2, 3, 4], self.eps).flatten(1, 2), self)


class InstanceNorm(nn.InstanceNorm2d):
    def forward(self, t: Tensor) -> Tensor:
        return affine(normalised(t, [2, 3], self.eps), self)


class BatchNorm(nn.BatchNorm2d):
    def forward(self, t: Tensor) -> Tensor:
        if self.training:
            return affine(normalised(t, [0, 2, 3], self.eps), self)
        mean, var = self.running_mean.view(-1, 1, 1), self.running_var.view(-1, 1, 1)
        return affine((t - mean) / (var + self.eps).sqrt(), self)


def normalised(t: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = t - t.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def affine(t: Tensor, norm: Any) -> Tensor:
    return t * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


class Energy(nn.Module):
    """Its logits depend on its own gradient."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
        self.last = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.inner(x).logsumexp(1).sum(), x, create_graph=True)
        return self.inner(x) + self.last(g.flatten(1))


NORMS: dict[str, tuple[nn.Module, nn.Module]] = {
    "layer": (nn.LayerNorm((4, 6, 6)), LayerNorm((4, 6, 6))),
    "layer called": (Lambda(lambda t: F.layer_norm(t, t.shape[1:])), Lambda(lambda t: normalised(t, [1, 2, 3], 1e-5))),
    "group": (nn.GroupNorm(2, 4), GroupNorm(2, 4)),
    "instance": (nn.InstanceNorm2d(4, affine=True), InstanceNorm(4, affine=True)),
    "instance called": (Lambda(F.instance_norm), Lambda(lambda t: normalised(t, [2, 3], 1e-5))),
    "batch": (nn.BatchNorm2d(4), BatchNorm(4)),
    "batch by the batch": (nn.BatchNorm2d(4, track_running_stats=False).train(), BatchNorm(4).train()),
    "batch called": (
        Lambda(lambda t: F.batch_norm(t, None, None, training=True)),
        Lambda(lambda t: normalised(t, [0, 2, 3], 1e-5)),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_models_that_differentiate_themselves(name: str) -> None:
    norm, plain_norm = (copy.deepcopy(n) for n in NORMS[name])
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model, plain = Energy(norm).double(), Energy(plain_norm).double()
    plain.load_state_dict(model.state_dict(), strict="batch" not in name)
    if name != "batch by the batch":
        check_right(model, plain, first_order=False)
        return
    x, y = images()
    z = unit(x)
    truth = definition(plain, x, y, z, train=True)
    for engine in EXACT:
        check_near(ours(model, x, y, z, engine=engine), truth)


def test_so_do_they_where_some_samples_have_no_penalty() -> None:
    model, (x, y) = Energy(nn.GroupNorm(2, 4)).double(), images()
    F.cross_entropy(model(x), y).backward()
    truth = [p.grad for p in model.parameters()]
    model.zero_grad()
    CURE(model, H, gamma=0.0, fraction=0.5)(x, y).total.backward()
    assert relative([p.grad for p in model.parameters()], truth) < rounding(torch.float64, x.numel())


@pytest.mark.parametrize("engine", EXACT)
def test_so_do_they_with_batch_statistics_of_training_mode(engine: str) -> None:
    model, plain = Energy(nn.BatchNorm2d(4)).double(), Energy(BatchNorm(4)).double()
    plain.load_state_dict(model.state_dict())
    x, y = images()
    z, twin = unit(x), copy.deepcopy(model)
    with torch.no_grad():
        twin.inner[1](twin.inner[0](x))
        twin.inner[1](twin.inner[0](x))  # the model calls it twice
    truth = definition(plain, x, y, z, train=True)
    check_near(ours(model, x, y, z, engine=engine, batch_stats="train"), truth)
    assert relative([*model.buffers()], [*twin.buffers()]) < rounding(torch.float64, x.numel())


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(4), nn.LayerNorm((4, 6, 6))])
def test_grad_inside_a_model(norm: nn.Module) -> None:
    class Functional(Energy):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.last(torch.func.grad(lambda t: self.inner(t).logsumexp(1).sum())(x).flatten(1))

    plain = {nn.BatchNorm2d: BatchNorm(4), nn.LayerNorm: LayerNorm((4, 6, 6))}.get(type(norm), nn.Identity())
    model, other = Functional(copy.deepcopy(norm)).double(), Energy(plain).double()
    other.load_state_dict(model.state_dict())
    check_right(model, other)
