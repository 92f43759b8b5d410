"""The images of the robustness study: some to train on, some to choose by, some to report on."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastcure.data import Augment, default_augmentation, load
from fastcure.data.dataset import Dataset, checked

JPEG = "CIFAR-10 (JPEG)"


class Images(NamedTuple):
    """What a run sees; images uint8 `(N, C, H, W)`, labels `(N,)`."""

    name: str
    num_classes: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    """Held out of the training set, its last images."""
    test: tuple[Tensor, Tensor]
    augment: Augment | None

    @property
    def numel(self) -> int:
        """Numbers of an image."""
        return self.train[0][0].numel()

    @property
    def moments(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, in [0, 1]."""
        pixels = self.train[0].transpose(0, 1).flatten(1).double() / 255
        return pixels.mean(1).tolist(), pixels.std(1).clamp_min(1e-2).tolist()


def read_images(name: str, data_dir: str, jpeg: Path | None, train: int, validation: int, test: int) -> Images:
    """Read a dataset and take the first `train` and `test` images of its splits, and the last `validation` to train on.

    Args:
        name: of `fastcure.data.load`, or "CIFAR-10 (JPEG)".
        data_dir: folder of the official files.
        jpeg: the file of "CIFAR-10 (JPEG)".
        train, validation, test: counts; a `train` of 0 means all that is left.

    Raises:
        ValueError: if there are not so many images, or the JPEG file is not given.
    """
    if name == JPEG:
        if jpeg is None:
            raise ValueError(f"{JPEG} needs its file: --cifar10-jpeg FILE")
        data, augment = read_jpeg(jpeg), default_augmentation("cifar10")
    else:
        data, augment = load(name, data_dir), default_augmentation(name)
    left = len(data.x_train) - validation
    if left < max(train, 1) or len(data.x_test) < test:
        raise ValueError(
            f"{name} must have {train} + {validation} training and {test} test images, got {len(data.x_train)} and "
            f"{len(data.x_test)}"
        )
    held = data.x_train[left:], data.y_train[left:]
    train = train or left
    seen = data.x_train[:train], data.y_train[:train]
    return Images(name, data.num_classes, seen, held, (data.x_test[:test], data.y_test[:test]), augment)


def read_jpeg(path: Path) -> Dataset:
    """Read all of CIFAR-10 from a numpy archive of JPEG files that share one header.

    Image i of a split is `header + SPLIT_bytes[SPLIT_offsets[i]:SPLIT_offsets[i + 1]]`, its label `y_SPLIT[i]`.
    """
    from PIL import Image

    def decode(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        content, offsets = archive[f"{split}_bytes"].tobytes(), archive[f"{split}_offsets"]
        files = (header + content[a:b] for a, b in pairwise(offsets))
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        return pixels.transpose(0, 3, 1, 2), archive[f"y_{split}"]

    with np.load(path) as archive:
        header = archive["header"].tobytes()
        return checked(JPEG, decode("train"), decode("test"), num_classes=10)


def as_floats(images: Tensor, device: torch.device) -> Tensor:
    """Return images in [0, 1] on the device, in the memory format in which convolutions are fastest."""
    return (images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)
