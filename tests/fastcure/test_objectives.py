"""Every objective against its definition, written out in float64, and what each declares against what it does."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign import Cube, Detached, OnceOnly
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from fastcure import CURE, CUREOutput
from fastcure._functional import cross_entropy as functional_cross_entropy
from fastcure.models import resnet8
from fastcure.objectives import (
    FGSM,
    FGSMRS,
    OBJECTIVES,
    PGD,
    TRADES,
    InputGradient,
    Objective,
    ObjectiveOutput,
    SmoothedCrossEntropy,
    Standard,
)
from fastcure.objectives.standard import smoothed
from fastcure.profiling.flops import FlopCounter
from fastcure.training.objective import OPTIONS, SCHEDULES

EPS = 0.1


def network(dropout: float = 0.0) -> nn.Module:
    """Batch norms whose running statistics are not those of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(80, 4)
    ).double()
    model(torch.rand(9, 3, 6, 6, dtype=torch.float64))
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(7, 3, 6, 6, generator=generator, dtype=torch.float64), torch.arange(7) % 4


def make(name: str, model: nn.Module, **options: Any) -> Objective:
    given: dict[str, Any] = {"eps": EPS, "gamma": 0.7, "steps": 3, "h": 0.5, **options}
    kind = OBJECTIVES[name]
    return kind(model, **{key: value for key, value in given.items() if key in kind.settings})


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return -logits.log_softmax(1)[range(len(y)), y]


def gradient(loss: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    return torch.autograd.grad(loss, at, create_graph=create_graph)[0]


def uniform_start(x: Tensor) -> Tensor:
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))  # drawn and scaled in float32
    return (x + (EPS * (2 * noise - 1)).double()).clamp(0, 1)


def ascend(loss: Callable[[Tensor], Tensor], x: Tensor, adv: Tensor, step_size: float, steps: int) -> Tensor:
    for _ in range(steps):
        point = adv.detach().requires_grad_()
        adv = adv + step_size * gradient(loss(point), point).sign()
        adv = torch.minimum(torch.maximum(adv, x - EPS), x + EPS).clamp(0, 1)
    return adv.detach()


