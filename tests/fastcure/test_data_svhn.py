"""SVHN: its two MATLAB files, and what is refused."""

import math
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from fastcure.data import load, svhn


def arrays(count: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    y = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
    return {"X": generator.integers(0, 256, (32, 32, 3, count), np.uint8), "y": y}


def write(folder: Path, *, compressed: bool = True, **train: Any) -> Path:
    folder.mkdir(exist_ok=True)
    savemat(folder / "train_32x32.mat", {**arrays(21), **train}, do_compression=compressed)
    savemat(folder / "test_32x32.mat", arrays(6, 1), do_compression=compressed)
    return folder / "train_32x32.mat"


@pytest.mark.parametrize("place", [".", "svhn"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("label_type", [np.uint8, np.float64])
def test_reads_the_official_files(tmp_path: Path, place: str, compressed: bool, label_type: type) -> None:
    original = arrays(21)
    write(tmp_path / place, compressed=compressed, y=original["y"].astype(label_type))
    data = load("svhn", tmp_path)
    assert data.x_train.shape == (21, 3, 32, 32)
    assert data.x_test.shape == (6, 3, 32, 32)
    assert data.x_train[5, 2, 7, 30] == original["X"][7, 30, 2, 5]
    assert (data.x_train.numpy() == original["X"].transpose(3, 2, 0, 1)).all()
    assert data.y_train[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert (data.num_classes, data.name) == (10, "svhn")


def test_missing_files_say_where_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_32x32.mat not found in .*ufldl.stanford.edu"):
        load("svhn", tmp_path)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"X": np.full((32, 32, 3, 21), 0.5)}, r"X must be uint8 \(32, 32, 3, N\), got float64"),
        ({"X": np.zeros((21, 32, 32, 3), np.uint8)}, r"X must be uint8 .* got uint8 \(21, 32, 32, 3\)"),
        ({"X": np.array([{}, 1], object)}, "must hold the arrays X and y, holds y"),
        ({"y": np.ones((20, 1), np.uint8)}, r"y must be whole numbers \(21, 1\), got uint8 \(20, 1\)"),
        ({"y": np.full((21, 1), 1.5)}, "y must be whole numbers"),
        ({"y": np.full((21, 1), np.nan)}, "y must be whole numbers|damaged"),
        ({"y": np.full((21, 1), 11)}, r"train labels must lie in 0\.\.9, got 11\.\.11"),
    ],
)
def test_lying_contents(tmp_path: Path, train: dict[str, Any], message: str) -> None:
    write(tmp_path, **train)
    with pytest.raises(ValueError, match=message) as error:
        load("svhn", tmp_path)
    assert "\n" not in str(error.value)


def test_missing_array(tmp_path: Path) -> None:
    path = write(tmp_path)
    savemat(path, {"y": arrays(21)["y"]})
    with pytest.raises(ValueError, match=r"train_32x32.mat: must hold the arrays X and y, holds y"):
        load("svhn", tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_other_variables_do_not_disturb(tmp_path: Path, compressed: bool) -> None:
    others = {"aa": np.eye(3), "note": "text", "cell": np.array([{"a": 1}, "b"], object), "z": np.array([1j, 2])}
    path = write(tmp_path, compressed=compressed)
    savemat(path, {**others, **arrays(21), "later": others}, do_compression=compressed)
    assert load("svhn", tmp_path).y_train[:3].tolist() == [1, 2, 3]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", "i8", "u8"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (3, 1), (2, 3, 4)])
def test_arrays_are_those_of_loadmat(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    original = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    savemat(tmp_path / "one.mat", {"a_name": original})
    found = svhn._read_mat(memoryview((tmp_path / "one.mat").read_bytes()))
    assert list(found) == ["a_name"]
    assert found["a_name"].dtype == original.dtype
    assert (found["a_name"] == loadmat(tmp_path / "one.mat")["a_name"]).all()


def test_big_endian() -> None:
    name = struct.pack(">I", 1 << 16 | 1) + b"y\0\0\0"
    body = struct.pack(">4I", 6, 8, 6, 0) + struct.pack(">2I2i", 5, 8, 2, 1) + name
    body += struct.pack(">2I2d", 9, 16, 3, 4)
    data = bytes(124) + b"\x01\x00MI" + struct.pack(">2I", 14, len(body)) + body
    assert svhn._read_mat(memoryview(data))["y"].tolist() == [[3], [4]]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kept", [0, 60, 130, 200, 5000, -40])
def test_truncated(tmp_path: Path, compressed: bool, kept: int) -> None:
    path = write(tmp_path, compressed=compressed)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path}: ") as error:
        load("svhn", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\x89HDF\r\n\x1a\n" + bytes(600), b"x" * 600, bytes(600)])
def test_not_matlab(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a MATLAB 5 file"):
        load("svhn", tmp_path)


@pytest.mark.parametrize("count", [2**31 - 1, 22, 0, -21])
def test_header_that_announces_another_size(tmp_path: Path, count: int) -> None:
    path = write(tmp_path, compressed=False)
    sizes = struct.pack("<4i", 32, 32, 3, 21)
    content = path.read_bytes()
    assert content.count(sizes) == 1
    path.write_bytes(content.replace(sizes, struct.pack("<4i", 32, 32, 3, count)))
    with pytest.raises(ValueError, match=rf"announces the shape \(32, 32, 3, {count}\) and holds 64,512 values"):
        load("svhn", tmp_path)


def test_zlib_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    bomb = zlib.compress(struct.pack("<2I", 14, 1 << 27) + bytes(1 << 27))
    path.write_bytes(path.read_bytes()[:128] + struct.pack("<2I", 15, len(bomb)) + bomb)
    monkeypatch.setattr(svhn, "expansion_limit", lambda size: 1 << 22)
    tracemalloc.start()
    with pytest.raises(ValueError, match="announces 134,217,728 bytes and holds only 4,194,296"):
        load("svhn", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24
