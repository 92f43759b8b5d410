"""Private names of torch's, each under a name that says what it is for; no other file of the package uses any.

Those that the kernels use as well are in `fastcure_kernels.torch_compat`.

`tests/fastcure/test_torch_compat*.py` has a canary for each, which says what broke when torch moves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from fastcure_kernels.torch_compat import engine_will_execute as engine_will_execute
from fastcure_kernels.torch_compat import tree_map as tree_map
from fastcure_kernels.torch_compat import without_storage as without_storage
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules._functions import BackwardHookFunction as BackwardHookFunction
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files

# Autograd.


def backward_retains_graph() -> bool:
    """Tell `retain_graph` of the backward that runs now: a Function is not told."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def backward_id() -> int:
    """Return a number of the backward that runs now, which no other has: what nodes leave for each other is of one."""
    return torch._C._current_graph_task_id()


def version(tensor: Tensor) -> int:
    """Return how often `tensor` was changed in place: autograd's own check comes with its backward, too late."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Tell whether `tensor` is a view of another to autograd, which then rewrites both if it changes in place."""
    return tensor._is_view()


def function_of(node: type) -> Any:
    """Return the `autograd.Function` that a kind of node in Python belongs to: nodes have generated classes."""
    return node._forward_cls  # type: ignore[attr-defined]


def elu_slope(node: Any) -> float:
    """Return the slope left of 0 of an ELU or SELU over that right of it, from its node in the graph."""
    return node._saved_alpha * node._saved_input_scale


def somebody_listens() -> bool:
    """Tell whether a mode, a hook of saved tensors, a hook of all modules or anomaly detection sees what runs now."""
    modes = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    saving = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return bool(modes) or saving or torch.is_anomaly_enabled() or _has_any_global_hook()


def in_forward_mode() -> bool:
    """Tell whether a level of forward-mode AD is open; the public API tells of single tensors only."""
    return forward_ad._current_level >= 0


