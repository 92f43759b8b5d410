"""Loss and parameter gradients in one compiled region: `torch.func.grad` inside it, then one ordinary backward."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastcure._functional import LossFn, find_logits, loss_scale
from fastcure._torch_compat import compiled_graphs, compiling, graph_break_errors, version
from fastcure._weak import weakly
from fastcure.engines._compile_check import check
from fastcure.engines._compile_folding import Folding, applied
from fastcure.engines._compile_norms import TrainingNorms
from fastcure.engines._loss_only import engine_of
from fastcure.engines.base import Evaluation, GraphEngine, Request, evaluation, twice_differentiable
from fastcure.engines.eager import lengths, root
from fastcure.reference import unit_sign
from fastcure.rules.second_derivatives import PLAIN_ATTENTION, Twice, missing_derivatives

logger = logging.getLogger("fastcure")


class Outputs(NamedTuple):
    """What a compiled region returns."""

    logits: Tensor
    loss: Tensor
    penalty: Tensor
    direction: Tensor | None
    """z, if it was wanted."""
    moved: dict[str, Tensor]
    """Running statistics after the pass at x."""


Compiled = Callable[..., Outputs]


class Program(NamedTuple):
    """A compiled region, and the forwards of modules that were compiled into it."""

    run: Compiled
    folding: Folding
    norms: TrainingNorms


class Compile(GraphEngine):
    """Exact; static shapes, a compilation for each model, loss and shape. `h` and weights change without another.

    Args:
        backend: of `torch.compile`.
    """

    instead = "use engine='eager', which may have one, or 'first_order'"
    training_norms = True
    any_part = True

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend
        self._cache: WeakKeyDictionary[nn.Module, dict[Any, Program]] = WeakKeyDictionary()

    def forward(self, request: Request) -> Evaluation:
        """Run the compiled region; the first call of a shape compiles it and checks its gradients.

        Raises:
            RuntimeError: if the model cannot be compiled whole, or its compiled gradients are not the eager ones (as
                where an operator of its own has no second derivative that the compiler sees).
        """
        if not request.differentiable:
            return engine_of(request).forward(request)
        functional, x, y = request.functional, request.x.detach(), request.y
        length = lengths(request.h, x)
        programs = self._cache.setdefault(functional.model, {})
        autocast, scale = torch.is_autocast_enabled(x.device.type), loss_scale(x.device)
        folding, norms = Folding(functional.model, norms=not autocast), TrainingNorms(functional.module)
        kind = request.power, request.loss_at == "step", request.penalised
        seen = x.shape, x.dtype, x.device, y.shape, y.dtype, length.shape, autocast, scale
        loss_fn, given = weakly(functional.module.loss_fn), request.direction is not None
        key = (loss_fn, kind, given, tuple(functional.state), folding.key, *norms.forwards, *seen)
        fresh = key not in programs
        if fresh:
            _refuse_modules_of_two_names(functional.model)
            programs[key] = Program(_compile(self.backend, *kind, norms, x.device, scale), folding, norms)
        program = programs[key]  # with the very forwards that were compiled
        run = partial(_run, program, request, length)
        compiled = compiled_graphs()
        if fresh:
            try:
                with twice_differentiable():
                    Twice(functional)(x.clone().requires_grad_(), y)  # what it refuses need not be compiled first
            except BaseException:
                del programs[key]
                raise
        else:
            result, _ = run(x)
            if compiled_graphs() == compiled:
                return result
        began, kept = time.perf_counter(), functional.state
        logger.warning("fastcure: compiling %s for %s ...", type(functional.model).__name__, tuple(x.shape))
        try:
            result, _ = run(x)
            disturbed = program.folding.folds or program.folding.norms
            for state in (kept, _disturbed(kept, program.folding)) if disturbed else (kept,):
                functional.state = state
                if not check(run, request, self):
                    logger.warning("fastcure: gradients are not finite, so the compiled step was not checked")
        except BaseException:
            del programs[key]
            raise
        finally:
            functional.state = kept
        logger.warning("fastcure: compiled in %.0f s", time.perf_counter() - began)
        return result


def _run(program: Program, request: Request, length: Tensor, x: Tensor) -> tuple[Evaluation, Tensor | None]:
    """Run a region on `x`, and return z as well, if it computes it."""
    functional, direction = request.functional, request.direction
    states: dict[str, dict[str, Tensor]] = {"model": {}, "loss_fn": {}}
    for name, tensor in functional.state.items():
        owner, _, rest = name.partition(".")
        states[owner][rest] = tensor
    model_state = program.folding.state(functional.model, states["model"])
    versions = {name: version(buffer) for name, buffer in functional.tracked.items()}
    forwards = applied({**program.folding.forwards, **program.norms.forwards})
    with forwards, warnings.catch_warnings():
        # The compiler looks at `.grad` of weights that are folded.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        # Inductor imports parts of torch that torch itself calls deprecated.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning, r"torch\.jit\.")
        logits, loss, penalty, z, moved = program.run(
            *(functional.model, model_state, functional.module.loss_fn, states["loss_fn"]),
            *(x, request.y, length, None if direction is None else direction.detach()),
        )
    for name, buffer in functional.tracked.items():
        if name not in moved and version(buffer) != versions[name]:
            raise RuntimeError(
                f"engine='compile' cannot take a model that moves {name} otherwise than by calling its batch norm: "
                "use engine='eager'"
            )
    functional.track(moved)
    return evaluation(logits, loss, penalty, functional.leaves(loss, penalty, inputs=())), z


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which the CPU's kernels need."""
    return bool(os.environ.get("CXX") or shutil.which("g++"))


