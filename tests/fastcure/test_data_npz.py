"""Datasets of one's own: layouts of the images, and what is refused."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcure.data import load
from fastcure.data.files import reading


def arrays(shape: tuple[int, ...] = (12, 10, 8, 3)) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, shape, np.uint8),
        "y_train": np.arange(shape[0]) % 4,
        "x_test": generator.integers(0, 256, (5, *shape[1:]), np.uint8),
        "y_test": np.arange(5) % 4,
    }


def write_members(path: Path, contents: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_layouts_agree(tmp_path: Path, save: Any, channels: int) -> None:
    path = tmp_path / "mine.npz"
    original = arrays((12, 10, 8, channels))
    expected = torch.from_numpy(original["x_train"].transpose(0, 3, 1, 2).copy())
    save(path, **original)
    data = load(f"npz:{path}")
    assert torch.equal(data.x_train, expected)
    assert data.x_test.shape == (5, channels, 10, 8)
    assert (data.num_classes, data.name) == (4, f"npz:{path}")
    for split in ("x_train", "x_test"):  # a transposed view is saved in Fortran order
        original[split] = original[split].transpose(0, 3, 1, 2)
    save(path, **original)
    assert torch.equal(load(f"npz:{path}").x_train, expected)


def test_grey_images_and_fortran_order(tmp_path: Path) -> None:
    original = arrays((12, 10, 8))
    np.savez(tmp_path / "mine.npz", **{**original, "x_train": np.asfortranarray(original["x_train"])})
    data = load(f"npz:{tmp_path}/mine.npz")
    assert (data.x_train.numpy() == original["x_train"][:, None]).all()


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "u8"])
def test_any_integer_labels(tmp_path: Path, dtype: str) -> None:
    original = arrays()
    np.savez(tmp_path / "mine.npz", **{**original, "y_train": original["y_train"].astype(dtype)})
    assert load(f"npz:{tmp_path}/mine.npz").y_train.tolist() == original["y_train"].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((12, 10, 8, 3), np.float32)}, "float32: multiply by 255 and store uint8"),
        ({"x_train": np.zeros((12, 10, 8, 3), np.int64)}, "x_train must be uint8, got int64"),
        ({"x_train": np.array([None] * 12)}, "x_train must be uint8, got object"),
        ({"y_test": np.array([{}, []], object)}, "y_test must hold whole numbers, got object"),
        ({"y_test": np.zeros(5)}, "y_test must hold whole numbers, got float64"),
        ({"x_train": np.zeros((12, 3, 8, 3), np.uint8)}, r"\(12, 3, 8, 3\) fits either layout"),
        ({"x_train": np.zeros((12, 7, 8, 5), np.uint8)}, r"\(12, 7, 8, 5\) fits no layout"),
        ({"x_train": np.zeros((12, 80), np.uint8)}, r"\(12, 80\) fits no layout"),
        ({"x_train": np.zeros((0, 10, 8, 3), np.uint8)}, "none of them 0"),
        ({"x_test": np.zeros((5, 8, 10, 3), np.uint8)}, "train and test images must have one shape"),
        ({"y_train": np.zeros((12, 1), int)}, r"train labels must be integers of shape \(12,\)"),
        ({"y_test": np.array([0, 1, 2, 3, 4])}, r"test labels must lie in 0\.\.3, got 0\.\.4"),
        ({"y_train": np.arange(12) - 1}, r"train labels must lie in 0\.\.10, got -1\.\.10"),
    ],
)
def test_refused_contents(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **{**arrays(), **changes})
    with pytest.raises(ValueError, match=message) as error:
        load(f"npz:{path}")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_missing_array(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    with pytest.raises(FileNotFoundError, match=r"mine.npz not found; write it with numpy.savez_compressed"):
        load(f"npz:{path}")
    np.savez(path, x_train=arrays()["x_train"])
    with pytest.raises(ValueError, match="lacks y_train; it must hold x_train, y_train, x_test, y_test"):
        load(f"npz:{path}")


@pytest.mark.parametrize("kept", [0, 100, 2000, -10])
def test_truncated_archive(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        load(f"npz:{path}")


def test_directory_of_lies(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    content[-6:-2] = b"\xff\xff\xff\x7f"  # where the zip's directory starts
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        load(f"npz:{path}")


def test_unreadable_files_are_the_systems_to_explain(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), reading(tmp_path):
        tmp_path.open("rb")


def test_truncated_array(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    members = {name: npy(array) for name, array in arrays().items()}
    write_members(path, {**members, "x_train": members["x_train"][:-1]})
    with pytest.raises(ValueError, match="announces 2,880 bytes and holds only 2,879"):
        load(f"npz:{path}")


@pytest.mark.parametrize(
    "shape", ["(99999999999, 32, 32, 3)", "(-1, 10, 8, 3)", "(-2, -3, 8, 3)", "('a', 2)", "(" * 500]
)
def test_lying_header_allocates_nothing(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "mine.npz"
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    lie = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100)
    write_members(path, {**{name: npy(array) for name, array in arrays().items()}, "x_train": lie})
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{path}: "):
        load(f"npz:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_bombs_are_not_inflated(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    members = {name: npy(array) for name, array in arrays().items()}
    write_members(path, {**members, "x_train": members["x_train"] + bytes(1 << 26)})
    tracemalloc.start()
    with pytest.raises(ValueError, match="announces 2,880 bytes and holds more"):
        load(f"npz:{path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23
    write_members(path, members, zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="compressed by a method that numpy does not write"):
        load(f"npz:{path}")
    long_header = b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little")
    write_members(path, {**members, "x_train": long_header})
    with pytest.raises(ValueError, match=r"x_train: not an npy array of version 1\.0"):
        load(f"npz:{path}")
