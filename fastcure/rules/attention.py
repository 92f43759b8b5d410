"""Attention by torch's own plain operators: its fused kernels have no second derivative."""

from __future__ import annotations

from typing import Any

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
    return math_attention(query, key, value, mask, dropout, causal, **options)[0]


RULES = {"scaled_dot_product_attention": scaled_dot_product_attention}
