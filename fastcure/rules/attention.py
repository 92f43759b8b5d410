"""Attention by torch's own plain operators: its fused kernels have no second derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcure._torch_compat import math_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """`softmax(query key^T / sqrt(E)) value`; `(..., L, E)`, `(..., S, E)`, `(..., S, E_v)` -> `(..., L, E_v)`."""
    if mask is not None and mask.dtype == torch.bool:  # which this operator would add as it is
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    return math_attention(query, key, value, mask, dropout, causal, **options)[0]


RULES = {"scaled_dot_product_attention": scaled_dot_product_attention}
