"""Who waits for whom on a GPU: what a training step costs the host, and what the device.

`python benchmarks/host_cost.py [--model resnet18] [--batch 128] [--only "auto|pgd"] [--autotune]`. `wall` is a step of
a loop that never waits for the device, `host` the time until its Python code returns, `busy` the time that kernels and
copies run. A step whose `wall` is above its `busy` waits for the host. Forward and backward; no optimizer.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from record import write
from steps import Step, adversarial, cure, published, standard
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workloads import DEVICE, Workload

from fastcure.objectives import PGD

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
MODES: dict[str, dict[str, Any]] = {
    "frozen": {},
    "at the step": {"loss_at": "step"},
    "split": {"batch_stats": "split"},
    "train": {"batch_stats": "train"},
    "preset": {"batch_stats": "train", "loss_at": "step", "fraction": 0.25},
}
STEPS: dict[str, tuple[Step, bool, str]] = {  # title: the step, whether the model is prepared, FASTCURE_BACKEND
    "standard": (standard, True, "auto"),
    **{f"{mode}, auto": (cure("auto", **options), True, "auto") for mode, options in MODES.items()},
    **{f"{mode}, eager": (cure("eager", **options), True, "auto") for mode, options in MODES.items()},
    "frozen, eager, plain torch": (cure("eager"), True, "torch"),
    "frozen, eager, not prepared": (cure("eager"), False, "auto"),
    "published schedule": (published, True, "auto"),
    "pgd-7": (adversarial(PGD, steps=7), True, "auto"),
}
WARM_UP = 6
"""Steps before any is timed: the engine "auto" replays from the fourth one on."""


def count(step: Callable[[], None]) -> dict[str, Any]:
    """Return busy milliseconds of the device, launches, synchronisations and copies of one step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.events() or []
    names = [event.name for event in events if event.device_type == DeviceType.CPU]
    on_device = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return {
        "busy_ms": round(sum(event.time_range.elapsed_us() for event in on_device) / 1e3, 3),
        "launches": sum(name in LAUNCHES for name in names),
        "syncs": sum("Synchronize" in name for name in names) - 1,  # the last is ours
        "copies_up": sum("HtoD" in event.name for event in on_device),
        "copies_on_device": sum("DtoD" in event.name for event in on_device),
    }


def timed(step: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Return host and wall milliseconds of a step, medians, and its counts."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    host, wall = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        host.append(time.perf_counter() - began)
        torch.cuda.synchronize()
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        wall.append((time.perf_counter() - began) / 4)
    times = {"wall_ms": wall, "host_ms": host}
    return {name: round(statistics.median(found) * 1e3, 3) for name, found in times.items()} | count(step)


def main() -> None:
    """Print a line a step, and write `results/host-cuda.csv`, or `host-autotuned-cuda.csv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10, help="timed; the median counts")
    parser.add_argument("--only", default="", help="steps whose title this pattern finds, beside the standard one")
    parser.add_argument("--autotune", action="store_true", help="let cuDNN try its algorithms for every shape")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = args.autotune
    if DEVICE.type != "cuda":
        parser.error("this measures a GPU's host: there is no CUDA device; benchmarks/cost.py counts without one")

    rows: list[dict[str, Any]] = []
    chosen = {title: row for title, row in STEPS.items() if title == "standard" or re.search(args.only, title)}
    for title, (step, prepared, backend) in chosen.items():
        for amp in (torch.float32, torch.bfloat16):
            os.environ["FASTCURE_BACKEND"] = backend
            workload = Workload(args.model, args.batch, amp)
            model, x, y = workload.build(prepared)
            row: dict[str, Any] = {"model": args.model, "batch": args.batch, "dtype": str(amp).removeprefix("torch.")}
            row["step"] = title

            def one(step: Step, workload: Workload, *batch: Any) -> None:
                with workload.precision():
                    step(*batch)

            row |= timed(partial(one, step, workload, model, x, y), args.rounds)
            print("  ".join(f"{name} {value}" for name, value in list(row.items())[2:]), flush=True)
            rows.append(row)
            write("host-autotuned-cuda" if args.autotune else "host-cuda", rows, DEVICE, by="step")


if __name__ == "__main__":
    main()
