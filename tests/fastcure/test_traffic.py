"""Elementwise memory traffic of a step, counted: so the same on every machine."""

from collections.abc import Callable

import pytest
import torch
from cost import kernels_that_only_count, megabytes
from steps import Step, cure, published, standard
from torch import nn
from workloads import ViT

from fastcure import prepare
from fastcure.models import resnet18
from fastcure.profiling.traffic import TrafficCounter


def traffic(run: Callable[[], object]) -> int:
    with TrafficCounter() as counter:
        run()
    return counter.total


def test_the_counter_agrees_with_a_count_by_hand() -> None:
    x, y = torch.rand(2, 3, 4), torch.rand(3, 1)
    assert traffic(lambda: x + x) == 3 * 96
    assert traffic(lambda: x * y) == 2 * 96 + 12
    assert traffic(lambda: x.clone().mul_(2.0)) == 4 * 96
    assert traffic(lambda: x + y.expand(3, 4)) == 2 * 96 + 12
    assert traffic(lambda: x.view(6, 4)[1:].T.detach()) == 0
    assert traffic(lambda: x @ x.mT) == 0
    assert traffic(lambda: torch.stack([x, x])) == 4 * 96
    assert traffic(lambda: nn.functional.conv1d(x, torch.rand(2, 3, 1))) == 24
    assert traffic(lambda: x[:0] + x[:0]) == 0
    with TrafficCounter() as counter:
        assert (x + x)[:0].clone().numel() == 0
    assert counter.launches == 1


@pytest.mark.parametrize(
    ("step", "prepared", "least", "most"),
    [
        (standard, False, 37, 38),
        (published, False, 305, 315),
        (cure("eager"), False, 185, 195),
        (cure("eager"), True, 49, 51),
        (cure("eager", "train"), False, 255, 265),
        (cure("eager", "train"), True, 117, 120),
    ],
)
def test_a_step_of_resnet18(
    step: Step, prepared: bool, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", "triton" if prepared else "torch")
    torch.manual_seed(0)
    model = resnet18()
    if prepared:
        prepare(model, torch.rand(2, 3, 8, 8))
    assert least < megabytes(step, model) < most


def test_a_step_of_one_block_of_a_vision_transformer_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    assert megabytes(cure("eager"), ViT(depth=1), side=32) < 34  # 49.5 by plain operators


def test_launches_of_a_training_mode_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    model, x, y = resnet18(), torch.rand(8, 3, 8, 8), torch.arange(8)
    with kernels_that_only_count(), TrafficCounter() as counter:
        cure("eager", "train")(model, x, y)
    # At both points 20 norms, 3 forward and 3 in each of 3 backward passes. Beside these, sums of weights' gradients,
    # and per norm and point a momentum, a flipped weight and a counter of batches.
    assert 480 < counter.launches < 480 + 110 + 40 * 3 + 100


def test_training_mode_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCURE_BACKEND", "triton")
    assert megabytes(cure("eager", "train"), resnet18(), dtype=torch.bfloat16) < 62
    assert megabytes(cure("eager", "train", loss_at="step", fraction=0.25), resnet18()) < 67
