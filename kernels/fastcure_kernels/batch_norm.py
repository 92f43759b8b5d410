"""Passes of a training-mode batch norm (+ residual) (+ ReLU) that is differentiated twice; no autograd of their own.

With n values a channel, mean m, inverse deviation r, x_hat = r (x - m), weight s and z = s x_hat + bias (+ residual), y
is z or max(z, 0). With w the gradient at z, which is that at y times the mask [z > 0], and sums over a channel, the
gradient at x is

    q = s r (w - sum(w) / n - x_hat sum(w x_hat) / n).

With v the gradient that arrives at q, the mask times the same map of v goes to the gradient at y. What goes to x is,
with w2 the gradient at z of the last backward, a combination of w2, v, w and x, with coefficients made of sums of v, w2
and v w. So each derivative is a reduction (`channel_sums.py`) and an elementwise pass, for all of them one kernel:

    out = constant + by_x (x - m) + a A + b B + c C + R        one number a channel each; gated before or after the sum

Tensors of the size of x read and written, by the reductions too: 3 forward, 5 first backward, 6 double backward, 7 last
backward. The mask is computed again from x, for nothing. With a residual it is one bit an element, written forward and
read in each backward, and w, which is the gradient of the residual, is written: 4, 6, 7 and 8. (Where channels are not
last, or no multiple of 8, the mask is read off y: 4, 7, 8 and 9.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, no_type_check

import torch
from torch import Tensor

from .backend import use_triton
from .channel_sums import GATE_BITS, GATE_NONE, GATE_OUTPUT, GATE_OWN, Layout, statistics, sums
from .jit import kernel
from .split_gradient import parts_of

if TYPE_CHECKING:
    import triton.language as tl


@kernel
@no_type_check
def _combine_kernel(
    out_ptr, x_ptr, a_ptr, b_ptr, c_ptr, residual_ptr, mask_ptr, stats_ptr, coef_ptr, M, C, S,
    FIRST: tl.constexpr, WITH_A: tl.constexpr, WITH_BC: tl.constexpr, WITH_RESIDUAL: tl.constexpr,
    GATE_IN: tl.constexpr, GATE_OUT: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    dtype = stats_ptr.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # (CHANNELS,)
    inside = (rows < M)[:, None] & (c < C)[None, :]
    if LAST:
        offsets = rows.to(tl.int64)[:, None] * C + c[None, :]
    else:
        offsets = ((rows // S).to(tl.int64) * C * S + rows % S)[:, None] + c[None, :] * S
    coef_ptr += FIRST * C + c
    mean = tl.load(stats_ptr + c, mask=c < C)[None, :]
    centered = tl.load(x_ptr + offsets, mask=inside).to(dtype) - mean
    out = tl.load(coef_ptr + C, mask=c < C)[None, :] + tl.load(coef_ptr, mask=c < C)[None, :] * centered
    closed = out <= 0  # of this very sum: the forward's; not so for NaN
    if GATE_IN or GATE_OUT == 1:  # by the norm's own sign
        scale = tl.load(stats_ptr + 2 * C + c, mask=c < C)[None, :]
        closed = tl.load(stats_ptr + 3 * C + c, mask=c < C)[None, :] + scale * centered <= 0
    if WITH_A:
        a = tl.load(a_ptr + offsets, mask=inside).to(dtype)
        if GATE_IN:
            a = tl.where(closed, 0.0, a)
        out += tl.load(coef_ptr + 2 * C, mask=c < C)[None, :] * a
    if WITH_BC:
        b = tl.load(b_ptr + offsets, mask=inside).to(dtype)
        out += tl.load(coef_ptr + 3 * C, mask=c < C)[None, :] * b
        w = tl.load(c_ptr + offsets, mask=inside).to(dtype)
        if GATE_IN:
            w = tl.where(closed, 0.0, w)
        out += tl.load(coef_ptr + 4 * C, mask=c < C)[None, :] * w
    if WITH_RESIDUAL:
        out += tl.load(residual_ptr + offsets, mask=inside).to(dtype)
    if GATE_OUT == 2:
        closed = tl.load(mask_ptr + offsets, mask=inside).to(dtype) <= 0
    if GATE_OUT == 3 or GATE_OUT == 5:
        eighths = tl.program_id(1) * (CHANNELS // 8) + tl.arange(0, CHANNELS // 8)  # of the channels
        there = (rows < M)[:, None] & (eighths * 8 < C)[None, :]
        mask_ptr += rows.to(tl.int64)[:, None] * (C // 8) + eighths[None, :]
    if GATE_OUT == 3:
        bits = tl.load(mask_ptr, mask=there, other=0).to(tl.int32)
        bits = tl.reshape(tl.broadcast_to(bits[:, :, None], (ROWS, CHANNELS // 8, 8)), (ROWS, CHANNELS))
        closed = (bits >> (c % 8)[None, :]) % 2 == 0
    if GATE_OUT >= 4:  # a ReLU
        closed = out <= 0
    if GATE_OUT:
        out = tl.where(closed, 0.0, out)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=inside)
    if GATE_OUT == 5:
        bits = tl.where(out <= 0, 0, 1) << (c % 8)[None, :]
        bits = tl.sum(tl.reshape(bits, (ROWS, CHANNELS // 8, 8)), 2)  # (ROWS, CHANNELS // 8)
        tl.store(mask_ptr, bits.to(tl.uint8), mask=there)


RELU, RELU_AND_BITS = 4, 5  # the sum's own; the second writes the mask as well


def _combine(
    x: Tensor,
    stats: Tensor,
    coefficients: Tensor,
    a: Tensor | None = None,
    bc: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    gate_in: bool = False,
    gate_out: int = GATE_NONE,
) -> Tensor:
    layout = Layout.of(x)
    options = layout.tile(stats.dtype == torch.float64)
    out = torch.empty_like(x)
    operands = (a, *(bc or (None, None)), residual, mask)
    _combine_kernel.launch(
        (-(-layout.M // options["ROWS"]), -(-layout.C // options["CHANNELS"])),
        *(out, x, *(x if t is None else t for t in operands), stats, coefficients, layout.M, layout.C, layout.S),
        FIRST=2 if coefficients is stats else 0,
        WITH_A=a is not None,
        WITH_BC=bc is not None,
        WITH_RESIDUAL=residual is not None,
        GATE_IN=gate_in,
        GATE_OUT=gate_out,
        LAST=layout.last,
        **options,
    )
    return out


class Norm(NamedTuple):
    """What the backward passes read of a forward."""

    x: Tensor
    """(B, C, ...), dense."""
    stats: Tensor
    """(4, C) in float32 or float64: m, r, s r and bias."""
    weight: Tensor | None
    mask: Tensor | None = None
    """Where a residual was added and a ReLU taken: bits, in the order of memory, or the output."""
    relu: bool = False

    @property
    def gate(self) -> int:
        """How the mask is found."""
        if self.mask is None:
            return GATE_OWN if self.relu else GATE_NONE
        return GATE_BITS if self.mask.dtype == torch.uint8 else GATE_OUTPUT


def measure(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
) -> tuple[Norm, Tensor | None]:
    """Take the statistics of `x` (B, C, ...), which has more than one value a channel.

    Args:
        x: in float16, bfloat16, float32 or float64.
        weight: (C,) in the dtype of the arithmetic, that is float64 for float64, else float32; None for ones.
        bias: the same, or None for zeros.
        running: mean and variance, which are moved by `momentum`.
        momentum: the share of the new statistics.
        eps: is added to the variance.

    Returns:
        What `finish` makes the output of; and the output itself, where no kernels run: torch makes both at once.
    """
    x = Layout.of(x).lay(x)
    if runs_as_kernels(x):
        return Norm(x, statistics(x, weight, bias, running, momentum, eps), weight), None
    mean, var = running or (None, None)
    y, m, r = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
    stats = torch.stack([m, r, r if weight is None else r * weight, torch.zeros_like(m) if bias is None else bias])
    return Norm(x, stats, weight), y


def finish(norm: Norm, residual: Tensor | None = None, relu: bool = False) -> tuple[Tensor, Norm]:
    """Normalise, add the residual, of the shape and dtype of x, and take the ReLU: y, and what is read of it."""
    x, mask = norm.x, None
    if runs_as_kernels(x):
        layout, gate = Layout.of(x), RELU if relu else GATE_NONE
        if relu and residual is not None and layout.last and layout.C % 8 == 0:
            mask, gate = torch.empty((x.numel() // 8,), dtype=torch.uint8, device=x.device), RELU_AND_BITS
        added = None if residual is None else layout.lay(residual)
        y = _combine(x, norm.stats, norm.stats, residual=added, mask=mask, gate_out=gate)
    else:
        z = _standard(x, norm.stats)
        y = (z if residual is None else z + residual).to(x.dtype)  # rounded once
        y = torch.relu_(y) if relu else y
    if relu and residual is not None and mask is None:
        mask = y
    return y, norm._replace(mask=mask, relu=relu)


def backward(norm: Norm, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First derivative: from the gradient at y, q, the sums (2, C) of w and w x_hat, and w.

    The sums are the gradients of bias and weight. Where the mask is found from x, w is given out as g, if that is one
    tensor, and masked again wherever it is read.
    """
    if not runs_as_kernels(norm.x):
        w = _masked(norm, g)
        q, found = _native(norm, w)
        return q, found, w if norm.mask is not None else g
    g, more = _laid(norm, g)
    found, coefficients, masked = sums(g, norm.x, norm.stats, norm.gate, norm.mask, more=more)
    w = g if masked is None else masked
    return _combine(norm.x, norm.stats, coefficients, w, gate_in=norm.gate == GATE_OWN), found, w


