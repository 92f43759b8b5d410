"""Fashion-MNIST: its idx files, and what is refused."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fastcure.data import fashion_mnist, load

Contents = dict[str, bytes]


def images(count: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, count * 784, np.uint8)
    return struct.pack(">4I", 0x0803, count, 28, 28) + pixels.tobytes()


def labels(count: int) -> bytes:
    return struct.pack(">2I", 0x0801, count) + bytes(i % 10 for i in range(count))


@pytest.fixture
def contents() -> Contents:
    return dict(zip(fashion_mnist.FILES, [images(12, 0), labels(12), images(5, 1), labels(5)], strict=True))


@pytest.fixture(autouse=True)
def no_system_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "system")


def write(folder: Path, contents: Contents, *, zipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("place", [".", "fashion-mnist", "system"])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_the_official_files(tmp_path: Path, contents: Contents, place: str, zipped: bool) -> None:
    write(tmp_path / place, contents, zipped=zipped)
    data = load("fashion-mnist", tmp_path)
    assert data.x_train.shape == (12, 1, 28, 28)
    assert data.x_test.shape == (5, 1, 28, 28)
    assert data.x_train.numpy().tobytes() == contents["train-images-idx3-ubyte"][16:]
    assert data.y_train.tolist() == [*range(10), 0, 1]
    assert (data.num_classes, data.name) == (10, "fashion-mnist")


def test_reads_the_whole_set(tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Debian package's files where it is installed, files of this test's own elsewhere."""
    installed = Path("/usr/share/datasets/fashion-mnist")
    real = installed.is_dir()
    if not real:
        write(tmp_path / "system", contents)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", installed if real else tmp_path / "system")
    data = load("fashion-mnist", tmp_path)
    assert (len(data.x_train), len(data.x_test)) == ((60_000, 10_000) if real else (12, 5))
    if real:
        assert data.y_train.bincount().tolist() == [6000] * 10
        assert data.x_train.float().mean() / 255 == pytest.approx(0.2860, abs=1e-4)


def test_missing_files_say_where_from(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"zalandoresearch.*apt-get install") as error:
        load("fashion-mnist", tmp_path / "data")
    for part in ("train-images-idx3-ubyte.gz", str(tmp_path / "data" / "fashion-mnist"), str(tmp_path / "system")):
        assert part in str(error.value)


def test_one_missing_file_is_named_and_not_taken_from_elsewhere(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "system", contents)
    write(tmp_path, contents)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"^t10k-labels-idx1-ubyte.gz not found in {tmp_path}; "):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (images(12, 0)[:-1], "announces 9,408 bytes and holds only 9,407"),
        (images(12, 0) + b"\0", "announces 9,408 bytes and holds more"),
        (images(12, 0)[:9], "damaged"),
        (b"", "damaged"),
        (struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28), r"announces 3,367,254,359,280 bytes; allowed are 0\.\."),
        (struct.pack(">4I", 0x0803, 1, 2**16, 2**16), "not an idx file of bytes"),
        (struct.pack(">4I", 0x0D03, 12, 28, 28), "not an idx file of bytes"),
        (labels(12) + bytes(8), "not an idx file of bytes"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_lying_headers(tmp_path: Path, contents: Contents, content: bytes, message: str, zipped: bool) -> None:
    contents["train-images-idx3-ubyte"] = content
    write(tmp_path, contents, zipped=zipped)
    with pytest.raises(ValueError, match=message) as error:
        load("fashion-mnist", tmp_path)
    assert str(error.value).startswith(str(tmp_path / "train-images-idx3-ubyte"))
    assert "\n" not in str(error.value)


def test_truncated_gzip(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path, contents)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        load("fashion-mnist", tmp_path)


def test_gzip_bomb_is_not_inflated(tmp_path: Path, contents: Contents) -> None:
    contents["train-images-idx3-ubyte"] = images(12, 0) + bytes(1 << 26)
    write(tmp_path, contents)
    contents.clear()
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more"):
        load("fashion-mnist", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_labels_out_of_range(tmp_path: Path, contents: Contents) -> None:
    contents["train-labels-idx1-ubyte"] = struct.pack(">2I", 0x0801, 12) + bytes(range(12))
    write(tmp_path, contents)
    with pytest.raises(ValueError, match=r"train labels must lie in 0\.\.9, got 0\.\.11"):
        load("fashion-mnist", tmp_path)


def test_counts_must_agree(tmp_path: Path, contents: Contents) -> None:
    contents["t10k-labels-idx1-ubyte"] = labels(4)
    write(tmp_path, contents)
    with pytest.raises(ValueError, match=r"test labels must be integers of shape \(5,\)"):
        load("fashion-mnist", tmp_path)
