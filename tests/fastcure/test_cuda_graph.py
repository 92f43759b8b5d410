"""The engine of CUDA graphs: on the CPU with a recorder that runs the work again, which shows all but the capture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import relative, rounding
from rerun import Rerun
from torch import Tensor, nn

from fastcure import CURE, curvature, prepare
from fastcure._cuda_graphs import SHAPES, CudaRecorder
from fastcure.attacks import pgd
from fastcure.attacks._replay import ReplayedSteps
from fastcure.engines import ENGINES
from fastcure.engines.cuda_graph import CudaGraph
from fastcure.models import resnet8
from fastcure.objectives import PGD


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    if request.param == "cpu":
        monkeypatch.setitem(ENGINES, "cuda_graph", CudaGraph(Rerun, "cpu"))
        monkeypatch.setattr(Rerun, "recorded", 0)
    else:
        monkeypatch.setitem(ENGINES, "cuda_graph", CudaGraph())
    return torch.device(request.param)


def network(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(100, 3))
    return (
        model.double().to(device),
        torch.rand(5, 2, 5, 5).double().to(device),
        torch.tensor([0, 1, 2, 1, 0]).to(device),
    )


def gradients(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, **options: object) -> list[Tensor]:
    model.zero_grad()
    out = curvature(model, x, y, **options)  # type: ignore[arg-type]
    (out.loss * weights + out.penalty * weights.square()).sum().backward()
    return [out.logits, out.loss.detach(), out.penalty.detach(), *(p.grad.clone() for p in model.parameters())]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("power", [1, 2])
def test_it_follows_everything_that_may_change_from_step_to_step(device: torch.device, power: int) -> None:
    model, _, y = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x, weights = torch.rand(5, 2, 5, 5).double().to(device), torch.rand(5).double().to(device)
        h: float | Tensor = 0.5 + step if step % 2 else torch.rand(5).double().to(device) + 0.1
        theirs = gradients(model, x, y.roll(step), weights, h=h, power=power, engine="reference")
        same(gradients(model, x, y.roll(step), weights, h=h, power=power, engine="cuda_graph"), theirs)
        optimizer.step()
        model(x)  # training mode: running statistics move
    if device.type == "cpu":
        assert Rerun.recorded == 2


def test_other_shapes_weights_and_settings_are_captured_anew(device: torch.device) -> None:
    model, x, y = network(device)
    weights = torch.ones(5, device=device, dtype=torch.float64)
    cases: list[dict[str, object]] = [
        {},
        {"power": 1},
        {"direction": torch.randn_like(x)},
        {"direction": torch.randn_like(x)},
    ]
    for options in cases:
        theirs = gradients(model, x, y, weights, engine="reference", **options)
        same(gradients(model, x, y, weights, engine="cuda_graph", **options), theirs)
    assert len(ENGINES["cuda_graph"].captures._kept[model]) == 3  # type: ignore[attr-defined]

    theirs = gradients(model, x[:3], y[:3], weights[:3], engine="reference")
    same(gradients(model, x[:3], y[:3], weights[:3], engine="cuda_graph"), theirs)
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))  # type: ignore[index]
    for count in (5, 4, 3, 2, 1):
        theirs = gradients(model, x[:count], y[:count], weights[:count], engine="reference")
        same(gradients(model, x[:count], y[:count], weights[:count], engine="cuda_graph"), theirs)
    assert len(ENGINES["cuda_graph"].captures._kept[model]) == SHAPES  # type: ignore[attr-defined]


def test_gradients_are_the_callers_own(device: torch.device) -> None:
    """Accumulated over steps, they would be overwritten if they were the capture's memory."""
    model, x, y = network(device)
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for engine, total in (("reference", wanted), ("cuda_graph", None)):
        model.zero_grad()
        for batch_x in (x, x.flip(0), x * 0.5):
            out = curvature(model, batch_x, y, engine=engine)
            (out.loss + out.penalty).sum().backward()
            if total is not None:
                for sum_, p in zip(total, model.parameters(), strict=True):
                    assert p.grad is not None
                    sum_.copy_(p.grad)
    same([p.grad for p in model.parameters() if p.grad is not None], wanted)


def test_without_gradients_it_captures_nothing(device: torch.device) -> None:
    model, x, y = network(device)
    with torch.no_grad():
        out = curvature(model, x, y, engine="cuda_graph")
    assert not out.penalty.requires_grad
    assert Rerun.recorded == 0


