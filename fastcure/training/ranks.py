"""The processes that train one model together: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Ranks(NamedTuple):
    """This process among the others. Every method but `share` is to be called by all of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def __str__(self) -> str:
        return f"{self.size} x {self.device.type}" if self.size > 1 else str(self.device)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Return every `size`-th row of each tensor, beginning with the `rank`-th."""
        return tuple(part[self.rank :: self.size] for part in batch)

    def wrap(self, objective: nn.Module) -> nn.Module:
        """Return `objective`, with gradients that are the mean over the processes."""
        if self.size == 1:
            return objective
        return DistributedDataParallel(objective, device_ids=[self.device] if self.device.type == "cuda" else None)

    def gather(self, row: Tensor) -> Tensor:
        """Stack the row of each process: `(size, *row.shape)`, on the CPU."""
        rows = [row.cpu()]
        if self.size > 1:
            rows = [torch.empty_like(rows[0]) for _ in range(self.size)]
            dist.all_gather(rows, row.cpu())
        return torch.stack(rows)

    def most(self, value: int) -> int:
        """Return the largest value of any process."""
        return int(self.gather(torch.tensor(value, dtype=torch.int64)).max())

    def agree(self, **values: Any) -> None:
        """Wait for the others.

        Raises:
            ValueError: in all of them, if the values of one are not those of the first.
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

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


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
    """Join the processes that torchrun started, each with a `device` of its own."""
    if not _torchrun():
        yield Ranks(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What is counted and agreed on lies on the CPU; gradients go from GPU to GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield Ranks(device, dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error, where it would wait for processes that wait for this one


def _torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()
