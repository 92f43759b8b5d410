"""Image classification data as uint8 tensors, from the files that their authors publish or from one's own."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fastcure._augmentation import Augment, Transform
from fastcure._fields import shortened
from fastcure.data import cifar10, digits, fashion_mnist, folder, hub, npz, svhn
from fastcure.data.dataset import Dataset, Reading
from fastcure.data.image_files import ImageFiles
from fastcure.data.loader import Batch, Loader, default_augmentation
from fastcure.data.sample import hold_out, limited, sampled, stratified

__all__ = [
    "ADDRESSES",
    "DATASETS",
    "Augment",
    "Batch",
    "Dataset",
    "ImageFiles",
    "Loader",
    "Transform",
    "default_augmentation",
    "hold_out",
    "limited",
    "load",
    "sampled",
    "stratified",
]

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits.read,
    "fashion-mnist": fashion_mnist.read,
    "svhn": svhn.read,
    "cifar10": cifar10.read,
}
"""Reads each data set, by its name, from the folder of its files."""

ADDRESSES: dict[str, Callable[[str, Reading], Dataset]] = {
    "folder:PATH": folder.read,
    "npz:PATH": npz.read,
    "hf:OWNER/NAME": hub.read,
}
"""Reads a data set that is not of these, by the form of its name, from what follows the colon."""


def load(
    name: str,
    data_dir: str | os.PathLike[str] = "data",
    *,
    image_size: int | None = None,
    train: bool = True,
    test_fraction: float | None = None,
    classes: Sequence[str] = (),
    channels: int | None = None,
    workers: int | None = None,
) -> Dataset:
    """Load a dataset; nothing but ``hf:`` ever downloads.

    Args:
        name: ``digits`` (comes with scikit-learn), ``fashion-mnist``, ``svhn``, ``cifar10`` (official files),
            ``folder:PATH`` (a folder of images for each class, or folders ``train`` and ``test`` (``validation``) of
            such), ``npz:PATH`` (arrays ``x_train, y_train, x_test, y_test``; images uint8 in NHWC, NCHW or NHW) or
            ``hf:OWNER/NAME`` (anything that ``datasets.load_dataset`` takes, a local folder such as
            ``hf:./folder`` included).
        data_dir: folder of the official files, themselves or in a subfolder called like the dataset.
        image_size: S, of ``folder:`` and ``hf:``: the shorter side of an image is scaled to S, and the middle of
            S x S cut out. Left out, images must have one size.
        train: False where nothing trains: a dataset of one's own then needs test images only, and may come without
            training images.
        test_fraction: of a folder without test images, the share of each class that becomes them; 0.1 by default, and
            all of it with ``train=False``.
        classes: of a folder or ``hf:``: names of the classes in their order, where it need not have all of them.
        channels: of a folder or ``hf:``: 1 or 3; by default 1 where all images are grey.
        workers: threads that decode images; one a CPU, and 8 at most, by default.

    Returns:
        The dataset, checked: sizes agree, images are not empty, labels lie in 0..num_classes-1. Training images of a
        folder stay in their files where they would take more than 2 GiB.

    Raises:
        FileNotFoundError: a file is missing; the message says where it was sought and how to get it.
        ValueError: the name is unknown, or a file is truncated or not what it says.
        ModuleNotFoundError: the format needs a package of the ``train`` extra.

    Examples:
        >>> import fastcure
        >>> data = fastcure.data.load("digits")
        >>> data.x_train.dtype, data.x_train.shape[1:]
        (torch.uint8, torch.Size([1, 16, 16]))
    """
    kind, _, address = name.partition(":")
    if image_size is not None and kind not in ("folder", "hf"):
        raise ValueError(
            f"image_size is of folder: and hf: datasets, got {image_size} for {shortened(name)}: leave it out"
        )
    if name in DATASETS:
        return DATASETS[name](Path(data_dir))
    how = Reading(image_size, test_fraction, tuple(classes), channels, train, workers)
    for form, read in ADDRESSES.items():
        if address and form.partition(":")[0] == kind:
            return read(address, how)
    raise ValueError(f"dataset must be one of {', '.join([*DATASETS, *ADDRESSES])}, got {shortened(name)}")
