"""Passes that are differentiated twice: what their operators lack for it is supplied, or is an error.

torch says nothing where a second derivative is missing: of a Function marked `once_differentiable`, or one whose
backward leaves no graph, it is taken for zero. The graph of a loss names its operators; those that are not torch's own
are tried once per model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastcure._functional import FunctionalLoss, ModelWithLoss, graph_nodes, unreachable
from fastcure._model_lock import Shared
from fastcure._torch_compat import BackwardHookFunction, function_of
from fastcure.rules.plain_operators import PlainOperators

INSTEAD = "use CURE's engine='first_order', or method='finite' in fastcure.analysis"
NEEDS_PLAIN = re.compile(r"(Hardsigmoid|Hardswish)Backward\d|\w*(Batch|Layer)Norm\w*BackwardBackward\d")
MISSING = re.compile(
    r"derivative for '?(?:aten::)?(?P<name>\w+?)(_backward)?'? is not implemented"
    r"|[Dd]ouble[ -]backwards?.*(not|n't).*(support|implement)|differentiate twice"
    r"|backward through (?P<custom>\S+) but no autograd formula|out=... arguments don't support automatic diff"
)

PLAIN_ATTENTION = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
"""The fast kernels of attention have no second derivative."""
_plain: WeakSet[nn.Module] = WeakSet()
"""Models that need `PlainOperators`."""
_tried: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""Operators of each model that were found to have a second derivative."""


class Twice:
    """`(x, y) -> (logits, loss)` of a model and its loss, for exact second derivatives.

    Args:
        run: the model and its loss, live or as a function free of side effects.
    """

    def __init__(self, run: FunctionalLoss | ModelWithLoss) -> None:
        self.run, self.module = run, run.module if isinstance(run, FunctionalLoss) else run

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on `x` `(B, ...)`.

        Raises:
            RuntimeError: if the loss does not depend on `x`, where that requires grad; at scripted code; at an operator
                that has no second derivative.
        """
        model = self.module.model
        if model not in _tried:
            _refuse_scripted(self.module)
        plain = model in _plain
        with PlainOperators() if plain else nullcontext():
            logits, loss = self.run(x, y)
        _tried.setdefault(model, set())
        nodes = graph_nodes(loss)
        if x.requires_grad and not any(getattr(node, "variable", None) is x for node in nodes):
            raise unreachable()
        kinds = {type(node): node for node in nodes}
        found = [kind.__name__ for kind in kinds if NEEDS_PLAIN.fullmatch(kind.__name__)]
        if found and not plain:
            _plain.add(model)
            return self(x, y)
        if any(name.endswith("BackwardBackward0") for name in found):
            raise RuntimeError(
                f"the model differentiates itself, and torch's third derivative of {found[0].split('Backward')[0]} is "
                f"wrong: call it as torch.nn.functional does, or {INSTEAD}"
            )
        if any(_is_foreign(kind) for kind in kinds):
            self._try(x, loss, [node for node in nodes if _is_foreign(type(node))])
        return logits, loss

    def _try(self, x: Tensor, loss: Tensor, nodes: list[Any]) -> None:
        """Differentiate once, the first time, and see that the gradients of `nodes` have a history."""
        if any("DifferentiableGraph" in node.name() for node in nodes):
            raise _scripted("it calls a scripted function")
        tried = _tried[self.module.model]
        nodes = [node for node in nodes if node.name() not in tried]
        if not (nodes and x.requires_grad):
            return
        handles = [node.register_hook(partial(_check_history, node.name())) for node in nodes]
        try:
            # Weights that require grad: what depends on nothing else shows itself as well.
            torch.autograd.grad(loss, x, torch.ones_like(loss).requires_grad_(), create_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        tried.update(node.name() for node in nodes)


def _is_foreign(kind: type) -> bool:
    """Tell a Function in Python, ours and that of backward hooks apart, or one of C++ code that is not torch's."""
    if issubclass(kind, BackwardCFunction):
        function: Any = function_of(kind)
        return function is not BackwardHookFunction and not function.__module__.startswith(
            ("fastcure.", "fastcure_kernels.")
        )
    return kind.__name__ == "CppFunction"


def _check_history(name: str, gradients: tuple[Tensor | None, ...], into: tuple[Tensor | None, ...]) -> None:
    """A hook of a node: raise if what it returns for inputs has no history, though what came in has one."""
    if not any(gradient is not None and gradient.requires_grad for gradient in into):
        return
    for gradient in gradients:
        if gradient is None:
            continue
        error = gradient.grad_fn is not None and gradient.grad_fn.name() == "torch::autograd::Error"
        if error or (not gradient.requires_grad and gradient.any()):
            raise RuntimeError(
                f"{name} has no second derivative (its backward is once_differentiable, or returns gradients without "
                f"a graph), and the result would be wrong: write its backward in operators of torch, or {INSTEAD}"
            )


def _refuse_scripted(module: ModelWithLoss) -> None:
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise _scripted(f"{name} is a {type(part).__name__}")
    if isinstance(module.loss_fn, torch.jit.ScriptFunction):
        raise _scripted("loss_fn is a ScriptFunction")


def _scripted(what: str) -> RuntimeError:
    return RuntimeError(
        f"the model is scripted or traced ({what}), and torch's second derivatives of such code are wrong: use what "
        f"there was before torch.jit.script or torch.jit.trace, or {INSTEAD}"
    )


@contextmanager
def missing_derivatives(instead: str = f"replace it, or {INSTEAD}") -> Iterator[None]:
    """Say what can be done instead where torch says within that it has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        found = MISSING.search(str(error))
        if found is None:
            raise
        name = found["name"] or found["custom"] or "an operator of the model"
        raise RuntimeError(f"torch has no second derivative of {name}: {instead}") from error
