"""A model and its loss as one function of (x, y), in evaluation mode, that leaves both exactly as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from fastcure._model_lock import one_thread
from fastcure._torch_compat import foreach_copy, uncompiled
from fastcure._validation import check_classes

LossFn = Callable[[Tensor, Tensor], Tensor]

NO_LABEL = -(1 << 62)
"""The `ignore_index`: with torch's own, -100, that label would have loss 0 on a GPU, where labels are not looked at."""


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample `(B,)`; y holds class indices `(B,)` or probabilities `(B, C)`.

    Raises:
        ValueError: if y has another shape, or (checked on the CPU, where looking costs nothing) a label is not in
            0..C-1. On a GPU such a label is an assertion of torch's on the device, which ends the process.
    """
    if y.is_floating_point():
        if y.shape != logits.shape:
            raise ValueError(
                f"soft targets must have the shape of the logits {tuple(logits.shape)}, got {tuple(y.shape)}; class "
                "indices must be whole numbers: pass y.long()"
            )
        return F.cross_entropy(logits, y, reduction="none")
    if y.shape != logits.shape[:1]:
        raise ValueError(f"labels must have shape ({len(logits)},), one class index a sample, got {tuple(y.shape)}")
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        check_classes(y, logits)
    return F.cross_entropy(logits, y.long(), reduction="none", ignore_index=NO_LABEL)


class ModelWithLoss(nn.Module):
    """`(x, y) -> (logits, loss)`; the parameters are those of the model and, if it is a module, of the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the loss of each sample `(B,)`."""
        logits = find_logits(self.model(x))
        loss = self.loss_fn(logits, y)
        if loss.shape != x.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss a sample, shape ({len(x)},), got {tuple(loss.shape)}: "
                "use reduction='none'"
            )
        return logits, loss


class FunctionalLoss:
    """`(x, y) -> (logits, loss)` of a model, free of side effects.

    Parameters are replaced by aliases, leaves of their own that share memory, so that the passes of the penalty
    fire no hook of the caller's. Buffers are replaced by copies: batch norm overwrites its running statistics in
    place without telling autograd, and a training forward between ours and the backward would corrupt gradients.

    Args:
        model: the network.
        loss_fn: `(logits, y) -> (B,)`.
        trainable: False to differentiate with respect to the inputs only.
        tracking: remember what the first pass makes of the buffers of these modules, for `update_buffers`.

    Raises:
        ValueError: if a lazy module has not been initialised.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn = cross_entropy,
        *,
        trainable: bool = True,
        tracking: Iterable[nn.Module] = (),
    ) -> None:
        self.model = model
        self.module = ModelWithLoss(model, loss_fn)
        named = dict(self.module.named_parameters())
        buffers = dict(self.module.named_buffers())
        check_initialised({**named, **buffers})
        self.state = {
            **{name: _alias(p, trainable).requires_grad_(trainable and p.requires_grad) for name, p in named.items()},
            **dict(zip(buffers, clones(buffers.values()), strict=True)),
        }
        for alias in self.state.values():
            if alias.requires_grad:
                alias.register_post_accumulate_grad_hook(_lost)
        of = {id(buffer) for module in tracking for buffer in module.buffers(recurse=False)}
        self._tracked = {name: buffer for name, buffer in buffers.items() if id(buffer) in of}
        self._updated: dict[str, Tensor] = {}
        self.trainable = trainable and any(p.requires_grad for p in named.values())
        # A parameter that the model reaches around its own attributes (a closure) stays itself.
        self._owner = {id(p): p for p in named.values() if p.requires_grad}
        self._owner |= {id(self.state[name]): p for name, p in named.items() if p.requires_grad}

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(logits, loss (B,))` of one forward."""
        logits, loss = functional_call(self.module, self.state, (x, y))
        self.track(self.state)
        return logits, loss

    @property
    def tracked(self) -> dict[str, Tensor]:
        """The copies of the buffers that `track` remembers."""
        return {name: self.state[name] for name in self._tracked}

    def track(self, state: Mapping[str, Tensor]) -> None:
        """Remember what the first pass has made of the buffers of the modules `tracking`; later ones do not count."""
        if self._tracked and not self._updated:
            updated = clones(state.get(name, self.state[name]) for name in self._tracked)
            self._updated = dict(zip(self._tracked, updated, strict=True))

    def to(self, dtype: torch.dtype) -> FunctionalLoss:
        """Return the same in another floating-point dtype; `leaves` finds the same parameters."""
        other = copy.copy(self)
        other.state = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.state.items()
        }
        pairs = ((tensor, self.state[name]) for name, tensor in other.state.items() if tensor.requires_grad)
        other._owner = self._owner | {id(new): self._owner[id(old)] for new, old in pairs}
        return other

    def update_buffers(self) -> None:
        """Give the buffers of the modules `tracking` the values that they had after the first pass."""
        copy_into(self._updated.values(), [self._tracked[name] for name in self._updated])

    def leaves(self, *losses: Tensor, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, nn.Parameter]]:
        """Find the trainable leaves under `losses`, each with the parameter whose gradient it carries.

        Raises:
            ValueError: at a leaf, `inputs` apart, that is a parameter of neither the model nor the loss.
        """
        found = []
        for leaf in graph_leaves(*losses):
            if any(leaf is point for point in inputs):
                continue
            if id(leaf) not in self._owner:
                raise ValueError(
                    f"a tensor of shape {tuple(leaf.shape)} that requires grad is used by the model or by loss_fn, "
                    "but it is not one of their parameters, so its gradient would be lost: register it as an "
                    "nn.Parameter of the model (or of a loss_fn that is a module), or detach it"
                )
            found.append((leaf, self._owner[id(leaf)]))
        return found


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return detached copies, in a few launches on a GPU."""
    given = list(tensors)
    made = [torch.empty_like(tensor, requires_grad=False) for tensor in given]
    copy_into(given, made)
    return made


@torch.no_grad()
def copy_into(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    """Copy each of `sources` into its target: those of one dtype in one launch on a GPU."""
    kinds: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        kinds.setdefault(target.dtype, []).append((target, source))
    for pairs in kinds.values():
        foreach_copy(*map(list, zip(*pairs, strict=True)))


def _alias(parameter: nn.Parameter, trainable: bool) -> Tensor:
    """Return a leaf that shares its memory; or a copy, if inference mode made it: autograd cannot save those."""
    return (parameter.clone() if parameter.is_inference() and not trainable else parameter).detach()


def _lost(_: Tensor) -> None:
    """Raise when an ordinary backward reaches an alias: the gradient would not reach the parameter."""
    raise RuntimeError(
        "a tensor that the model kept from a pass of the penalty was sent backward, and its gradient would be lost: "
        "put auxiliary losses into loss_fn, or compute them in a forward of your own"
    )


LOSS_SCALE = 1024.0
"""Factor of a loss that is differentiated under float16 autocast, where small derivatives would become zero."""


def loss_scale(device: torch.device) -> float:
    """Return the factor of a loss on `device` that is differentiated here and now; a power of two rounds nothing.

    A `GradScaler` acts on the last backward alone, which comes after the input gradient.
    """
    name = device.type
    half = torch.is_autocast_enabled(name) and torch.get_autocast_dtype(name) == torch.float16
    return LOSS_SCALE if half else 1.0


def input_gradient(loss: Tensor, point: Tensor, weights: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of `loss` `(B,)`, times `weights` `(B,)` if given, at `point` `(B, ...)`.

    Raises:
        RuntimeError: if the loss does not depend on `point`.
    """
    if not loss.requires_grad:
        raise unreachable()
    total, scale = loss.sum() if weights is None else loss, loss_scale(loss.device)
    total = total * scale if scale != 1 else total
    (g,) = torch.autograd.grad(total, point, weights, create_graph=create_graph, allow_unused=True)
    if g is None:
        raise unreachable()
    return g / scale if scale != 1 else g


def unreachable() -> RuntimeError:
    """Return the error for a loss that does not depend on the images."""
    return RuntimeError(
        "the loss has no gradient with respect to the images, so that the penalty would be 0 and an attack would stand "
        "still: the model runs itself under torch.no_grad, detaches its input or output, or computes one by operators "
        "that have no derivative; remove that from its forward"
    )


def check_initialised(named: Mapping[str, Tensor]) -> None:
    """Raise if one of these parameters and buffers is that of a lazy module that has not run yet."""
    for name, tensor in named.items():
        if is_lazy(tensor):
            raise ValueError(f"{name} of a lazy module has no shape yet: run the model on a batch before, model(x)")


def find_logits(output: Any) -> Tensor:
    """Take the logits out of what a model returned: a tensor, an object or mapping with `logits`, or a tuple.

    Raises:
        TypeError: where there are none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    else:
        logits = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits (a tensor, something with .logits, or a tuple that starts with them), "
            f"got {type(output).__name__}"
        )
    return logits


def graph_leaves(*outputs: Tensor) -> list[Tensor]:
    """Return the leaves that require grad under `outputs`, each once."""
    leaves = [out for out in outputs if out.grad_fn is None and out.requires_grad]
    return leaves + [node.variable for node in graph_nodes(*outputs) if hasattr(node, "variable")]


def graph_nodes(*outputs: Tensor) -> list[Any]:
    """Return the nodes of the autograd graph under `outputs`, each once."""
    nodes = list({out.grad_fn: None for out in outputs if out.grad_fn is not None})
    seen = set(nodes)
    for node in nodes:  # grows as it goes
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                nodes.append(child)
    return nodes


@contextmanager
def evaluation_mode(*modules: object, but: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """Set the flag of every submodule to evaluation, and restore each one exactly, also after an exception.

    Those of the types `but` keep theirs.

    The flags are set directly: a model's own `train()` may have side effects (merged adapters, for instance).
    What is not an `nn.Module` is passed over.

    Raises:
        RuntimeError: if another thread changes one of the modules now.
    """
    with one_thread(*modules, changes=lambda module: module.training and not isinstance(module, but)):
        flags = [(m, m.training) for root in modules if isinstance(root, nn.Module) for m in root.modules()]
        try:
            for module, _ in flags:
                if not isinstance(module, but):
                    module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that can be differentiated twice: the one inside a `torch.compile` wrapper.

    Raises:
        TypeError: for what is not a module, or one that synchronises gradients or gathers parameters by itself.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            "model must not be a DistributedDataParallel: its gradients would not be averaged; "
            "wrap the regulariser instead, DistributedDataParallel(CURE(model))"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise TypeError(
            "model must not have sharded parameters (DTensor): shard it as one with the regulariser, "
            "fully_shard(CURE(model)), and no part of it apart"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError("model must not be a DataParallel: use DistributedDataParallel(CURE(model))")
    original = uncompiled(model)
    assert isinstance(original, nn.Module)
    return original
