"""What the user sets, and nothing would read, is an error that says so."""

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fastcure.evaluation.settings import EvaluationSettings
from fastcure.objectives import OBJECTIVES, Objective
from fastcure.training.objective import make_objectives
from fastcure.training.settings import make_settings

NETWORK = {"model": "own:net", "dataset": "npz:a.npz"}


@pytest.mark.parametrize(
    ("explicit", "message"),
    [
        ({"surrogate": "a.pt"}, "surrogate has no effect here, got a.pt: leave it out, or add --checklist"),
        ({"autoattack_images": 5}, "autoattack_images has no effect here, got 5: leave it out, or add --checklist"),
        ({"attacks": ("fgsm",), "restarts": 2}, "restarts has no effect here, got 2: .* --attacks pgd"),
        ({"attacks": ("fgsm",), "steps": 20}, "steps has no effect here, got 20: .* --attacks pgd"),
    ],
)
def test_an_evaluation_says_what_it_would_not_use(explicit: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings.of({**NETWORK, **explicit})


@pytest.mark.parametrize(
    "explicit",
    [
        {"surrogate": "a.pt", "autoattack_images": 5, "checklist": True},
        {"attacks": ("fgsm",), "steps": 20, "checklist": True},
        {"attacks": ("pgd",), "steps": 20, "restarts": 2},
    ],
)
def test_what_it_uses_is_welcome(explicit: dict[str, Any]) -> None:
    found = EvaluationSettings.of({**NETWORK, **explicit})
    assert {name: getattr(found, name) for name in explicit} == explicit


def test_momentum_is_of_sgd() -> None:
    with pytest.raises(ValueError, match="momentum is no setting of adamw: leave it out, or give --optimizer sgd"):
        make_settings({"optimizer": "adamw", "momentum": 0.5})
    assert make_settings({"optimizer": "sgd", "momentum": 0.5}).momentum == 0.5


class Own(Objective):
    """Takes nothing but a model."""

    settings = ()
    cost = 3.0

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)


def test_a_smoothing_that_the_objective_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "own", Own)
    assert make_settings({"objective": "own"}).label_smoothing == 0
    with pytest.raises(ValueError, match=r"label_smoothing must be 0, as Own has no setting loss_fn, got 0\.1: leave"):
        make_settings({"objective": "own", "label_smoothing": 0.1})


def test_a_schedule_for_which_there_is_no_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scheduled(Own):
        scheduled: ClassVar[tuple[str, ...]] = ("gamma", "beta")

    monkeypatch.setitem(OBJECTIVES, "own", Scheduled)
    with pytest.raises(ValueError, match=r"Scheduled\.scheduled may name gamma, h, eps, .* got 'beta': leave it out"):
        make_settings({"objective": "own"})


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_that_nothing_would_train_is_refused(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    class Projecting(Own):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.head = nn.Linear(3, 2).requires_grad_(not frozen)

    monkeypatch.setitem(OBJECTIVES, "own", Projecting)
    arguments = make_settings({"objective": "own"}), nn.Linear(4, 3), torch.Size((5, 1, 2, 2)), torch.device("cpu")
    if frozen:
        assert isinstance(make_objectives(*arguments)["finetune"], Projecting)
        return
    with pytest.raises(ValueError, match=r"Projecting has the parameter head\.weight, which would not be trained"):
        make_objectives(*arguments)
