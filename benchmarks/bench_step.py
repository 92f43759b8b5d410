"""What a training step costs: time as a ratio to the standard step, measured in turn in one run, and peak memory.

A step whose gradients are wrong is not timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import fastcure_kernels as kernels
import pytest
import torch
from record import write
from steps import GAMMA, STEPS, H, Step, compiled_standard, cure
from timing import medians, peak_mib
from torch import Tensor, nn
from workloads import DEVICE, WORKLOADS, Workload, without_tf32

from fastcure import curvature
from fastcure.profiling.flops import FlopCounter

ROWS: list[dict[str, object]] = []
COMPILED = "eager compile cuda_graph" if DEVICE.type == "cuda" else "eager compile"
ENGINES = os.environ.get("BENCH_ENGINES", COMPILED).split()
"""Of the frozen step. Those of large networks take minutes to compile."""


def contenders(workload: Workload) -> dict[str, Step]:
    """The steps to compare on this workload; where nothing is piecewise linear, the first-order engine as well."""
    engines = [*ENGINES, *(["first_order"] if workload.model == "vit" else [])]
    ours = {f"cure, {engine} (ours)": cure(engine) for engine in engines}
    compiled = {"standard, compiled": compiled_standard()} if "compile" in ENGINES else {}
    return {**STEPS, **compiled, **ours}


def check(model: nn.Module, x: Tensor, y: Tensor, engine: str) -> None:
    """Raise unless the gradients of an engine are the reference's, but for kinks that rounding crosses."""
    z = kernels.direction(torch.randn_like(x))  # one of its own, for entries of g near 0 have the sign of rounding
    gradients = []
    with without_tf32():
        for name in (engine, "reference"):
            model.zero_grad()
            out = curvature(model, x, y, H, engine=name, direction=z)
            (out.loss + GAMMA * out.penalty).mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert error < 5e-3, f"gradients of {engine} are off by {error:.1e}: nothing is timed"


def forwards(model: nn.Module, x: Tensor, y: Tensor, step: Step) -> float:
    """The arithmetic of a step in forward passes; 0 where it is compiled, and cannot be seen."""
    x, y = x[:4], y[:4]  # a quarter of them is one
    with torch.no_grad(), FlopCounter() as one:
        model(x)
    with FlopCounter() as counter:
        step(model, x, y)
    return counter.total / one.total


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_steps(benchmark: pytest.FixtureRequest, workload: Workload) -> None:
    torch._dynamo.reset()  # eight programs a code object, and all ResNets share theirs
    model, x, y = workload.build()
    for engine in ENGINES:
        check(model, x, y, engine)
    steps = contenders(workload)
    unseen = ("compile", "graph")
    cost = {t: 0.0 if any(w in t for w in unseen) else forwards(model, x, y, step) for t, step in steps.items()}

    def in_precision(step: Step) -> None:
        with workload.precision():
            step(model, x, y)

    works: dict[str, Callable[[], None]] = {title: partial(in_precision, step) for title, step in steps.items()}
    for work in works.values():
        work()
    memory = {title: peak_mib(work) for title, work in works.items()}
    times = medians(benchmark, works)

    print(f"\n{workload}, {DEVICE}, medians")
    for title, median in times.items():
        ratio, mib = median / times["standard"], memory[title]
        print(f"  {title:<26} {median * 1e3:9.1f} ms  {ratio:6.2f} x standard  {cost[title]:5.1f} F  {mib:6d} MiB")
        row = {"model": workload.model, "batch": workload.batch, "dtype": str(workload.amp).removeprefix("torch.")}
        row |= {"channels_last": workload.channels_last, "step": title, "milliseconds": round(median * 1e3, 3)}
        row |= {"ratio_to_standard": round(ratio, 3), "forwards": round(cost[title], 2) or "", "peak_MiB": mib}
        ROWS.append(row)
    write(f"step-{DEVICE.type}", ROWS, DEVICE, by="step")
