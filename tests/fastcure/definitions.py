"""The penalty as the paper writes it, by plain double backpropagation, and the check of networks against it.

A network that uses what torch has no second derivative of, or a wrong one, is compared with the same network written
in operators of which torch has all derivatives.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE, curvature
from fastcure.analysis import curvature_along_gradient, curvature_profile, frobenius_norm, robustness_bounds

seeded = [
    pytest.mark.usefixtures("seed"),
    pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode:UserWarning"),
]
"""Marks of a file whose networks are random."""
of_torch = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
H = 0.5
EXACT = ["eager", "reference"]


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, t: Tensor) -> Tensor:
        return self.function(t)


def images() -> tuple[Tensor, Tensor]:
    return torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


def unit(x: Tensor) -> Tensor:
    return torch.randn_like(x).sign() / x[0].numel() ** 0.5


def network(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()
    model(images()[0])
    return model


def definition(model: nn.Module, x: Tensor, y: Tensor, z: Tensor, train: bool = False) -> tuple[Tensor, Tensor]:
    """Penalty (B,), and the gradients of its mean in one vector, as the paper writes them."""
    model = copy.deepcopy(model).train(train)

    def g(point: Tensor) -> Tensor:
        point = point.requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)[0]

    penalty = (g(x + H * z) - g(x.clone())).flatten(1).square().sum(1)
    grads = torch.autograd.grad(penalty.mean(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    return penalty.detach(), torch.cat([grad.flatten() for grad in grads])


def along_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||Hz|| with z of the gradient's signs, (B,)."""
    model = copy.deepcopy(model).eval()
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point, create_graph=True)
    z = g.detach().sign() / g.detach().sign().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.autograd.grad(g, point, z)[0].flatten(1).norm(dim=1)


def ours(model: nn.Module, x: Tensor, y: Tensor, z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    penalty = curvature(model, x, y, H, direction=z, **options).penalty
    penalty.mean().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return penalty.detach(), torch.cat([grad.flatten() for grad in grads])


def check_near(values: Sequence[Tensor], truths: Sequence[Tensor], limit: float = 1e-9) -> None:
    for value, truth in zip(values, truths, strict=True):
        assert relative(value, truth) < limit


def check_right(model: nn.Module, plain: nn.Module | None = None, *, first_order: bool = True) -> None:
    """Compare engines, and the exact ||Hz||, with the definition of `plain`, the same network in other operators."""
    (x, y), plain = images(), plain or model
    z = unit(x)
    truth = definition(plain, x, y, z)
    for engine in EXACT:
        check_near(ours(model, x, y, z, engine=engine), truth)
    if first_order:
        check_near(ours(model, x, y, z, engine="first_order"), truth, 1e-5)
    assert relative(curvature_along_gradient(model, x, y).value, along_gradient(plain, x, y)) < 1e-9


def check_right_in_training(model: nn.Module) -> None:
    """Compare with the definition where batch norms use the batch's statistics."""
    x, y = images()
    z = unit(x)
    truth = definition(model, x, y, z, train=True)
    check_near(ours(model, x, y, z, batch_stats="train"), truth)


def check_refused(model: nn.Module, message: str, error: type[Exception] = RuntimeError, **options: Any) -> None:
    """Every exact engine and measure raises one error."""
    x, y = images()
    for engine in (*EXACT, "auto"):
        with pytest.raises(error, match=message):
            curvature(model, x, y, H, engine=engine, **options).penalty.sum().backward()
    with pytest.raises(error, match=message):
        CURE(model, H, microbatch=2, **options)(x, y).total.backward()
    for measure in (curvature_along_gradient, curvature_profile, frobenius_norm, robustness_bounds):
        with pytest.raises(error, match=message):
            measure(model, x, y, **options)
