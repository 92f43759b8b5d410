"""A gradient penalty in plain torch code, with and without `fastcure.double_backward()` around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest
import torch
from record import write
from timing import busy_ms, medians, peak_mib
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import DEVICE, Workload, without_tf32

from fastcure import double_backward

SIZES = (
    {"resnet8": 128, "resnet18": 16, "convnet": 32, "vit": 32}
    if DEVICE.type == "cpu"
    else {"resnet8": 512, "resnet18": 128, "convnet": 128, "vit": 128}
)
MODES = [(name, training) for name in SIZES for training in (False, True) if name.startswith("resnet") or not training]
ROWS: list[dict[str, object]] = []
Context = Callable[[], AbstractContextManager[object]]


class ConvNet(nn.Module):
    """Depthwise convolutions, layer norms over channels and GELU, as in ConvNeXt: 4 blocks of width 64."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Conv2d(width, width, 7, padding=3, groups=width),
                    nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 3, 32, 32)` to logits `(B, 10)`."""
        x = self.stem(x - 0.5)
        for spatial, mixing in self.blocks:
            x = x + mixing(spatial(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.fc(x.mean((2, 3)))


def gradient_penalty(model: nn.Module, x: Tensor, y: Tensor, context: Context) -> list[Tensor]:
    """Return the parameter gradients of `mean loss + mean ||grad_x loss||^2`."""
    with context():
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(model(x).float(), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
    total = (loss + g.square().sum()) / len(x)
    return list(torch.autograd.grad(total, list(model.parameters())))


def plain() -> AbstractContextManager[object]:
    """Torch as it is; attention by the kernel that has a second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def relative(found: list[Tensor], truth: list[Tensor]) -> float:
    """||found - truth|| / ||truth|| over all parameters together."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, truth, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in truth)) ** 0.5


@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "training"), MODES)
def test_double_backward(benchmark: pytest.FixtureRequest, name: str, training: bool, amp: torch.dtype) -> None:
    workload = Workload("resnet8" if name == "convnet" else name, SIZES[name], amp)
    model, x, y = workload.build()
    if name == "convnet":
        torch.manual_seed(0)
        model = ConvNet().to(DEVICE)
    model.train(training)

    def step(context: Context) -> list[Tensor]:
        with workload.precision():
            return gradient_penalty(model, x, y, context)

    with without_tf32():
        wide = [g.double() for g in gradient_penalty(model.double(), x.double(), y, plain)]
        model.float()
        errors = {"torch": relative(step(plain), wide), "double_backward": relative(step(double_backward), wide)}
    assert errors["double_backward"] < 1.5 * errors["torch"] + 1e-6, errors
    works = {"torch": partial(step, plain), "double_backward": partial(step, double_backward)}
    memory = {title: peak_mib(work) for title, work in works.items()}
    times = medians(benchmark, works)
    for title, seconds in times.items():
        row: dict[str, object] = {"model": name, "batch": workload.batch, "dtype": str(amp).removeprefix("torch.")}
        row |= {"training": training, "rules": title, "milliseconds": round(seconds * 1e3, 3)}
        row |= {"speedup": round(times["torch"] / seconds, 3), "relative_error": f"{errors[title]:.1e}"}
        ROWS.append({**row, "peak_MiB": memory[title], "busy_ms": round(busy_ms(works[title]), 3)})
    faster = times["torch"] / times["double_backward"]
    print(f"\n{workload}, {'training' if training else 'evaluation'}: {faster:.2f} times as fast as torch's rules")
    write(f"double_backward-{DEVICE.type}", ROWS, DEVICE, by="rules")
