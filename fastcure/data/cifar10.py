"""CIFAR-10 from either official archive, packed or extracted."""

import gzip
import io
import pickle
import pickletools
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastcure.data.dataset import Dataset, Split, checked
from fastcure.data.files import Readable, expansion_limit, find, missing, read_exactly, reading

SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
MAX_BATCH = 1 << 25  # bytes; the official ones hold about 31 million
_RECORD = 1 + 3072


def read(data_dir: Path) -> Dataset:
    """50,000 training and 10,000 test images (3, 32, 32) of ten kinds of things."""
    places = [data_dir, data_dir / "cifar10"]
    for place in places:
        for variant in _VARIANTS:
            folder, archive = place / variant.folder, place / variant.archive
            names = [name + variant.suffix for name in BATCHES]
            if folder.is_dir():
                paths = find([folder], [(name,) for name in names], SOURCE)
                batches = [_read_file(path, variant.decode) for path in paths]
            elif archive.is_file():
                with reading(archive):
                    members = _read_members(archive, [f"{variant.folder}/{name}" for name in names])
                    batches = [variant.decode(member) for member in members]
            else:
                continue
            train = tuple(np.concatenate(part) for part in zip(*batches[:-1], strict=True))
            return checked("cifar10", (train[0], train[1]), batches[-1], num_classes=10)
    raise missing(" or ".join(variant.archive for variant in _VARIANTS), places, SOURCE)


def _read_file(path: Path, decode: Callable[[bytes], Split]) -> Split:
    with reading(path), path.open("rb") as file:
        return decode(_read_batch(file, path.stat().st_size))


def _read_batch(file: Readable, size: int) -> bytes:
    if size > MAX_BATCH:
        raise ValueError(f"a batch of {size:,} bytes, more than the {MAX_BATCH:,} that are allowed")
    return bytes(read_exactly(file, size))


class _CappedGzip(gzip.GzipFile):
    """Ends in an error: tarfile reads some headers whole, however far a gzip bomb inflates them."""

    left = 8 * MAX_BATCH

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("inflates to more than six batches")
        return data


def _read_members(archive: Path, names: list[str]) -> list[bytes]:
    """Read members by their exact names, in memory: nothing is extracted, no link followed."""
    found: dict[str, bytes] = {}
    unzipped = _CappedGzip(archive)
    unzipped.left = min(unzipped.left, expansion_limit(archive.stat().st_size))
    with unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
        while len(found) < len(names) and (member := tar.next()):
            if member.name not in names:
                continue
            content = tar.extractfile(member) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
            if content is None:
                raise ValueError(f"{member.name} is not a regular file")
            found[member.name] = _read_batch(content, member.size)
    lacking = [name for name in names if name not in found]
    if lacking:
        raise ValueError(f"lacks {', '.join(lacking)}")
    return [found[name] for name in names]


def _decode_binary(batch: bytes) -> Split:
    """Records of a label byte and 3,072 pixels."""
    if len(batch) % _RECORD:
        raise ValueError(f"a batch of {len(batch):,} bytes is not a whole number of {_RECORD}-byte records")
    records = np.frombuffer(batch, np.uint8).reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class _Kept:
    """Stands for everything of numpy that the pickles name: keeps what it is called and built with.

    Its ``__setstate__`` also makes a BUILD aimed at the class itself fail, which would else change it.
    """

    __slots__ = ("arguments", "state")

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Kept,
    ("numpy._core.multiarray", "_reconstruct"): _Kept,
    ("numpy", "ndarray"): _Kept,
    ("numpy", "dtype"): _Kept,
    ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in protocol 2
}


class _Unpickler(pickle.Unpickler):
    """Rebuilds dictionaries, lists, numbers and bytes; calls nothing but ``_Kept`` and ``str.encode``."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"the pickle asks for {module}.{name}: refused")
        return _ALLOWED[module, name]


def _decode_python(batch: bytes) -> Split:
    """A Python 2 pickle of ``{b"data": uint8 (N, 3072), b"labels": [int] * N, ...}``."""
    for opcode, argument, _ in pickletools.genops(batch):
        # The unpickler's memo is an array up to the largest index, which four bytes can set to 2^32.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(batch):
            raise ValueError(f"the pickle asks for memo entry {argument:,}: refused")
    content = _Unpickler(io.BytesIO(batch), encoding="bytes").load()
    _, shape, dtype, fortran_order, pixels = content[b"data"].state
    labels = content[b"labels"]
    if dtype.arguments[0] not in ("u1", b"u1") or fortran_order:
        raise ValueError(f"data must be uint8 in C order, got {dtype.arguments[0]!r}")
    if shape != (len(labels), 3072) or not all(type(label) is int for label in labels):
        raise ValueError(f"data must be ({len(labels)}, 3072) beside as many whole-number labels, got {shape}")
    return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32), np.array(labels, np.int64)


class _Variant(NamedTuple):
    folder: str
    archive: str
    suffix: str
    decode: Callable[[bytes], Split]


_VARIANTS = [
    _Variant("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _decode_python),
    _Variant("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _decode_binary),
]
