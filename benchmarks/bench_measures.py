"""What each measure brings: the eager step with one of them left out at a time, taking turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from record import write
from steps import cure, standard
from timing import medians, peak_mib
from torch import Tensor, nn
from workloads import DEVICE, Workload

from fastcure import models
from fastcure.rules.context import RULES

WORKLOADS = (
    [Workload("resnet8", 128), Workload("resnet18", 16)]
    if DEVICE.type == "cpu"
    else [Workload("resnet18", batch, amp) for batch in (128, 512) for amp in (torch.float32, torch.bfloat16)]
)
ROWS: list[dict[str, object]] = []


@contextmanager
def torchs(*operators: str) -> Iterator[None]:
    """Give operators torch's own double backward."""
    ours = {operator: RULES.pop(operator) for operator in operators}
    try:
        yield
    finally:
        RULES.update(ours)


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_measures(benchmark: pytest.FixtureRequest, workload: Workload) -> None:
    model, x, y = workload.build()
    plain = models.build(workload.model).to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other, x_other, _ = workload._replace(channels_last=False).build()
    eager, reference, train = cure("eager"), cure("reference"), cure("eager", "train")

    def without_rules(model: nn.Module, x: Tensor, y: Tensor) -> None:
        with torchs("convolution"):
            eager(model, x, y)

    def train_without_rule(model: nn.Module, x: Tensor, y: Tensor) -> None:
        with torchs("batch_norm"):
            train(model, x, y)

    def work(step: Callable[[nn.Module, Tensor, Tensor], None], model: nn.Module, x: Tensor) -> None:
        with workload.precision():
            step(model, x, y)

    works = {
        "standard step": partial(work, standard, model, x),
        "all": partial(work, eager, model, x),
        "without folding and fusing": partial(work, eager, plain, x),
        "without our rules of convolutions": partial(work, without_rules, model, x),
        "contiguous, not channels_last": partial(work, eager, other, x_other),
        "none shared: the reference": partial(work, reference, plain, x),
        "all, batch norms in training mode": partial(work, train, model, x),
        "so, without our rule of batch norms": partial(work, train_without_rule, model, x),
    }
    memory = {title: (run(), peak_mib(run))[1] for title, run in works.items()}
    times = medians(benchmark, works)
    print(f"\n{workload}, {DEVICE}, medians")
    for title, seconds in times.items():
        ratio = seconds / times["all"]
        print(f"  {title:<36} {seconds * 1e3:9.1f} ms  {ratio:5.2f} x all of them  {memory[title]:6d} MiB")
        row = {"model": workload.model, "batch": workload.batch, "dtype": str(workload.amp).removeprefix("torch.")}
        row |= {"measures": title, "milliseconds": round(seconds * 1e3, 3), "ratio_to_all": round(ratio, 3)}
        ROWS.append({**row, "peak_MiB": memory[title]})
    write(f"measures-{DEVICE.type}", ROWS, DEVICE, by="measures")
