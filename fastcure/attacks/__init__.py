"""Attacks: images near the given ones that a model gets wrong, in pixels in [0, 1]."""

from fastcure.attacks.gradient import fgsm, pgd

__all__ = ["fgsm", "pgd"]
