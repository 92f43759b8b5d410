"""Folders of images, one subfolder a class: with train and test folders around them, or one tree."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure._extras import extra
from fastcure.data.dataset import Dataset, Reading
from fastcure.data.files import reading
from fastcure.data.image_files import ImageFiles, default_workers, in_memory
from fastcure.data.pictures import GREY, PURPOSE, header

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
"""Of the files that are images; others are passed over."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
"""What the folder of each split may be called."""

TEST_FRACTION = 0.1
"""Share of each class that is tested on where there is no folder for that."""


class Split(NamedTuple):
    """Image files and their classes."""

    names: list[str]
    """Relative to the root, in order."""
    labels: list[int]


def read(address: str, how: Reading) -> Dataset:
    """Read a folder of images, as `fastcure.data.load` says."""
    extra("PIL", PURPOSE)
    root, name = Path(address), f"folder:{address}"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} not found; give a folder that has a folder of images for each class in it")
    places = {split: place for split in SPLITS if (place := _split(root, split)) is not None}
    tree = places.pop("train", None) or (None if places else root)
    tested = places.pop("test", None) or places.pop("validation", None)
    if tree is None and how.train:
        raise ValueError(f"{root}: has no folder called train (only {', '.join(_subfolders(root))}), to train on")
    named = tree or tested
    assert named is not None
    classes = how.classes or tuple(_subfolders(named))
    if not classes:
        raise ValueError(f"{root}: has no folders in it: give one of images for each class")

    train, test = Split([], []), Split([], [])
    if tested is not None:
        test = _list(root, tested, classes)
        train = _list(root, tree, classes) if how.train and tree is not None else train
    elif tree is not None:
        train, test = _divide(_list(root, tree, classes), how)
    held = _list(root, places["validation"], classes) if how.train and "validation" in places else Split([], [])

    workers = how.workers or default_workers()
    size = _size(root, [*train.names, *test.names, *held.names], how, workers)

    def files(split: Split) -> tuple[ImageFiles, Tensor]:
        return ImageFiles(root, split.names, size, how.image_size, workers), torch.tensor(split.labels).long()

    (x_train, y_train), (x_test, y_test), (x_held, y_held) = files(train), files(test), files(held)
    test_images = in_memory(x_test, always=True)
    assert isinstance(test_images, Tensor)
    return Dataset(
        *(in_memory(x_train), y_train, test_images, y_test, len(classes), name),
        classes=classes,
        validation=(in_memory(x_held), y_held) if held.names else None,
    )


def _split(root: Path, split: str) -> Path | None:
    """The folder of a split: of one of its names, and with folders in it (else it is that of a class)."""
    return next((root / name for name in SPLITS[split] if (root / name).is_dir() and _subfolders(root / name)), None)


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list(root: Path, folder: Path, classes: Sequence[str]) -> Split:
    """The images of a split, class by class, by name: in the same order on every machine."""
    split = Split([], [])
    for name in _subfolders(folder):
        if name not in classes:
            raise ValueError(f"{folder / name}: must be one of the classes {', '.join(classes)}: move or rename it")
        found = sorted(
            os.path.relpath(os.path.join(place, file), root)
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        if not found:
            raise ValueError(f"{folder / name}: has no images ({', '.join(SUFFIXES)}) in it: remove it, or add some")
        split.names.extend(found)
        split.labels.extend([classes.index(name)] * len(found))
    if not split.names:
        raise ValueError(f"{folder}: has no folders in it: give one of images for each class")
    return split


def _divide(whole: Split, how: Reading) -> tuple[Split, Split]:
    """Divide a tree into images to train on and to test on, by a checksum of their names: the same ones each time.

    Where nothing trains and no share is given, all of them are tested on.
    """
    if not how.train and how.test_fraction is None:
        return Split([], []), whole
    share = TEST_FRACTION if how.test_fraction is None else how.test_fraction
    parts = Split([], []), Split([], [])
    for label in sorted(set(whole.labels)):
        names = [name for name, one in zip(whole.names, whole.labels, strict=True) if one == label]
        ranked = sorted(names, key=lambda name: (zlib.crc32(os.fsencode(name.replace(os.sep, "/"))), name))
        chosen = set(ranked[: min(max(1, round(share * len(names))), len(names) - 1)])
        for part, members in zip(parts, ([n for n in names if n not in chosen], sorted(chosen)), strict=True):
            part.names.extend(members)
            part.labels.extend([label] * len(members))
    train, test = parts
    if not test.names:
        raise ValueError(f"every class has a single image ({whole.names[0]}), and none is left to test on: add some")
    return (train if how.train else Split([], [])), test


def _size(root: Path, names: Sequence[str], how: Reading, workers: int) -> tuple[int, int, int]:
    """Look at the header of every file: (C, H, W) of the images as they come out."""

    def look(name: str) -> tuple[int, int, str]:
        with reading(root / name):
            return header(root / name, "the image")

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(look, names))
    channels = how.channels or (1 if all(mode in GREY for *_, mode in found) else 3)
    if how.image_size is not None:
        return channels, how.image_size, how.image_size
    width, height, _ = found[0]
    for name, (*size, _) in zip(names, found, strict=True):
        if size not in ([width, height], [height, width]):  # a photo may lie on its side
            raise ValueError(
                f"{root}: images must have one size, got {width}x{height} ({names[0]}) and {size[0]}x{size[1]} "
                f"({name}): give --image-size N (image_size=N), which scales the shorter side to N and cuts the middle "
                "out"
            )
    return channels, height, width
