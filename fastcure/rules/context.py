"""A context in which torch's operators have fast second derivatives, right to any order, whoever calls them.

Rules stand at torch's Autograd dispatch key: below autocast, so that they see tensors already cast, and above the
library's kernels, so that they see every call, from modules, functional code, scripted code or torch's own C++ (the
inside of `nn.MultiheadAttention`). Where a rule does not apply, torch's own kernel runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from fastcure_kernels.backend import use_triton
from torch import Tensor, nn

from fastcure._torch_compat import in_forward_mode, in_functorch_transform, set_thread_local, thread_local
from fastcure.rules import attention, batch_norm, convolution, gelu, hard_activations, relu, row_norms
from fastcure.rules.pending_norm import PendingNorm

Rule = Callable[..., Any]
"""Takes the operator's arguments; returns what it returns, or NotImplemented for torch's own."""

FILES = (attention, batch_norm, convolution, gelu, hard_activations, relu, row_norms)
RULES: dict[str, Rule] = {operator: rule for file in FILES for operator, rule in file.RULES.items()}
FUSED: dict[str, Rule] = {"batch_norm": batch_norm.training_batch_norm, **relu.OF_NORMS}
SETS: tuple[dict[str, Rule], ...] = ({}, FUSED, RULES)
"""Of rules that apply together; of two contexts around a call the later set holds."""
ONLY_FUSED, ALL = 1, 2
KEYS = ("AutogradCPU", "AutogradCUDA") if torch.backends.cuda.is_built() else ("AutogradCPU",)


@contextmanager
def double_backward() -> Iterator[None]:
    """Give operators second-order rules of ours while the graph is built, in this thread.

    For code that differentiates a gradient: gradient penalties (R1, WGAN-GP), energy models, meta-learning. Run the
    forward, and the `torch.autograd.grad(..., create_graph=True)` that follows, inside; the last backward may run
    anywhere. Values and first derivatives are those of torch.

    | operator | what the rule changes |
    | --- | --- |
    | `conv1d..3d`, `conv_transpose1d..3d` | no convolution with a kernel as large as the image |
    | `batch_norm`, `instance_norm` | fewer passes; right for one image in channels_last, where torch's are wrong |
    | `layer_norm`, `group_norm` | fewer passes; right at third order, where torch's are wrong |
    | `relu`, `gelu` on a GPU | no passes over zeros; one kernel |
    | `hardsigmoid`, `hardswish` | a second derivative, where torch has none |
    | `scaled_dot_product_attention` | the kernel that has a second derivative |

    On a GPU the output of a training-mode batch norm is computed when something reads it: a ReLU takes it, with what
    was added to it, in one kernel. Until then it has no memory; whatever reads it finds it as ever.

    In a transform of `torch.func`, under forward-mode AD, for subclasses of Tensor and for dtypes that a rule does not
    know, torch's own operator runs. Other threads are not affected. Contexts may be nested. With activation
    checkpointing, which runs the forward again, run the last backward inside as well.

    Raises:
        RuntimeError: in the backward, from `torch.autograd.grad(..., is_grads_batched=True)`; on a GPU, where the input
            of a norm, or what is added to its output, is changed in place before that output is read.

    Examples:
        >>> import torch, fastcure
        >>> critic, x = torch.nn.Conv2d(3, 1, 3), torch.rand(2, 3, 8, 8, requires_grad=True)
        >>> with fastcure.double_backward():
        ...     (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        >>> g.square().sum().backward()
    """
    with _applied(ALL):
        yield


@contextmanager
def fused_norms(x: Tensor) -> Iterator[None]:
    """Run training-mode batch norms and the ReLUs behind them as kernels of ours, where those run on `x`.

    For passes that are differentiated once: of them no other rule is cheaper than torch's own operator.
    """
    with _applied(ONLY_FUSED) if use_triton(x) else nullcontext():
        yield


@contextmanager
def _applied(rules: int) -> Iterator[None]:
    _install()
    before = thread_local(_KEY)
    set_thread_local(_KEY, max(before, rules))
    try:
        yield
    finally:
        set_thread_local(_KEY, before)
        _remove()


_KEY = "fastcure.double_backward"
_lock = threading.Lock()
_open = 0
_library: torch.library.Library | None = None


def _rules() -> dict[str, Rule]:
    """Those that apply in this thread.

    Kept in torch's own thread-local state: autograd gives it to the threads in which it runs a backward on a GPU, where
    activation checkpointing runs the forward again.
    """
    return SETS[thread_local(_KEY)]


def _install() -> None:
    """Put the rules at their key: once for all threads, each of which asks `_rules` whether they apply to it."""
    global _open, _library
    with _lock:
        if _library is None:
            _library = torch.library.Library("aten", "IMPL")
            for operator in RULES:
                for key in KEYS:
                    _library.impl(operator, _kernel(operator, _original(operator, key)), key, with_keyset=True)
        _open += 1


def _remove() -> None:
    """Take the rules away with the last context: calls elsewhere would pay for the way through Python.

    Where there are other threads they stay: one of them may be in a kernel, which must not go under its feet.
    """
    global _open, _library
    with _lock:
        _open -= 1
        if not _open and threading.active_count() == 1:
            _library = None


@cache
def _original(operator: str, key: str) -> Any:
    return torch.library.get_kernel(f"aten::{operator}", key)


def _kernel(operator: str, original: Any) -> Callable[..., Any]:
    takes_pending = operator in relu.RULES or operator.endswith("_")

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        rule = _rules().get(operator)
        if rule and torch.is_grad_enabled() and _ordinary(args) and not _in_transform():
            if not takes_pending:
                args = tuple(arg.settled() if isinstance(arg, PendingNorm) else arg for arg in args)
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return original.call_boxed(keys, *args, **kwargs)

    return kernel


def _ordinary(args: tuple[Any, ...]) -> bool:
    """Tell whether gradients are wanted of tensors that the rules know."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return any(tensor.requires_grad for tensor in tensors) and all(
        type(tensor) in (Tensor, nn.Parameter, PendingNorm) and not tensor.is_complex() for tensor in tensors
    )


def _in_transform() -> bool:
    return in_forward_mode() or in_functorch_transform()
