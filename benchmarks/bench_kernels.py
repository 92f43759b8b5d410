"""Each kernel: bytes moved over time on the device, as a share of what a copy there reaches in the same run.

Beside it stands its reference implementation in PyTorch, eager and under torch.compile, which alone runs on a CPU.
A kernel is timed only after its results match the reference.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import fastcure_kernels as kernels
import pytest
import torch
from fastcure_kernels import batch_norm, gelu, row_norm
from record import write
from timing import busy_ms, medians
from torch import Tensor
from workloads import DEVICE

ROWS: list[dict[str, object]] = []
BATCH, CHANNELS, SIDE = (4096, 64, 32) if DEVICE.type == "cuda" else (64, 64, 32)
BOUNDS = (0.0, 1.0)


class Case(NamedTuple):
    """An operator; `operands` of the size of a batch, of which it reads `moved - results` and writes the rest."""

    run: Callable[..., Any]
    operands: int
    moved: int
    """Tensors of the batch's size that it reads and writes: the least that it can."""


def masked_gradients(y: Tensor, w: Tensor) -> Tensor:
    """`w` where y > 0, by the backward of `bias_relu` alone."""
    x = y.detach().requires_grad_()
    return torch.autograd.grad(kernels.bias_relu(x), x, w)[0]


def normalised(x: Tensor) -> tuple[Tensor, batch_norm.Norm]:
    """Training-mode batch norm and ReLU."""
    return batch_norm.finish(batch_norm.measure(x, None, None, None, 0.1, 1e-5)[0], relu=True)


def derivatives_of_norm(x: Tensor, g: Tensor, v: Tensor, last: Tensor) -> tuple[Tensor, ...]:
    """Its three backward passes, after the forward."""
    _, norm = normalised(x)
    q, w_sums, w = batch_norm.backward(norm, g)
    u, v_sums = batch_norm.double_backward(norm, v, w)
    return q, u, batch_norm.last_backward(norm, last, v, w, v_sums, w_sums)[0]


def derivatives_of_rows(v: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a layer norm over 1024 values, of given means and deviations."""
    v, w, x = (t.view(-1, 1024) for t in (v, w, x))
    mean = torch.zeros(len(x), 1, device=x.device)
    return row_norm.double_backward(v, w, x, mean, mean + 1)


CASES = {
    "direction_step": Case(lambda x, g: kernels.direction_step(x, g, 1.25), 2, 3),
    "difference_sqnorm": Case(kernels.difference_sqnorm, 2, 2),
    "linf_step": Case(lambda a, g, x: kernels.linf_step(a, g, x, 0.01, 0.03, *BOUNDS), 3, 4),
    "l2_step": Case(lambda a, g, x: kernels.l2_step(a, g, x, 0.1, 0.5, *BOUNDS), 3, 4),
    "bias_relu": Case(lambda x: kernels.bias_relu(x, x.new_ones(CHANNELS)), 1, 2),
    "bias_relu, residual": Case(lambda x, r: kernels.bias_relu(x, x.new_ones(CHANNELS), r), 2, 3),
    "bias_relu, forward and backward": Case(masked_gradients, 2, 4),
    "gelu, double backward": Case(gelu.double_backward, 3, 5),
    "layer norm, double backward": Case(derivatives_of_rows, 3, 5),
    "batch_norm, relu": Case(lambda x: normalised(x)[0], 1, 3),
    "batch_norm, relu, and three derivatives": Case(derivatives_of_norm, 4, 21),
}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Set FASTCURE_BACKEND."""
    old = os.environ.get("FASTCURE_BACKEND")
    os.environ["FASTCURE_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("FASTCURE_BACKEND") if old is None else os.environ.update(FASTCURE_BACKEND=old)


def on(name: str, run: Callable[..., Any], *operands: Tensor) -> Any:
    with backend(name):
        return run(*operands)


def away_from_half(shape: tuple[int, ...]) -> Tensor:
    """Uniform values in [0, 1] without (0.4, 0.6), where the mean is and a norm's ReLU has its kink.

    Two means that round differently disagree on the mask of what lies between them: 16 of 2^28 values of float32 are
    an error of 5e-4.
    """
    x = torch.rand(shape, device=DEVICE).mul_(0.8)
    return x.add_((x >= 0.4).to(x.dtype), alpha=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels(benchmark: pytest.FixtureRequest, name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    operands = [away_from_half((BATCH, CHANNELS, SIDE, SIDE)).to(dtype) for _ in range(case.operands)]
    to = torch.empty_like(operands[0])
    works: dict[str, Callable[[], Any]] = {"copy": partial(to.copy_, operands[0])}
    if DEVICE.type == "cuda":
        ours, reference = (on(which, case.run, *operands) for which in ("triton", "torch"))
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, reference)), strict=True):
            error = float((a.double() - b.double()).norm() / b.double().norm())
            assert error < (1e-5 if dtype == torch.float32 else 1e-2), f"{name} is off by {error:.1e}: it is not timed"
        works["triton"] = partial(on, "triton", case.run, *operands)
    works["torch"] = partial(on, "torch", case.run, *operands)
    works["torch.compile"] = partial(on, "torch", torch.compile(case.run, dynamic=False), *operands)
    times = medians(benchmark, works, budget=3.0)
    if DEVICE.type == "cuda":  # without what a launch costs the host
        times = {title: statistics.median(busy_ms(work) for _ in range(5)) / 1e3 for title, work in works.items()}

    size = to.numel() * to.element_size()
    copied = 2 * size / times["copy"]
    print(
        f"\n{name}, {str(dtype).removeprefix('torch.')}, {size / 2**20:.0f} MiB a tensor, copy {copied / 1e9:.0f} GB/s"
    )
    for title, seconds in times.items():
        moved = 2 if title == "copy" else case.moved
        share = moved * size / seconds / copied
        print(f"  {title:<14} {seconds * 1e3:8.3f} ms  {share:6.1%} of the copy's bandwidth")
        row = {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "MiB": size >> 20, "by": title}
        ROWS.append({**row, "milliseconds": round(seconds * 1e3, 4), "share_of_copy": round(share, 4)})
    write(f"kernels-{DEVICE.type}", ROWS, DEVICE, by="by")
