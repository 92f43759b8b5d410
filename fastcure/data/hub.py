"""Image classification sets of the Hugging Face hub, or of a local folder in one of its layouts."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcure.data.dataset import Dataset, checked
from fastcure.data.extras import extra
from fastcure.data.files import MAX_BYTES

GREY = ("1", "L", "LA")
COLOUR = ("RGB", "RGBA", "P", "CMYK", "YCbCr")  # the rest has more than 8 bits, which Pillow would clip
LABELS = ("label", "labels")


def read(address: str) -> Dataset:
    """Read the train split, and the test (or else the validation) split, through the ``datasets`` library.

    The images are the column of type Image; the labels the ClassLabel column, or an integer column called
    label or labels. Images come out grey if all are, else as RGB, and must have one size.
    """
    extra("PIL")  # which the library needs for images without saying so
    library = extra("datasets")
    name = f"hf:{address}"
    splits = library.load_dataset(address)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"{name}: needs the splits train and test (or validation), has {', '.join(splits)}")
    image, label, classes = _columns(name, splits["train"].features, library)
    images, labels = [], []
    for split in (splits["train"], splits[test]):
        images.append(_images(name, split.select_columns(image), image))
        labels.append(np.array(split[label][:]))
    channels = max(x.shape[0] for split in images for x in split)
    x_train, x_test = (_stack(split, channels) for split in images)
    return checked(name, (x_train, labels[0]), (x_test, labels[1]), classes)


def _columns(name: str, features: Any, library: Any) -> tuple[str, str, int | None]:
    """The image column, the label column, and the number of classes where the set declares it."""
    images = [column for column, kind in features.items() if isinstance(kind, library.Image)]
    declared = [column for column, kind in features.items() if isinstance(kind, library.ClassLabel)]
    whole = [c for c in LABELS if "int" in getattr(features.get(c), "dtype", "")]
    labels = [column for column in declared if len(declared) == 1 or column in LABELS] or whole
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"{name}: needs one Image column and one label column, has {dict(features)}")
    return images[0], labels[0], getattr(features[labels[0]], "num_classes", None)


def _images(name: str, split: Any, column: str) -> list[NDArray[np.uint8]]:
    """Arrays (1, H, W) or (3, H, W), all of one size."""
    arrays: list[NDArray[np.uint8]] = []
    first = None
    for row in split:
        image = row[column]
        if image is None or image.mode not in GREY + COLOUR:
            found = "none" if image is None else f"Pillow mode {image.mode}"
            raise ValueError(f"{name}: image {len(arrays)} must have 8 bits a channel, got {found}")
        first = first or image.size
        if image.size != first:
            sizes = "{}x{} and {}x{}".format(*first, *image.size)
            raise ValueError(f"{name}: images must have one size, got {sizes}; resize them first")
        pixels = np.asarray(image.convert("L" if image.mode in GREY else "RGB"))
        if pixels.size * len(split) > MAX_BYTES:
            raise ValueError(f"{name}: {len(split)} images {pixels.shape} exceed {MAX_BYTES:,} bytes of memory")
        arrays.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return arrays


def _stack(images: list[NDArray[np.uint8]], channels: int) -> NDArray[np.uint8]:
    return np.stack([np.broadcast_to(x, (channels, *x.shape[1:])) for x in images])
