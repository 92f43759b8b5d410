"""What two gloo processes do for test_own_loops: training loops of one's own, right and wrong."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from networks import NETWORKS, Case, make
from run_example import weights as weights_of_example
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import refusal

from fastcure import CURE, curvature
from fastcure import _distributed as data_parallel
from fastcure.integrations.hugging_face import call_through

STEPS = 3
H, GAMMA = 0.7, 2.0


def by_definition(case: Case) -> Tensor:
    """The weights after some steps of SGD on the whole batch, from the definition alone."""
    model = copy.deepcopy(case.model).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        x = case.x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), case.y, reduction="none")
        (g,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        sign = g.detach().sign().flatten(1)
        step = (case.x + H * (sign / sign.norm(dim=1, keepdim=True)).view_as(case.x)).requires_grad_()
        at_step = nn.functional.cross_entropy(model(step), case.y, reduction="sum")
        (g_step,) = torch.autograd.grad(at_step, step, create_graph=True)
        optimizer.zero_grad()
        (loss.mean() + GAMMA * (g_step - g).flatten(1).square().sum(1).mean()).backward()
        optimizer.step()
    return weights(model)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Trainer(nn.Module):
    """Calls the regulariser inside of its own forward, as a Lightning module does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return CURE(self.model, H, GAMMA)(x, y).total


def loops(rank: int, store: str) -> dict[str, Any]:
    """Of each loop how far the weights of the processes are from the truth, or what refused it."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case = make(NETWORKS["mlp-softplus"], 8, seed=0)
    x, y = case.x[rank::2], case.y[rank::2]
    truth, found = by_definition(case), dict[str, Any]()

    def run(model: nn.Module, backward: Callable[[], None]) -> float:
        """Train; the error of the worse process."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(STEPS):
            optimizer.zero_grad()
            backward()
            optimizer.step()
        error = (weights(model) - truth).norm() / (truth - weights(case.model)).norm()
        dist.all_reduce(error, dist.ReduceOp.MAX)
        return float(error)

    def average(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2

    def fresh() -> tuple[nn.Module, DistributedDataParallel]:
        model = copy.deepcopy(case.model)
        return model, DistributedDataParallel(model)

    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "microbatch": {"microbatch": 2},
        "fraction": {"fraction": 0.5},
        "first order": {"engine": "first_order"},
        "split": {"batch_stats": "split"},
    }
    for name, given in options.items():
        model, ddp = fresh()
        cure = CURE(ddp.module, H, GAMMA, **given)
        found[f"beside, {name}"] = refusal(lambda cure=cure: cure(x, y).total.backward())
    found["beside, per sample"] = refusal(lambda: curvature(ddp.module, x, y, H).penalty.sum().backward())
    found["a part of it"] = refusal(lambda: curvature(model[0], x, y, H).penalty.sum().backward())
    data_parallel._living.clear()  # as if it had been made before fastcure was imported
    data_parallel._look_for_earlier_ones.cache_clear()
    found["beside, made earlier"] = refusal(lambda: cure(x, y).total.backward())
    found["around it"] = refusal(lambda: CURE(nn.Sequential(nn.Identity(), ddp))(x, y))

    out = cure(x, y)
    with torch.no_grad():
        silent = cure(x, y)
    found["looked at"] = [bool(torch.isfinite(values.total)) for values in (out, silent)]

    def without_sync() -> None:
        with ddp.no_sync():
            CURE(model, H, GAMMA)(x, y).total.backward()
        average(model.parameters())

    model, ddp = fresh()
    found["averaged by hand, no_sync"] = run(model, without_sync)
    model, ddp = fresh()
    del ddp

    def by_hand() -> None:
        CURE(model, H, GAMMA)(x, y).total.backward()
        average(model.parameters())

    found["averaged by hand"] = run(model, by_hand)
    model = copy.deepcopy(case.model)
    ddp = DistributedDataParallel(Trainer(model))
    found["inside a trainer"] = run(model, lambda: ddp(x, y).backward())
    for name, replaced in (("of its class", False), ("of its own", True)):  # as accelerate does to cast
        model, ddp = fresh()
        if replaced:
            of_class = model.forward
            model.forward = lambda x, of_class=of_class: of_class(x)
        before, cure = vars(model).get("forward"), CURE(model, H, GAMMA)
        refused = refusal(lambda ddp=ddp, cure=cure: call_through(ddp, cure.model, cure, x, y[:1]))
        assert refused.startswith("ValueError: y must be"), refused
        assert vars(model).get("forward") is before
        through = lambda ddp=ddp, cure=cure: call_through(ddp, cure.model, cure, x, y).total.backward()  # noqa: E731
        found[f"through its wrapper, forward {name}"] = run(model, through)
        assert vars(model).get("forward") is before
    del ddp
    other, unused = fresh()
    model = copy.deepcopy(case.model)
    ddp = DistributedDataParallel(CURE(model, H, GAMMA))
    found["beside an unrelated one"] = run(model, lambda: ddp(x, y).total.backward())
    found["refused settings"] = settings(ddp, x, y)

    cure = CURE(copy.deepcopy(case.model), H, 0.1)
    fully_shard(cure, mesh=init_device_mesh("cpu", (2,)))
    cure.gamma = 0.0
    out = cure(x, y)
    found["gamma of what is sharded"] = float(out.total - out.loss)
    del other, unused
    found["example"] = weights_of_example("ddp_torchrun")
    return found


def settings(ddp: DistributedDataParallel, x: Tensor, y: Tensor) -> dict[str, str]:
    """What is said of settings on a wrapper."""
    values = {"h": 0.1, "gamma": 0.0, "fraction": 0.5, "power": 1, "engine": "reference", "batch_stats": "split"}
    said = {}
    for name, value in {**values, "loss_at": "step", "microbatch": 1, "loss_fn": nn.Identity()}.items():
        setattr(ddp, name, value)
        said[name] = refusal(lambda: ddp(x, y))
        delattr(ddp, name)
    ddp.gamma, ddp.step = GAMMA, 3
    said["the same value, and a name that is no setting"] = refusal(lambda: ddp(x, y).total.backward())
    return said
