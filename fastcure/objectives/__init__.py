"""Objectives: what a training step minimises.

`OBJECTIVES` has each by its name; one entry more, and it is a choice of `fastcure finetune --objective`.
"""

from fastcure.objectives.base import Objective, ObjectiveOutput
from fastcure.objectives.cure import CURE
from fastcure.objectives.standard import SmoothedCrossEntropy, Standard

OBJECTIVES: dict[str, type[Objective]] = {"cure": CURE, "standard": Standard}

__all__ = ["CURE", "OBJECTIVES", "Objective", "ObjectiveOutput", "SmoothedCrossEntropy", "Standard"]
