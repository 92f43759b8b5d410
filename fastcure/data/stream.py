"""Images that do not lie on the device, read ahead batch by batch by the workers of torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastcure.data.image_files import Images, default_workers


class Stream:
    """Takes batches of images to the device: workers decode, a thread pins memory, and copies overlap computation.

    Args:
        images: uint8 `(N, C, H, W)`, or files.
        device: takes the batches.
        workers: processes; 0 for none, None for as many as CPUs, and 8 at most.
    """

    def __init__(self, images: Images, device: torch.device, workers: int | None) -> None:
        self.device = device
        count = default_workers() if workers is None else workers
        self._order = _Order()
        self._loader: DataLoader[Tensor] = DataLoader(
            _Batches(images),
            batch_size=None,  # an index is that of a whole batch
            sampler=self._order,
            num_workers=count,
            persistent_workers=count > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # it draws a number an epoch, which is not to be one of the training's
        )

    def batches(self, places: list[Tensor]) -> Iterator[Tensor]:
        """Yield the images at each of the `places`, int64 `(B,)`: uint8 `(B, C, H, W)`, on the device.

        Raises:
            ValueError: if a file is damaged.
        """
        self._order.places = places
        batches = iter(self._loader)
        while True:
            try:
                images = next(batches, None)
            except ValueError as error:  # a worker's comes with the stack of its calls
                raise ValueError(str(error).strip().rpartition("ValueError: ")[2]) from error
            if images is None:
                return
            yield images.to(self.device, non_blocking=True)


class _Order:
    """The batches of an epoch. No `Stream` itself: in a cycle of references, workers that are to end wait 5 s each."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class _Batches(Dataset[Tensor]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, places: Tensor) -> Tensor:
        return self.images[places]
