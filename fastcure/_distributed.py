"""A DistributedDataParallel around the penalty: what would silently leave gradients unaveraged is refused."""

from __future__ import annotations

import gc
import sys
from functools import cache
from typing import Any
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastcure._torch_compat import active_ddp, averaged_parameters, has_python_reducer

_living: WeakSet[DistributedDataParallel] = WeakSet()
"""Every DistributedDataParallel of this process that was made since this file was imported, or that was looked for."""


def refuse_static_graph() -> None:
    """Raise if a DistributedDataParallel around us takes the graph of its first step for that of every step."""
    around = active_ddp()
    if around is not None and around.static_graph:
        raise ValueError(
            "CURE must not be in a DistributedDataParallel with static_graph=True: where a step's graph is not that of "
            "the first, gradients are not averaged, without an error; leave it out (find_unused_parameters=True works)"
        )


def refuse_wrappers_within(*roots: object) -> None:
    """Raise if a part of a model or of its loss averages gradients by itself, and so before they are all there."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without it there is none
    kinds = (DistributedDataParallel, DataParallel, *([fsdp.FullyShardedDataParallel] if fsdp else []))
    for root in roots:
        if not (isinstance(root, nn.Module) and any(isinstance(module, kinds) for module in root.modules())):
            continue
        name, module = next(named for named in root.named_modules() if isinstance(named[1], kinds))
        raise TypeError(
            f"the model must have no {type(module).__name__} in it, got one at {name!r}: its gradients would not be "
            "averaged; take the module inside it, and wrap the regulariser, DistributedDataParallel(CURE(model))"
        )


def averaged_once(roots: tuple[object, ...], *values: Tensor) -> tuple[Tensor, ...]:
    """Return `values`, whose backward raises where a DistributedDataParallel would not average their gradients.

    It averages in the first backward after a forward of its own. So a second backward raises; and where it holds
    parameters of one of the modules `roots`, but the penalty was not called through it, the first one does. Under its
    `no_sync`, where nothing is averaged, every backward is allowed.
    """
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in values)):
        return values
    around = active_ddp()
    if (passed_by := _passed_by(roots, around)) is not None:
        return _Refused.apply(ref(passed_by), *values)
    if around is not None and around.require_backward_grad_sync:
        return _Once.apply(*values)
    return values


def _passed_by(roots: tuple[object, ...], around: DistributedDataParallel | None) -> DistributedDataParallel | None:
    """Return a DistributedDataParallel that should average gradients of `roots`, and whose forward this is not."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    _look_for_earlier_ones()
    others = [other for other in _living if other is not around and _averages(other)]
    if not others:
        return None
    parameters = (p for root in roots if isinstance(root, nn.Module) for p in root.parameters())
    left = {id(parameter) for parameter in parameters if parameter.requires_grad}
    if around is not None:
        left -= {id(parameter) for parameter in averaged_parameters(around)}
    return next((other for other in others if not left.isdisjoint(map(id, averaged_parameters(other)))), None)


def _averages(wrapper: DistributedDataParallel) -> bool:
    """Tell whether it awaits a forward of its own to average; the reducer in Python averages whatever arrives."""
    if has_python_reducer(wrapper) or not wrapper.require_backward_grad_sync:
        return False
    return dist.get_world_size(wrapper.process_group) > 1


def _remember(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel):
        _living.add(module)


register_module_module_registration_hook(_remember)


@cache
def _look_for_earlier_ones() -> None:
    """Find those that were made before this file was imported; it takes some 0.1 s, once."""
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):
            _living.add(thing)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.sent = False
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.sent:
            raise RuntimeError(
                "DistributedDataParallel averages gradients in one backward a step, and this is the second: send the "
                "sum backward, as (loss + gamma * penalty).backward() or CURE's total, or use no_sync()"
            )
        ctx.sent = True
        return gradients


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passed_by: ref[DistributedDataParallel], *values: Tensor) -> tuple[Tensor, ...]:
        ctx.passed_by = passed_by
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gc.collect()  # nobody may hold it any more
        if (wrapper := ctx.passed_by()) is None:
            return None, *gradients
        raise RuntimeError(
            f"the model is in a DistributedDataParallel of {dist.get_world_size(wrapper.process_group)} processes, and "
            "the penalty was not called through it, so its gradients would not be averaged and the processes would "
            "drift apart: wrap the regulariser, ddp = DistributedDataParallel(CURE(model)), and call ddp(x, y); if you "
            "average gradients yourself, call the penalty under the no_sync() of that DistributedDataParallel"
        )
