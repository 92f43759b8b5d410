"""Datasets of one's own, in a numpy archive of four arrays."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fastcure.data.dataset import Dataset, Reading, checked
from fastcure.data.files import expansion_limit, read_exactly, reading

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CHANNELS = (1, 3, 4)


def read(address: str, how: Reading) -> Dataset:
    """Read ``x_train, y_train, x_test, y_test`` of a ``.npz`` file; classes are 0..max(y_train).

    Where nothing trains, ``x_test`` and ``y_test`` will do; classes are then 0..max(y_test).
    """
    path = Path(address)
    if not path.is_file():
        mend = f"write it with numpy.savez_compressed(path, {', '.join(f'{a}=...' for a in ARRAYS)})"
        raise FileNotFoundError(f"{path} not found; {mend}")
    with reading(path), zipfile.ZipFile(path) as archive:
        trains = how.train or all(f"{name}.npy" in archive.namelist() for name in ARRAYS[:2])
        train, test = (
            (_nchw(_read_array(archive, f"x_{split}")), _read_array(archive, f"y_{split}")) if wanted else None
            for split, wanted in (("train", trains), ("test", True))
        )
    assert test is not None
    return checked(f"npz:{address}", train, test)


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Read one array; its header is judged before anything is read or allocated, and nothing is unpickled."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"lacks {name}; it must hold {', '.join(ARRAYS)}")
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name}: compressed by a method that numpy does not write")  # nor zipfile bound
    with archive.open(member) as file:
        if npy.read_magic(file) != (1, 0):  # later versions have headers of up to 4 GiB
            raise ValueError(f"{name}: not an npy array of version 1.0")
        shape, fortran_order, dtype = npy.read_array_header_1_0(file)
        if name.startswith("x"):
            if dtype.kind == "f":
                raise ValueError(f"{name} must be uint8, got {dtype}: multiply by 255 and store uint8")
            if dtype != np.uint8:
                raise ValueError(f"{name} must be uint8, got {dtype}")
        elif dtype.kind not in "iu":
            raise ValueError(f"{name} must hold whole numbers, got {dtype}")
        data = read_exactly(file, math.prod(shape) * dtype.itemsize, expansion_limit(member.compress_size))
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _nchw(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bring images to (N, C, H, W); the channels are the dimension of size 1, 3 or 4, first or last."""
    if x.ndim == 3:
        return x[:, None]
    first, last = x.ndim == 4 and x.shape[1] in CHANNELS, x.ndim == 4 and x.shape[-1] in CHANNELS
    if first == last:
        why = "either" if first else "no"
        raise ValueError(f"images must be NHW, NHWC or NCHW with C = 1, 3 or 4; {x.shape} fits {why} layout")
    return x if first else x.transpose(0, 3, 1, 2)
