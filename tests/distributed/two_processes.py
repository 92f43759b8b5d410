"""What two gloo processes do for test_distributed: the first of them returns what it found."""

import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from networks import NETWORKS, Case, make, relative
from small_runs import finetune
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastcure import CURE
from fastcure.training.epoch import train_steps
from fastcure.training.ranks import Ranks
from fastcure.training.run import Run
from fastcure.training.schedule import parse_schedule


def in_two_processes(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work(rank, *arguments)` in both; return what it returns in the first."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        torch.multiprocessing.spawn(_process, (result, work, arguments), nprocs=2)
        return torch.load(result, weights_only=False)


def _process(rank: int, result: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    found = work(rank, *arguments)
    if rank == 0:
        torch.save(found, result)
    os._exit(0)  # torch's threads sometimes abort a process that ends in the ordinary way


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Unused(nn.Module):
    """A layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(13, 17), nn.Linear(17, 17), nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector; where there is none, zeros."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]
    return torch.cat([g.flatten() for g in whole])


def own_loop(rank: int, store: str) -> dict[str, Any]:
    """Relative errors of the gradients of `DistributedDataParallel(CURE(model))`, and what is refused."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found: dict[str, Any] = {}

    def truth(case: Case, **options: Any) -> Tensor:
        model = case.copy().model
        CURE(model, **options)(case.x, case.y).total.backward()
        return gradient(model)

    def wrapped(case: Case, wrap: dict[str, Any], **options: Any) -> tuple[nn.Module, DistributedDataParallel]:
        model = case.copy().model
        return model, DistributedDataParallel(CURE(model, **options), **wrap)

    def compare(name: str, case: Case, wrap: dict[str, Any] = {}, **options: Any) -> None:  # noqa: B006
        model, ddp = wrapped(case, wrap, **options)
        errors = []
        for _ in range(3):
            model.zero_grad()
            ddp(case.x[rank::2], case.y[rank::2]).total.backward()
            errors.append(relative(gradient(model), truth(case, **options)))
        found[name] = max(errors)

    def case_of(name: str) -> Case:
        return make(NETWORKS[name], 8, seed=0, dtype=torch.float32)

    for name in ("resnet8", "batch_norm-gelu-average", "attention", "shared"):
        compare(name, case_of(name))
    mlp = case_of("mlp-softplus")
    compare("reference", mlp, engine="reference")
    compare("power one", mlp, power=1)
    compare("every parameter used", mlp, {"find_unused_parameters": True})
    unused = Case(Unused(), mlp.x, mlp.y)
    for parameter in unused.model.parameters():
        dist.broadcast(parameter.data, 0)
    compare("unused", unused, {"find_unused_parameters": True})
    frozen = case_of("resnet8")
    for parameter in list(frozen.model.parameters())[:9]:
        parameter.requires_grad_(False)
    compare("partly frozen", frozen)

    case = case_of("resnet8")
    model, ddp = wrapped(case, {})
    for _ in range(2):
        model.zero_grad()
        x, y = case.x[rank::2], case.y[rank::2]
        with ddp.no_sync():
            (ddp(x[:2], y[:2]).total / 2).backward()
        (ddp(x[2:], y[2:]).total / 2).backward()
    found["accumulated"] = relative(gradient(model), truth(case))

    for rows in (7, 1):  # shares of 4 and 3, of 1 and 0
        few = Case(case.model, case.x[:rows], case.y[:rows])
        model, ddp = wrapped(few, {})
        optimizer = torch.optim.SGD(model.parameters())
        schedules = {name: parse_schedule(name, "1", 1) for name in ("lr", "h", "gamma")}
        schedules["lr"] = parse_schedule("lr", "0", 1)
        sums, ranks = torch.zeros(4).double(), Ranks(torch.device("cpu"), rank, 2)
        list(train_steps(ddp, [(0.0, (few.x, few.y))], optimizer, schedules, sums, ranks))
        found[f"finetune on {rows}"] = relative(gradient(model), truth(few, h=1.0, gamma=1.0))
        found[f"images of {rows}"] = float(ranks.gather(sums).sum(0)[3])

    found["static_graph"] = refusal(lambda: wrapped(case, {"static_graph": True})[1](case.x, case.y))
    mesh = init_device_mesh("cpu", (2,))
    for reshard in (False, True):
        cure = CURE(case.copy().model)
        fully_shard(cure, mesh=mesh, reshard_after_forward=reshard)
        cure(case.x[rank::2], case.y[rank::2]).total.backward()
        found[f"fully_shard, {reshard}"] = relative(gradient(cure), truth(case))
    nested, inside = CURE(case.copy().model), CURE(case.copy().model)
    for module in (*nested.model.stages, nested, inside.model):
        fully_shard(module, mesh=mesh)
    found["nested"] = refusal(lambda: nested(case.x, case.y))
    found["inside"] = refusal(lambda: inside(case.x, case.y))
    dist.destroy_process_group()
    return found


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def runs(rank: int, npz: Path, folder: Path, ports: Iterator[int]) -> dict[str, Any]:
    """A run in peace; one that the second process is told to stop, and its continuation; one that disagrees."""
    found: dict[str, Any] = {}

    def run(name: str, out: str, *flags: str) -> None:
        os.environ |= {"TORCHELASTIC_RUN_ID": name, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(ports))}
        printed, error = StringIO(), StringIO()
        with redirect_stdout(printed), redirect_stderr(error):
            status = finetune(npz, folder / out, *flags)
        if dist.is_initialized():  # after an error the process would end
            dist.destroy_process_group()
        mine = torch.tensor(status), torch.tensor(len(printed.getvalue()))
        found[name] = (*mine, error.getvalue())
        torch.save(found[name], folder / f"{name}-{rank}.pt")

    ports = iter(ports)
    run("whole", "whole")
    pause, taken = Run._pause, []

    def signalled(run: Run) -> None:
        taken.append(1)
        if len(taken) == 5 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        pause(run)

    Run._pause = signalled  # type: ignore[method-assign]
    run("stopped", "out")
    found["steps"] = len(taken)
    Run._pause = pause  # type: ignore[method-assign]
    run("resumed", "out", "--resume")
    run("finished", "out", "--resume")
    run("apart", f"own-{rank}" if rank else "out", "--resume")
    return found
