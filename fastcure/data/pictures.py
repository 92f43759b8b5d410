"""Image files as arrays: 8 bits a channel, decoded by Pillow, refused where they would take too much memory."""

from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcure._extras import extra
from fastcure.data.files import expansion_limit

GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr")  # the rest has more than 8 bits, which Pillow would clip
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # not EPS, which Pillow has a program run
PURPOSE = "to read images"


def header(source: Path | str | BytesIO, which: str) -> tuple[int, int, str]:
    """Read width, height and Pillow mode of an image file, of which nothing is decoded.

    Raises:
        ValueError: if it is in no common format, has more than 8 bits a channel, or would take too much memory.
    """
    pillow = extra("PIL.Image", PURPOSE)
    size = len(source.getbuffer()) if isinstance(source, BytesIO) else os.path.getsize(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(source, formats=FORMATS) as image:
            width, height = image.size
            values, mode = width * height * len(image.getbands()), image.mode
    if values > expansion_limit(size):
        raise ValueError(f"{which} announces {width}x{height} pixels in a file of {size:,} bytes: refused")
    check_mode(mode, which)
    return width, height, mode


def check_mode(mode: str, which: str) -> None:
    """Raise if an image has more than 8 bits a channel."""
    if mode not in GREY + COLOUR:
        raise ValueError(f"{which} must have 8 bits a channel, got Pillow mode {mode}")


def pixels(image: Any, channels: int, image_size: int | None) -> NDArray[np.uint8]:
    """Return a Pillow image as uint8 `(channels, H, W)`.

    Args:
        image: opened.
        channels: 1 for grey, 3 for RGB.
        image_size: S: the shorter side is scaled to S, bilinearly and without aliasing, and the middle of S x S is cut
            out. None leaves the size as it is.
    """
    image = image.convert("L" if channels == 1 else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        how = extra("PIL.Image", PURPOSE).Resampling.BILINEAR
        image = extra("PIL.ImageOps", PURPOSE).fit(image, (image_size, image_size), method=how)
    found = np.asarray(image)
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)
