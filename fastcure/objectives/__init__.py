"""Objectives: what a training step minimises.

`OBJECTIVES` has each by its name; one entry more, and it is a choice of `fastcure finetune --objective`.
"""

from fastcure.objectives.adversarial import FGSM, FGSMRS, PGD
from fastcure.objectives.base import Objective, ObjectiveOutput
from fastcure.objectives.cure import CURE
from fastcure.objectives.input_gradient import InputGradient
from fastcure.objectives.standard import SmoothedCrossEntropy, Standard
from fastcure.objectives.trades import TRADES

OBJECTIVES: dict[str, type[Objective]] = {
    "cure": CURE,
    "standard": Standard,
    "input-gradient": InputGradient,
    "fgsm": FGSM,
    "fgsm-rs": FGSMRS,
    "pgd": PGD,
    "trades": TRADES,
}

__all__ = [
    "CURE",
    "FGSM",
    "FGSMRS",
    "OBJECTIVES",
    "PGD",
    "TRADES",
    "InputGradient",
    "Objective",
    "ObjectiveOutput",
    "SmoothedCrossEntropy",
    "Standard",
]
