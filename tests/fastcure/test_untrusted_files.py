"""Files with bytes changed, cut off or put in: each is read, or refused in one line, within bounded memory."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import TRIED, cases
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from scipy.io import savemat
from torch import nn

from fastcure.data import cifar10, fashion_mnist, load
from fastcure.models.weights import load_weights
from fastcure.training.checkpoint import Progress, pack, unpack

PEAK = 32 << 20
"""Bytes; the files have at most some 60 thousand."""

pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
labels = np.arange(12) % 10
model = nn.Linear(5, 4)


def idx_files() -> dict[str, bytes]:
    images = struct.pack(">4I", 0x0803, 12, 28, 28) + pixels[:, :28, :28, 0].tobytes()
    names = struct.pack(">2I", 0x0801, 12) + bytes(labels.tolist())
    return dict(zip(fashion_mnist.FILES, [images, names] * 2, strict=True))


def mat(compressed: bool) -> bytes:
    file = io.BytesIO()
    savemat(file, {"X": pixels.transpose(1, 2, 3, 0), "y": labels[:, None] + 1}, do_compression=compressed)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return file.getvalue()


def cifar(zipped: bool) -> bytes:
    file = io.BytesIO()
    content = pickle.dumps({b"data": pixels.reshape(12, -1)[:2], b"labels": [0, 1]}, protocol=2)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in cifar10.BATCHES:
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(file.getvalue()) if zipped else file.getvalue()


def pt() -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


def dataset(name: str, files: dict[str, bytes], zipped: bool = False) -> Callable[[Path, bytes], object]:
    """Reads a data set whose first file has other contents."""

    def read(folder: Path, content: bytes) -> object:
        first, *_ = files
        for file, whole in {**files, first: content}.items():
            (folder / file).write_bytes(gzip.compress(content, 1) if zipped and file == first else whole)
        return load(name.format(folder), folder)

    return read


def weights(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)
        load_weights(nn.Linear(5, 4), folder / name)

    return read


def state(folder: Path, content: bytes) -> object:
    (folder / "checkpoint.safetensors").write_bytes(content)
    return unpack(folder / "checkpoint.safetensors")


FORMATS: dict[str, tuple[bytes, Callable[[Path, bytes], object]]] = {
    "idx": (idx_files()[fashion_mnist.FILES[0]], dataset("fashion-mnist", idx_files())),
    "idx.gz": (gzip.compress(idx_files()[fashion_mnist.FILES[0]]), dataset("fashion-mnist", idx_files())),
    "mat": (mat(False), dataset("svhn", {"train_32x32.mat": b"", "test_32x32.mat": mat(True)})),
    "mat, compressed": (mat(True), dataset("svhn", {"train_32x32.mat": b"", "test_32x32.mat": mat(True)})),
    "npz": (npz(), dataset("npz:{}/a.npz", {"a.npz": b""})),
    "tar.gz": (cifar(True), dataset("cifar10", {"cifar-10-python.tar.gz": b""})),
    "tar in gz": (cifar(False), dataset("cifar10", {"cifar-10-python.tar.gz": b""}, zipped=True)),
    "safetensors": (save(model.state_dict()), weights("w.safetensors")),
    "pt": (pt(), weights("w.pt")),
    "state of a run": (pack(Progress(data=1), {"model": model.state_dict()}), state),
}


@st.composite
def damage(draw: Any, content: bytes) -> bytes:
    """Changes a few bytes, half of them near an end, where formats have their headers; cuts off; puts in."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        last = len(changed) - 1
        near = draw(st.sampled_from(["start", "end", "anywhere"]))
        at = draw(st.integers(0, last if near == "anywhere" else min(last, 200)))
        at = last - at if near == "end" else at
        kind = draw(st.sampled_from(["byte", "byte", "word", "cut", "put"]))
        if kind == "cut":
            del changed[at + 1 :]
        elif kind == "put":
            changed[at:at] = draw(st.binary(max_size=40))
        else:
            new = draw(st.binary(min_size=1, max_size=1) | st.sampled_from([b"\0", b"\xff"]))
            changed[at : at + (4 if kind == "word" else 1)] = new * (4 if kind == "word" else 1)
    return bytes(changed)


@pytest.mark.parametrize("name", FORMATS)
def test_undamaged_files_are_read(tmp_path: Path, name: str) -> None:
    content, read = FORMATS[name]
    read(tmp_path, content)


@pytest.mark.parametrize("name", FORMATS)
@cases(20)
@given(st.data())
def test_damaged_files(tmp_path: Path, name: str, data: st.DataObject) -> None:
    content, read = FORMATS[name]
    content = data.draw(damage(content))
    before = set(os.listdir(tmp_path.parent))
    tracemalloc.start()
    try:
        read(tmp_path, content)
        refusal = None
    except (ValueError, OSError) as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert refusal is None or (refusal and "\n" not in refusal)
    assert peak < PEAK
    assert set(os.listdir(tmp_path.parent)) == before
    TRIED[f"damaged {name}, {'read' if refusal is None else 'refused'}"] += 1