def _disturbed(state: dict[str, Tensor], folding: Folding) -> dict[str, Tensor]:
    """The state of an functional with other running statistics in what is folded."""
    prefix = "model."
    inner = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return {**state, **{prefix + name: t for name, t in folding.disturbed(inner).items()}}


def _refuse_modules_of_two_names(model: nn.Module) -> None:
    """Raise if a module is found under two names: the compiler would leave its tensors replaced for good."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names and any(True for _ in (*module.parameters(), *module.buffers())):
            raise RuntimeError(
                f"engine='compile' cannot take a model that has one module under two names, {names[module]} and "
                f"{name}: use engine='eager'"
            )
        names.setdefault(module, name)


def _compile(
    backend: str, power: int, stepped: bool, penalised: bool, norms: TrainingNorms, device: torch.device, scale: float
) -> Compiled:
    """Return the compiled region, a code object of its own: torch keeps its compilations by code object."""
    if backend == "inductor" and device.type == "cpu" and not has_compiler():
        raise RuntimeError(
            "engine='compile' needs a C++ compiler on the CPU, and none was found: install g++, or set CXX"
        )
    from fastcure.engines._compile_rewrite import Rewrite

    def region(
        model: nn.Module,
        model_state: dict[str, Tensor],
        loss_fn: LossFn,
        loss_state: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        h: Tensor,
        z: Tensor | None,
    ) -> Any:
        def summed(point: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor]]]:
            logits = find_logits(functional_call(model, model_state, (point,)))
            if isinstance(loss_fn, nn.Module):
                loss = functional_call(loss_fn, loss_state, (logits, y))
            else:
                loss = loss_fn(logits, y)
            return (loss.sum() if scale == 1 else loss.sum() * scale), (logits, loss, norms.taken())

        if not (penalised or stepped):
            _, (logits, loss, moved) = summed(x)
            return logits.detach(), loss, torch.zeros_like(loss), z, moved
        g, (logits, loss, moved) = torch.func.grad(summed, has_aux=True)(x)
        direction = unit_sign(g.detach()) if z is None else z
        step = x + h * direction
        if not penalised:
            _, (_, loss, _) = summed(step)
            return logits.detach(), loss, torch.zeros_like(loss), direction, moved
        g_step, (_, loss_step, _) = torch.func.grad(summed, has_aux=True)(step)
        d = g_step - g if scale == 1 else (g_step - g) / scale
        squared = (d if d.dtype == torch.float64 else d.float()).square().flatten(1).sum(1)
        loss = loss_step if stepped else loss
        return logits.detach(), loss, root(squared) if power == 1 else squared, direction, moved

    code = region.__code__
    region.__code__ = code.replace(co_name=f"region_{id(region)}")
    program = torch.compile(region, backend=backend, dynamic=False, fullgraph=True)

    def run(*arguments: Any) -> Outputs:
        norms.taken()  # of a pass that failed
        with compiling(Rewrite()), PLAIN_ATTENTION, missing_derivatives(Compile.instead):
            try:
                return Outputs(*program(*arguments))
            except graph_break_errors() as error:
                said = str(error).split("Hint:")[0].split("Developer debug context:")[0]
                raise RuntimeError(
                    f"engine='compile' needs a model that torch.compile takes whole, and it does not take this one "
                    f"({' '.join(said.split())[:500]}): use engine='eager'"
                ) from error

    return run
