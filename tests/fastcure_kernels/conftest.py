"""Where the kernels run, how results are compared, and memory that shows what a kernel left out or overran."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Largest norm of the error relative to the norm of the expected values. Half precisions accumulate in float32 and
# round each value once, by eps / 2; sums of float32 have up to 1024 terms, whose roundings add up as its root; float64
# is for derivatives of derivatives, too.
TOLERANCES = {dtype: 0.51 * torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}
TOLERANCES |= {torch.float32: 1024**0.5 * 2**-24, torch.float64: 1e-12}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_PLACES = [
    *([pytest.param(("triton", "cpu"), id="triton-interpreted")] if INTERPRETED else []),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]
PLACES = [
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    *TRITON_PLACES,
]
CANARY = 77.0
MARGIN = 64


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the operands; each backend is chosen on it in turn."""
    backend, device = request.param
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    return device


@pytest.fixture(params=TRITON_PLACES)
def triton_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of the operands of kernels alone."""
    backend, device = request.param
    monkeypatch.setenv("FASTCURE_BACKEND", backend)
    return device


@pytest.fixture
def close() -> Callable[..., None]:
    """Asserts that values are those expected in float64, to the tolerance of their dtype, NaN where they are."""

    def check(actual: Tensor, expected: Tensor, looser: float = 1.0) -> None:
        assert actual.shape == expected.shape
        wide = actual.detach().cpu().double()
        expected = expected.detach().cpu().double()
        assert torch.equal(wide.isnan(), expected.isnan())
        wide, expected = wide.nan_to_num(), expected.nan_to_num()
        error = torch.linalg.vector_norm(wide - expected)
        assert error <= looser * TOLERANCES[actual.dtype] * torch.linalg.vector_norm(expected)

    return check


@pytest.fixture
def lay() -> Callable[[Tensor, str], Tensor]:
    """Gives the same values in another memory layout."""

    def arrange(x: Tensor, layout: str) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "batch_last":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        if layout == "sliced":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "rows_apart":
            return x.repeat_interleave(2, 0)[::2]
        assert layout == "contiguous"
        return x

    return arrange


class GuardedTorch:
    """The module torch, but fresh memory is full of NaN, or of other bits of masks, and lies between canaries."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_strided(self, size: torch.Size, stride: Sequence[int], *, dtype: torch.dtype, device: str) -> Tensor:
        span = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        buffer = torch.full((span + 2 * MARGIN,), CANARY, dtype=dtype, device=device)
        buffer[MARGIN : MARGIN + span] = torch.nan if dtype.is_floating_point else 0xA5
        self.buffers.append(buffer)
        # No view of it, which autograd would treat apart.
        return torch.empty(0, dtype=dtype, device=device).set_(buffer.untyped_storage(), MARGIN, size, stride)

    def empty_like(self, x: Tensor, **options: Any) -> Tensor:
        stride = torch.empty_like(x, **options).stride()
        return self.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)

    def empty(self, size: torch.Size, *, dtype: torch.dtype, device: str) -> Tensor:
        stride = torch.empty(size, device="meta").stride()
        return self.empty_strided(size, stride, dtype=dtype, device=device)

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[:MARGIN] == CANARY).all()
            assert (buffer[buffer.numel() - MARGIN :] == CANARY).all()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an operator leaves unwritten stays NaN, and what it writes beyond its memory fails the test."""
    guard = GuardedTorch()
    for name, module in list(sys.modules.items()):
        if name.startswith("fastcure_kernels.") and hasattr(module, "torch"):
            monkeypatch.setattr(module, "torch", guard)
    yield
    guard.check()


@pytest.fixture(scope="session", autouse=True)
def rounding_interpreter() -> Iterator[None]:
    """The interpreter cuts float32 off to bfloat16, and makes nonsense of float64; this rounds, as a GPU does."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):  # type: ignore[no-untyped-def]
        if src.dtype.scalar not in (tl.float32, tl.float64) or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        values = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return TensorHandle(values.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
        yield
