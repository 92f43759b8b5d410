"""What each training step costs on paper, counted: its arithmetic, and the memory traffic around it.

`python benchmarks/cost.py`. Arithmetic is in forward passes F. Traffic is that of everything but convolutions and
matrix products, in MB an image, in fp32 and under autocast to bf16; what a step moves whatever its batch, of the size
of the weights, is left out. Without a GPU our kernels are counted and not run.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":  # before triton is imported: it then lets us launch kernels here
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastcure_kernels import channel_sums  # noqa: E402
from fastcure_kernels.jit import LISTENERS, Kernel  # noqa: E402
from steps import STEPS, Step, cure  # noqa: E402
from torch import nn  # noqa: E402

from fastcure import prepare  # noqa: E402
from fastcure.models import resnet18  # noqa: E402
from fastcure.profiling.flops import FlopCounter  # noqa: E402
from fastcure.profiling.traffic import TrafficCounter  # noqa: E402


@contextmanager
def kernels_that_only_count() -> Iterator[None]:
    """Let kernels return zeros on a CPU, where one step of them would take minutes."""

    def launch(kernel: Kernel, grid: object, *args: Any, **options: object) -> None:
        for listener in LISTENERS:
            listener(args)
        ctypes.memset(args[0].data_ptr(), 0, args[0].numel() * args[0].element_size())

    with mock.patch.object(Kernel, "launch", launch if DEVICE.type == "cpu" else Kernel.launch):
        yield


def megabytes(step: Step, model: nn.Module, side: int = 8, dtype: torch.dtype = torch.float32) -> float:
    """Count the traffic of one image of 32 x 32 pixels, channels last: 16 times that of 8 x 8, which is sooner counted.

    The partial results of reductions are of one size for all batches of 128 images and more: here they are one each.
    """
    model.to(memory_format=torch.channels_last)
    totals = []
    for batch in (8, 16):  # a quarter is then two images or more, as batch norms in training mode want
        x, y = torch.rand(batch, 3, side, side, device=DEVICE), torch.arange(batch, device=DEVICE) % 10
        x = x.contiguous(memory_format=torch.channels_last)
        amp = torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)
        one = mock.patch.object(channel_sums, "PROGRAMS", 1)
        with kernels_that_only_count(), one, amp, TrafficCounter() as counter:
            step(model, x, y)
        totals.append(counter.total)
    return (32 // side) ** 2 * (totals[1] - totals[0]) / 8 / 1e6


def main() -> None:
    """Print one line a step, for ResNet-18 on 32 x 32 images."""
    torch.manual_seed(0)
    model, x, y = resnet18().to(DEVICE), torch.rand(8, 3, 32, 32, device=DEVICE), torch.arange(8, device=DEVICE)
    with torch.no_grad(), FlopCounter() as forward:
        model(x)
    print(f"{'step':<34} {'F':>5} {'MB':>5} {'bf16':>5}   (F = {forward.total / len(x) / 1e9:.3f} GFLOP an image)")

    def show(name: str, step: Step, backend: str = "triton") -> None:
        with FlopCounter() as counter:
            step(model, x, y)
        with mock.patch.dict(os.environ, FASTCURE_BACKEND=backend):
            moved = megabytes(step, model), megabytes(step, model, dtype=torch.bfloat16)
        print(f"{name:<34} {counter.total / forward.total:5.1f} {moved[0]:5.0f} {moved[1]:5.0f}", flush=True)

    for name, step in STEPS.items():
        show(name, step)
    show("cure, train, 1/4, at FGSM (ours)", cure("eager", "train", fraction=0.25, loss_at="step"))
    show("cure, train, no kernels (ours)", cure("eager", "train"), "torch")
    show("cure, no kernels (ours)", cure("eager"), "torch")
    show("cure (ours)", cure("eager"))
    prepare(model, x)
    show("cure, prepared (ours)", cure("eager"))


if __name__ == "__main__":
    main()
