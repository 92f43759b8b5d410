"""Accuracy curves: one radius after the other, or several in one batch."""

from functools import partial

import pytest
import torch
from torch import nn

from fastcure.analysis import accuracy_curve
from fastcure.attacks import pgd
from fastcure.evaluation.accuracy import accuracy

EPS = [0.0, 0.02, 0.05, 0.1, 0.3]


def classifier() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear one: wherever PGD starts, it ends in the same corner of the ball."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(37, 3, 2, 2) * 0.4 + 0.3
    return model, x, model(x).argmax(1)


def test_one_by_one_it_is_the_accuracy_under_each_attack() -> None:
    model, x, y = classifier()
    found = accuracy_curve(model, x, y, EPS, steps=5, seed=3, batch_size=10)
    for radius, value in zip(EPS, found.accuracy.tolist(), strict=True):
        assert value == accuracy(model, x, y, partial(pgd, eps=radius, steps=5), 10, seed=3)
    assert found.accuracy[0] == 1
    assert 0 < found.accuracy[-2] < 1


@pytest.mark.parametrize("at_once", [2, 5, 7])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_several_radii_in_one_batch_find_the_same(at_once: int, norm: str) -> None:
    model, x, y = classifier()
    images = (x * 255).to(torch.uint8)
    one, several = (
        accuracy_curve(model, images, y, EPS, steps=20, norm=norm, batch_size=16, at_once=count)  # type: ignore[arg-type]
        for count in (1, at_once)
    )
    assert torch.equal(one.accuracy, several.accuracy)
    assert torch.equal(one.eps, several.eps)


@pytest.mark.parametrize(("steps", "restarts"), [(3, 1), (7, 1), (3, 2)])
def test_steps_and_restarts_are_those_of_the_attack(steps: int, restarts: int) -> None:
    model, x, y = classifier()
    passes = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    accuracy_curve(model, x, y, [0.1], steps=steps, restarts=restarts)
    judged = restarts if restarts > 1 else 0
    assert passes == [37] * (restarts * steps + judged + 1)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at_once must be >= 1, got 0"):
        accuracy_curve(*classifier(), EPS, at_once=0)
