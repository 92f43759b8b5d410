"""The processes that do one job together: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastcure._augmentation import Transform
from fastcure.data import Batch
from fastcure.evaluation.accuracy import batches

DEADLINE = timedelta(minutes=30)
"""How long a process waits for another at most: for a step, a batch of an evaluation, or the reading of the data."""

Work = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Takes images, labels and a source of random numbers; returns a row an image."""


class Share(NamedTuple):
    """What a process has of a batch."""

    x: Tensor
    y: Tensor
    places: Tensor
    """int64 `(B,)`, of its images among those that are trained on."""
    transform: Transform
    """How they were augmented."""
    counting: int
    """How many of its images count: all, or none where the batch is too small for every process to have one."""
    whole: int
    """Images of the batch, in all processes."""


class Ranks(NamedTuple):
    """This process among the others. Every method but `voice` and `counted` is to be called by all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def __str__(self) -> str:
        return f"{self.size} x {self.device.type}" if self.size > 1 else str(self.device)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def voice(self, say: Callable[[str], object]) -> Callable[[str], object]:
        """Return what takes the lines of a report: `say` in the main process, nothing in the others."""
        return say if self.is_main_process else lambda _: None

    def counted(self, batch: Batch, whole: int) -> Share:
        """Return images of this process as its share of a batch of `whole` images."""
        return Share(*batch, len(range(self.rank, whole, self.size)), whole)

    def gather(self, rows: Iterable[Tensor], whole: int) -> list[Tensor]:
        """Put rows of the shares of a batch together: bit for bit, and in the order of the batch.

        Args:
            rows: tensors `(B, ...)`, a row for each image of this process's share.
            whole: images of the batch, in all processes.

        Returns:
            tensors `(whole, ...)`.
        """
        if self.size == 1:
            return list(rows)
        found = []
        for mine in rows:
            every = mine.new_zeros((whole, *mine.shape[1:]))
            share = every[self.rank :: self.size]
            share.copy_(mine[: len(share)])
            found.append(every)
        # Bytes, of which all but one process's are zero: a sum of floats would lose the sign of a zero.
        self.all_reduce([every.view(-1).view(torch.uint8) for every in found])
        return found

    def all_reduce_max(self, value: int) -> int:
        """Return the largest value of any process."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def agree(self, **values: Any) -> None:
        """Wait for the others.

        Raises:
            ValueError: in all of them, if the values of one are not those of the main process.
        """
        if self.size == 1:
            return
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, values)
        for rank, others in enumerate(every):
            for name, value in others.items():
                if value != every[0][name]:
                    raise ValueError(
                        f"every process must see the same run, but {name} is {every[0][name]!r} in process 0 and "
                        f"{value!r} in process {rank}: on several hosts, --out must be a folder that they share"
                    )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of the main process."""
        if self.size > 1:
            _as_one(list(tensors), lambda flat: dist.broadcast(flat, 0))

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with its sum over the processes."""
        if self.size > 1:
            _as_one(list(tensors), dist.all_reduce)

    def map(self, work: Work, x: Tensor, y: Tensor, seed: int, batch_size: int) -> Tensor:
        """Apply `work` to batches of images, each in one process; return the rows of all images, in order.

        Nothing but the time depends on the number of processes.

        Args:
            work: returns `(B, ...)` for a batch of B images.
            x, y: all images and labels, in every process.
            batch_size, seed: as in `fastcure.evaluation.accuracy.batches`.

        Returns:
            `(N, ...)`, on the CPU.

        Raises:
            MemoryError: if memory runs out.
            Exception: in all processes, after the batch that each is at, what `work` raised in one.
        """
        parts = batches(x, y, batch_size, seed)
        rows: dict[int, Tensor] = {}
        failure: Exception | None = None
        for first in range(0, len(parts), self.size):  # a batch in each process, and none begins the next one alone
            try:
                if (index := first + self.rank) < len(parts):
                    images, labels, generator = parts[index]
                    rows[index] = work(images.to(self.device), labels.to(self.device), generator).cpu()
            except Exception as error:
                failure = error
                if out_of_memory(error):
                    words = f"memory does not suffice for {batch_size} images at a time: lower --batch-size"
                    failure = MemoryError(words)
            if self.all_reduce_max(failure is not None):
                break
        every: list[Any] = [(rows, failure)]
        if self.size > 1:
            every = [None] * self.size
            dist.all_gather_object(every, (rows, failure))
        for found, failure in every:
            if failure is not None:
                raise failure
            rows |= found
        return torch.cat([rows[index] for index in range(len(rows))])


def _as_one(tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Apply a collective operation to the tensors of each dtype as to one vector: the price is by the call."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.flatten() for tensor in alike])
        collective(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error of torch's says that memory ran out, on a GPU or on the CPU."""
    signs = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def own_device(name: str) -> str:
    """Return the name of this process's device: under torchrun a GPU of its own where `name` is "cuda" or "auto".

    Raises:
        ValueError: if `name` is one GPU, and there are several processes.
    """
    if not _torchrun() or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda under torchrun, got {name!r}")
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started, each with a `device` of its own.

    No process leaves this context before all have done their work: torchrun ends the others as soon as one dies, and
    the first process may still be writing the results.

    Raises:
        ConnectionError: if another process ended in the meantime. That one reports the cause.
        TimeoutError: if another did not answer within `DEADLINE`.
    """
    if not _torchrun():
        yield Ranks(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What is counted and agreed on lies on the CPU; gradients go from GPU to GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=DEADLINE)
    ranks = Ranks(device, dist.get_rank(), dist.get_world_size())
    try:
        yield ranks
    except RuntimeError as error:
        if not _connection_lost(error):
            raise
        if "Timed out" in str(error):
            raise TimeoutError(
                f"process {ranks.rank} waited {DEADLINE} (hours:minutes:seconds) for another, which hangs or is slow"
            ) from error
        raise ConnectionError(
            f"process {ranks.rank} lost the connection to the others: one of them ended, and says why"
        ) from error
    # After an error there is no waiting: the others may wait for this process, and end when it does.
    with suppress(RuntimeError):  # of a process that failed after its last exchange, and reports that by its status
        ranks.all_reduce_max(0)
    dist.destroy_process_group()


def _connection_lost(error: RuntimeError) -> bool:
    return "gloo/transport" in str(error) or isinstance(error, dist.DistNetworkError)


def _torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()
