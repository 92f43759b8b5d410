"""What bfloat16 brings: the steps that users take, under autocast and without, taking turns in one run."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from record import write
from steps import Step, cure, standard
from timing import medians
from torch import Tensor, nn
from workloads import DEVICE, Workload

WORKLOADS = (
    [Workload("resnet8", 128), Workload("resnet18", 64), Workload("resnet18", 16)]
    if DEVICE.type == "cpu"
    else [Workload("resnet18", 128)]
)
STEPS: dict[str, Step] = {
    "standard": standard,
    "cure": cure("auto"),
    "cure, train": cure("auto", "train"),
    "cure, train, compiled": cure("compile", "train"),
    "cure, train, 1/4, at FGSM": cure("auto", "train", fraction=0.25, loss_at="step"),
    "cure, train, 1/4, at FGSM, compiled": cure("compile", "train", fraction=0.25, loss_at="step"),
}
ROWS: list[dict[str, object]] = []


def run(step: Step, model: nn.Module, x: Tensor, y: Tensor, amp: torch.dtype) -> None:
    with torch.autocast(DEVICE.type, amp, enabled=amp != torch.float32):
        step(model, x, y)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_precision(benchmark: pytest.FixtureRequest, workload: Workload) -> None:
    model, x, y = workload.build()
    works = {
        (title, amp): partial(run, step, model, x, y, amp)
        for title, step in STEPS.items()
        for amp in (torch.float32, torch.bfloat16)
    }
    times = medians(benchmark, works, budget=150.0)
    print(f"\n{workload.model}, batch {workload.batch}, {DEVICE}, medians")
    for (title, amp), seconds in times.items():
        ratios = {"ratio_to_standard_float32": ("standard", torch.float32), "ratio_to_float32": (title, torch.float32)}
        row: dict[str, object] = {"model": workload.model, "batch": workload.batch, "step": title}
        row |= {"dtype": str(amp).removeprefix("torch."), "milliseconds": round(seconds * 1e3, 3)}
        row |= {name: round(seconds / times[base], 3) for name, base in ratios.items()}
        print("  {step:<36} {dtype:<9} {milliseconds:9.1f} ms  {ratio_to_standard_float32:6.2f} standard".format(**row))
        ROWS.append(row)
    write(f"precision-{DEVICE.type}", ROWS, DEVICE, by="step")
