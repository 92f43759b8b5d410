"""Foreign operators and model code: right against finite differences of first-order gradients, or an error."""

from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import pytest
import torch
from foreign import BLOCKS, NO_SECOND_DERIVATIVE, Foreign
from fuzzing import TRIED, cases
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastcure import curvature, double_backward

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),  # torch's own, from 2.14 on
    pytest.mark.filterwarnings("ignore:loss and penalty are computed in evaluation mode"),
]
STEP = 1e-4
"""Of the central difference of fourth order, whose truncation is of the order STEP^4, its rounding eps / STEP."""
REFUSABLE = NO_SECOND_DERIVATIVE | {"scripted", "checkpointed", "differentiates itself"}
LIMIT = 1e-7
"""Relative: rounding is eps / STEP = 2e-12 of the total, which may be 1e4 times a slope of it."""


class Case(NamedTuple):
    names: list[str]
    model: Foreign
    x: Tensor
    y: Tensor
    h: float
    direction: Tensor
    options: dict[str, Any]


@st.composite
def foreign(draw: Any) -> Case:
    names = draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    model = Foreign(names, draw(st.sampled_from([2, 3]))).double().eval()
    batch, side = draw(st.integers(1, 3)), draw(st.integers(3, 5))
    x = torch.rand(batch, 2, side, side + 1, dtype=torch.float64)
    direction = torch.randn_like(x)
    direction /= direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    options = {"engine": draw(st.sampled_from(["eager", "eager", "reference"]))}
    options |= {"loss_at": draw(st.sampled_from(["x", "step"])), "power": draw(st.sampled_from([1, 2]))}
    return Case(names, model, x, torch.randint(3, (batch,)), draw(st.floats(0.1, 1.5)), direction, options)


def first_order(model: Foreign, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss `(B,)` and its gradient at x, without any second derivative."""
    point = x.detach().requires_grad_()
    loss = F.cross_entropy(model(point), y, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), point)[0]


def total_of(case: Case) -> Tensor:
    """Mean loss + mean penalty by their definitions."""
    loss, g = first_order(case.model, case.x, case.y)
    loss_step, g_step = first_order(case.model, case.x + case.h * case.direction, case.y)
    penalty = (g_step - g).square().flatten(1).sum(1)
    penalty = penalty.sqrt() if case.options["power"] == 1 else penalty
    return ((loss_step if case.options["loss_at"] == "step" else loss) + penalty).mean()


def slope(case: Case, way: list[Tensor]) -> float:
    """The derivative of `total_of` with the parameters along `way`, by central differences of fourth order."""
    parameters = list(case.model.parameters())
    kept = [p.detach().clone() for p in parameters]

    def at(t: float) -> Tensor:
        with torch.no_grad():
            for parameter, start, v in zip(parameters, kept, way, strict=True):
                parameter.copy_(start + t * v)
        return total_of(case)

    found = (8 * (at(STEP) - at(-STEP)) - (at(2 * STEP) - at(-2 * STEP))) / (12 * STEP)
    at(0.0)
    return float(found)


@cases(34)
@given(foreign())
def test_right_or_an_error(case: Case) -> None:
    TRIED["foreign code"] += 1
    note(f"{case.names}, x {tuple(case.x.shape)}, h {case.h}, {case.options}")
    total = None
    with suppress(RuntimeError) if REFUSABLE & set(case.names) else nullcontext():
        out = curvature(case.model, case.x, case.y, case.h, direction=case.direction, **case.options)
        (out.loss + out.penalty).mean().backward()
        total = (out.loss + out.penalty).mean().detach()
    if total is None:
        TRIED["an error"] += 1
        return
    assert not NO_SECOND_DERIVATIVE & set(case.names), "any number would be wrong"
    assert abs(float(total) - float(total_of(case))) <= 1e-10 * (1 + abs(float(total)))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in case.model.parameters()]
    way = [torch.randn_like(p) for p in case.model.parameters()]
    ours = sum(float((g * v).sum()) for g, v in zip(gradients, way, strict=True))
    scale = sum(float(g.square().sum()) for g in gradients) ** 0.5
    assert abs(ours - slope(case, way)) <= LIMIT * (scale + abs(float(total)))


@cases(16)
@given(foreign())
def test_plain_code_under_double_backward(case: Case) -> None:
    """The penalty is ||g||^2 here, and whatever torch computes must be what it is under the rules, or an error."""
    TRIED["plain code under double_backward"] += 1
    note(f"{case.names}, x {tuple(case.x.shape)}")
    parameters = list(case.model.parameters())

    def gradients() -> list[Tensor]:
        point = case.x.detach().requires_grad_()
        loss = F.cross_entropy(case.model(point), case.y, reduction="sum")
        (g,) = torch.autograd.grad(loss, point, create_graph=True)
        found = torch.autograd.grad(loss + g.square().sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if t is None else t for p, t in zip(parameters, found, strict=True)]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        try:
            wanted = gradients()
        except RuntimeError:
            with pytest.raises(RuntimeError), double_backward():
                gradients()
            return
    with double_backward():
        found = gradients()
    scale = sum(float(w.square().sum()) for w in wanted) ** 0.5
    error = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)) ** 0.5
    assert error <= 1e-12 * scale
