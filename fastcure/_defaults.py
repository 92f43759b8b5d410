"""Defaults of the penalty, in one table: `curvature`, `CURE` and what is built on them take them from here."""

from __future__ import annotations

from typing import Literal

BatchStats = Literal["frozen", "split", "train"]

H = 1.25
"""L2 length of the finite step: on 32 x 32 colour images, 5.8/255 a pixel."""
GAMMA = 4.0
"""Weight of the penalty."""
BATCH_STATS: BatchStats = "frozen"
