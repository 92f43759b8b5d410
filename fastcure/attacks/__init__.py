"""Attacks: images near the given ones that a model gets wrong, in pixels in [0, 1]."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcure.attacks._autoattack import autoattack
from fastcure.attacks._deepfool import DeepFool, deepfool
from fastcure.attacks._gradient import fgsm, pgd
from fastcure.attacks._margin import margin_loss
from fastcure.attacks._spsa import spsa


def _fgsm(*args: Any, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    return fgsm(*args, **options)  # draws nothing


def _spsa(*args: Any, eot: int = 1, **options: Any) -> Tensor:
    return spsa(*args, **options)  # its estimate is a mean of many passes as it is


ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": _fgsm, "pgd": pgd, "spsa": _spsa, "autoattack": autoattack}
"""The attacks of `fastcure evaluate`: each takes a model, images, labels, `eps`, and by name `eot` and `generator`."""

L2_ATTACKS = ("pgd", "autoattack")
"""Those of them that take `norm="l2"`; the others are of L-infinity."""

__all__ = ["ATTACKS", "L2_ATTACKS", "DeepFool", "autoattack", "deepfool", "fgsm", "margin_loss", "pgd", "spsa"]
