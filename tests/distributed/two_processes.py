"""What two gloo processes do for test_distributed: the first of them returns what it found.

No test opens a process group in pytest's own process. The reducer of a DistributedDataParallel may be freed after its
group; its destructor then joins gloo's threads while it holds the interpreter's lock, for which they wait: for ever.
"""

import faulthandler
import multiprocessing
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from networks import NETWORKS, Case, make, relative
from prepared import count, relu, style
from small_runs import SMALL, share_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastcure import CURE, curvature, prepare
from fastcure.cli import main
from fastcure.objectives.cure import CUREOutput
from fastcure.schedules import schedule
from fastcure.training.epoch import train_steps
from fastcure.training.ranks import Ranks
from fastcure.training.run import Run
from fastcure.training.run_folder import reserved
from fastcure.training.tally import Tally

STATEFUL = "--objective trades --steps 1 --batch-stats train --optimizer sgd --lr 1e-2 --ema 0.9".split()
DEADLINE = 240
"""Seconds after which a process prints the stacks of its threads and ends: less than pytest allows a test."""


def in_two_processes(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work(rank, *arguments)` in both; return what it returns in the first."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        # Children of a process that has imported torch, and done nothing with it, need not import it again.
        multiprocessing.set_forkserver_preload(["torch._dynamo"])
        torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
            _process, (result, work, arguments), nprocs=2, start_method="forkserver"
        )
        return torch.load(result, weights_only=False)


def _process(rank: int, result: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    torch.set_num_threads(1)
    found = work(rank, *arguments)
    if rank == 0:
        torch.save(found, result)
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # torch's threads sometimes abort a process that ends in the ordinary way


def free_port() -> int:
    """A port that nobody listens on, below those that a system gives to connections: it stays free until it is used."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            port = secrets.choice(range(10_000, 32_000))
            listener.bind(("127.0.0.1", port))
            return port


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
    compare("fraction", case_of("resnet8"), fraction=0.5)

    for backend in ("torch", "triton"):  # folded, and with ReLUs fused by the kernels that a GPU runs
        os.environ["FASTCURE_BACKEND"] = backend
        folded = style("resnet8", relu)
        expected = truth(folded, engine="reference")
        prepare(folded.model, folded.x)
        ddp = DistributedDataParallel(CURE(folded.model))
        errors = []
        for _ in range(2):
            ddp.zero_grad()
            ddp(folded.x[rank::2], folded.y[rank::2]).total.backward()
            errors.append(relative(gradient(folded.model), expected))
        found[f"prepared, {backend}"] = max(errors) if count(folded.model) == 9 else "not folded"
    del os.environ["FASTCURE_BACKEND"]

    found["failing"] = failing(Ranks(torch.device("cpu"), rank, 2))
    case = case_of("resnet8")
    found["model in ddp"] = refusal(lambda: curvature(DistributedDataParallel(case.copy().model), case.x, case.y))

    def two_backwards(options: dict[str, Any]) -> None:
        out = wrapped(case, {}, **options)[1](case.x[rank::2], case.y[rank::2])
        first, second = (out.total, out.total) if "microbatch" in options else (out.loss, out.penalty)
        first.backward(retain_graph=True)
        second.backward()

    model, ddp = wrapped(case, {})
    with ddp.no_sync():
        out = ddp(case.x, case.y)
        out.loss.backward(retain_graph=True)
        (4 * out.penalty).backward()
    found["two backwards, no_sync"] = relative(gradient(model), truth(case))

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
        model = few.copy().model
        optimizer = torch.optim.SGD(model.parameters(), fused=True)
        schedules = {name: schedule("1", 1, name) for name in ("lr", "h", "gamma")}
        schedules["lr"] = schedule("0", 1, "lr")
        tally, ranks = Tally(torch.device("cpu")), Ranks(torch.device("cpu"), rank, 2)
        with reductions() as reduced:
            work = [(0, 0.0, share_of(ranks, few.x, few.y))]
            list(train_steps(CURE(model), work, optimizer, schedules, tally, ranks))
        found["reduced"] = reduced
        found["parameters"] = sum(p.numel() for p in model.parameters())
        found[f"finetune on {rows}"] = relative(gradient(model), truth(few, h=1.0, gamma=1.0))
        found[f"images of {rows}"] = float(tally.numbers[3])

    found["static_graph"] = refusal(lambda: wrapped(case, {"static_graph": True})[1](case.x, case.y))
    twice: list[dict[str, Any]] = [{}, {"batch_stats": "split"}, {"microbatch": 2, "batch_stats": "split"}]
    found["two backwards"] = [refusal(lambda options=options: two_backwards(options)) for options in twice]
    mesh = init_device_mesh("cpu", (2,))
    for reshard in (False, True):
        cure = CURE(case.copy().model)
        fully_shard(cure, mesh=mesh, reshard_after_forward=reshard)
        cure(case.x[rank::2], case.y[rank::2]).total.backward()
        found[f"fully_shard, {reshard}"] = relative(gradient(cure), truth(case))
        cure.zero_grad()
        out = cure(case.x[rank::2], case.y[rank::2])
        out.loss.backward(retain_graph=True)
        (4 * out.penalty).backward()
        found[f"fully_shard, {reshard}, two backwards"] = relative(gradient(cure), truth(case))
    nested, inside = CURE(case.copy().model), CURE(case.copy().model)
    for module in (*nested.model.stages, nested, inside.model):
        fully_shard(module, mesh=mesh)
    found["nested"] = refusal(lambda: nested(case.x, case.y))
    found["inside"] = refusal(lambda: inside(case.x, case.y))
    return found


@contextmanager
def reductions() -> Iterator[list[int]]:
    """Bytes of each reduction of floating point numbers, in their order."""
    found: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments: Any) -> Any:
        if tensor.is_floating_point():
            found.append(tensor.nbytes)
        return all_reduce(tensor, *arguments)

    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        yield found
    finally:
        dist.all_reduce = all_reduce


def failing(ranks: Ranks) -> tuple[int, str]:
    """An evaluation of 20 batches, in the second of which one process runs out of memory: how many this one made."""
    begun = []

    def work(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        begun.append(1)
        if ranks.rank == 1 and len(begun) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return y

    try:
        ranks.map(work, torch.zeros(40, 1), torch.zeros(40), seed=0, batch_size=2)
    except MemoryError as error:
        return len(begun), str(error)
    return len(begun), "nothing"


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Commands:
    """Runs commands in this process as torchrun would, and keeps their status and what they printed."""

    def __init__(self, rank: int, folder: Path, ports: Iterable[int]) -> None:
        self.rank, self.folder, self.ports = rank, folder, iter(ports)

    def __call__(self, name: str, *arguments: str) -> None:
        rank = self.rank
        os.environ |= {"TORCHELASTIC_RUN_ID": name, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(self.ports))}
        printed, error = StringIO(), StringIO()
        with redirect_stdout(printed), redirect_stderr(error):
            status = main(list(arguments))
        if dist.is_initialized():  # after an error the process would end
            dist.destroy_process_group()
        torch.save((status, printed.getvalue(), error.getvalue()), self.folder / f"{name}-{rank}.pt")


def runs(rank: int, npz: Path, folder: Path, ports: list[int]) -> int:
    """A run in peace; one that the second process is told to stop, and its continuation; one that disagrees.

    With random starts of each process's own, statistics of batch norms, momentum and averaged weights.

    Returns the steps that the stopped one took.
    """
    commands = Commands(rank, folder, ports)

    def run(name: str, out: str, *flags: str) -> None:
        commands(name, "finetune", "--dataset", f"npz:{npz}", "--out", str(folder / out), *SMALL, *STATEFUL, *flags)

    run("whole", "whole")
    pause, taken = Run._pause, []

    def signalled(run: Run) -> None:
        taken.append(1)
        if len(taken) == 5 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        pause(run)

    Run._pause = signalled  # type: ignore[method-assign]
    run("stopped", "out")
    Run._pause = pause  # type: ignore[method-assign]
    run("resumed", "out", "--resume")
    run("finished", "out", "--resume")
    run("apart", f"own-{rank}" if rank else "out", "--resume")
    return len(taken)


def distress(rank: int, npz: Path, folder: Path, ports: list[int]) -> None:
    """Runs in which one process alone lacks memory or meets what is not finite, or the folder is taken."""
    commands, forward = Commands(rank, folder, ports), CURE.forward

    def run(name: str, *flags: str) -> None:
        commands(name, "finetune", "--dataset", f"npz:{npz}", "--out", str(folder / name), *SMALL, *flags)

    def small(cure: CURE, x: Tensor, y: Tensor, index: Tensor) -> CUREOutput:
        out = forward(cure, x, y, index)
        if rank == 1 and min(cure.microbatch or len(x), len(x)) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    def spoilt(cure: CURE, x: Tensor, y: Tensor, index: Tensor) -> CUREOutput:
        steps.append(1)
        factor = torch.nan if rank == 1 and len(steps) == 5 else 1
        return CUREOutput(*(part * factor for part in forward(cure, x, y, index)))

    CURE.forward = small  # type: ignore[method-assign]
    run("memory")
    CURE.forward = spoilt  # type: ignore[method-assign]
    for name, *flags in (("stop",), ("skip", "--non-finite", "skip")):
        steps: list[int] = []
        run(name, *flags)
    CURE.forward = forward  # type: ignore[method-assign]
    with reserved(folder / "taken") if rank == 0 else nullcontext():
        run("taken")


def measures(rank: int, folder: Path, ports: list[int]) -> None:
    """What is measured of the run in `folder`, with one dataset of an odd number of batches, and what is refused."""
    commands = Commands(rank, folder, ports)
    for command, flags in MEASURES.items():
        commands(command, command, "--run", str(folder / "run"), *flags, "--out", str(folder / f"{command}-two.json"))
    commands("report", "report", str(folder / "run"))
    nan = folder / "nan.safetensors"
    commands("nan", "evaluate", "--run", str(folder / "run"), "--checkpoint", str(nan))


MEASURES = {
    "evaluate": "--batch-size 5 --limit 13 --eps 0.05,0.1 --attacks fgsm,pgd --restarts 2 --steps 1 "
    "--device cpu".split(),
    "analyze": "--batch-size 5 --limit 13 --probes 3 --extremes 2 --device cpu".split(),
}
"""Batches of 5, 5 and 3: the second process gets one and the first the odd one, too."""
