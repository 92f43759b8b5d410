"""Attacks: images near the given ones that a model gets wrong, in pixels in [0, 1]."""

from fastcure.attacks.autoattack import autoattack
from fastcure.attacks.deepfool import DeepFool, deepfool
from fastcure.attacks.gradient import fgsm, pgd
from fastcure.attacks.margin import margin_loss
from fastcure.attacks.spsa import spsa

__all__ = ["DeepFool", "autoattack", "deepfool", "fgsm", "margin_loss", "pgd", "spsa"]
