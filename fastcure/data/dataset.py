"""A dataset: images and labels of its splits, which agree with one another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcure.data.image_files import Images

Split = tuple[NDArray[np.uint8], NDArray[Any]]


class Dataset(NamedTuple):
    """Images and labels on the CPU.

    Attributes:
        x_train: uint8 (N, C, H, W); pixel / 255 lies in [0, 1]. Those of a folder that do not fit into memory stay in
            their files, as ``ImageFiles``: indexed by places, they are decoded.
        y_train: int64 (N,), in 0..num_classes-1.
        x_test: uint8 (M, C, H, W).
        y_test: int64 (M,).
        num_classes: number of classes.
        name: what ``load`` was asked for.
        classes: their names, if they have any.
        validation: images and labels that are held out from training and testing, if the dataset has such.
    """

    x_train: Images
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    name: str
    classes: tuple[str, ...] = ()
    validation: tuple[Images, Tensor] | None = None


class Reading(NamedTuple):
    """How a dataset of one's own is read; see ``load``."""

    image_size: int | None = None
    test_fraction: float | None = None
    classes: tuple[str, ...] = ()
    channels: int | None = None
    train: bool = True
    workers: int | None = None


def checked(
    name: str, train: Split | None, test: Split, num_classes: int | None = None, classes: Sequence[str] = ()
) -> Dataset:
    """Check two splits against each other and make a dataset of them.

    Args:
        name: the dataset's name.
        train: images uint8 (N, C, H, W) and integer labels (N,); None where nothing trains.
        test: the same, of M images.
        num_classes: number of classes; left out, the largest training label (or else test label) plus one.
        classes: their names.

    Raises:
        ValueError: sizes disagree, a split is empty, or a label lies outside 0..num_classes-1.
    """
    splits = {"test": test} if train is None else {"train": train, "test": test}
    for split, (x, y) in splits.items():
        if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape:
            found = f"{x.dtype} {x.shape}"
            raise ValueError(f"{name}: {split} images must be uint8 (N, C, H, W), none of them 0, got {found}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            found = f"{y.dtype} {y.shape}"
            raise ValueError(f"{name}: {split} labels must be integers of shape {x.shape[:1]}, got {found}")
    if train is not None and train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{train[0].shape[1:]} and {test[0].shape[1:]}"
        raise ValueError(f"{name}: train and test images must have one shape (C, H, W), got {shapes}")
    if num_classes is None:
        known = test[1] if train is None else train[1]
        num_classes = max(int(known.max()) + 1, 1)
        if train is not None and num_classes > len(known):  # a stray label would size the model's last layer
            raise ValueError(f"{name}: labels reach {num_classes - 1} with only {len(known)} training images")
    for split, (_, y) in splits.items():
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name}: {split} labels must lie in 0..{num_classes - 1}, got {low}..{high}")
    x_test, y_test = _tensors(test)
    x_train, y_train = (x_test[:0], y_test[:0]) if train is None else _tensors(train)
    return Dataset(x_train, y_train, x_test, y_test, num_classes, name, tuple(classes))


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    x, y = split
    return torch.from_numpy(np.require(x, requirements=["C", "W"])), torch.from_numpy(y.astype(np.int64))
