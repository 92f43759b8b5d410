"""Image classification data as uint8 tensors, read from the files that their authors publish."""

import os
from collections.abc import Callable
from pathlib import Path

from fastcure._fields import shortened
from fastcure.data import cifar10, digits, fashion_mnist, hub, npz, svhn
from fastcure.data.dataset import Dataset
from fastcure.data.loader import Augment, Loader, default_augmentation
from fastcure.data.sample import hold_out, limited, sampled, stratified

__all__ = [
    "ADDRESSES",
    "DATASETS",
    "Augment",
    "Dataset",
    "Loader",
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

ADDRESSES: dict[str, Callable[[str], Dataset]] = {"npz:PATH": npz.read, "hf:OWNER/NAME": hub.read}
"""Reads a data set that is not of these, by the form of its name, from what follows the colon."""


def load(name: str, data_dir: str | os.PathLike[str] = "data") -> Dataset:
    """Load a dataset into CPU memory; nothing but ``hf:`` ever downloads.

    Args:
        name: ``digits`` (comes with scikit-learn), ``fashion-mnist``, ``svhn``, ``cifar10`` (official files),
            ``npz:PATH`` (arrays ``x_train, y_train, x_test, y_test``; images uint8 in NHWC, NCHW or NHW) or
            ``hf:OWNER/NAME`` (anything that ``datasets.load_dataset`` takes, a local folder such as
            ``hf:./folder`` included).
        data_dir: folder of the official files, themselves or in a subfolder called like the dataset.

    Returns:
        The dataset, checked: sizes agree, images are not empty, labels lie in 0..num_classes-1.

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
    if name in DATASETS:
        return DATASETS[name](Path(data_dir))
    kind, _, address = name.partition(":")
    for form, read in ADDRESSES.items():
        if address and form.partition(":")[0] == kind:
            return read(address)
    raise ValueError(f"dataset must be one of {', '.join([*DATASETS, *ADDRESSES])}, got {shortened(name)}")
