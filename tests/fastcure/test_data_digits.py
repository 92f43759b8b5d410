"""The embedded digits: size, values, and the fixed stratified split."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastcure.data import Dataset, load


@pytest.fixture
def digits() -> Dataset:
    return load("digits")


def test_sizes_and_types(digits: Dataset) -> None:
    assert digits.x_train.shape == (1347, 1, 16, 16)
    assert digits.x_test.shape == (450, 1, 16, 16)
    assert digits.x_train.dtype == digits.x_test.dtype == torch.uint8
    assert digits.y_train.dtype == digits.y_test.dtype == torch.int64
    assert (digits.num_classes, digits.name) == (10, "digits")
    assert (int(digits.x_train.min()), int(digits.x_train.max())) == (0, 255)


def test_split_is_stratified_and_complete(digits: Dataset) -> None:
    train, test = digits.y_train.bincount(), digits.y_test.bincount()
    expected = np.bincount(load_digits().target)
    assert (train + test).tolist() == expected.tolist()
    assert np.abs(test.numpy() - expected * 450 / 1797).max() < 1


def test_split_is_always_the_same(digits: Dataset) -> None:
    again = load("digits")
    assert all(torch.equal(a, b) for a, b in zip(digits[:4], again[:4], strict=True))
    assert digits.y_test[:12].tolist() == [2, 0, 4, 9, 4, 1, 2, 4, 6, 7, 9, 1]


def test_every_original_appears_once_enlarged_bilinearly(digits: Dataset) -> None:
    # Between the centres of two small pixels lie two large ones, at 1/4 and 3/4; edges repeat.
    place = (np.arange(16) + 0.5) / 2 - 0.5
    weights = np.maximum(0, 1 - np.abs(np.clip(place, 0, 7)[:, None] - np.arange(8)))  # (16, 8)
    large = weights @ (load_digits().images / 16) @ weights.T
    expected = np.rint(large * 255).astype(np.uint8).reshape(1797, -1)
    found = torch.cat([digits.x_train, digits.x_test]).numpy().reshape(1797, -1)
    assert (np.sort(found.view("V256").ravel()) == np.sort(expected.view("V256").ravel())).all()
