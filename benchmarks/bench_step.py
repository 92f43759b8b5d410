"""What a training step costs: time as a ratio to the standard step, measured in turn in one run, and peak memory.

The steps take turns within a round, so that a machine that slows down slows all of them; the median round counts. A
step whose gradients are wrong is not timed.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from record import write
from steps import GAMMA, STEPS, H
from torch import Tensor, nn

from fastcure import curvature
from fastcure.models import build

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKLOADS = (
    [("resnet8", 128, 7), ("resnet18", 16, 5)]
    if DEVICE.type == "cpu"
    else [("resnet8", 512, 30), ("resnet18", 128, 20), ("resnet18", 512, 10), ("wide_resnet28_10", 128, 5)]
)
ROWS: list[dict[str, object]] = []


def workload(name: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with initial weights and a batch of noise, which cost what any others do."""
    torch.manual_seed(0)
    return build(name).to(DEVICE), torch.rand(batch, 3, 32, 32, device=DEVICE), torch.arange(batch, device=DEVICE) % 10


def check(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise unless our gradients are the oracle's."""
    gradients = []
    for engine in ("auto", "reference"):
        model.zero_grad()
        out = curvature(model, x[:8], y[:8], H, engine=engine)
        (out.loss + GAMMA * out.penalty).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert error < 1e-3, f"gradients are off by {error:.1e}: nothing is timed"


def seconds(run: object, *arguments: object) -> float:
    """Time one call, to its end on the device."""
    began = time.perf_counter()
    run(*arguments)  # type: ignore[operator]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@pytest.mark.parametrize(("name", "batch", "rounds"), WORKLOADS)
def test_steps(benchmark: pytest.FixtureRequest, name: str, batch: int, rounds: int) -> None:
    model, x, y = workload(name, batch)
    check(model, x, y)
    memory: dict[str, int] = {}
    for title, step in STEPS.items():  # warm-up, and peak memory where the device counts it
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(model, x, y)
        memory[title] = torch.cuda.max_memory_allocated() // 2**20 if DEVICE.type == "cuda" else 0
    times: dict[str, list[float]] = {title: [] for title in STEPS}

    def one_round() -> None:
        for title, step in STEPS.items():
            times[title].append(seconds(step, model, x, y))

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)  # type: ignore[attr-defined]
    base = statistics.median(times["standard"])
    print(f"\n{name}, batch {batch}, {DEVICE}, median of {rounds} rounds")
    for title, values in times.items():
        median = statistics.median(values)
        print(f"  {title:<26} {median * 1e3:9.1f} ms  {median / base:5.2f} x standard  {memory[title]:6d} MiB")
        row = {"model": name, "batch": batch, "dtype": "float32", "step": title}
        row |= {"milliseconds": round(median * 1e3, 2), "slowest": round(max(values) * 1e3, 2)}
        ROWS.append({**row, "ratio_to_standard": round(median / base, 3), "peak_MiB": memory[title]})
    write(f"step-{DEVICE.type}", ROWS, DEVICE)
