"""Names, the checks common to all formats, and what importing the package brings in."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcure.data import ADDRESSES, DATASETS, Dataset, load
from fastcure.data.dataset import Split, checked
from fastcure.data.files import read_exactly


def split(count: int = 4, *, label: int = 0, size: int = 8) -> Split:
    return np.zeros((count, 1, size, size), np.uint8), np.full(count, label)


def test_imports_torch_and_numpy_only() -> None:
    code = "import sys, fastcure.data; print(*{'sklearn', 'scipy', 'datasets', 'torchvision'} & set(sys.modules))"
    path = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]
    code = f"import sys; sys.path[:0] = {path!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["mnist", "", "npz:", "hf", "CIFAR10", "digits:x"])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of " + re.escape(", ".join([*DATASETS, *ADDRESSES]))):
        load(name)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("hf:./x", "datasets", "datasets"),
        ("hf:./x", "PIL", "pillow"),
    ],
)
def test_a_missing_package_is_named_as_pip_knows_it(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"the package {package} is needed .*: pip install {package}$"):
        load(name)


def test_checked_keeps_values_and_writes_nothing_through() -> None:
    x, y = split(6)
    x[:] = np.arange(6)[:, None, None, None]
    y[:] = [0, 1, 2, 0, 1, 2]
    x.flags.writeable = False
    data = checked("mine", (x, y.astype(">u2")), split(3), num_classes=None)
    assert isinstance(data, Dataset)
    assert data.name == "mine"
    assert data.num_classes == 3
    assert data.x_train.dtype == torch.uint8
    assert data.x_train[:, 0, 0, 0].tolist() == list(range(6))
    assert data.y_train.dtype == torch.int64
    assert data.y_train.tolist() == [0, 1, 2, 0, 1, 2]
    data.x_train.zero_()
    assert x.max() == 5


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (split(0), split(), r"train images must be uint8 \(N, C, H, W\).*\(0, 1, 8, 8\)"),
        (split(), split(size=0), r"test images must be .*\(4, 1, 0, 0\)"),
        ((split()[0][:3], split()[1]), split(), r"labels must be integers of shape \(3,\), got int64 \(4,\)"),
        ((split()[0], split()[1] / 1), split(), r"labels must be integers .* got float64"),
        (split(), split(size=9), r"one shape \(C, H, W\), got \(1, 8, 8\) and \(1, 9, 9\)"),
        (split(label=-1), split(), r"train labels must lie in 0\.\.9, got -1\.\.-1"),
        (split(label=9), split(label=10), r"test labels must lie in 0\.\.9, got 10\.\.10"),
    ],
)
def test_checked_refuses(train: Split, test: Split, message: str) -> None:
    with pytest.raises(ValueError, match=f"^mine: .*{message}"):
        checked("mine", train, test, num_classes=10)


@pytest.mark.parametrize(("labels", "classes"), [([0, 0, 0, 0], 1), ([3, 1, 2, 0], 4)])
def test_checked_counts_the_classes(labels: list[int], classes: int) -> None:
    assert checked("mine", (split()[0], np.array(labels)), split()).num_classes == classes


def test_checked_refuses_classes_without_images() -> None:
    with pytest.raises(ValueError, match="labels reach 4 with only 4 training images"):
        checked("mine", split(label=4), split())
    with pytest.raises(ValueError, match="labels reach 1000000 with only 4 training images"):
        checked("mine", split(label=1_000_000), split())


def test_checked_does_not_wrap_large_unsigned_labels() -> None:
    x, _ = split()
    labels = np.full(4, 2**64 - 1, np.uint64)
    with pytest.raises(ValueError, match=r"got 18446744073709551615\.\.18446744073709551615"):
        checked("mine", (x, labels), split(), num_classes=10)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_payload_that_arrives_in_pieces(most: int) -> None:
    class Pieces(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(most, size if size is not None and size >= 0 else most))

    assert read_exactly(Pieces(b"0123456789"), 10) == b"0123456789"
    with pytest.raises(ValueError, match="announces 11 bytes and holds only 10"):
        read_exactly(Pieces(b"0123456789"), 11)
    with pytest.raises(ValueError, match="announces 9 bytes and holds more"):
        read_exactly(Pieces(b"0123456789"), 9)
