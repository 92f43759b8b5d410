"""A network, steps and what they must equal, for tests of replayed steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure import CURE
from fastcure._trials import EAGER_RUNS
from fastcure.engines import ENGINES


class Net(nn.Module):
    """A network with something of everything that Python may change."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.still = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(100, 3)
        self.scale, self.settings = 1.0, {"shift": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x))) * self.scale + self.settings["shift"]
        return self.head(F.relu(self.still(self.second(x)) + x).flatten(1))


def network(device: torch.device, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double().to(device)


def batch(device: torch.device, step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(size, 2, 5, 5, generator=generator).double()
    return x.to(device), torch.randint(3, (size,), generator=generator).to(device)


def replays(model: nn.Module, engine: str = "auto") -> int:
    """How many replays there were of captures that are still kept."""
    return sum(captured.replays for captured in ENGINES[engine].captures._kept.get(model, {}).values())  # type: ignore[attr-defined]


def train(cure: CURE, steps: int, device: torch.device, sizes: Sequence[int] = (8,), first: int = 0) -> None:
    optimizer = torch.optim.SGD(cure.parameters(), lr=0.01, momentum=0.9)
    for step in range(first, first + steps):
        for size in sizes:
            optimizer.zero_grad()
            cure(*batch(device, step, size)).total.backward()
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.step()


def same(a: nn.Module, b: nn.Module) -> None:
    theirs = b.state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, theirs[name]) or relative(value.double(), theirs[name].double()) < 1e-10, name


MODES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "first power": {"power": 1},
    "at the step": {"loss_at": "step"},
    "train": {"batch_stats": "train"},
    "split": {"batch_stats": "split"},
    "share": {"fraction": 0.25},
    "preset": {"batch_stats": "train", "loss_at": "step", "fraction": 0.25},
    "micro-batches": {"microbatch": 3},
    "h of each sample": {"h": "each"},
}


def closed_over(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, y: weight * F.cross_entropy(logits, y, reduction="none")


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def warmed(device: torch.device, engine: str = "auto") -> Net:
    model = network(device)
    for _ in range(EAGER_RUNS + 2):  # the first one of a model is watched for dropout
        CURE(model, engine=engine)(*batch(device, 0)).total.backward()
    assert replays(model, engine)
    return model