def in_functorch_transform() -> bool:
    """Tell whether a transform of torch.func (grad, jvp, vmap) runs now; the public API has no such question."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched_gradient(g: Tensor) -> bool:
    """Tell whether `g` is a batch of gradients, of `torch.autograd.grad(..., is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(g)


def thread_local(key: str) -> int:
    """Return a small number of this thread, 0 at first, that torch hands on to the threads of its backward."""
    return int(torch._C._get_obj_in_tls(key)) if torch._C._is_key_in_tls(key) else 0


def set_thread_local(key: str, value: int) -> None:
    """Set what `thread_local` returns.

    Nothing but small numbers, which Python never frees: torch 2.11 releases what is kept here once more than it takes
    hold of it.
    """
    if not (type(value) is int and 0 <= value < 256):
        raise TypeError(f"a thread's number must be an int in 0..255, got {value!r}")
    torch._C._stash_obj_in_tls(key, value)


# Modules.

BatchNormBase = nn.modules.batchnorm._BatchNorm
"""Of all batch norms, those of other libraries included; torch's public classes are leaves."""
DropoutBase = nn.modules.dropout._DropoutNd
"""Of all dropout layers, as above."""
FSDP_ATTRIBUTE = "_fsdp_wrapped_module"
"""Under which a FullyShardedDataParallel registers its module; its public `module` is a property."""
WRAPPER_ATTRIBUTES = ("_orig_mod", FSDP_ATTRIBUTE, "_checkpoint_wrapped_module")
"""In the state dicts of compiled, sharded and checkpointed modules; what saved them need not be there to ask."""
PARTS_OF_FORWARD = ("_conv_forward", "_check_input_dim")
"""Methods that the `forward` of convolutions and norms calls: an instance may have its own."""


def convolve(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run an `nn.Conv1d..3d` with another weight and bias; the padding modes are in this method alone."""
    return layer._conv_forward(x, weight, bias)  # type: ignore[operator]


def has_hooks(module: nn.Module) -> bool:
    """Tell whether anybody listens to `module`, or to all modules; hooks can be registered, but not listed."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or _has_any_global_hook()


def registered_parameters(module: nn.Module) -> Iterable[str]:
    """Return the names of the parameters of `module` itself, those that are None too, which the public API skips."""
    return module._parameters.keys()


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper, or else `module`: the wrapper has no public way to it."""
    return getattr(module, "_orig_mod", module)


# DistributedDataParallel.


def active_ddp() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward runs now."""
    return DistributedDataParallel._active_ddp_module


def averaged_parameters(ddp: DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters whose gradients it averages: those of its module less some that nobody else knows."""
    return ddp._module_parameters


def has_python_reducer(ddp: DistributedDataParallel) -> bool:
    """Tell whether its reducer is the one in Python, which averages every gradient: chosen by torch's config."""
    return ddp._use_python_reducer


# Subclasses of Tensor, and operators.

without_torch_function: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass
"""Within, functions take subclasses of Tensor for tensors; the public context disables modes as well."""
math_attention: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_attention_math
"""Attention in plain operators, chosen for one call: the public `sdpa_kernel` sets it for the whole process."""
foreach_copy: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
"""Copies the second list into the first: on a GPU in one launch where both are of one dtype; the optimisers' own."""
foreach_add: Callable[[list[Tensor], list[Tensor]], tuple[Tensor, ...]] = torch._foreach_add
"""Adds the lists, in one launch likewise."""
unsafe_view = torch.ops.aten._unsafe_view.default
"""A view that torch's matrix products return, not marked as one."""
hardsigmoid_in_c: Callable[..., Tensor] = torch._C._nn.hardsigmoid
hardswish_in_c: Callable[..., Tensor] = torch._C._nn.hardswish
"""What a mode sees of the public functions, which call these."""


def is_in_place(operator: Any) -> bool:
    """Tell whether an operator, as `__torch_dispatch__` is given it, writes into an argument."""
    return operator._schema.is_mutable


def written_arguments(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return those arguments of an operator, as `__torch_dispatch__` is given it, into which it writes."""
    declared = operator._schema.arguments
    written = [(i, each.name) for i, each in enumerate(declared) if each.is_write]
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in written]


def operator_name(operator: Any) -> str:
    """Return the name of an operator, without namespace and overload."""
    return operator._opname


def operator_packet(operator: Any) -> Any:
    """Return all overloads of an operator, the key of `flop_registry`."""
    return operator._overloadpacket


# torch.compile, which is imported only once something is compiled.


def not_inside_torch_compile() -> None:
    """Do nothing; where torch.compile comes upon it, torch raises an error that has this name in it."""


# torch.compiler.disable would silently break the graph.
not_inside_torch_compile._dynamo_forbidden = True  # type: ignore[attr-defined]


def compiler_is_loaded() -> bool:
    """Tell whether anything can be compiled yet: `torch.compiler.set_stance` would load it, which takes a second."""
    return "torch._dynamo" in sys.modules


def compiled_graphs() -> int:
    """Return how many graphs torch has compiled up to now: a call does not tell whether it compiled."""
    import torch._dynamo.utils

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_break_errors() -> tuple[type[Exception], ...]:
    """Return what torch raises where `fullgraph=True` cannot be kept, and where what it traces fails."""
    import torch._dynamo

    return torch._dynamo.exc.Unsupported, torch._dynamo.exc.TorchRuntimeError


def compiling(graph_pass: Any) -> AbstractContextManager[object]:
    """Set the compiler up for a region that is differentiated twice; none of these settings is a public option.

    Args:
        graph_pass: a `CustomGraphPass` that is run on the joint graph of forward and backward.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    stack = ExitStack()
    # Donated buffers cannot serve a backward with retain_graph.
    stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
    stack.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))  # hooks may come and go
    stack.enter_context(torch._inductor.config.patch(joint_custom_pre_pass=graph_pass))
    return stack


def __getattr__(name: str) -> Any:
    """Load the compiler's graph passes when they are asked for."""
    if name in ("CustomGraphPass", "get_hash_for_files"):
        from torch._inductor import custom_graph_pass

        return getattr(custom_graph_pass, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
