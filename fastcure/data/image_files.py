"""Images that stay in their files, and are decoded when they are indexed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fastcure._extras import extra
from fastcure.data.files import reading
from fastcure.data.pictures import FORMATS, PURPOSE, header, pixels

IN_MEMORY = 2 << 30
"""Bytes of decoded images of a split that are kept in memory; more of them are decoded anew in each epoch."""

MOST_WORKERS = 8


def default_workers() -> int:
    """Return how many threads or processes decode images: one a CPU, and 8 at most."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


class ImageFiles:
    """Images in files; indexed like a uint8 tensor `(N, C, H, W)`, it decodes and returns what is asked for.

    Args:
        root: folder of the files.
        names: of the files, each relative to `root`.
        size: `(C, H, W)`: C is 1 (grey) or 3 (RGB).
        image_size: as in `fastcure.data.load`.
        workers: threads that decode.

    Attributes:
        shape: `(N, C, H, W)`.

    Examples:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from fastcure.data import ImageFiles
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("L", (40, 30)).save(root / "a.png")
        >>> images = ImageFiles(root, ["a.png"], (1, 16, 16), image_size=16, workers=1)
        >>> len(images), images[torch.tensor([0])].shape
        (1, torch.Size([1, 1, 16, 16]))
    """

    def __init__(
        self, root: Path, names: Sequence[str], size: tuple[int, int, int], image_size: int | None, workers: int
    ) -> None:
        self.root, self.image_size, self.workers = root, image_size, workers
        # One array, and not an object a name: a worker process that counts references to them copies their memory.
        self._names = np.array([os.fsencode(name) for name in names])
        self.shape = torch.Size((len(names), *size))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: Tensor) -> Tensor:
        """Decode the images at the places `index`, int64 or bool `(B,)`.

        Returns:
            uint8 `(B, C, H, W)`.

        Raises:
            ValueError: if a file is damaged, or its image has another size.
        """
        names = self._names[index.numpy()]
        found = np.empty((len(names), *self.shape[1:]), np.uint8)

        def decode(place: int) -> None:
            found[place] = self._decode(self.path(names[place]))

        threads = 1 if get_worker_info() is not None else min(self.workers, len(names))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode, range(len(names))))
        else:
            for place in range(len(names)):
                decode(place)
        return torch.from_numpy(found)

    def take(self, index: Tensor) -> Tensor | ImageFiles:
        """Return the images at the places `index`: decoded, if they fit into memory, or in their files."""
        names = [os.fsdecode(name) for name in self._names[index.numpy()]]
        _, C, H, W = self.shape
        return in_memory(ImageFiles(self.root, names, (C, H, W), self.image_size, self.workers))

    def path(self, name: bytes) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(name)

    def identity(self) -> bytes:
        """Return what tells these images from others, without decoding them: names and sizes of the files."""
        sizes = np.array([os.path.getsize(self.path(name)) for name in self._names], np.int64)
        return self._names.tobytes() + sizes.tobytes()

    def _decode(self, path: Path) -> np.ndarray:
        with reading(path):
            header(path, "the image")
            with extra("PIL.Image", PURPOSE).open(path, formats=FORMATS) as image:
                upright = extra("PIL.ImageOps", PURPOSE).exif_transpose(image)
                found = pixels(upright, self.shape[1], self.image_size)
            if found.shape != self.shape[1:]:
                (_, H, W), (_, height, width) = self.shape[1:], found.shape
                raise ValueError(
                    f"images must have one size, got {W}x{H} and {width}x{height}: give --image-size N (image_size=N)"
                )
            return found


Images = Tensor | ImageFiles


def in_memory(images: ImageFiles, *, always: bool = False) -> Images:
    """Decode images that fit into memory (or `always`); others stay in their files."""
    if always or images.shape.numel() <= IN_MEMORY:
        return images[torch.arange(len(images))]
    return images


def taken(images: Images, index: Tensor) -> Images:
    """Return the images at the places `index`, int64 or bool; of files, in memory only if they fit."""
    return images.take(index) if isinstance(images, ImageFiles) else images[index]