def double_backward(norm: Norm, v: Tensor, w: Tensor, v_residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Second derivative: from the gradients at q and at that of the residual, u, and the sums (3, C) of v.

    Args:
        norm: of the forward.
        v: the gradient that arrives at q.
        w: as `backward` gave it out.
        v_residual: the gradient that arrives at w as the gradient of the residual.

    Returns:
        What goes to the gradient at y; sums of v, v x_hat and v w.
    """
    if not runs_as_kernels(norm.x):
        u, found = _native(norm, v)
        masked = w if norm.mask is not None else _masked(norm, w)
        products = _sums(v, masked, torch.zeros_like(norm.stats[0]), torch.ones_like(norm.stats[0]))[1]
        return _masked(norm, u if v_residual is None else u + v_residual), torch.cat([found, products[None]])
    layout = Layout.of(norm.x)
    v, w = layout.lay(v), layout.lay(w)
    v_residual = None if v_residual is None else layout.lay(v_residual)
    found, coefficients, _ = sums(v, norm.x, norm.stats, GATE_OWN if norm.gate == GATE_OWN else GATE_NONE, other=w)
    u = _combine(norm.x, norm.stats, coefficients, v, residual=v_residual, mask=norm.mask, gate_out=norm.gate)
    return u, found


def last_backward(
    norm: Norm, g: Tensor | None, v: Tensor, w: Tensor, v_sums: Tensor, w_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Everything that goes to x, to bias and weight, and to the residual.

    Args:
        norm: of the forward.
        g: the gradient at y; None stands for zeros.
        v: as in `double_backward`.
        w: as `backward` gave it out.
        v_sums: as `double_backward` returned them.
        w_sums: as `backward` returned them.

    Returns:
        The gradients of x, of bias and weight (2, C), and w2, masked where there is a residual.
    """
    gate_in = norm.gate == GATE_OWN
    if runs_as_kernels(norm.x):
        layout = Layout.of(norm.x)
        g, more = (None, None) if g is None else _laid(norm, g)
        found, coefficients, w2 = sums(g, norm.x, norm.stats, norm.gate, norm.mask, second=(v_sums, w_sums), more=more)
        g = g if w2 is None else w2
        bc = layout.lay(v), layout.lay(w)
        return _combine(norm.x, norm.stats, coefficients, g, bc, gate_in=gate_in), found, g
    x, (m, r, scale, _) = norm.x, norm.stats
    n = x.numel() / x.shape[1]
    (v_1, v_x, v_w), (w_1, w_x) = v_sums / n, w_sums / n
    v_w = v_w - v_1 * w_1
    w2 = None if g is None else _masked(norm, g)
    found = torch.zeros_like(w_sums) if w2 is None else _sums(w2, x, m, r)
    by_x = scale * r * (r * (3 * v_x * w_x - v_w) - found[1] / n)
    constant = scale * (r * (w_x * v_1 + v_x * w_1) - found[0] / n) - by_x * m
    by_channel = constant, by_x, -scale * r * w_x, -scale * r * v_x, scale
    constant, by_x, by_v, by_w, by_w2 = (t.view(-1, *[1] * (x.dim() - 2)) for t in by_channel)
    g_x = torch.addcmul(constant, x, by_x).addcmul_(v, by_v).addcmul_(_masked(norm, w) if gate_in else w, by_w)
    g_x = g_x if w2 is None else g_x.addcmul_(w2, by_w2)
    found[1] += r * n * (v_w - v_x * w_x)
    return g_x.to(x.dtype), found, g if gate_in else w2


def runs_as_kernels(x: Tensor) -> bool:
    """Whether kernels run on `x` (B, C, ...): they count the values of a channel in 32 bits."""
    return use_triton(x) and x.numel() // x.shape[1] < 2**30


def _laid(norm: Norm, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """What adds up to g, laid out as x."""
    layout, (first, second) = Layout.of(norm.x), parts_of(g)
    return layout.lay(first), None if second is None else layout.lay(second)


def _masked(norm: Norm, t: Tensor) -> Tensor:
    if not norm.relu:
        return t
    z = _standard(norm.x, norm.stats) if norm.mask is None else norm.mask
    return torch.where(z <= 0, 0.0, t)


def _standard(x: Tensor, stats: Tensor) -> Tensor:
    """Return z without a residual, in the dtype of the arithmetic."""
    m, _, scale, shift = (row.view(-1, *[1] * (x.dim() - 2)) for row in stats)
    return shift + scale * (x - m)


def _native(norm: Norm, w: Tensor) -> tuple[Tensor, Tensor]:
    """Run torch's backward: the map from w to q, with the sums of w and w x_hat."""
    m, r = norm.stats[0], norm.stats[1]
    q, sum_x, total = _torch_backward(w, norm.x, norm.weight, m, r, True)
    return q, torch.stack([total, sum_x])


def _sums(w: Tensor, x: Tensor, m: Tensor, r: Tensor) -> Tensor:
    """Sum w and w r (x - m) over a channel, each tensor read once."""
    _, sum_x, total = _torch_backward(w, x, None, m, r, False)
    return torch.stack([total, sum_x])


def _torch_backward(
    w: Tensor, x: Tensor, weight: Tensor | None, m: Tensor, r: Tensor, with_q: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.ones_like(m) if weight is None else weight  # without one torch has no sums on a GPU
    if len(x) == 1:  # in channels_last the stride of the batch is arbitrary, and torch 2.13 then reads other values
        w, x = w.contiguous(), x.contiguous()
    backward = torch.ops.aten.native_batch_norm_backward
    q, sum_x, total = backward(w, x, weight, None, None, m, r, True, 0.0, [with_q, True, True])
    return q, sum_x, total
