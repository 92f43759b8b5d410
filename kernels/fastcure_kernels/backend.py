"""Choice of backend: the Triton kernels or their reference implementations in PyTorch."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor

_TRITON_INSTALLED = find_spec("triton") is not None


def use_triton(x: Tensor) -> bool:
    """Whether an operator on `x` runs as a Triton kernel.

    The environment variable `FASTCURE_BACKEND` decides, at each call: `auto` (the default) takes Triton for
    CUDA and ROCm tensors where it is installed, `torch` the reference implementation, `triton` the kernel anyway.

    Raises:
        ValueError: `FASTCURE_BACKEND` is none of the three.
        RuntimeError: `triton` was asked for and is not installed, or cannot run on the device of `x`.
    """
    choice = os.environ.get("FASTCURE_BACKEND", "auto")
    if choice == "torch":
        return False
    if choice == "auto":
        return x.is_cuda and _TRITON_INSTALLED
    if choice != "triton":
        raise ValueError(f"FASTCURE_BACKEND must be auto, torch or triton, got {choice!r}: set one of them or unset it")
    if not _TRITON_INSTALLED:
        raise RuntimeError("FASTCURE_BACKEND=triton wants triton, which is not installed: install it or use auto")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"FASTCURE_BACKEND=triton wants CUDA tensors, got one on {x.device}: "
            "set TRITON_INTERPRET=1 before Python starts to interpret the kernels, or use auto"
        )
    return True
