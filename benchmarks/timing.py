"""Timing of contenders that take turns: in every round each runs once, so that a slower moment slows all of them."""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workloads import DEVICE, rounds_for

Work = Callable[[], object]
T = TypeVar("T", bound=Hashable)
PEAKS = "/proc/self/clear_refs"
"""By which Linux forgets the peak of a process's memory."""


def seconds(work: Work) -> float:
    """Time one call, to its end on the device."""
    began = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def medians(benchmark: pytest.FixtureRequest, contenders: Mapping[T, Work], budget: float = 30.0) -> dict[T, float]:
    """Median seconds of each contender, after a warm-up, in as many rounds as fit into `budget` seconds."""
    for work in contenders.values():
        for _ in range(4 if DEVICE.type == "cuda" else 1):  # work that repeats is captured there
            work()
    rounds = rounds_for(sum(seconds(work) for work in contenders.values()), budget)
    times: dict[T, list[float]] = {title: [] for title in contenders}

    def one_round() -> None:
        for title, work in contenders.items():
            times[title].append(seconds(work))

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)  # type: ignore[attr-defined]
    return {title: statistics.median(values) for title, values in times.items()}


def busy_ms(work: Work) -> float:
    """Milliseconds that kernels and copies of one call run on the device; 0 on a CPU."""
    if DEVICE.type != "cuda":
        return 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() or [] if event.device_type == DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in events if not event.is_user_annotation) / 1e3


def peak_mib(work: Work) -> int:
    """Peak memory of one call beyond what was held before, in MiB: of the allocator on CUDA, of the process on a CPU.

    0 where the device or the system does not count it; Linux does.
    """
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) // 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free, and not yet given back, would hide what is taken
        forget = os.open(PEAKS, os.O_WRONLY)
        os.write(forget, b"5")  # the highest so far
        os.close(forget)
    except (OSError, AttributeError):
        return 0
    before = _resident("VmRSS")
    work()
    return (_resident("VmHWM") - before) // 2**10


def _resident(name: str) -> int:
    """Return a line of the kernel's about this process, in KiB."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
