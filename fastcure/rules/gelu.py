"""GELU whose double backward is one kernel, on a GPU; that of torch is a dozen plain operators."""

from __future__ import annotations

from typing import Any

import torch
from fastcure_kernels import gelu as passes
from fastcure_kernels.backend import use_triton
from torch import Tensor

from fastcure.rules.passes import refuse_batched, save, saved


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """`x Phi(x)`, or what is near it."""
    return _GELU.apply(x, approximate) if use_triton(x) else NotImplemented


RULES = {"gelu": gelu}


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        save(ctx, x)
        ctx.approximate = approximate
        return torch.ops.aten.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        refuse_batched(w)
        (x,) = saved(ctx)
        return _InputGradient.apply(w, x, ctx.approximate), None


class _InputGradient(torch.autograd.Function):
    """`w f'(x)`."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, approximate: str) -> Tensor:
        save(ctx, w, x)
        ctx.approximate = approximate
        return torch.ops.aten.gelu_backward(w, x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        refuse_batched(v)
        w, x = saved(ctx)
        if not ctx.needs_input_grad[1]:
            return _InputGradient.apply(v, x, ctx.approximate), None, None
        if torch.is_grad_enabled():  # create_graph: what follows must itself be differentiable
            first, second = passes.derivatives(x, ctx.approximate)
            return v * first, v * w * second, None
        return *passes.double_backward(v, w, x, ctx.approximate), None
