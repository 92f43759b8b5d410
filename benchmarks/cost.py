"""The arithmetic of each training step in forward passes F, counted: `python benchmarks/cost.py`."""

from __future__ import annotations

import torch
from steps import STEPS

from fastcure.flops import FlopCounter
from fastcure.models import resnet18


def main() -> None:
    """Print one line a step, for ResNet-18 on 32 x 32 images."""
    torch.manual_seed(0)
    model, x, y = resnet18(), torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    with torch.no_grad(), FlopCounter() as forward:
        model(x)
    print(f"{'step':<26} {'F':>5}   (F = {forward.total / len(x) / 1e9:.3f} GFLOP an image)")
    for name, step in STEPS.items():
        with FlopCounter() as counter:
            step(model, x, y)
        print(f"{name:<26} {counter.total / forward.total:5.1f}")


if __name__ == "__main__":
    main()
