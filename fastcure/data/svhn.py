"""Street View House Numbers from its two MATLAB files of cropped digits.

The files are read here and not by ``scipy.io.loadmat``, which believes what they announce: bytes changed at
random crash the interpreter there (scipy 1.17), and a few kilobytes can inflate to gigabytes.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastcure.data.dataset import Dataset, Split, checked
from fastcure.data.files import expansion_limit, find, read_exactly, reading

SOURCE = "http://ufldl.stanford.edu/housenumbers/ (format 2, cropped digits)"

# Of MATLAB's "MAT-File Format", level 5: the types of elements, and of numbers as they are stored.
MATRIX, COMPRESSED = 14, 15
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read(data_dir: Path) -> Dataset:
    """73,257 training and 26,032 test images (3, 32, 32) of digits."""
    wanted = [("train_32x32.mat",), ("test_32x32.mat",)]
    train, test = find([data_dir, data_dir / "svhn"], wanted, SOURCE)
    return checked("svhn", _read_split(train), _read_split(test), num_classes=10)


def _read_split(path: Path) -> Split:
    """``X`` (32, 32, 3, N) and ``y`` (N, 1), in which 10 stands for the digit 0."""
    with reading(path), path.open("rb") as file:
        arrays = _read_mat(memoryview(read_exactly(file, path.stat().st_size)))
        if not {"X", "y"} <= arrays.keys():
            raise ValueError(f"must hold the arrays X and y, holds {', '.join(arrays) or 'none'}")
        x, y = arrays["X"], arrays["y"]
        if x.dtype != np.uint8 or x.shape[:-1] != (32, 32, 3):
            raise ValueError(f"X must be uint8 (32, 32, 3, N), got {x.dtype} {x.shape}")
        if y.shape != (x.shape[-1], 1) or (y % 1 != 0).any():
            raise ValueError(f"y must be whole numbers ({x.shape[-1]}, 1), got {y.dtype} {y.shape}")
        labels = y[:, 0].astype(np.int64)
        return x.transpose(3, 2, 0, 1), np.where(labels == 10, 0, labels)


def _read_mat(data: memoryview) -> dict[str, NDArray[Any]]:
    """The numeric arrays of a MATLAB 5 file by name; cells, structures and the like are left out."""
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(bytes(data[124:128]))
    if order is None:
        raise ValueError("not a MATLAB 5 file")
    arrays = {}
    for kind, content in _elements(data[128:], order):
        if kind == COMPRESSED:
            inflated = zlib.decompressobj().decompress(content, expansion_limit(len(content)))
            kind, content = next(_elements(memoryview(inflated), order), (0, content))
        if kind != MATRIX:
            continue
        _, (_, sizes), (_, name), (number, values), *_ = _elements(content, order)
        if number in NUMBERS:
            shape = struct.unpack(f"{order}{len(sizes) // 4}i", sizes)
            array = np.frombuffer(values, order + NUMBERS[number])
            if min(shape) < 0 or math.prod(shape) != array.size:
                raise ValueError(f"{bytes(name)!r} announces the shape {shape} and holds {array.size:,} values")
            arrays[bytes(name).decode()] = array.reshape(shape, order="F")
    return arrays


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The elements that follow one another in ``data``: their types, and their contents as views."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}2I", data, at)
        if kind >> 16:  # at most four bytes: type and size share the first word, the content is the second
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
        else:
            start = at + 8
            at = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError(f"an element announces {size:,} bytes and holds only {len(data) - start:,}")
        yield kind, data[start : start + size]
