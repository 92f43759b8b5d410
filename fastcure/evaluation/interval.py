"""How sure an accuracy is: its confidence interval, and whether one attack leaves much more than another."""

from __future__ import annotations

from typing import NamedTuple

Z = 1.959963984540054
"""The normal distribution's quantile at 97.5 %: 95 % lie between minus this and this."""

MUCH = 0.05
"""What PGD may leave more than AutoAttack, as a share of the images. Of networks without masked gradients it leaves
some 2 to 4 points more (Croce and Hein, ICML 2020)."""


class Interval(NamedTuple):
    """Where the accuracy on all images of the kind lies, with a confidence of 95 %."""

    low: float
    high: float


def wilson(accuracy: float, images: int) -> Interval:
    """Return the 95 % interval of an accuracy that was measured on so many images (Wilson, 1927).

    It holds the accuracies p from which the measured one is no farther than 1.96 sqrt(p (1 - p) / images). It keeps to
    [0, 1] and stays honest near 0 and 1, where the accuracy plus and minus 1.96 standard errors does not. It is of the
    drawing of the images alone, not of the attack's random starts.

    Args:
        accuracy: in [0, 1].
        images: how many, >= 1.

    Raises:
        ValueError: if one is out of range.

    Examples:
        >>> from fastcure.evaluation.interval import wilson
        >>> low, high = wilson(0.5, 100)
        >>> f"{low:.3f} {high:.3f}"
        '0.404 0.596'
    """
    if images < 1:
        raise ValueError(f"images must be >= 1, got {images}")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy must be in [0, 1], got {accuracy}")
    shrink = Z**2 / images
    middle = (accuracy + shrink / 2) / (1 + shrink)
    half = (shrink * accuracy * (1 - accuracy) + shrink**2 / 4) ** 0.5 / (1 + shrink)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))


def with_interval(accuracy: float, images: int) -> str:
    """Format an accuracy and its interval, in percent.

    Examples:
        >>> from fastcure.evaluation.interval import with_interval
        >>> with_interval(0.5, 100)
        '50.0% [40.4, 59.6]'
    """
    low, high = wilson(accuracy, images)
    return f"{accuracy:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def weaker_than_autoattack(attack: str, left: float, autoattack: float, images: int) -> str | None:
    """Say so where an attack leaves much more accuracy than AutoAttack on the same images.

    Much is more than `MUCH`, and more than AutoAttack's interval reaches.

    Args:
        attack: its title, such as PGD-10.
        left: the accuracy under it.
        autoattack: under AutoAttack.
        images: of both.

    Examples:
        >>> from fastcure.evaluation.interval import weaker_than_autoattack
        >>> weaker_than_autoattack("PGD-10", 0.52, 0.5, 100) is None
        True
        >>> print(weaker_than_autoattack("PGD-10", 0.8, 0.5, 100))  # doctest: +ELLIPSIS
        PGD-10 leaves 80.0%, AutoAttack 50.0% [40.4, 59.6] of the same 100 images: 30.0 points less, 3.1 times ...
    """
    gap, reach = left - autoattack, wilson(autoattack, images).high - autoattack
    if gap <= max(reach, MUCH):
        return None
    return (
        f"{attack} leaves {left:.1%}, AutoAttack {with_interval(autoattack, images)} of the same {images:,} images: "
        f"{100 * gap:.1f} points less, {gap / reach:.1f} times as far as the 95 % interval reaches; the accuracy under "
        f"{attack} overstates the robustness: give PGD more steps and restarts, and look for gradient masking"
    )
