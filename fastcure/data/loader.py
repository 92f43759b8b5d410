"""Training batches from images that live on the device as bytes, or are streamed to it, and are augmented there."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcure._augmentation import Augment, Transform, augmented, windows
from fastcure.data.image_files import Images
from fastcure.data.stream import Stream

RESIDENT = 0.5
"""Share of a GPU's free memory that images may take."""


class Batch(NamedTuple):
    """Images of a step, and where they come from; all on the loader's device."""

    x: Tensor
    """float32 (B, C, H, W) in [0, 1], augmented."""
    y: Tensor
    """int64 (B,)."""
    places: Tensor
    """int64 (B,), of the images among those that the loader was given."""
    transform: Transform
    """How they were augmented."""


def default_augmentation(dataset_name: str) -> Augment | None:
    """The usual augmentation of a dataset that ``load`` knows by name; None for one's own.

    Examples:
        >>> import fastcure
        >>> fastcure.data.default_augmentation("cifar10")
        Augment(pad=4, flip=True)
    """
    return {
        "digits": Augment(pad=1),
        "fashion-mnist": Augment(pad=2, flip=True),
        "svhn": Augment(pad=4),
        "cifar10": Augment(pad=4, flip=True),
    }.get(dataset_name)


class Loader:
    """Iterate over batches ``(x, y)``: float32 (B, C, H, W) in [0, 1], and int64 (B,), on the device.

    ``batches`` tells of each batch as well which images they are, and how they were augmented.

    All that is random in an epoch (order, shifts, flips) is drawn on the CPU when its iteration starts:
    seeded epochs are the same on every device, streamed or not, and the generator's state taken between two
    epochs is all that it takes to resume there.

    Args:
        x: uint8 (N, C, H, W), or the ``ImageFiles`` of a folder.
        y: int64 (N,).
        batch_size: B; the last batch may be smaller.
        device: where the images live, and the batches come out.
        shuffle: a new order each epoch.
        augment: random changes, drawn anew each epoch.
        generator: on the CPU; left out, torch's own.
        drop_last: leave out a last batch that is smaller.
        stream: read images batch by batch with torch's DataLoader; by default those in files, and those that would
            take more than half of a GPU's free memory.
        workers: processes of a stream, which read ahead; 0 for none. One a CPU, and 8 at most, by default.
        share: (r, n): of each batch, yield every n-th image from the r-th on; the first where there is none.

    Raises:
        ValueError: a shape, type or size does not fit.

    Examples:
        >>> import torch
        >>> from fastcure.data import Augment, Loader
        >>> images, labels = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6)
        >>> loader = Loader(images, labels, batch_size=4, augment=Augment(pad=1, flip=True))
        >>> [x.shape for x, y in loader]
        [torch.Size([4, 1, 8, 8]), torch.Size([2, 1, 8, 8])]
    """

    def __init__(
        self,
        x: Images,
        y: Tensor,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle: bool = True,
        augment: Augment | None = None,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        stream: bool | None = None,
        workers: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if isinstance(x, Tensor) and (x.dtype != torch.uint8 or x.ndim != 4):
            raise ValueError(f"x must be uint8 (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise ValueError(f"y must be int64 ({len(x)},), got {y.dtype} {tuple(y.shape)}")
        if batch_size < 1 or (drop_last and batch_size > len(x)):
            raise ValueError(f"batch_size must be > 0, with drop_last <= {len(x)} images, got {batch_size}")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"generator must be on the CPU, got {generator.device}")
        self.augment = augment or Augment()
        pad, (H, W) = self.augment.pad, x.shape[2:]
        if not 0 <= pad < min(H, W):
            raise ValueError(f"augment.pad must lie in 0..{min(H, W) - 1} for {H} x {W} images, got {pad}")
        self.size = H, W
        self.device = torch.device(device)
        self.stream: Stream | None = None
        if stream or not isinstance(x, Tensor) or (stream is None and not _fits(x, pad, self.device)):
            self.stream = Stream(x, self.device, workers)
        else:
            self.windows = windows(x.to(device), pad)
        self.y = y.to(device)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator
        self.drop_last = drop_last
        self.share = share

    def __len__(self) -> int:
        whole, rest = divmod(len(self.y), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.x, batch.y) for batch in self.batches())

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch from its batch ``start`` on; those before are drawn, but not read."""
        N, B = len(self.y), self.batch_size
        order = torch.randperm(N, generator=self.generator) if self.shuffle else torch.arange(N)
        shifts = 2 * self.augment.pad + 1
        plan = torch.stack([order, self._draw(shifts), self._draw(shifts), self._draw(1 + self.augment.flip)])
        plan = plan if self.stream is not None else plan.to(self.device)
        parts = [self._shared(plan[:, B * i : B * (i + 1)]) for i in range(start, len(self))]
        if self.stream is not None:
            return self._streamed(self.stream, parts)
        return (self._batch(self.windows, part[0], part) for part in parts)

    def _streamed(self, stream: Stream, parts: list[Tensor]) -> Iterator[Batch]:
        read = stream.batches([part[0] for part in parts])
        for part, images in zip(parts, read, strict=True):
            places = torch.arange(len(images), device=self.device)
            yield self._batch(windows(images, self.augment.pad), places, part.to(self.device, non_blocking=True))

    def _shared(self, part: Tensor) -> Tensor:
        first, step = self.share
        return part[:, first::step] if part.shape[1] > first else part[:, :1]

    def _draw(self, choices: int) -> Tensor:
        """A number below ``choices`` for each image; without a choice, the generator stays as it is."""
        N = len(self.y)
        if choices == 1:
            return torch.zeros(N, dtype=torch.int64)
        return torch.randint(choices, (N,), generator=self.generator)

    def _batch(self, windows: Tensor, places: Tensor, part: Tensor) -> Batch:
        """Augment the images at `places` of the windows; a column of `part` says which image it is, and how."""
        index, draws = part[0], part[1:]
        x = augmented(windows, places, self.augment.flip, draws)
        return Batch(x.float() / 255, self.y[index], index, Transform(self.augment, self.size, draws))


def _fits(x: Tensor, pad: int, device: torch.device) -> bool:
    """Tell whether images fit into the memory of a device; the CPU has them already."""
    if device.type != "cuda":
        return True
    N, C, H, W = x.shape
    free, _ = torch.cuda.mem_get_info(device)
    return N * C * (H + 2 * pad) * (W + 2 * pad) <= RESIDENT * free
