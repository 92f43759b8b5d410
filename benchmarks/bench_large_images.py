"""ResNet-50 on images of 224 x 224: seconds and memory of a step, by standard training, CURE, and its thrifty forms.

The network is timm's; torchvision's, which is the same, where timm is absent; with neither nothing is measured.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch
from record import write
from steps import Step, cure, standard
from timing import medians, peak_mib
from workloads import DEVICE, Workload

BATCH = 8 if DEVICE.type == "cpu" else 32
PRECISIONS = [torch.float32] if DEVICE.type == "cpu" else [torch.float32, torch.bfloat16]
STEPS: dict[str, Step] = {
    "standard": standard,
    "cure": cure("auto"),
    "cure, microbatches of a quarter": cure("auto", microbatch=BATCH // 4),
    "cure, train": cure("auto", "train"),
    "cure, train, 1/4": cure("auto", "train", fraction=0.25),
    "cure, train, 1/4, at FGSM": cure("auto", "train", fraction=0.25, loss_at="step"),
}
ROWS: list[dict[str, object]] = []


@pytest.mark.skipif(not find_spec("timm") and not find_spec("torchvision"), reason="needs timm: pip install timm")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_large_images(benchmark: pytest.FixtureRequest, dtype: torch.dtype) -> None:
    workload = Workload("resnet50", BATCH, dtype, size=224)
    model, x, y = workload.build()

    def work(step: Step) -> None:
        with workload.precision():
            step(model, x, y)

    works = {title: partial(work, step) for title, step in STEPS.items()}
    for each in works.values():
        each()
    memory = {title: peak_mib(each) for title, each in works.items()}
    times = medians(benchmark, works)
    print(f"\n{workload}, {DEVICE}, medians")
    for title, seconds in times.items():
        ratio = seconds / times["standard"]
        print(f"  {title:<32} {seconds:7.2f} s  {ratio:5.2f} x standard  {memory[title]:6d} MiB")
        row = {"model": workload.model, "batch": BATCH, "pixels": 224, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"step": title, "seconds": round(seconds, 4), "ratio_to_standard": round(ratio, 3)}
        ROWS.append({**row, "peak_MiB": memory[title]})
    write(f"large-images-{DEVICE.type}", ROWS, DEVICE, by="step")
