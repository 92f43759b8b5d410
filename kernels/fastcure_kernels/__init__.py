"""Fused operators of fastcure, each a Triton kernel with a reference implementation in PyTorch."""

from .bias_relu import bias_relu
from .difference_sqnorm import difference_sqnorm
from .direction_step import direction, direction_step
from .l2_step import l2_step
from .linf_step import linf_step

__all__ = [
    "bias_relu",
    "difference_sqnorm",
    "direction",
    "direction_step",
    "l2_step",
    "linf_step",
]
