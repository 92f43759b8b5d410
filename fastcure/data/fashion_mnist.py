"""Fashion-MNIST from its four idx files, compressed or not."""

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcure.data.dataset import Dataset, checked
from fastcure.data.files import expansion_limit, find, read_exactly, reading

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package
SOURCE = "https://github.com/zalandoresearch/fashion-mnist, or on Debian: apt-get install dataset-fashion-mnist"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def read(data_dir: Path) -> Dataset:
    """60,000 training and 10,000 test images (1, 28, 28) of ten kinds of clothing."""
    folders = [data_dir, data_dir / "fashion-mnist", SYSTEM_FOLDER]
    paths = find(folders, [(f"{name}.gz", name) for name in FILES], SOURCE)
    x_train, y_train, x_test, y_test = (
        read_idx(path, shape) for path, shape in zip(paths, [(28, 28), (), (28, 28), ()], strict=True)
    )
    return checked("fashion-mnist", (x_train[:, None], y_train), (x_test[:, None], y_test), num_classes=10)


def read_idx(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    """Read an idx file of unsigned bytes, (N, *shape): a big-endian header, then the values.

    Raises:
        ValueError: the header asks for another shape or type, or the payload is not what it says.
    """
    with reading(path), path.open("rb") as raw:
        gzipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if gzipped else raw as file:
            dims = 1 + len(shape)
            magic, *sizes = struct.unpack(f">{1 + dims}I", file.read(4 + 4 * dims))
            if magic != 0x0800 + dims or tuple(sizes[1:]) != shape:
                raise ValueError(f"not an idx file of bytes (N, {', '.join(map(str, shape))}): header {sizes}")
            data = read_exactly(file, math.prod(sizes), expansion_limit(path.stat().st_size))
            return np.frombuffer(data, np.uint8).reshape(sizes)
