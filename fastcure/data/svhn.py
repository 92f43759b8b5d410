"""Street View House Numbers from its two MATLAB files of cropped digits."""

import struct
import zlib
from pathlib import Path

import numpy as np

from fastcure.data.dataset import Dataset, Split, checked
from fastcure.data.extras import extra
from fastcure.data.files import MAX_BYTES, find, reading

SOURCE = "http://ufldl.stanford.edu/housenumbers/ (format 2, cropped digits)"
_COMPRESSED = 15  # the tag of a zlib-compressed element


def read(data_dir: Path) -> Dataset:
    """73,257 training and 26,032 test images (3, 32, 32) of digits."""
    wanted = [("train_32x32.mat",), ("test_32x32.mat",)]
    train, test = find([data_dir, data_dir / "svhn"], wanted, SOURCE)
    return checked("svhn", _read_mat(train), _read_mat(test), classes=10)


def _read_mat(path: Path) -> Split:
    """``X`` (32, 32, 3, N) and ``y`` (N, 1), in which 10 stands for the digit 0."""
    matlab = extra("scipy.io")
    with reading(path):
        _bound_elements(path)
        kinds = {name: (shape, kind) for name, shape, kind in matlab.whosmat(path)}
        shape, kind = kinds.get("X", ((), "nothing"))
        count = shape[-1] if shape else 0
        if kind != "uint8" or shape != (32, 32, 3, count) or 3072 * count > MAX_BYTES:
            raise ValueError(f"X must be uint8 (32, 32, 3, N) of at most {MAX_BYTES:,} bytes, got {kind} {shape}")
        if kinds.get("y", ((), ""))[0] != (count, 1):
            raise ValueError(f"y must be ({count}, 1), got {kinds.get('y', 'nothing')}")
        arrays = matlab.loadmat(path, variable_names=["X", "y"])
        x, y = arrays["X"], arrays["y"][:, 0]
        labels = y.astype(np.int64)
        if (labels != y).any():
            raise ValueError("y must hold whole numbers")
        return x.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels)


def _bound_elements(path: Path) -> None:
    """Refuse a file with an element that inflates beyond ``MAX_BYTES``: loadmat would hold it whole."""
    with path.open("rb") as file:
        header = file.read(128)
        if header[124:128] not in (b"\x00\x01IM", b"\x01\x00MI"):
            raise ValueError("not a MATLAB 5 file")
        order = "<" if header.endswith(b"IM") else ">"
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}2I", tag)
            if kind != _COMPRESSED:
                file.seek(size, 1)
                continue
            inflater, inflated = zlib.decompressobj(), 0
            while size and (block := file.read(min(size, 1 << 20))):
                size -= len(block)
                while block:
                    inflated += len(inflater.decompress(block, 1 << 24))
                    block = inflater.unconsumed_tail
                    if inflated > MAX_BYTES:
                        raise ValueError(f"inflates to more than the {MAX_BYTES:,} bytes that are allowed")
