"""The objective that the settings of a run describe, and the schedules of its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fastcure.objectives import OBJECTIVES, Objective, Standard
from fastcure.objectives.base import refuse_parameters_beside
from fastcure.objectives.standard import smoothed
from fastcure.schedules import Schedule
from fastcure.units import eps_to_h

if TYPE_CHECKING:
    from fastcure.training.settings import Settings

OPTIONS = ("power", "engine", "batch_stats", "loss_at", "fraction", "microbatch", "steps")
"""Settings of a run that are settings of objectives by the same name."""

SCHEDULES = {"gamma": "gamma", "h": "h", "eps": "train_eps"}
"""The setting of a run that has the schedule of each number of an objective."""


ByPhase = dict[Literal["pretrain", "finetune"], Objective]


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


def check_objective(settings: Settings) -> None:
    """Check that there can be such an objective, and that no setting is lost on it.

    Raises:
        ValueError: if a setting is out of range or has no effect, two do not go together, or a number of the objective
            has no setting for its schedule.
    """
    make_objective(settings, nn.Identity(), settings.microbatch)
    kind = OBJECTIVES[settings.objective]
    for name in kind.scheduled:
        if name not in SCHEDULES:
            raise ValueError(
                f"{kind.__name__}.scheduled may name {', '.join(SCHEDULES)}, of which a run has schedules, got "
                f"{name!r}: leave it out, and give it a default"
            )
    if settings.label_smoothing and "loss_fn" not in kind.settings:
        raise ValueError(
            f"label_smoothing must be 0, as {kind.__name__} has no setting loss_fn, got {settings.label_smoothing}: "
            "leave it out, or take loss_fn in the constructor and name it in settings"
        )


def make_objectives(settings: Settings, model: nn.Module, images: torch.Size, device: torch.device) -> ByPhase:
    """Return the objective of each phase of a run, on the device, with room for what it keeps of each training sample.

    Args:
        settings: of the run.
        model: to train.
        images: `(N, C, H, W)`, of those that are trained on.
        device: of the model.

    Raises:
        ValueError: if a buffer that fine-tuning's is to have is not there, would not be saved, or has not N rows; if it
            has parameters beside those of the model, which alone are trained.
    """
    objective = make_objective(settings, model)
    refuse_parameters_beside(model, objective)
    objective.allocate(images[0], images[1:])
    saved, kind = objective.state_dict(), type(objective).__name__
    for name in objective.per_sample:
        if name not in saved:
            raise ValueError(
                f"{kind}.per_sample must name buffers that are saved, got {name!r}: call "
                f"self.register_buffer({name!r}, ...) in allocate"
            )
        if saved[name].shape[:1] != images[:1]:
            raise ValueError(
                f"{kind}.{name} must be ({images[0]}, ...), a row for each training sample, got "
                f"{tuple(saved[name].shape)}: make it of the count that allocate is given"
            )
    standard = Standard(model, smoothed(settings.label_smoothing))
    return {"pretrain": standard, "finetune": objective.to(device)}


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
