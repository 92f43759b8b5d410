"""Steps that cannot be replayed run eagerly, and replays that are wrong are noticed."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replayed import batch, network, replays, same, train, warmed
from rerun import Rerun
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcure import CURE, _trials
from fastcure.engines import ENGINES
from fastcure.engines.auto import Auto


def waits(model: Any, x: Tensor) -> Tensor:
    return model.inner(x) * (2.0 if float(x.detach().sum()) > 0 else 1.0)


def from_the_host(model: Any, x: Tensor) -> Tensor:
    return model.inner(x) + torch.tensor([0.0, 1.0, 2.0], device="cpu").to(x)


def draws(model: Any, x: Tensor) -> Tensor:
    random.random()
    return model.inner(x)


def notes(model: Any, x: Tensor) -> Tensor:
    model.last = model.inner(x)
    return model.last * 2


def masks(model: Any, x: Tensor) -> Tensor:
    logits = model.inner(x)
    return logits + logits[logits > 0].sum()


class Awkward(nn.Module):
    def __init__(self, inner: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def goes_on_eagerly(device: torch.device, function: Callable[[Any, Tensor], Tensor]) -> list[str]:
    """Return what was said."""
    models, said = [Awkward(network(device), function) for _ in range(2)], list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastcure").addHandler(handler)
    try:
        for model, engine in zip(models, ("eager", "auto"), strict=True):
            train(CURE(model, engine=engine, batch_stats="train"), 6, device)
    finally:
        logging.getLogger("fastcure").removeHandler(handler)
    assert not replays(models[1])
    same(*models)
    return said


def test_random_numbers_are_not_captured(device: torch.device) -> None:
    (said,) = goes_on_eagerly(device, draws)
    assert "draws random numbers" in said


def test_attributes_that_a_forward_changes_are_not_captured(device: torch.device) -> None:
    assert goes_on_eagerly(device, notes) == []  # no step is like the one before


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "reason"),
    [(waits, "_local_scalar_dense"), (masks, "aten.index.Tensor"), (from_the_host, "has a tensor on cpu")],
)
def test_what_waits_for_the_host_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    monkeypatch.setitem(ENGINES, "auto", Auto())
    (said,) = goes_on_eagerly(torch.device("cuda"), function)
    assert reason in said


def test_it_says_once_that_steps_are_replayed(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    model = network(device)
    with caplog.at_level(logging.WARNING, "fastcure"):
        train(CURE(model), 5, device, sizes=(8, 6))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["fastcure: steps of Net are replayed as CUDA graphs from now on"]


class Wrong(Rerun):
    """Replays something else."""

    by = 1.01

    def record(self, work: Any) -> Any:
        def different() -> Any:
            return [None if t is None else t * Wrong.by for t in work()]

        return super().record(different)


def test_a_replay_that_is_not_the_eager_step_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(ENGINES, "auto", Auto(Wrong, "cpu"))
    models = [network(torch.device("cpu")) for _ in range(2)]
    with caplog.at_level(logging.WARNING, "fastcure"):
        for model, engine in zip(models, ("eager", "auto"), strict=True):
            train(CURE(model, engine=engine), 5, torch.device("cpu"))
    assert ["differ by 0.01" in record.getMessage() for record in caplog.records] == [True]
    same(*models)


def test_replays_are_compared_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(ENGINES, "auto", Auto(Wrong, "cpu"))
    monkeypatch.setattr(Wrong, "by", 1.0)
    monkeypatch.setattr(_trials, "COMPARED_EVERY", 5)
    model, cpu = network(torch.device("cpu")), torch.device("cpu")
    train(CURE(model), 5, cpu)
    assert replays(model)
    monkeypatch.setattr(Wrong, "by", 1.01)
    with caplog.at_level(logging.WARNING, "fastcure"):
        train(CURE(model), 5, cpu)
    assert "differ by 0.01" in caplog.records[-1].getMessage()
    assert not replays(model)


@pytest.mark.gpu
def test_a_value_that_no_key_holds_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(ENGINES, "auto", Auto())
    monkeypatch.setattr(_trials, "COMPARED_EVERY", 5)
    hidden, cuda = [1.0], torch.device("cuda")
    globals()["_hidden"] = hidden
    model = Awkward(network(cuda), lambda model, x: model.inner(x) * globals()["_hidden"][0])
    train(CURE(model), 5, cuda)
    assert replays(model)
    hidden[0] = 2.0
    with caplog.at_level(logging.WARNING, "fastcure"):
        train(CURE(model), 5, cuda)
    assert "differ by" in caplog.records[-1].getMessage()


@pytest.mark.gpu
def test_random_numbers_can_be_drawn_after_a_capture_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    model = network(torch.device("cuda"))

    class Sync(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.cuda.synchronize()  # which no operator shows
            return x

    model.norm = nn.Sequential(model.norm, Sync())  # type: ignore[assignment]
    other = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, "fastcure"):
        train(CURE(model), 5, torch.device("cuda"))
    assert ["run eagerly" in record.getMessage() for record in caplog.records] == [True]
    torch.rand(3, device="cuda")
    train(CURE(other, engine="eager"), 5, torch.device("cuda"))
    same(model, other)
    train(CURE(fresh := network(torch.device("cuda"))), 5, torch.device("cuda"))
    assert replays(fresh)


class Watch(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_every_step(device: torch.device) -> None:
    model = warmed(device)
    with Watch() as watch:
        CURE(model)(*batch(device, 1))
    assert watch.count > 100
    seen = list[object]()
    model.conv.register_forward_hook(lambda *args: seen.append(args[0]))
    CURE(model)(*batch(device, 1)).total.backward()
    assert len(seen) == 2
