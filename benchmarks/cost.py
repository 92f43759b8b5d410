"""What each training step costs on paper, counted: its arithmetic, and the memory traffic around it.

`python benchmarks/cost.py`. Arithmetic is in forward passes F. Traffic is that of everything but convolutions and
matrix products, in MB an image in fp32; what a step moves whatever its batch, of the size of the weights, is left out.
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":  # before triton is imported: kernels are interpreted, and operators counted as on a GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from steps import STEPS, Step, cure  # noqa: E402
from torch import nn  # noqa: E402

from fastcure import prepare  # noqa: E402
from fastcure.models import resnet18  # noqa: E402
from fastcure.profiling.flops import FlopCounter  # noqa: E402
from fastcure.profiling.traffic import TrafficCounter  # noqa: E402


def megabytes(step: Step, model: nn.Module) -> float:
    """Count the traffic of one image of 32 x 32 pixels: 16 times that of 8 x 8, which is sooner counted."""
    totals = []
    for batch in (4, 8):
        x, y = torch.rand(batch, 3, 8, 8, device=DEVICE), torch.arange(batch, device=DEVICE)
        with TrafficCounter() as counter:
            step(model, x, y)
        totals.append(counter.total)
    return 16 * (totals[1] - totals[0]) / 4 / 1e6


def main() -> None:
    """Print one line a step, for ResNet-18 on 32 x 32 images."""
    torch.manual_seed(0)
    model, x, y = resnet18().to(DEVICE), torch.rand(4, 3, 32, 32, device=DEVICE), torch.arange(4, device=DEVICE)
    with torch.no_grad(), FlopCounter() as forward:
        model(x)
    print(f"{'step':<26} {'F':>5} {'MB':>5}   (F = {forward.total / len(x) / 1e9:.3f} GFLOP an image)")

    def show(name: str, step: Step) -> None:
        with FlopCounter() as counter:
            step(model, x, y)
        os.environ["FASTCURE_BACKEND"] = "triton"
        print(f"{name:<26} {counter.total / forward.total:5.1f} {megabytes(step, model):5.0f}", flush=True)
        os.environ["FASTCURE_BACKEND"] = "auto"

    for name, step in STEPS.items():
        show(name, step)
    prepare(model, x)
    show("cure, prepared (ours)", cure("eager"))


if __name__ == "__main__":
    main()
