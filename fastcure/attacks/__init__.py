"""Attacks: images near the given ones that a model gets wrong, in pixels in [0, 1]."""

from fastcure.attacks._autoattack import autoattack
from fastcure.attacks._deepfool import DeepFool, deepfool
from fastcure.attacks._gradient import fgsm, pgd
from fastcure.attacks._margin import margin_loss
from fastcure.attacks._spsa import spsa

__all__ = ["DeepFool", "autoattack", "deepfool", "fgsm", "margin_loss", "pgd", "spsa"]