def test_microbatches_and_folded_batch_norms(device: torch.device) -> None:
    model = resnet8(in_channels=1).double().to(device)
    x, y = torch.rand(6, 1, 8, 8).double().to(device), torch.arange(6, device=device)
    prepare(model, x)
    results = []
    for engine, microbatch in (("reference", None), ("cuda_graph", 2), ("cuda_graph", None)):
        model.zero_grad()
        CURE(model, engine=engine, microbatch=microbatch)(x, y).total.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same(results[1], results[0])
    same(results[2], results[0])


def test_on_another_device_it_says_so() -> None:
    model, x, y = network(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"wants tensors on cuda, got cpu: use engine='auto'"):
        curvature(model, x, y, engine="cuda_graph")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_replayed_is_the_attack(device: torch.device, norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ReplayedSteps(Rerun if device.type == "cpu" else CudaRecorder, device.type)
    monkeypatch.setattr("fastcure.attacks._gradient.REPLAYED", steps)
    model, x, y = network(device)
    for attempt in range(3):
        eps = 0.05 * (attempt + 1) if attempt % 2 else torch.rand(5).double().to(device) * 0.1
        advs = []
        for cuda_graph in (False, True):
            generator = torch.Generator().manual_seed(attempt)
            options: dict[str, Any] = {"norm": norm, "restarts": 2, "generator": generator, "cuda_graph": cuda_graph}
            advs.append(pgd(model, x.roll(attempt, 0), y, eps, steps=4, **options))
        assert relative(advs[1], advs[0]) < rounding(torch.float64, 100, 10)
        assert float((advs[0] - x.roll(attempt, 0)).norm()) > 0
        with torch.no_grad():
            model[0].weight.mul_(1.1)  # type: ignore[index]
        model(x)  # training mode: running statistics move
    assert len(steps.captures._kept[model]) == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_that_repeats_is_replayed(device: torch.device, norm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = ReplayedSteps(Rerun if device.type == "cpu" else CudaRecorder, device.type)
    monkeypatch.setattr("fastcure.attacks._gradient.REPLAYED", steps)
    model, x, y = network(device)
    prepare(model, x)
    for attempt in range(5):
        advs = []
        for cuda_graph in (False, None):
            generator = torch.Generator().manual_seed(attempt)
            options: dict[str, Any] = {"norm": norm, "generator": generator, "cuda_graph": cuda_graph}
            advs.append(pgd(model, x.roll(attempt, 0), y, 0.05 * (attempt + 1), steps=4, **options))
        assert relative(advs[1], advs[0]) < rounding(torch.float64, 100, 10)
        with torch.no_grad():
            model[0].weight.mul_(1.1)  # type: ignore[index]
        model(x)  # training mode: running statistics move
    assert [captured.uses for captured in steps.captures._kept[model].values()] == [4]


def test_adversarial_training_replays_its_attack(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for where in (device.type, "none"):
        steps = ReplayedSteps(Rerun if device.type == "cpu" else CudaRecorder, where)
        monkeypatch.setattr("fastcure.objectives.adversarial.REPLAYED", steps)
        model, x, y = network(device)
        objective = PGD(model, eps=0.05, steps=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            objective(x, y.roll(step)).total.backward()
            optimizer.step()
        assert len(steps.captures._kept.get(model, {})) == (where != "none")
        states.append([p.detach() for p in model.parameters()])
    same(*states)


def test_an_attack_on_the_cpu_cannot_be_captured() -> None:
    model, x, y = network(torch.device("cpu"))
    with pytest.raises(ValueError, match="cuda_graph=True wants tensors on cuda, got cpu"):
        pgd(model, x, y, cuda_graph=True)


def test_parameters_replaced_over_the_same_memory_are_seen(device: torch.device) -> None:
    model, x, y = network(device)
    weights = torch.ones(5, device=device, dtype=torch.float64)
    gradients(model, x, y, weights, engine="cuda_graph")
    model.load_state_dict(model.state_dict(), assign=True)
    model[0].weight = nn.Parameter(model[0].weight.data)  # type: ignore[index,union-attr]
    theirs = gradients(model, x, y, weights, engine="reference")
    same(gradients(model, x, y, weights, engine="cuda_graph"), theirs)


def test_weights_changed_before_the_backward_are_refused(device: torch.device) -> None:
    model, x, y = network(device)
    out = curvature(model, x, y, engine="cuda_graph")
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[index,union-attr,operator]
    with pytest.raises(RuntimeError, match="call backward before the optimiser"):
        out.penalty.sum().backward()