def standard(model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(model(x), y).mean(), torch.zeros(())


def fgsm(model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    adv = ascend(lambda z: cross_entropy(attacked(z), y).sum(), x, x, EPS, 1)
    return standard(model, attacked, adv, y)


def fgsm_rs(model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    adv = ascend(lambda z: cross_entropy(attacked(z), y).sum(), x, uniform_start(x), 1.25 * EPS, 1)
    return standard(model, attacked, adv, y)


def pgd(model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    adv = ascend(lambda z: cross_entropy(attacked(z), y).sum(), x, uniform_start(x), 2.5 * EPS / 3, 3)
    return standard(model, attacked, adv, y)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def trades(model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    p = attacked(x).softmax(1).detach()
    adv = ascend(lambda z: divergence(p, attacked(z).softmax(1)).sum(), x, uniform_start(x), 2.5 * EPS / 3, 3)
    logits = model(torch.cat([x, adv]))
    return cross_entropy(logits[:7], y).mean(), divergence(logits[:7].softmax(1), logits[7:].softmax(1)).mean()


def input_gradient(model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    point = x.clone().requires_grad_()
    losses = cross_entropy(model(point), y)
    return losses.mean(), gradient(losses.sum(), point, create_graph=True).square().sum((1, 2, 3)).mean()


DEFINITIONS = {
    "standard": standard,
    "fgsm": fgsm,
    "fgsm-rs": fgsm_rs,
    "pgd": pgd,
    "trades": trades,
    "input-gradient": input_gradient,
}


def test_every_setting_is_one_of_finetune() -> None:
    settings = {name for kind in OBJECTIVES.values() for name in kind.settings} - {"loss_fn"}
    assert settings <= {*OPTIONS, *SCHEDULES}, "a new setting needs a field in training/settings.py, and its name here"


def test_every_objective_has_a_definition() -> None:
    assert {*DEFINITIONS, "cure"} == set(OBJECTIVES)  # CURE's tests are files of their own


@pytest.mark.parametrize("batch_stats", ["train", "frozen"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_is_its_definition(name: str, batch_stats: str) -> None:
    (x, y), model = batch(), network(dropout=0.2 if batch_stats == "train" else 0.0)
    other, attacked = copy.deepcopy(model), copy.deepcopy(model).eval()
    other.train(batch_stats == "train")
    objective = make(name, model, batch_stats=batch_stats)
    objective.generator = torch.Generator().manual_seed(2)

    torch.manual_seed(3)  # of dropout
    total, loss, penalty, logits = objective(x, y)
    total.backward()
    torch.manual_seed(3)
    wanted_loss, wanted_penalty = DEFINITIONS[name](other, attacked, x, y)
    (wanted_loss + 0.7 * wanted_penalty).backward()

    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(loss, wanted_loss, **close)
    torch.testing.assert_close(penalty.double(), wanted_penalty.double(), **close)
    torch.testing.assert_close(total, loss + 0.7 * penalty, **close)
    for parameter, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, **close)
    for buffer, wanted in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, **close)
    assert logits.shape == (7, 4)
    assert not logits.requires_grad
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_declares_what_it_does(name: str) -> None:
    kind, (x, y) = OBJECTIVES[name], batch()
    assert kind.title
    assert set(kind.scheduled) <= set(kind.settings)
    assert set(kind.settings) <= set(inspect.signature(kind).parameters)
    for batch_stats in kind.modes:
        model = network()
        before = copy.deepcopy(model)
        objective = make(name, model, batch_stats=batch_stats)
        assert [getattr(objective, each) for each in kind.settings]
        assert f"batch_stats={batch_stats!r}" in repr(objective)
        whole = objective(x, y)
        moved = not all(torch.equal(*pair) for pair in zip(model.buffers(), before.buffers(), strict=True))
        assert moved == objective.updates_buffers
        if objective.can_microbatch:
            divided = make(name, before, batch_stats=batch_stats, microbatch=3)(x, y)
            torch.testing.assert_close(divided.penalty, whole.penalty.detach())
    with pytest.raises(ValueError, match=r"batch_stats must be .*'frozen'.* got 'best'"):
        make(name, network(), batch_stats="best")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_cost_is_what_is_counted(name: str) -> None:
    """In convolutions and matrix products; 3 % are for the first layer, which takes part in less of a step."""
    model, x, y = resnet8(), torch.rand(8, 3, 32, 32), torch.arange(8)
    with torch.no_grad(), FlopCounter() as forward:
        model(x)
    options: list[dict[str, Any]] = [{}]
    if name == "cure":
        options += [{"batch_stats": "split"}, {"fraction": 0.25}, {"fraction": 0.25, "loss_at": "step"}]
        options += [{"fraction": 0.5, "batch_stats": "split"}, {"loss_at": "step"}]
    for some in options:
        objective = make(name, model, **some)
        with FlopCounter() as counter:
            objective(x, y).total.backward()
        assert counter.total / forward.total == pytest.approx(objective.cost, rel=0.03), some


def test_a_step_that_is_not_a_number_stays_one() -> None:
    """No attack hides it: a trainer is to see it."""
    x, y = batch()
    x[0, 0, 0, 0] = torch.nan
    for name in OBJECTIVES:
        assert make(name, network())(x, y).total.isnan(), name


def test_no_smoothing_is_plain_cross_entropy() -> None:
    assert smoothed(0.0) is functional_cross_entropy
    assert isinstance(smoothed(0.1), SmoothedCrossEntropy)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    logits, (_, y) = torch.randn(7, 4, dtype=torch.float64), batch()
    wanted = F.cross_entropy(logits, y, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(SmoothedCrossEntropy(smoothing)(logits, y), wanted)
    soft = F.one_hot(y, 4).double()
    torch.testing.assert_close(SmoothedCrossEntropy(smoothing)(logits, soft), wanted)
    with pytest.raises(ValueError, match=r"label smoothing must be in \[0, 1\), got 1"):
        SmoothedCrossEntropy(1.0)


def test_dropout_that_frozen_passes_leave_out_is_warned_of_once() -> None:
    (x, y), model = batch(), network(dropout=0.2)
    Standard(model)(x, y)
    objective = Standard(model, batch_stats="frozen")
    with pytest.warns(UserWarning, match=r"leaves out 4 \(Dropout, 0\.2\).* batch_stats='train' has it"):
        objective(x, y)
    objective(x, y)


def test_a_loss_of_ones_own_is_attacked_and_trained() -> None:
    (x, y), model = batch(), network().eval()
    loss_fn = SmoothedCrossEntropy(0.3)
    found = FGSM(model, EPS, loss_fn=loss_fn)(x, y).total
    adv = ascend(lambda z: loss_fn(model(z), y).sum(), x, x, EPS, 1)
    torch.testing.assert_close(found, loss_fn(model(adv), y).mean())


def test_model_and_loss_are_attacked_in_evaluation_mode_and_trained_in_theirs() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            self.modes.append((model.training, self.training))
            return F.cross_entropy(logits, y, reduction="none")

    (x, y), model, loss_fn = batch(), network(), Watched()
    FGSM(model, EPS, loss_fn=loss_fn)(x, y)
    assert loss_fn.modes == [(False, False), (True, True)]


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def test_an_operator_without_a_second_derivative_has_no_silent_input_gradient() -> None:
    """Its share of the gradient would be zero: torch says nothing of it."""

    def step(function: type[torch.autograd.Function], *more: nn.Module) -> None:
        model = nn.Sequential(network(), Applied(function), *more).train()
        InputGradient(model)(*batch()).total.backward()

    step(Cube)
    for function in (OnceOnly, Detached):
        with pytest.raises(RuntimeError, match=f"{function.__name__}Backward has no second derivative"):
            step(function)
    with pytest.raises(RuntimeError, match="scripted"):
        step(Cube, torch.jit.script(nn.Tanh()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FGSM(network(), -0.1), ValueError, "eps must be >= 0, got -0.1"),
        (lambda: PGD(network(), 0.1, 0), ValueError, "steps must be a whole number >= 1, got 0"),
        (lambda: TRADES(network(), 0.1, -1.0), ValueError, "gamma must be >= 0, got -1"),
        (lambda: InputGradient(network(), float("nan")), ValueError, "gamma must be >= 0, got nan"),
        (lambda: setattr(PGD(network(), 0.1), "eps", -1.0), ValueError, "eps must be >= 0"),
        (lambda: setattr(PGD(network(), 0.1), "step", 3), AttributeError, "PGD has no setting 'step': .* 'steps'"),
        (lambda: setattr(FGSMRS(network(), 0.1), "epps", 3), AttributeError, "FGSMRS has no setting 'epps'"),
        (
            lambda: Standard(network(), batch_stats="split"),
            ValueError,
            "batch_stats must be 'train' or 'frozen' for Standard, got 'split'",
        ),
        (lambda: FGSM(network(), 0.1)(*[255 * batch()[0], batch()[1]]), ValueError, "x must hold pixels in"),
        (lambda: FGSM(torch.tanh, 0.1), TypeError, "model must be a torch.nn.Module"),  # type: ignore[arg-type]
    ],
)
def test_misuse_is_an_error(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_setting_on_a_wrapper_is_refused_for_every_objective() -> None:
    x, y = batch()
    wrapper: Any = AveragedModel(PGD(network(), EPS))
    wrapper(x, y)
    wrapper.eps = 0.0
    with pytest.raises(ValueError, match=r"eps was set to .* on the AveragedModel around PGD, where it has"):
        wrapper(x, y)


def test_one_name_for_what_a_step_returns() -> None:
    assert CUREOutput is ObjectiveOutput
    assert isinstance(CURE(network())(*batch()), ObjectiveOutput)
