"""Operands of shape (B, ...) seen as B rows of memory, without copies where their layouts allow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_operands(**operands: Tensor) -> None:
    """Raise unless the tensors, given by name, are floating-point and of the shape and device of the first.

    Raises:
        TypeError: a dtype other than float32, float16, bfloat16 and float64.
        ValueError: no batch dimension, or shapes or devices that differ.
    """
    first, model = next(iter(operands.items()))
    for name, x in operands.items():
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}: convert it")
        if x.ndim == 0:
            raise ValueError(f"{name} must have a batch dimension, got a 0-dim tensor: unsqueeze it")
        if x.shape != model.shape:
            wanted, got = tuple(model.shape), tuple(x.shape)
            raise ValueError(f"{name} must have the shape {wanted} of {first}, got {got}: reshape or expand it")
        if x.device != model.device:
            raise ValueError(f"{name} must be on the device {model.device} of {first}, got {x.device}: move it")


def check_bounds(lower: float, upper: float) -> None:
    """Raise a ValueError unless lower <= upper."""
    if not lower <= upper:
        raise ValueError(f"lower must be <= upper, got {lower} and {upper}: swap them")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 where any operand is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def per_sample(name: str, value: float | Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """One value a sample of `x`, (B,), from a float, a 0-dim or a (B,) tensor; one value is not copied B times.

    A float costs one small fill on the device, which a CUDA graph can capture, unlike a copy from the host.

    Raises:
        ValueError: another shape, or another device than that of `x`.
    """
    B = x.shape[0]
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=x.device).expand(B)
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != B):
        raise ValueError(f"{name} must be a float, 0-dim or ({B},), got {tuple(value.shape)}: reshape it")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device {x.device} of the samples, got {value.device}: move it")
    return value.detach().to(dtype).expand(B)


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """`value`, (B,), as (B, 1, ..., 1), to combine with `x`, (B, ...)."""
    return value.view(-1, *[1] * (x.ndim - 1))


def sum_samples(x: Tensor) -> Tensor:
    """Sums over all dimensions but the first: (B,)."""
    return x.sum(tuple(range(1, x.ndim))) if x.ndim > 1 else x


def row_length(x: Tensor) -> int:
    """Number of elements of one sample, N."""
    return x.shape[1:].numel()


def row_strides(x: Tensor) -> list[int]:
    """Strides of a dense tensor of the shape of `x`: one sample after the other, each ordered as in `x`."""
    strides = [row_length(x)] * x.ndim
    step = 1
    for dim in sorted(range(x.ndim - 1, 0, -1), key=x.stride):
        strides[dim] = step
        step *= x.shape[dim]
    return strides


def as_rows(strides: Sequence[int], *tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where they do not have these `row_strides`, dimensions of size 1 aside."""

    def row(x: Tensor) -> Tensor:
        if all(n == 1 or s == t for n, s, t in zip(x.shape, x.stride(), strides, strict=True)):
            return x
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)

    return [row(x) for x in tensors]


def reduction_launch(n: int) -> dict[str, int]:
    """Block and warps of a kernel whose programs loop over one row of `n` elements each."""
    block = min(4096, max(128, 1 << (n - 1).bit_length()))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def elementwise_launch(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, block and warps of a kernel whose programs take one block of one row each."""
    block = 1024  # rows go first: the second axis of a CUDA grid ends at 65,535
    return (x.shape[0], -(-row_length(x) // block)), {"BLOCK": block, "num_warps": 4}
