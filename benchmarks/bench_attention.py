"""Attention that is differentiated twice: time and memory of the rule for long sequences, beside plain operators."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from record import write
from timing import medians, peak_mib
from torch import Tensor
from torch.nn import functional as F
from workloads import DEVICE

from fastcure import double_backward
from fastcure.rules import attention

BATCH, HEADS, WIDTH = (4, 6, 64) if DEVICE.type == "cpu" else (32, 6, 64)
TOKENS = [256, 577, 1024]
ROWS: list[dict[str, object]] = []


def step(tensors: list[Tensor], long: int) -> None:
    """Forward, the gradient, and the gradient of its square and of the output."""
    with mock.patch.object(attention, "LONG", long), double_backward():
        out = F.scaled_dot_product_attention(*tensors)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        loss = out.sum() + torch.stack([g.square().sum() for g in first]).sum()
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(benchmark: pytest.FixtureRequest, tokens: int) -> None:
    torch.manual_seed(0)
    shape = BATCH, HEADS, tokens, WIDTH
    tensors = [torch.randn(shape, device=DEVICE).requires_grad_() for _ in range(3)]
    works = {name: partial(step, tensors, long) for name, long in (("plain", 2**31), ("ours", 1))}
    for work in works.values():
        work()
    memory = {name: peak_mib(work) for name, work in works.items()}
    times = medians(benchmark, works, 10.0)
    for name, seconds in times.items():
        print(f"\n{tokens:5d} tokens, {name:<6} {seconds * 1e3:8.1f} ms {memory[name]:6d} MiB", end="")
        row = {"batch": BATCH, "heads": HEADS, "width": WIDTH, "tokens": tokens, "rule": name}
        ROWS.append({**row, "milliseconds": round(seconds * 1e3, 2), "peak_MiB": memory[name]})
    write(f"attention-{DEVICE.type}", ROWS, DEVICE, by="rule")
