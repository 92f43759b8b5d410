"""What reducing the gradients of two processes costs a step, and what overlap with the backward could save of it.

Two processes with a thread each share a batch over gloo. Their steps take turns, and a step takes as long as the slower
process. A way to reduce whose gradients are not the sum of those of both processes is not timed.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from record import write
from steps import GAMMA, H
from timing import seconds
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workloads import Workload, rounds_for

from fastcure import CURE, _functional
from fastcure._writing import write_whole
from fastcure.objectives import Objective, Standard
from fastcure.profiling.flops import FlopCounter
from fastcure.training.ranks import Ranks

WORKLOADS = [Workload("resnet8", 128), Workload("resnet18", 16)]
ALONE, NONE = "one process, whole batch", "none"
BUCKET = 2**20
"""Numbers of a bucket, at least: 4 MiB."""
ROWS: list[dict[str, object]] = []
Arrival = Callable[[nn.Parameter, Tensor], None]


class Buckets:
    """Sums gradients over the processes bucket by bucket, while the backward makes the others."""

    def __init__(self, order: list[nn.Parameter]) -> None:
        flat = torch.empty(sum(p.numel() for p in order))
        parts = flat.split([p.numel() for p in order])
        self.gradients = {p: part.view_as(p) for p, part in zip(order, parts, strict=True)}
        self.full: dict[nn.Parameter, Tensor] = {}  # with the last gradient of each bucket: the bucket
        begin = end = 0
        for p in order:
            end += p.numel()
            if end - begin >= BUCKET or p is order[-1]:
                self.full[p] = flat[begin:end]
                begin = end

    def step(self, objective: Objective, x: Tensor, y: Tensor) -> None:
        """Leave the sum of all processes in `.grad`."""
        works = []

        def arrive(parameter: nn.Parameter, gradient: Tensor) -> None:
            self.gradients[parameter].copy_(gradient)
            if parameter in self.full:
                works.append(dist.all_reduce(self.full[parameter], async_op=True))

        with arrivals(arrive):
            backward(objective, x, y)
        for work in works:
            work.wait()
        for parameter, total in self.gradients.items():
            parameter.grad = total


@contextmanager
def arrivals(arrive: Arrival) -> Iterator[None]:
    """Call `arrive` with every gradient of a penalty as soon as the backward has made it."""
    alias = _functional._alias

    def watched(parameter: nn.Parameter, trainable: bool) -> Tensor:
        leaf = alias(parameter, trainable)
        if trainable:
            leaf.requires_grad_().register_hook(lambda gradient: arrive(parameter, gradient))
        return leaf

    with patch.object(_functional, "_alias", watched):
        yield


def backward(objective: nn.Module, x: Tensor, y: Tensor) -> None:
    objective.zero_grad()
    objective(x, y).total.backward()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def schedule(objective: Objective, x: Tensor, y: Tensor) -> tuple[list[nn.Parameter], str]:
    """The parameters in the order of their gradients, and when these arrive: shares of the step's arithmetic."""
    found: list[tuple[nn.Parameter, int]] = []
    with FlopCounter() as counter, arrivals(lambda parameter, _: found.append((parameter, counter.total))):
        backward(objective, x, y)
    size = sum(parameter.numel() for parameter, _ in found)
    half = next(i for i in range(len(found)) if sum(p.numel() for p, _ in found[: i + 1]) >= size / 2)
    first, middle = (found[i][1] / counter.total for i in (0, half))
    return [
        p for p, _ in found
    ], f"the first gradient is ready after {first:.0%} of the arithmetic, half after {middle:.0%}"


def both(rank: int, store: str, workload: Workload, penalised: bool, result: Path) -> None:
    """What each of the processes does; the first writes what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = measure(rank, workload, penalised)
    if rank == 0:
        content = BytesIO()
        torch.save(found, content)
        write_whole(result, content.getvalue())
    dist.destroy_process_group()


def measure(rank: int, workload: Workload, penalised: bool) -> tuple[dict[str, float], dict[str, float], str, int]:
    """Return each contender's median seconds and ratio to no reduction; when gradients arrive; their bytes."""
    ranks = Ranks(torch.device("cpu"), rank, 2)
    model, x, y = workload.build()
    other, *_ = workload.build()  # the same weights: the hooks of DistributedDataParallel stay
    objective, wrapped = (CURE(m, H, GAMMA) if penalised else Standard(m, batch_stats="frozen") for m in (model, other))
    ddp = DistributedDataParallel(wrapped)
    half = x[rank::2], y[rank::2]

    def one_vector() -> None:  # as `fastcure finetune`
        backward(objective, *half)
        ranks.all_reduce_max(0)
        ranks.all_reduce([p.grad for p in model.parameters() if p.grad is not None])

    contenders: dict[str, Callable[[], object]] = {
        ALONE: lambda: backward(objective, x, y) if rank == 0 else None,
        NONE: lambda: backward(objective, *half),
        "one vector, after the backward": one_vector,
        "DistributedDataParallel": lambda: backward(ddp, *half),
    }
    arrive = ""
    if penalised:
        order, arrive = schedule(objective, x[:4], y[:4])
        contenders["4 MiB buckets, as gradients arrive"] = lambda: Buckets(order).step(objective, *half)

    backward(objective, *half)
    expected = gradient(model).double()
    dist.all_reduce(expected)
    for title, work in contenders.items():
        work()  # rounding differs between copies of a network, and takes some activations across their kinks
        found = 2 * gradient(other) if title.startswith("Dist") else gradient(model)  # that one averages
        error = float((found - expected).norm() / expected.norm())
        assert title in (ALONE, NONE) or error < 2e-2, f"{title} is off by {error:.1e}: nothing is timed"

    def slower(work: Callable[[], object]) -> float:
        dist.barrier()
        return ranks.all_reduce_max(round(1e9 * seconds(work))) / 1e9

    rounds = rounds_for(sum(slower(work) for work in contenders.values()), 60.0)
    times = [{title: slower(work) for title, work in contenders.items()} for _ in range(rounds)]
    medians = {title: statistics.median(each[title] for each in times) for title in contenders}
    ratios = {title: statistics.median(each[title] / each[NONE] for each in times) for title in contenders}
    return medians, ratios, arrive, expected.nbytes // 2


@pytest.mark.parametrize("penalised", [False, True], ids=["standard", "cure"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_reduction(tmp_path: Path, workload: Workload, penalised: bool) -> None:
    arguments = (str(tmp_path / "store"), workload, penalised, tmp_path / "result.pt")
    with patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
        torch.multiprocessing.spawn(both, arguments, nprocs=2)
    medians, ratios, arrive, size = torch.load(tmp_path / "result.pt")
    step = "cure" if penalised else "standard"
    print(f"\n{step}, {workload}, two processes on a CPU, {size / 1e6:.1f} MB of gradients {arrive and '; ' + arrive}")
    for title, median in medians.items():
        print(f"  {title:<36} {median * 1e3:9.1f} ms  {ratios[title]:6.3f} x none")
        row = {"model": workload.model, "batch": workload.batch, "MB": round(size / 1e6, 2), "step": step}
        row |= {"reduction": title, "milliseconds": round(median * 1e3, 3)}
        ROWS.append({**row, "ratio_to_none": round(ratios[title], 4)})
    assert all(map(math.isfinite, ratios.values()))
    write("reduction-cpu", ROWS, torch.device("cpu"), by="reduction")
