"""Reductions over the channels of (B, C, ...) for a training-mode batch norm, and coefficients that follow from them.

Two stages, each in a fixed order, so that every run gives the same bits: programs reduce rows of the channels to
partial results, and one program combines those of a few channels. The first is one pass over the operands; the second
writes the coefficients of the elementwise pass that comes next (`batch_norm.py`, whose notation this is).

Statistics are those of differences from one value of the channel, updated element by element (Welford) and combined by
differences of means (Chan et al., 1983): neither a mean far from 0 nor an unlucky choice of that value costs digits.
The arithmetic is float32, or float64 for float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, no_type_check

import torch
from torch import Tensor

from .jit import kernel
from .rows import accumulation_dtype

if TYPE_CHECKING:
    import triton.language as tl

GATE_NONE, GATE_OWN, GATE_OUTPUT, GATE_BITS = range(4)
"""Of a gradient: not at all, by the sign of the norm, by that of the output, or by bits that say so."""
PROGRAMS = 512  # of a reduction: one wave of a large GPU


class Layout(NamedTuple):
    """A dense (B, C, ...) tensor as M rows of C channels; with `last`, each row lies together in memory."""

    M: int
    C: int
    S: int
    last: bool
    form: torch.memory_format

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """Choose that of `x`, or contiguous where `x` is neither dense nor channels last."""
        form = torch.contiguous_format
        if x.ndim in (4, 5) and not x.is_contiguous():
            wanted = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
            form = wanted if x.is_contiguous(memory_format=wanted) else form
        S = x.shape[2:].numel()
        return cls(x.shape[0] * S, x.shape[1], S, form != torch.contiguous_format or S == 1, form)

    def lay(self, x: Tensor) -> Tensor:
        """`x` in this layout, copied if it has another."""
        return x.contiguous(memory_format=self.form)

    def tile(self, wide: bool) -> dict[str, int]:
        """Launch options of a kernel whose programs take tiles of rows and channels."""
        channels = min(64 if self.last else 8, 1 << (self.C - 1).bit_length())
        return {"ROWS": (1024 if wide else 2048) // channels, "CHANNELS": channels, "num_warps": 4}


@kernel
@no_type_check
def _statistics_kernel(
    part_ptr, x_ptr, M, C, S, PER, LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    dtype = part_ptr.dtype.element_ty
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # (CHANNELS,)
    near = tl.load(x_ptr + (c if LAST else c * S), mask=c < C, other=0.0).to(dtype)[
        None, :
    ]  # some value of the channel
    start = tl.program_id(0) * PER
    stop = tl.minimum(start + PER, M)
    mean = tl.zeros((ROWS, CHANNELS), dtype)
    square = tl.zeros((ROWS, CHANNELS), dtype)
    counts = tl.zeros((ROWS,), dtype)
    while start < stop:
        rows = start + tl.arange(0, ROWS)  # (ROWS,)
        inside = (rows < stop)[:, None] & (c < C)[None, :]
        if LAST:
            offsets = rows.to(tl.int64)[:, None] * C + c[None, :]
        else:
            offsets = ((rows // S).to(tl.int64) * C * S + rows % S)[:, None] + c[None, :] * S
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(dtype) - near
        counts += tl.where(rows < stop, 1.0, 0.0).to(dtype)
        apart = tl.where(inside, x - mean, 0.0)
        mean += apart * (1.0 / tl.maximum(counts, 1.0))[:, None]  # a division a row, not an element
        square += tl.where(inside, apart * (x - mean), 0.0)
        start += ROWS
    total = tl.sum(counts, 0)
    center = tl.sum(mean * counts[:, None], 0) / total  # (CHANNELS,)
    apart = mean - center[None, :]
    square = tl.sum(square + apart * apart * counts[:, None], 0)
    part_ptr += tl.program_id(0) * 2 * C + c
    tl.store(part_ptr, center, mask=c < C)
    tl.store(part_ptr + C, square, mask=c < C)


@kernel
@no_type_check
def _finish_statistics_kernel(
    stats_ptr, part_ptr, near_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, momentum_ptr,
    M, C, P, PER, STEP, EPS: tl.constexpr, WITH_WEIGHT: tl.constexpr, WITH_BIAS: tl.constexpr, RUNNING: tl.constexpr,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype = stats_ptr.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)  # (CHANNELS,)
    here = c < C
    p = tl.arange(0, PARTS)  # (PARTS,)
    inside = (p < P)[:, None] & here[None, :]
    offsets = p[:, None] * 2 * C + c[None, :]
    means = tl.load(part_ptr + offsets, mask=inside, other=0.0)
    squares = tl.load(part_ptr + offsets + C, mask=inside, other=0.0)
    counts = tl.where(p < P, tl.minimum(M - p * PER, PER), 0).to(dtype)[:, None]
    n = tl.sum(counts, 0)  # (1,)
    mean = tl.sum(means * counts, 0) / n
    apart = means - mean[None, :]
    square = tl.sum(tl.where(inside, squares + apart * apart * counts, 0.0), 0)
    mean += tl.load(near_ptr + c * STEP, mask=here, other=0.0).to(dtype)
    r = 1.0 / tl.sqrt(square / n + EPS)
    scale = r
    if WITH_WEIGHT:
        scale = r * tl.load(weight_ptr + c, mask=here).to(dtype)
    shift = tl.zeros((CHANNELS,), dtype)
    if WITH_BIAS:
        shift = tl.load(bias_ptr + c, mask=here).to(dtype)
    tl.store(stats_ptr + c, mean, mask=here)
    tl.store(stats_ptr + C + c, r, mask=here)
    tl.store(stats_ptr + 2 * C + c, scale, mask=here)
    tl.store(stats_ptr + 3 * C + c, shift, mask=here)
    if RUNNING:
        momentum = tl.load(momentum_ptr)
        old = tl.load(running_mean_ptr + c, mask=here)
        tl.store(running_mean_ptr + c, (1.0 - momentum) * old + momentum * mean, mask=here)
        old = tl.load(running_var_ptr + c, mask=here)
        tl.store(running_var_ptr + c, (1.0 - momentum) * old + momentum * (square / (n - 1.0)), mask=here)


@kernel
@no_type_check
def _sums_kernel(
    part_ptr, out_ptr, g_ptr, more_ptr, x_ptr, other_ptr, mask_ptr, stats_ptr, M, C, S, PER,
    GATE: tl.constexpr, WITH_MORE: tl.constexpr, WITH_OTHER: tl.constexpr,
    LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype = part_ptr.dtype.element_ty
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # (CHANNELS,)
    here = c < C
    mean = tl.load(stats_ptr + c, mask=here, other=0.0)[None, :]
    if GATE == 1:  # by the norm's own sign
        scale = tl.load(stats_ptr + 2 * C + c, mask=here, other=0.0)[None, :]
        shift = tl.load(stats_ptr + 3 * C + c, mask=here, other=0.0)[None, :]
    start = tl.program_id(0) * PER
    stop = tl.minimum(start + PER, M)
    sum_g = tl.zeros((ROWS, CHANNELS), dtype)
    sum_x = tl.zeros((ROWS, CHANNELS), dtype)
    sum_other = tl.zeros((ROWS, CHANNELS), dtype)
    while start < stop:
        rows = start + tl.arange(0, ROWS)  # (ROWS,)
        inside = (rows < stop)[:, None] & here[None, :]
        if LAST:
            offsets = rows.to(tl.int64)[:, None] * C + c[None, :]
        else:
            offsets = ((rows // S).to(tl.int64) * C * S + rows % S)[:, None] + c[None, :] * S
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(dtype)
        if WITH_MORE:  # rounded as the sum would be in memory
            g += tl.load(more_ptr + offsets, mask=inside, other=0.0).to(dtype)
            g = g.to(out_ptr.dtype.element_ty).to(dtype)
        centered = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(dtype) - mean
        if WITH_OTHER:
            other = tl.load(other_ptr + offsets, mask=inside, other=0.0).to(dtype)
            if GATE == 1:
                other = tl.where(shift + scale * centered <= 0, 0.0, other)
            sum_other += g * other
        else:
            if GATE == 1:
                g = tl.where(shift + scale * centered <= 0, 0.0, g)
            if GATE == 2:
                y = tl.load(mask_ptr + offsets, mask=inside, other=0.0).to(dtype)
                g = tl.where(y <= 0, 0.0, g)
            if GATE == 3:
                eighths = tl.program_id(1) * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)  # of the channels
                there = (rows < stop)[:, None] & (eighths * 8 < C)[None, :]
                bits = tl.load(mask_ptr + rows.to(tl.int64)[:, None] * (C // 8) + eighths[None, :], mask=there, other=0)
                bits = tl.broadcast_to(bits.to(tl.int32)[:, :, None], (ROWS, CHANNELS // 8, 8))
                bits = tl.reshape(bits, (ROWS, CHANNELS)) >> (c % 8)[None, :]
                g = tl.where(bits % 2 == 0, 0.0, g)
            if GATE >= 2 or WITH_MORE:
                tl.store(out_ptr + offsets, g.to(out_ptr.dtype.element_ty), mask=inside)
        sum_g += g
        sum_x += g * centered
        start += ROWS
    r = tl.load(stats_ptr + C + c, mask=here, other=0.0)
    part_ptr += tl.program_id(0) * (3 if WITH_OTHER else 2) * C + c
    tl.store(part_ptr, tl.sum(sum_g, 0), mask=here)
    tl.store(part_ptr + C, tl.sum(sum_x, 0) * r, mask=here)
    if WITH_OTHER:
        tl.store(part_ptr + 2 * C, tl.sum(sum_other, 0), mask=here)


@kernel
@no_type_check
def _finish_sums_kernel(
    sums_ptr, coef_ptr, part_ptr, stats_ptr, v_ptr, w_ptr, M, C, P,
    SUMS: tl.constexpr, SECOND: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype = sums_ptr.dtype.element_ty
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)  # (CHANNELS,)
    here = c < C
    n = tl.zeros((CHANNELS,), dtype) + M
    p = tl.arange(0, PARTS)  # (PARTS,)
    inside = (p < P)[:, None] & here[None, :]
    offsets = p[:, None] * SUMS * C + c[None, :]
    sum_g = tl.sum(tl.load(part_ptr + offsets, mask=inside, other=0.0), 0)
    sum_x = tl.sum(tl.load(part_ptr + offsets + C, mask=inside, other=0.0), 0)
    if SUMS == 3:
        tl.store(
            sums_ptr + 2 * C + c, tl.sum(tl.load(part_ptr + offsets + 2 * C, mask=inside, other=0.0), 0), mask=here
        )
    r = tl.load(stats_ptr + C + c, mask=here, other=0.0)
    scale = tl.load(stats_ptr + 2 * C + c, mask=here, other=0.0)
    by_x = -scale * r * (sum_x / n)
    constant = -scale * (sum_g / n)
    if SECOND:
        v, w = tl.load(v_ptr + c, mask=here, other=0.0), tl.load(w_ptr + c, mask=here, other=0.0)
        v_x, w_x = tl.load(v_ptr + C + c, mask=here, other=0.0), tl.load(w_ptr + C + c, mask=here, other=0.0)
        v_w = tl.load(v_ptr + 2 * C + c, mask=here, other=0.0) - v * (w / n)  # of v and w less their means
        by_x += scale * r * r * ((3 * v_x * (w_x / n) - v_w) / n)
        constant += scale * r * ((w_x * (v / n) + v_x * (w / n)) / n)
        sum_x += r * (v_w - v_x * (w_x / n))
        tl.store(coef_ptr + 3 * C + c, -scale * r * (w_x / n), mask=here)
        tl.store(coef_ptr + 4 * C + c, -scale * r * (v_x / n), mask=here)
    tl.store(coef_ptr + c, by_x, mask=here)
    tl.store(coef_ptr + C + c, constant, mask=here)
    tl.store(coef_ptr + 2 * C + c, scale, mask=here)
    tl.store(sums_ptr + c, sum_g, mask=here)
    tl.store(sums_ptr + C + c, sum_x, mask=here)


def _divide(layout: Layout, wide: bool) -> tuple[int, int, dict[str, int]]:
    """Number of programs along the rows, rows of each, and launch options."""
    options = layout.tile(wide)
    blocks = -(-layout.M // options["ROWS"])
    programs = min(blocks, max(1, PROGRAMS // -(-layout.C // options["CHANNELS"])))
    per = -(-blocks // programs) * options["ROWS"]
    return -(-layout.M // per), per, options


def _finish(parts: int, C: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and launch options of the second stage."""
    rows = 1 << max(0, parts - 1).bit_length()
    channels = min(32, 4096 // rows, 1 << (C - 1).bit_length())
    return (-(-C // channels),), {"PARTS": rows, "CHANNELS": channels, "num_warps": 4}


def statistics(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """Mean, inverse deviation, their product with the weight, and bias of each channel: (4, C).

    Args:
        x: (B, C, ...), laid out as its `Layout`.
        weight: (C,), or None for ones.
        bias: (C,), or None for zeros.
        running: mean and unbiased variance, (C,) each, which take `momentum` of the new ones.
        momentum: see `running`.
        eps: is added to the variance.
    """
    layout, dtype = Layout.of(x), accumulation_dtype(x)
    C = layout.C
    P, per, options = _divide(layout, dtype == torch.float64)
    part = torch.empty((P, 2, C), dtype=dtype, device=x.device)
    grid = (P, -(-C // options["CHANNELS"]))
    _statistics_kernel.launch(grid, part, x, layout.M, C, layout.S, per, LAST=layout.last, **options)
    stats = torch.empty((4, C), dtype=dtype, device=x.device)
    near = x.as_strided((C,), (1 if layout.last else layout.S,))  # what differences were taken from
    finish, options = _finish(P, C)
    _finish_statistics_kernel.launch(
        finish,
        stats,
        part,
        near,
        part if weight is None else weight,
        part if bias is None else bias,
        *((part, part) if running is None else running),
        part if running is None else torch.full((), momentum, dtype=dtype, device=x.device),
        layout.M,
        C,
        P,
        per,
        near.stride(0),
        EPS=eps,
        WITH_WEIGHT=weight is not None,
        WITH_BIAS=bias is not None,
        RUNNING=running is not None,
        **options,
    )
    return stats


def sums(
    g: Tensor | None,
    x: Tensor,
    stats: Tensor,
    gate: int,
    mask: Tensor | None = None,
    other: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of g, g x_hat and g `other`, (2 or 3, C); coefficients that follow from them (5, C); and g gated.

    The gate is that of `other` where there is one, else that of g, which is written where `mask` gates it or `more` is
    added to it. `second` are the sums of v, with `other`, and of w: the coefficients are then those of the last pass,
    and the sums the gradients of bias and weight. Without g, which stands for zeros, no pass is made.
    """
    layout, dtype = Layout.of(x), stats.dtype
    C, count, parts = layout.C, 2 if other is None else 3, 0
    part, gated, writes = stats, stats, False
    if g is not None:
        parts, per, options = _divide(layout, dtype == torch.float64)
        part = torch.empty((parts, count, C), dtype=dtype, device=x.device)
        writes = other is None and (mask is not None or more is not None)
        gated = torch.empty_like(x) if writes else part
        grid = (parts, -(-C // options["CHANNELS"]))
        operands = [part if t is None else t for t in (g, more, x, other, mask)]
        _sums_kernel.launch(
            grid,
            *(part, gated, *operands, stats, layout.M, C, layout.S, per),
            GATE=gate,
            WITH_MORE=more is not None,
            WITH_OTHER=other is not None,
            LAST=layout.last,
            **options,
        )
    found = torch.empty((count, C), dtype=dtype, device=x.device)
    coefficients = torch.empty((3 if second is None else 5, C), dtype=dtype, device=x.device)
    finish, options = _finish(parts, C)
    _finish_sums_kernel.launch(
        finish,
        *(found, coefficients, part, stats, *((part, part) if second is None else second), layout.M, C, parts),
        SUMS=count,
        SECOND=second is not None,
        **options,
    )
    return found, coefficients, gated if writes else None
