"""What determines a run of the robustness study: a recipe of training, and the setting of its grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.nn import functional as F

from fastcure import eps_to_h
from fastcure.models import MODELS, resnet8
from fastcure.objectives import OBJECTIVES, Objective
from fastcure.schedules import Schedule, schedule

NETWORKS: dict[str, Callable[..., nn.Module]] = {**MODELS, "resnet8-gelu": partial(resnet8, activation=F.gelu)}


@dataclass(frozen=True)
class Setting:
    """What all runs of a grid share."""

    dataset: str
    model: str
    eps: float
    train: int
    validation: int
    test: int
    batch_size: int
    autoattack_images: int
    """The first of the test images; AutoAttack sees no others."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Schedules are those of `fastcure.schedules`."""

    label: str
    """Name of the curve that it is a point of."""
    objective: str
    """One of `fastcure.objectives.OBJECTIVES`."""
    epochs: int
    lr: str
    """Schedule of Adam's learning rate."""
    start: str = "standard"
    """"standard": the network after standard training; "scratch": initial weights."""
    batch_stats: str = "train"
    steps: int = 0
    """Of the attack of PGD and TRADES; the others have none to choose."""
    gamma: str = "0"
    """Schedule of the penalty's weight."""
    h: str = "1"
    """Schedule of CURE's finite step, in units of `eps sqrt(N)`: the FGSM step of eps."""
    power: int = 2
    fraction: float = 1.0
    loss_at: str = "x"
    engine: str = "eager"

    def make(self, model: nn.Module) -> Objective:
        """Return the objective; its radius, gamma and h are set by the schedules.

        Raises:
            ValueError: if the objective does not know one of the options.
        """
        kind = OBJECTIVES[self.objective]
        options: dict[str, Any] = {name: getattr(self, name) for name in kind.settings if name in OPTIONS}
        return kind(model, **options, **({"eps": 0.0} if "eps" in kind.settings else {}))

    def schedules(self, eps: float, numel: int) -> dict[str, Schedule]:
        """Return the schedules of the learning rate and of the objective's numbers, on images of `numel` numbers."""
        found = {name: schedule(getattr(self, name), self.epochs, name) for name in ("lr", "gamma", "h")}
        found["h"] = found["h"].times(eps_to_h(eps, numel))
        found["eps"] = schedule(repr(eps), self.epochs, "eps")
        return {name: found[name] for name in ("lr", *OBJECTIVES[self.objective].scheduled)}


OPTIONS = ("batch_stats", "steps", "power", "fraction", "loss_at", "engine")
"""Fields of a recipe that are settings of objectives."""
