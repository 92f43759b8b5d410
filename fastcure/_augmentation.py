"""Augmentation: what may be drawn for a training image, and what was drawn for those of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augment(NamedTuple):
    """Random changes of a training image that keep its label.

    Attributes:
        pad: largest shift in pixels, in either direction of each axis; what moves in is zero.
        flip: mirror left to right, with probability one half.
    """

    pad: int = 0
    flip: bool = False


class Transform(NamedTuple):
    """The shifts and mirrors of the images of one batch: called on a tensor, it changes that as the images were.

    `transform(kept)` takes what is kept of each image into the coordinates of the augmented one, and
    `transform.inverse(found, onto=kept)` takes it back. Without arguments it changes nothing.

    Attributes:
        augment: what could be drawn.
        size: height and width of the images.
        draws: int64 `(3, B)`: row and column of the zero-padded image at which the crop begins, in 0..2 pad, and
            whether it is mirrored then; None for no change.

    Examples:
        >>> import torch
        >>> from fastcure.data import Augment, Transform
        >>> right = Transform(Augment(pad=1), (1, 3), torch.tensor([[1], [0], [0]]))
        >>> kept = torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> right(kept)
        tensor([[[[0., 1., 2.]]]])
        >>> right.inverse(10 * right(kept), onto=kept)
        tensor([[[[10., 20.,  3.]]]])
    """

    augment: Augment = Augment()
    size: tuple[int, int] = (0, 0)
    draws: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Shift and mirror `x` as the images were; what moves in is zero.

        Args:
            x: `(B, C, H, W)` of any C: B, H and W are those of the images.

        Raises:
            ValueError: if it has another shape.
        """
        if self.draws is None:
            return x
        self._check("x", x)
        return _mirrored(_shifted(x, self.augment.pad, self.draws), self.augment.flip, self.draws)

    def inverse(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Take `x` back into the coordinates of the images before augmentation.

        Args:
            x: `(B, C, H, W)`, in the coordinates of the augmented images.
            onto: `(B, C, H, W)`, has the pixels that the augmented images do not show; they are zero without it.

        Raises:
            ValueError: if either has another shape.
        """
        if self.draws is None:
            return x
        self._check("x", x)
        pad, draws = self.augment.pad, self.draws
        back = torch.stack([2 * pad - draws[0], 2 * pad - draws[1]])
        found = _shifted(_mirrored(x, self.augment.flip, draws), pad, back)
        if onto is None:
            return found
        self._check("onto", onto)
        return torch.where(_shifted(torch.ones_like(x[:, :1]), pad, back) > 0, found, onto)

    def _check(self, name: str, x: Tensor) -> None:
        assert self.draws is not None
        B, (H, W) = self.draws.shape[1], self.size
        if x.ndim != 4 or (len(x), *x.shape[2:]) != (B, H, W):
            raise ValueError(f"{name} must be ({B}, C, {H}, {W}) as the images of the batch, got {tuple(x.shape)}")


def windows(x: Tensor, pad: int) -> Tensor:
    """Return a view `(N, C, 2 pad + 1, 2 pad + 1, H, W)` of every shift of every image: one gather crops a batch."""
    H, W = x.shape[2:]
    return (F.pad(x, (pad,) * 4) if pad else x).unfold(2, H, 1).unfold(3, W, 1)


def augmented(windows: Tensor, places: Tensor, flip: bool, draws: Tensor) -> Tensor:
    """Crop the images at `places` `(B,)` of the windows, and mirror them; `draws` as in `Transform`."""
    return _mirrored(windows[places, :, draws[0], draws[1]], flip, draws)


def _shifted(x: Tensor, pad: int, draws: Tensor) -> Tensor:
    return windows(x, pad)[torch.arange(len(x), device=x.device), :, draws[0], draws[1]] if pad else x


def _mirrored(x: Tensor, flip: bool, draws: Tensor) -> Tensor:
    return torch.where(draws[2].bool()[:, None, None, None], x.flip(3), x) if flip else x
