"""The engine "auto": eager at once, compiled when a shape has been worked on for long, eager where that fails."""

import logging
from typing import Any

import pytest
import torch
from networks import NETWORKS, Case, make, relative
from torch import Tensor, nn

from fastcure._functional import Objective, evaluation_mode
from fastcure.engines import ENGINES
from fastcure.engines.auto import Auto
from fastcure.engines.base import Evaluation
from fastcure.engines.compile import Compile
from fastcure.engines.eager import Eager
from fastcure.profiling.flops import FlopCounter

OPTIONS: dict[str, Any] = {"power": 2, "direction": None, "differentiable": True}


class Counted(Compile):
    """The compile engine on a backend that is quick, and how often it was asked."""

    def __init__(self) -> None:
        super().__init__("aot_eager")
        self.calls = 0

    def forward(self, *arguments: Any, **options: Any) -> Evaluation:
        self.calls += 1
        return super().forward(*arguments, **options)


@pytest.fixture
def case() -> Case:
    torch._dynamo.reset()
    return make(NETWORKS["mlp-softplus"], 4, seed=0)


def step(engine: Any, case: Case, **options: Any) -> list[Tensor]:
    """Loss, penalty and the gradients of their sum."""
    objective = Objective(case.model)
    with evaluation_mode(case.model):
        found = engine.forward(objective, case.x, case.y, 0.7, **{**OPTIONS, **options})
    if not options.get("differentiable", True):
        return [found.loss, found.penalty]
    ones = torch.ones_like(found.loss)
    gradients = engine.backward(found.state, ones, ones, retain=False)
    by_parameter = dict(zip(map(id, found.parameters), gradients, strict=True))
    return [found.loss, found.penalty, *(by_parameter[id(parameter)] for parameter in case.model.parameters())]


def flops_of_a_step(case: Case) -> float:
    with FlopCounter() as counter:
        step(Eager(), case)
    return counter.total


def test_it_changes_over_when_enough_work_is_done_and_nothing_else_changes(case: Case) -> None:
    compiled = Counted()
    auto = Auto(compiled, hot=2.5 * flops_of_a_step(case))
    truth = step(Eager(), case)
    for number in range(6):
        for ours, eager in zip(step(auto, case), truth, strict=True):
            assert relative(ours, eager) < 1e-12
        assert compiled.calls == max(0, number - 2)


def test_the_work_of_a_step_is_what_it_costs(case: Case) -> None:
    auto = Auto(Counted())
    step(auto, case)
    (shape,) = auto._shapes[case.model].values()
    assert shape.step == pytest.approx(flops_of_a_step(case), rel=0.2)  # of the first layer a step costs less


def test_shapes_are_counted_apart(case: Case) -> None:
    compiled = Counted()
    auto = Auto(compiled, hot=1.5 * flops_of_a_step(case))
    part = Case(case.model, case.x[:2], case.y[:2])
    for each in (case, part, case, part):
        step(auto, each)
    assert compiled.calls == 0
    step(auto, case)
    assert compiled.calls == 1


def test_what_is_not_a_step_or_not_known_to_gain_stays_eager(case: Case) -> None:
    compiled = Counted()
    auto = Auto(compiled, hot=0.0)
    for _ in range(3):
        step(auto, case, differentiable=False)
        with torch.autocast("cpu", torch.bfloat16):
            step(auto, case.copy(torch.float32))
    case.model.train()
    auto.forward(Objective(case.model), case.x, case.y, 0.7, **OPTIONS)
    assert compiled.calls == 0


def test_without_a_compiler_it_stays_eager(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcure.engines.auto.has_compiler", lambda: False)
    compiled = Counted()
    auto = Auto(compiled, hot=0.0)
    for _ in range(3):
        step(auto, case)
    assert compiled.calls == 0


class Branching(nn.Module):
    """A network that the compiler cannot take whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh() if x.sum() > 0 else self.fc(x)


def test_what_cannot_be_compiled_stays_eager_for_good(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    case = Case(Branching(), torch.rand(4, 6, dtype=torch.float64), torch.arange(4) % 3)
    compiled = Counted()
    auto, truth = Auto(compiled, hot=0.0), step(Eager(), case)
    with caplog.at_level(logging.WARNING, "fastcure"):
        for _ in range(4):
            for ours, eager in zip(step(auto, case), truth, strict=True):
                assert relative(ours, eager) < 1e-12
    assert compiled.calls == 1
    assert "steps stay as they are: engine='compile' needs a model that torch.compile takes whole" in caplog.text


class Changing(nn.Module):
    """A network that reads a number which changes at each step: the compiler starts over each time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(6, 3).double(), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.sin()) * (1 + self.scale / 10)


def test_what_is_compiled_again_and_again_returns_to_eager(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Changing()
    case = Case(model, torch.rand(4, 6, dtype=torch.float64), torch.arange(4) % 3)
    compiled = Counted()
    auto = Auto(compiled, hot=0.0)
    with caplog.at_level(logging.WARNING, "fastcure"):
        for model.scale in range(8):
            for ours, eager in zip(step(auto, case), step(Eager(), case), strict=True):
                assert relative(ours, eager) < 1e-12
    assert compiled.calls == 4
    assert "steps are eager from now on" in caplog.text


def test_a_compilation_that_is_found_wrong_leaves_the_step_right(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = Counted()

    def refuse(*_: Any) -> None:
        raise RuntimeError("the compiled gradients differ")

    monkeypatch.setattr(compiled, "_check", refuse)
    auto, truth = Auto(compiled, hot=0.0), step(Eager(), case)
    for _ in range(3):
        for ours, eager in zip(step(auto, case), truth, strict=True):
            assert relative(ours, eager) < 1e-12
    assert compiled.calls == 1
    assert "the compiled gradients differ" in caplog.text


def test_the_default_engine_is_this_one_and_shares_the_compile_engine() -> None:
    auto = ENGINES["auto"]
    assert isinstance(auto, Auto)
    assert auto.compiled is ENGINES["compile"]


def test_a_batch_that_is_wrong_is_not_the_compilers_fault(case: Case) -> None:
    compiled = Counted()
    auto = Auto(compiled, hot=0.0)
    for _ in range(2):
        step(auto, case)
    bad = Case(case.model, case.x, torch.full_like(case.y, 99))
    with pytest.raises(Exception, match="labels must be in"):
        step(auto, bad)
    calls = compiled.calls
    step(auto, case)
    assert compiled.calls == calls + 1
