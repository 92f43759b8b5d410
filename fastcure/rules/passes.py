"""What a backward pass asks of the operators that it goes through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcure._torch_compat import engine_will_execute, is_batched_gradient


def wanted(ctx: Any, inputs: int) -> list[bool]:
    """Return which of the first `inputs` arguments of a Function need a gradient in the backward pass that runs now.

    `ctx.needs_input_grad` says which of them require grad. A pass for the gradient of the input does not continue into
    weights, unless they depend on the input, and their gradients are then not computed.
    """
    nodes = (node for node, _ in ctx.next_functions if node is not None)  # of the arguments that require grad
    return [need and _continues_into(next(nodes)) for need in ctx.needs_input_grad[:inputs]]


def _continues_into(node: Any) -> bool:
    try:
        return engine_will_execute(node)
    except RuntimeError:  # a leaf for whose gradient torch.autograd.grad was called
        return True


def differentiated(
    results: Sequence[Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], directions: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `results` under `directions`, differentiable again, in those `inputs` that are needed.

    Args:
        results: of a formula in plain operators.
        inputs: what it is made of. Views of a backward's operands: these may depend on one another, which is not asked.
        needed: `ctx.needs_input_grad`, from that of the first input on.
        directions: one for each result.
    """
    needed = needed[: len(inputs)]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(results, wanted, directions, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward, after one of a shape that torch's own operators do not save.

    Activation checkpointing that recomputes outside of the context would put the tensors of torch's operator in their
    places. With the odd one it raises torch's CheckpointError instead.
    """
    device = next(tensor.device for tensor in tensors if tensor is not None)
    ctx.save_for_backward(torch.empty(0, dtype=torch.bool, device=device), *tensors)


def saved(ctx: Any) -> tuple[Any, ...]:
    """Return what `save` was given."""
    found: tuple[Any, ...] = ctx.saved_tensors[1:]
    return found


def refuse_batched(g: Tensor) -> None:
    """Raise where `g` stands for many gradients: our Functions would mix them, without an error.

    Raises:
        RuntimeError: within `torch.autograd.grad(..., is_grads_batched=True)`.
    """
    if is_batched_gradient(g):
        raise RuntimeError(
            "fastcure.double_backward() does not support is_grads_batched=True (and vectorize=True): call "
            "torch.autograd.grad once for each gradient, or leave the context out"
        )
