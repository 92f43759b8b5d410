"""Image classification sets of the Hugging Face hub, or of a local folder in one of its layouts."""

import os
import warnings
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcure._extras import extra
from fastcure.data.dataset import Dataset, checked
from fastcure.data.files import MAX_BYTES, expansion_limit, reading

GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr")  # the rest has more than 8 bits, which Pillow would clip
LABELS = ("label", "labels")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")  # not EPS, which Pillow has a program run


def read(address: str) -> Dataset:
    """Read the train split, and the test (or else the validation) split, through the ``datasets`` library.

    The images are the column of type Image; the labels the ClassLabel column, or an integer column called
    label or labels. Images come out grey if all are, else as RGB, and must have one size.
    """
    extra("PIL", "to read hf: datasets")  # which the library needs for images without saying so
    library = extra("datasets", "to read hf: datasets")
    name = f"hf:{address}"
    with reading(name):
        splits = _load(library, address)
        test = next((split for split in ("test", "validation") if split in splits), None)
        if "train" not in splits or test is None:
            raise ValueError(f"needs the splits train and test (or validation), has {', '.join(splits)}")
        image, label, classes = _columns(splits["train"].features, library)
        images, labels = [], []
        for split in (splits["train"], splits[test]):
            images.append(_images(split.select_columns(image), image, library))
            labels.append(np.array(split[label][:]))
        channels = max(x.shape[0] for split in images for x in split)
        x_train, x_test = (_stack(split, channels) for split in images)
    return checked(name, (x_train, labels[0]), (x_test, labels[1]), classes)


def _load(library: Any, address: str) -> Any:
    try:
        return library.load_dataset(address)
    except library.exceptions.DatasetGenerationError as error:  # which keeps the reason to itself
        raise error.__cause__ or error from None


def _columns(features: Any, library: Any) -> tuple[str, str, int | None]:
    """The image column, the label column, and the number of classes where the set declares it."""
    images = [column for column, kind in features.items() if isinstance(kind, library.Image)]
    declared = [column for column, kind in features.items() if isinstance(kind, library.ClassLabel)]
    whole = [c for c in LABELS if "int" in getattr(features.get(c), "dtype", "")]
    labels = [column for column in declared if len(declared) == 1 or column in LABELS] or whole
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"needs one Image column and one label column, has {dict(features)}")
    return images[0], labels[0], getattr(features[labels[0]], "num_classes", None)


def _images(split: Any, column: str, library: Any) -> list[NDArray[np.uint8]]:
    """Arrays (1, H, W) or (3, H, W), all of one size."""
    arrays: list[NDArray[np.uint8]] = []
    decoded = library.Image(mode=split.features[column].mode)
    first = None
    for row in split.cast_column(column, library.Image(decode=False)):
        if row[column] is None:
            raise ValueError(f"image {len(arrays)} must have 8 bits a channel, got none")
        _check_size(row[column], f"image {len(arrays)}", len(split))
        image = decoded.decode_example(row[column])
        if image.mode not in GREY + COLOUR:
            raise ValueError(f"image {len(arrays)} must have 8 bits a channel, got Pillow mode {image.mode}")
        first = first or image.size
        if image.size != first:
            sizes = "{}x{} and {}x{}".format(*first, *image.size)
            raise ValueError(f"images must have one size, got {sizes}; resize them first")
        pixels = np.asarray(image.convert("L" if image.mode in GREY else "RGB"))
        arrays.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return arrays


def _check_size(file: dict[str, Any], which: str, count: int) -> None:
    """Look at the header of an image file before anything is decoded.

    Raises:
        ValueError: if it is in no common format, at another address, or would take too much memory.
    """
    content, path = file["bytes"], file["path"]
    if content is None and "://" in (path or ""):
        raise ValueError(f"{which} is at the address {path}, which is not followed: save the images themselves")
    pillow = extra("PIL.Image", "to read hf: datasets")
    source, size = (path, os.path.getsize(path)) if content is None else (BytesIO(content), len(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        with pillow.open(source, formats=FORMATS) as image:
            width, height = image.size
            values = width * height * len(image.getbands())
    if values > expansion_limit(size):
        raise ValueError(f"{which} announces {width}x{height} pixels in a file of {size:,} bytes: refused")
    if values * count > MAX_BYTES:
        raise ValueError(f"{count} images of {width}x{height} pixels exceed {MAX_BYTES:,} bytes of memory")


def _stack(images: list[NDArray[np.uint8]], channels: int) -> NDArray[np.uint8]:
    return np.stack([np.broadcast_to(x, (channels, *x.shape[1:])) for x in images])
