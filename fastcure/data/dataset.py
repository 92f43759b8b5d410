"""A dataset in memory: four tensors that agree with one another."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Split = tuple[NDArray[np.uint8], NDArray[Any]]


class Dataset(NamedTuple):
    """Images and labels on the CPU.

    Attributes:
        x_train: uint8 (N, C, H, W); pixel / 255 lies in [0, 1].
        y_train: int64 (N,), in 0..num_classes-1.
        x_test: uint8 (M, C, H, W).
        y_test: int64 (M,).
        num_classes: number of classes.
        name: what ``load`` was asked for.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    name: str


def checked(name: str, train: Split, test: Split, num_classes: int | None = None) -> Dataset:
    """Check two splits against each other and make a dataset of them.

    Args:
        name: the dataset's name.
        train: images uint8 (N, C, H, W) and integer labels (N,).
        test: the same, of M images.
        num_classes: number of classes; left out, the largest training label plus one.

    Raises:
        ValueError: sizes disagree, a split is empty, or a label lies outside 0..num_classes-1.
    """
    for split, (x, y) in (("train", train), ("test", test)):
        if x.dtype != np.uint8 or x.ndim != 4 or 0 in x.shape:
            found = f"{x.dtype} {x.shape}"
            raise ValueError(f"{name}: {split} images must be uint8 (N, C, H, W), none of them 0, got {found}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            found = f"{y.dtype} {y.shape}"
            raise ValueError(f"{name}: {split} labels must be integers of shape {x.shape[:1]}, got {found}")
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{train[0].shape[1:]} and {test[0].shape[1:]}"
        raise ValueError(f"{name}: train and test images must have one shape (C, H, W), got {shapes}")
    if num_classes is None:
        num_classes = max(int(train[1].max()) + 1, 1)
        if num_classes > len(train[1]):  # a stray label would otherwise size the model's last layer
            raise ValueError(f"{name}: labels reach {num_classes - 1} with only {len(train[1])} training images")
    for split, (_, y) in (("train", train), ("test", test)):
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name}: {split} labels must lie in 0..{num_classes - 1}, got {low}..{high}")
    return Dataset(*_tensors(train), *_tensors(test), num_classes, name)


def _tensors(split: Split) -> tuple[Tensor, Tensor]:
    x, y = split
    return torch.from_numpy(np.require(x, requirements=["C", "W"])), torch.from_numpy(y.astype(np.int64))
