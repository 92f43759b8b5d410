"""The arithmetic of a step, in forward passes F: counted, so the same on every machine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastcure import CURE
from fastcure.attacks import fgsm, pgd
from fastcure.models import resnet18
from fastcure.profiling.flops import FlopCounter


def flops(run: Callable[[], object]) -> int:
    with FlopCounter() as counter:
        run()
    return counter.total


@pytest.fixture(scope="module")
def resnet() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, int]:
    torch.manual_seed(0)
    model, x, y = resnet18(), torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad():
        return model, x, y, flops(lambda: model(x))


@pytest.mark.parametrize(("batch_stats", "budget"), [("frozen", 12.4), ("split", 15.5), ("train", 12.4)])
def test_a_step(resnet: tuple, batch_stats: str, budget: float) -> None:
    model, x, y, forward = resnet
    cure = CURE(model, batch_stats=batch_stats)
    spent = flops(lambda: cure(x, y).total.backward()) / forward
    assert budget - 0.6 < spent <= budget


@pytest.mark.parametrize(
    ("options", "budget"), [({}, 7.6), ({"loss_at": "step"}, 8.6), ({"batch_stats": "split"}, 9.1)]
)
def test_a_step_with_a_penalty_on_half_of_the_batch(resnet: tuple, options: dict[str, Any], budget: float) -> None:
    model, x, y, forward = resnet
    cure = CURE(model, fraction=0.5, **options)
    assert budget - 0.4 < flops(lambda: cure(x, y).total.backward()) / forward <= budget


def test_a_step_without_grad(resnet: tuple) -> None:
    model, x, y, forward = resnet
    with torch.no_grad():
        assert flops(lambda: CURE(model)(x, y)) <= 4 * forward


@pytest.mark.parametrize("steps", [1, 3])
def test_pgd(resnet: tuple, steps: int) -> None:
    model, x, y, forward = resnet
    assert flops(lambda: pgd(model, x, y, steps=steps)) <= 2 * steps * forward
    assert flops(lambda: pgd(model, x, y, steps=steps, restarts=2)) <= 2 * (2 * steps + 1) * forward
    assert flops(lambda: fgsm(model, x, y)) <= 2 * forward


def test_the_counter_agrees_with_a_count_by_hand() -> None:
    convolution, x = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.rand(2, 3, 7, 7)
    by_hand = 2 * (2 * 5 * 7 * 7) * (3 * 3 * 3)
    assert flops(lambda: convolution(x)) == by_hand
    assert flops(lambda: convolution(x).sum().backward()) == 2 * by_hand  # x needs no gradient
