"""Parts of a dataset that have every class in its share, whatever the order of the images."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcure.data.dataset import Dataset
from fastcure.data.image_files import taken

HELD_OUT = 128
"""Training images on which a run is followed, if they are at most a tenth of them."""


def stratified(y: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` images at random, as many of each class as its share is, rounded up or down.

    Args:
        y: class indices `(N,)`.
        count: how many; N at most counts.
        seed: of the choice, which is the same on every device.

    Returns:
        int64 `(min(count, N),)`, on the CPU: the places of the images, ascending.

    Examples:
        >>> import torch
        >>> from fastcure.data import stratified
        >>> y = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> y[stratified(y, count=3, seed=0)]
        tensor([0, 0, 1])
    """
    N = len(y)
    if count >= N:
        return torch.arange(N)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(N, generator=generator)
    by_class = shuffled[y.cpu()[shuffled].argsort(stable=True)]
    # Every N/count-th of them, from a random beginning.
    places = (torch.arange(count) * N + torch.randint(N, (1,), generator=generator)) // count
    return by_class[places].sort().values


def limited(data: Dataset, limit: int | None, seed: int) -> Dataset:
    """Return stratified samples of at most `limit` images of each split, or all of them.

    Examples:
        >>> import fastcure
        >>> data = fastcure.data.limited(fastcure.data.load("digits"), limit=100, seed=0)
        >>> len(data.y_train), len(data.y_test)
        (100, 100)
    """
    if limit is None:
        return data
    train, test = (stratified(y, limit, seed) for y in (data.y_train, data.y_test))
    return data._replace(
        x_train=taken(data.x_train, train),
        y_train=data.y_train[train],
        x_test=data.x_test[test],
        y_test=data.y_test[test],
    )


def sampled(data: Dataset, whole: Dataset) -> str:
    """Say how many test images there are, and of how many they are a sample.

    Examples:
        >>> from fastcure.data import limited, load, sampled
        >>> digits = load("digits")
        >>> sampled(limited(digits, limit=100, seed=0), digits)
        '100 test images (a sample of 450, stratified by class)'
    """
    count, of = len(data.y_test), len(whole.y_test)
    return f"{count:,} test images" + (f" (a sample of {of:,}, stratified by class)" if count < of else "")


def hold_out(data: Dataset, count: int | float | None, seed: int) -> tuple[Dataset, Tensor, Tensor]:
    """Take a stratified sample out of the training images, to follow the training on it and to choose by it.

    A dataset with validation images of its own gives up none of the others: the sample is of these.

    Args:
        data: is left as it is.
        count: how many, or as a float their share, at least 1; None for `HELD_OUT`, or a tenth of the training images
            if that is less.
        seed: of the choice.

    Returns:
        The dataset without them; uint8 `(count, C, H, W)`; int64 `(count,)`.

    Raises:
        ValueError: if none are left to train on.

    Examples:
        >>> import fastcure
        >>> data = fastcure.data.load("digits")
        >>> rest, x, y = fastcure.data.hold_out(data, count=100, seed=0)
        >>> len(data.y_train) - len(rest.y_train), len(y)
        (100, 100)
    """
    if data.validation is not None:
        x, y = data.validation
        chosen = stratified(y, _number(count, len(y), HELD_OUT), seed)
        return data, x[chosen], y[chosen]
    N = len(data.y_train)
    wanted = _number(count, N, min(HELD_OUT, -(-N // 10)))
    if wanted >= N:
        raise ValueError(
            f"validation must leave images to train on, got {wanted} of the {N} training images of {data.name}: lower "
            "--validation (or --val-fraction), or give more images"
        )
    chosen = stratified(data.y_train, wanted, seed)
    held = torch.zeros(N, dtype=torch.bool)
    held[chosen] = True
    rest = data._replace(x_train=taken(data.x_train, ~held), y_train=data.y_train[~held])
    return rest, data.x_train[held], data.y_train[held]


def _number(count: int | float | None, of: int, default: int) -> int:
    if isinstance(count, float):
        return max(1, round(count * of))
    return default if count is None else count
