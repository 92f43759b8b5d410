"""What is on a picture."""

import io

import numpy as np
from PIL import Image

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
"""Of the curves, as in `fastcure.training.curves` and `fastcure.report.figures`."""


def drawn(png: bytes, colour: tuple[int, int, int] | None = None) -> int:
    """How many pixels have this colour, or any but white."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return int((pixels != 255).any(2).sum() if colour is None else (pixels == colour).all(2).sum())
