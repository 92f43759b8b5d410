"""Image classification sets of the Hugging Face hub, or of a local folder in one of its layouts."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcure._extras import extra
from fastcure.data.dataset import Dataset, Reading, checked
from fastcure.data.files import MAX_BYTES, reading
from fastcure.data.pictures import GREY, check_mode, header, pixels

LABELS = ("label", "labels")


def read(address: str, how: Reading) -> Dataset:
    """Read the train split, and the test (or else the validation) split, through the ``datasets`` library.

    The images are the column of type Image; the labels the ClassLabel column, or an integer column called
    label or labels. Images come out grey if all are, else as RGB, and must have one size if ``how`` gives them none.
    Where nothing trains, a test split will do. Labels with names are numbered as those of ``how`` are.
    """
    extra("PIL", "to read hf: datasets")  # which the library needs for images without saying so
    library = extra("datasets", "to read hf: datasets")
    name = f"hf:{address}"
    with reading(name):
        splits = _load(library, address)
        test = next((split for split in ("test", "validation") if split in splits), None)
        trains = how.train or "train" in splits
        if (trains and "train" not in splits) or test is None:
            raise ValueError(f"needs the splits train and test (or validation), has {', '.join(splits)}")
        used = [splits["train"], splits[test]] if trains else [splits[test]]
        image, label, classes = _columns(used[0].features, library)
        images, labels = [], []
        for split in used:
            images.append(_images(split.select_columns(image), image, library, how))
            labels.append(np.array(split[label][:]))
        if how.classes and classes:
            labels = [_renumbered(y, classes, how.classes) for y in labels]
            classes = list(how.classes)
        channels = how.channels or max(x.shape[0] for split in images for x in split)
        parts = [(_stack(split, channels), y) for split, y in zip(images, labels, strict=True)]
    train, test_part = (parts[0], parts[1]) if trains else (None, parts[0])
    return checked(name, train, test_part, len(classes) if classes else None, classes or ())


def _load(library: Any, address: str) -> Any:
    try:
        return library.load_dataset(address)
    except library.exceptions.DatasetGenerationError as error:  # which keeps the reason to itself
        raise error.__cause__ or error from None


def _columns(features: Any, library: Any) -> tuple[str, str, list[str] | None]:
    """The image column, the label column, and the names of the classes where the set declares them."""
    images = [column for column, kind in features.items() if isinstance(kind, library.Image)]
    declared = [column for column, kind in features.items() if isinstance(kind, library.ClassLabel)]
    whole = [c for c in LABELS if "int" in getattr(features.get(c), "dtype", "")]
    labels = [column for column in declared if len(declared) == 1 or column in LABELS] or whole
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"needs one Image column and one label column, has {dict(features)}")
    return images[0], labels[0], getattr(features[labels[0]], "names", None)


def _renumbered(y: NDArray[Any], names: Sequence[str], wanted: Sequence[str]) -> NDArray[Any]:
    """Return labels of the classes `names` as those of the same names among `wanted`; -1, no label, stays."""
    strangers = [name for label, name in enumerate(names) if name not in wanted and (y == label).any()]
    if strangers:
        raise ValueError(
            f"{strangers[0]} must be one of the classes {', '.join(wanted)}, which the network was trained on: rename "
            "it; or give --model and --checkpoint in place of --run, and labels count by their numbers"
        )
    places = [wanted.index(name) if name in wanted else -1 for name in names]
    return np.array([*places, -1])[y]


def _images(split: Any, column: str, library: Any, how: Reading) -> list[NDArray[np.uint8]]:
    """Arrays (C, H, W), all of one size; C is 1 or 3."""
    arrays: list[NDArray[np.uint8]] = []
    decoded = library.Image(mode=split.features[column].mode)
    first = None
    for row in split.cast_column(column, library.Image(decode=False)):
        which = f"image {len(arrays)}"
        if row[column] is None:
            raise ValueError(f"{which} must have 8 bits a channel, got none")
        _check_size(row[column], which, len(split), how.image_size)
        image = decoded.decode_example(row[column])
        check_mode(image.mode, which)
        first = first or image.size
        if image.size != first and how.image_size is None:
            sizes = "{}x{} and {}x{}".format(*first, *image.size)
            raise ValueError(f"images must have one size, got {sizes}: give --image-size N (image_size=N)")
        channels = how.channels or (1 if image.mode in GREY else 3)
        arrays.append(pixels(image, channels, how.image_size))
    return arrays


def _check_size(file: dict[str, Any], which: str, count: int, image_size: int | None = None) -> None:
    """Look at the header of an image file before anything is decoded.

    Raises:
        ValueError: if it is in no common format, at another address, or would take too much memory.
    """
    content, path = file["bytes"], file["path"]
    if content is None and "://" in (path or ""):
        raise ValueError(f"{which} is at the address {path}, which is not followed: save the images themselves")
    width, height, mode = header(Path(path) if content is None else BytesIO(content), which)
    if image_size is not None:
        width = height = image_size
    if width * height * (1 if mode in GREY else 3) * count > MAX_BYTES:
        raise ValueError(
            f"{count} images of {width}x{height} pixels exceed {MAX_BYTES:,} bytes of memory: give a smaller "
            "--image-size, or save them as a folder of images (folder:PATH), which is read bit by bit"
        )


def _stack(images: list[NDArray[np.uint8]], channels: int) -> NDArray[np.uint8]:
    return np.stack([np.broadcast_to(x, (channels, *x.shape[1:])) for x in images])
