"""Attacks, preparation and measures of a model that uses torch.vmap: the values of the same model with a loop."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import Case
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import prepare
from fastcure.analysis import curvature_along_gradient, curvature_profile, frobenius_norm, robustness_bounds
from fastcure.attacks import deepfool, fgsm, pgd, spsa
from fastcure.evaluation.accuracy import accuracy


class Frames(nn.Module):
    """One network on each of two frames, their features averaged; together by vmap, or one after the other."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.together = together
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 4, 3, stride=2)
        )
        self.last = nn.Linear(4, 3)
        nn.init.uniform_(self.features[1].running_mean, -0.2, 0.2)
        nn.init.uniform_(self.features[1].running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([x, x.flip(3).square()])
        if self.together:
            out = torch.vmap(self.features)(frames)
        else:
            out = torch.stack([self.features(frame) for frame in frames])
        return self.last(out.tanh().mean((0, 3, 4)))


@pytest.fixture(params=[False, True], ids=["plain", "prepared"])
def cases(request: pytest.FixtureRequest) -> tuple[Case, Case]:
    """The case with vmap, prepared or not, and that with a loop."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(5, 1, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    ours, plain = (Frames(together).double().eval() for together in (True, False))
    assert torch.equal(ours.last.weight, plain.last.weight)
    if request.param:
        prepare(ours, x)
    return Case(ours, x, y), Case(plain, x, y)


def seeded(run: Callable[..., object], **options: object) -> Callable[..., object]:
    return lambda *case: run(*case, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    "run",
    [
        fgsm,
        seeded(pgd, eps=0.1, steps=3, restarts=2),
        seeded(pgd, eps=1.0, steps=3, norm="l2"),
        deepfool,
        seeded(spsa, steps=2, samples=4),
        partial(accuracy, attack=partial(pgd, random_start=False)),
        curvature_along_gradient,
        partial(curvature_along_gradient, method="finite", h=0.5),
        curvature_profile,
        seeded(frobenius_norm, probes=5),
        robustness_bounds,
        partial(robustness_bounds, kind="margin"),
    ],
)
def test_is_what_a_loop_gives(cases: tuple[Case, Case], run: Callable[..., object]) -> None:
    ours, plain = cases
    torch.testing.assert_close(run(*ours), run(*plain), rtol=1e-9, atol=1e-9)


def test_the_gradient_and_the_curvature_are_those_of_the_definition(cases: tuple[Case, Case]) -> None:
    ours, (model, x, y) = cases
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)
    z = F.normalize(g.detach().sign().flatten(1)).view_as(x)  # no pixel of the last row is seen
    (Hz,) = torch.autograd.grad((g * z).sum(), point)
    torch.testing.assert_close(curvature_along_gradient(*ours).value, Hz.flatten(1).norm(dim=1), rtol=1e-9, atol=0)
    torch.testing.assert_close(fgsm(*ours, eps=0.05), (x + 0.05 * g.detach().sign()).clamp(0, 1), rtol=0, atol=1e-12)
