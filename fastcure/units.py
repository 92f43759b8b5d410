"""The step length h of CURE in the units of attacks, and back.

`x + h z` is an FGSM point: on N input values with no gradient entry zero, an L2 length h is `h / sqrt(N)` per pixel.
"""

import math


def h_to_eps(h: float, values: int) -> float:
    """Return the step per pixel, in [0, 1] pixel units, of an L2 length `h` on `values` input values.

    Examples:
        >>> import fastcure
        >>> round(fastcure.h_to_eps(1.25, 3 * 32 * 32) * 255, 2)
        5.75
    """
    return h / math.sqrt(_count(values))


def eps_to_h(eps: float, values: int) -> float:
    """Return the L2 length of a step of `eps` per pixel on `values` input values.

    Examples:
        >>> import fastcure
        >>> round(fastcure.eps_to_h(8 / 255, 3 * 32 * 32), 3)
        1.739
    """
    return eps * math.sqrt(_count(values))


def _count(values: int) -> int:
    if values < 1:
        raise ValueError(f"values must be the number of input values of a sample, >= 1, got {values}")
    return values
