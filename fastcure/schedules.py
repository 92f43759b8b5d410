"""Schedules of gamma, h, a learning rate, ..., written as `4x10,8x5,12x5` or `0:4x30%,4`."""

from __future__ import annotations

import math
from typing import NamedTuple

ONE_CYCLE = "onecycle:"
"""Begins the schedule of one cycle."""


class Segment(NamedTuple):
    """From `start` to `stop` in `epochs` epochs, linearly or along half a wave of the cosine."""

    start: float
    stop: float
    epochs: float
    cosine: bool = False

    def at(self, epoch: float) -> float:
        """Return the value at an epoch of the segment, counted from its start."""
        if self.cosine:
            epoch = self.epochs * (1 - math.cos(math.pi * epoch / self.epochs)) / 2
        return self.start + (self.stop - self.start) * epoch / self.epochs


class Schedule(NamedTuple):
    """A function of the epoch, segment by segment; `fastcure.schedule` makes one."""

    segments: tuple[Segment, ...]

    def at(self, epoch: float) -> float:
        """Return the value at a (fractional) epoch; past the end, the last value."""
        for segment in self.segments:
            if epoch < segment.epochs:
                return segment.at(epoch)
            epoch -= segment.epochs
        return self.segments[-1].stop

    def times(self, factor: float) -> Schedule:
        """Return the schedule in another unit."""
        return Schedule(
            tuple(each._replace(start=factor * each.start, stop=factor * each.stop) for each in self.segments)
        )


def schedule(text: str, epochs: float, name: str = "schedule") -> Schedule:
    """Read a schedule: segments `VALUE` or `FROM:TO`, each but the last followed by `xEPOCHS`, joined by commas.

    `4x10,8x5,12x5` holds 4 for ten epochs, then 8 for five, then 12 for five; `0:4x30%,4` climbs from 0 to 4 in the
    first 30 % of the run and stays; `1e-3:1e-5` falls throughout. `onecycle:1e-2` is torch's OneCycleLR with its
    defaults: from a 25th up to 1e-2 in 30 % of the run, and down to 4e-8 of 1e-2, both along a cosine.

    Args:
        text: the schedule.
        epochs: length of the run; a last segment without `xEPOCHS` takes what is left of it.
        name: of the setting, for errors.

    Raises:
        ValueError: if it cannot be read, has a negative value, or does not last `epochs` epochs.

    Examples:
        >>> import fastcure
        >>> gamma = fastcure.schedule("0:4x30%,4", epochs=20)
        >>> [gamma.at(epoch) for epoch in (0, 1.5, 3, 6, 20)]
        [0.0, 1.0, 2.0, 4.0, 4.0]
    """
    text = text.replace(" ", "")
    if text.startswith(ONE_CYCLE):
        return _one_cycle(name, text, epochs)
    parts = text.split(",")
    segments, left = [], float(epochs)
    for index, part in enumerate(parts):
        values, cross, length = part.partition("x")
        start, _, stop = values.partition(":")
        try:
            if not cross and index == len(parts) - 1:
                lasts = left
            else:
                lasts = float(length[:-1]) / 100 * epochs if length.endswith("%") else float(length)
            segment = Segment(float(start), float(stop or start), lasts)
        except ValueError:
            raise ValueError(
                f"{name} must be a number or a schedule such as 4x10,8x5,12x5 or 0:4x30%,4 or onecycle:4, got {text!r}"
            ) from None
        if not all(math.isfinite(v) and v >= 0 for v in segment):
            raise ValueError(f"{name} must be finite and >= 0 throughout, got {part!r} in {text!r}")
        segments.append(segment)
        left -= lasts
    if abs(left) > 1e-9:
        raise ValueError(f"{name} must last the run's {epochs:g} epochs, got {epochs - left:g} in {text!r}")
    return Schedule(tuple(segments))


def _one_cycle(name: str, text: str, epochs: float) -> Schedule:
    """Smith, Topin, "Super-Convergence", 2018, as `torch.optim.lr_scheduler.OneCycleLR` has it."""
    try:
        peak = float(text.removeprefix(ONE_CYCLE))
    except ValueError:
        peak = math.nan
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"{name} must be onecycle:PEAK with a peak > 0, such as onecycle:1e-2, got {text!r}")
    start, up = peak / 25, 0.3 * epochs
    return Schedule((Segment(start, peak, up, True), Segment(peak, start / 1e4, epochs - up, True)))
