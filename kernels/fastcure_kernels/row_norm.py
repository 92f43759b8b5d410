"""The double backward of rows that are normalised, in one pass; no autograd of its own.

Rows x of n values with mean m and inverse deviation r, x_hat = r (x - m), w the gradient at x_hat, and q the gradient
at x. With v the gradient that arrives at q, and sums over a row,

    q = r (w - sum(w) / n - x_hat sum(w x_hat) / n)
    u = r (v - sum(v) / n - x_hat sum(v x_hat) / n)                                                      goes to w
    -(r / n) (sum(w x_hat) u + sum(v x_hat) q + e x_hat)                                                 goes to x
    e = r (sum(v w) - sum(v) sum(w) / n - sum(v x_hat) sum(w x_hat) / n)

Each row is read once and stays in registers: 20 bytes an element in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, no_type_check

import torch
from torch import Tensor

from .backend import use_triton
from .jit import kernel

if TYPE_CHECKING:
    import triton.language as tl

LONGEST = 8192
"""Values of a row that stay in registers."""


@kernel
@no_type_check
def _double_backward_kernel(
    u_ptr, g_ptr, v_ptr, w_ptr, x_ptr, m_ptr, r_ptr, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    columns = tl.arange(0, BLOCK)  # (BLOCK,)
    inside = (rows < R)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    m = tl.load(m_ptr + rows, mask=rows < R, other=0.0)[:, None]
    r = tl.load(r_ptr + rows, mask=rows < R, other=0.0)[:, None]
    v = tl.load(v_ptr + offsets, mask=inside, other=0.0).to(m.dtype)
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(m.dtype)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(m.dtype)
    x_hat = tl.where(inside, x - m, 0.0) * r
    v_mean, w_mean = tl.sum(v, 1)[:, None] / N, tl.sum(w, 1)[:, None] / N
    v_along, w_along = tl.sum(v * x_hat, 1)[:, None] / N, tl.sum(w * x_hat, 1)[:, None] / N
    e = r * (tl.sum(v * w, 1)[:, None] / N - v_mean * w_mean - v_along * w_along)
    u = r * (v - v_mean - x_hat * v_along)
    q = r * (w - w_mean - x_hat * w_along)
    g = -r * (w_along * u + v_along * q + e * x_hat)
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=inside)
    tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=inside)


def double_backward(v: Tensor, w: Tensor, x: Tensor, m: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """What goes to w and to x, `(R, n)` as `v`, `w` and `x`; `m` and `r` `(R, 1)` have the dtype of the arithmetic."""
    n = x.shape[1]
    if not use_triton(x) or n > LONGEST:
        dtype = x.dtype
        v, w, x = (t.to(r.dtype) for t in (v, w, x))
        x_hat = (x - m) * r
        (v_mean, w_mean), (v_along, w_along) = (
            [t.mean(1, keepdim=True) for t in pair] for pair in ((v, w), (v * x_hat, w * x_hat))
        )
        e = r * ((v * w).mean(1, keepdim=True) - v_mean * w_mean - v_along * w_along)
        u, q = r * (v - v_mean - x_hat * v_along), r * (w - w_mean - x_hat * w_along)
        return u.to(dtype), (-r * (w_along * u + v_along * q + e * x_hat)).to(dtype)
    u, g = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block = max(16, 1 << (n - 1).bit_length())
    rows = max(1, 2048 // block)
    operands = [t.contiguous() for t in (v, w, x, m, r)]
    _double_backward_kernel.launch(
        (-(-len(x) // rows),), u, g, *operands, len(x), n, ROWS=rows, BLOCK=block, num_warps=4 if block <= 2048 else 8
    )
    return u, g
