"""The objective that the settings of a run describe, and the schedules of its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fastcure.objectives import OBJECTIVES, Objective
from fastcure.objectives.standard import smoothed
from fastcure.schedules import Schedule
from fastcure.units import eps_to_h

if TYPE_CHECKING:
    from fastcure.training.settings import Settings

OPTIONS = ("power", "engine", "batch_stats", "loss_at", "fraction", "microbatch", "steps")
"""Settings of a run that are settings of objectives by the same name."""

SCHEDULES = {"gamma": "gamma", "h": "h", "eps": "train_eps"}
"""The setting of a run that has the schedule of each number of an objective."""


def settings_of(name: str) -> set[str]:
    """Return which settings of a run, of those that not every objective has, the objective called `name` has."""
    settings = OBJECTIVES[name].settings
    found = {option for option in OPTIONS if option in settings}
    found |= {setting for number, setting in SCHEDULES.items() if number in settings}
    return found | {"h_unit"} if "h" in settings else found


def make_objective(settings: Settings, model: nn.Module, microbatch: int | None = None) -> Objective:
    """Return the objective of fine-tuning.

    Args:
        settings: of the run.
        model: to train.
        microbatch: as in `CURE`.

    Raises:
        ValueError: if a setting is out of range for this objective, or two do not go together.
    """
    kind = OBJECTIVES[settings.objective]
    options: dict[str, Any] = {name: getattr(settings, name) for name in OPTIONS}
    options["microbatch"] = microbatch
    options["engine"] = "eager" if settings.engine == "auto" else settings.engine  # so that a resumed run is the same
    options |= {"loss_fn": smoothed(settings.label_smoothing), "eps": 0.0}  # eps: a schedule sets it
    return kind(model, **{name: value for name, value in options.items() if name in kind.settings})


def schedules_of(settings: Settings, numel: int) -> dict[str, Schedule]:
    """Return the schedules of fine-tuning: of `lr`, and of each number of the objective that has one.

    Args:
        settings: of the run.
        numel: numbers of an image.
    """
    found = {"lr": settings.schedule("lr")}
    for name in OBJECTIVES[settings.objective].scheduled:
        found[name] = step_lengths(settings, numel) if name == "h" else settings.schedule(SCHEDULES[name])
    return found


def step_lengths(settings: Settings, numel: int) -> Schedule:
    """Return the schedule of CURE's finite step as an L2 length, for images of `numel` numbers."""
    schedule = settings.schedule("h")
    return schedule if settings.h_unit == "l2" else schedule.times(eps_to_h(max(settings.eps), numel))
