"""The engine "auto": eager, and on a GPU, where the host is what a step waits for, captured steps that were compared.

A step is captured when it comes for the third time, all that `fastcure._recorder.key_of` sees being equal. Where a
captured step cannot be had, or is not the eager one, the model goes on eagerly.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcure._diagnostics.first_batch import random_states
from fastcure._functional import clones, copy_into
from fastcure._recorder import CudaRecorder, Recorder
from fastcure._torch_compat import TorchDispatchMode, has_hooks, somebody_listens, tree_leaves
from fastcure.engines.base import Evaluation, Request
from fastcure.engines.cuda_graph import Captured, CudaGraph, eagerly, kind_of

logger = logging.getLogger("fastcure")

EAGER_STEPS = 2
"""Steps of a kind before one is captured."""
COMPARED_EVERY = 1000
KINDS = 32
"""Kinds of steps that are counted for a model."""


class Auto(CudaGraph):
    """The eager engine; on a GPU, steps that repeat are replayed.

    A step whose predecessor still waits for its backward runs eagerly, as all do where somebody could notice the
    difference: with hooks on modules, modes of torch, several processes, or while a graph is being captured.

    Args:
        recorder: makes what records graphs.
        device: type of device that it records.
    """

    def __init__(self, recorder: Callable[[], Recorder] = CudaRecorder, device: str = "cuda") -> None:
        super().__init__(recorder, None)
        self.replays_on = device
        self._trials: WeakKeyDictionary[nn.Module, _Trial] = WeakKeyDictionary()

    def captured(self, request: Request) -> Captured | None:
        """Return what was captured of such a request; capture it when it comes for the third time."""
        if request.x.device.type != self.replays_on or is_observed(request):
            return None
        trial = self._trials.setdefault(request.model, _Trial())
        if trial.given_up:
            return None
        key = kind_of(request)
        captured = self.captures.get(request.model, key)
        if captured is None:
            if not trial.comes_again(key) or any(map(has_hooks, _modules(request))):  # hooks are in the key
                return None
            return self._try(request, key, trial)
        if captured.replays % COMPARED_EVERY == 0 and not captured.memory.is_held:
            self._compare(captured, request, trial)
        return None if trial.given_up else captured

    def _try(self, request: Request, key: Hashable, trial: _Trial) -> Captured | None:
        """Capture a request, if that gives what an eager step gives."""
        try:
            if reason := obstacle(request, key):
                self._give_up(request, trial, reason)
                return None
            captured = self.capture(request, key)
        except Exception as error:
            self._give_up(request, trial, _told(error))
            return None
        self._compare(captured, request, trial)
        if trial.given_up:
            return None
        if not trial.said:
            trial.said = True
            name = type(request.model).__name__
            logger.warning("fastcure: steps of %s are replayed as CUDA graphs from now on", name)
        return captured

    def _compare(self, captured: Captured, request: Request, trial: _Trial) -> None:
        """Give captures up if a replay is not the eager step."""
        try:
            reason = difference(captured, request)
        except Exception as error:
            reason = _told(error)
        if reason:
            self._give_up(request, trial, reason)

    def _give_up(self, request: Request, trial: _Trial, reason: str) -> None:
        trial.given_up = True
        self.captures.forget(request.model)
        if request.x.is_cuda:
            torch.cuda.empty_cache()
        name = type(request.model).__name__
        logger.warning(
            "fastcure: steps of %s run eagerly, since they cannot be replayed as a CUDA graph (%s); engine='eager' "
            "does not try it",
            *(name, reason),
        )


@dataclass
class _Trial:
    """What is known of a model."""

    seen: dict[Hashable, int] = field(default_factory=dict)
    """How often each kind of step came."""
    given_up: bool = False
    said: bool = False

    def comes_again(self, key: Hashable) -> bool:
        """Count a step, and tell whether enough of its kind ran eagerly."""
        count = self.seen.pop(key, 0)
        while len(self.seen) >= KINDS:
            del self.seen[next(iter(self.seen))]
        self.seen[key] = count + 1
        return count >= EAGER_STEPS


def is_observed(request: Request) -> bool:
    """Tell whether a replay would pass somebody by who sees what an eager step runs, hooks of modules apart."""
    if somebody_listens() or (request.x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return True
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _modules(request: Request) -> Iterator[nn.Module]:
    for root in (request.model, request.loss_fn):
        if isinstance(root, nn.Module):
            yield from root.modules()


def obstacle(request: Request, key: Hashable) -> str:
    """Run a step eagerly; return what in it a capture would not repeat, or nothing.

    Args:
        request: the step.
        key: of its kind, before.
    """
    python, before = random.getstate(), random_states(request.x)
    with _Inspection(request.x.device) as inspection:
        made = eagerly(replace(request))
        ones = torch.ones_like(made.loss)
        made.state.engine.backward(made.state.state, ones if request.with_loss else None, ones, retain=False)
    if inspection.found:
        return inspection.found
    after = random_states(request.x)
    if python != random.getstate() or not all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        return "it draws random numbers"
    if kind_of(replace(request, known={})) != key:
        return "its forward changes attributes of the model"
    return ""


class _Inspection(TorchDispatchMode):
    """Notes an operator for which the host waits, or whose tensors are not all on the device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.found = device, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.found:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            elsewhere = [t.device for t in tensors if t.device.type != self.device.type and t.dim()]
            masked = any(t.dtype in (torch.bool, torch.uint8) for t in tensors)  # or else an index is of numbers
            sized = torch.Tag.dynamic_output_shape in func.tags and (masked or "index" not in str(func))
            if elsewhere:
                self.found = f"{func} has a tensor on {elsewhere[0]}"
            elif self.device.type != "cpu" and (sized or torch.Tag.data_dependent_output in func.tags):
                self.found = f"{func} waits for the device"
        return out


def difference(captured: Captured, request: Request) -> str:
    """Return how a replay differs from the eager step, if it does by more than rounding.

    The eager step is given the replay's direction: of a gradient near 0, rounding decides the sign.
    """
    kept = clones(captured.statistics)
    ours = captured.forward(request)
    statistics = clones(captured.statistics)
    copy_into(kept, captured.statistics)
    given = replace(request)
    if ours.step is not None and request.direction is None:
        given = replace(request, direction=ours.step - request.x, h=1.0)
    theirs = eagerly(given)
    given.move_buffers()
    pairs = {
        "logits": ([ours.logits], [theirs.logits]),
        "losses": ([ours.loss], [theirs.loss]),
        "penalties": ([ours.penalty], [theirs.penalty]),
        "running statistics": (statistics, clones(captured.statistics)),
    }
    copy_into(kept, captured.statistics)
    ones = torch.ones_like(ours.loss)
    for what, pair in (("gradients of the penalty", (None, ones)), ("gradients of the loss", (ones, None))):
        if not (request.penalised if pair[0] is None else request.with_loss):
            continue
        replayed = captured.backward(ours.state, *pair, retain=True)
        pairs[what] = (
            _by_parameter(ours, replayed),
            _by_parameter(theirs, theirs.state.engine.backward(theirs.state.state, *pair, retain=True), ours),
        )
    captured.memory.release()
    limit = 4 * resolution(request.x) ** 0.5
    for what, (a, b) in pairs.items():
        error, norm = _norm(s.double() - t.double() for s, t in zip(a, b, strict=True)), _norm(b)
        if norm < torch.inf and not error <= limit * norm:
            return f"its {what} differ by {error / norm if norm else error:.2g}"
    return ""


def _by_parameter(
    step: Evaluation, gradients: tuple[Tensor | None, ...], like: Evaluation | None = None
) -> list[Tensor]:
    """Return gradients in the order of the parameters of `like`, with zeros for None."""
    found = dict(zip(map(id, step.parameters), gradients, strict=True))
    order = (like or step).parameters
    wanted = [found.get(id(parameter)) for parameter in order]
    return [torch.zeros_like(p) if g is None else g for p, g in zip(order, wanted, strict=True)]


def _norm(tensors: Iterable[Tensor]) -> float:
    """Return the norm of all elements together."""
    norms = [tensor.double().norm() for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0


def resolution(x: Tensor) -> float:
    """Return the machine epsilon of the narrowest type in which a model computes on `x`."""
    device, cuda = x.device.type, torch.backends.cuda.matmul
    if torch.is_autocast_enabled(device):
        return float(torch.finfo(torch.get_autocast_dtype(device)).eps)
    narrow = {torch.backends.cudnn.conv.fp32_precision, cuda.fp32_precision}  # type: ignore[attr-defined]
    if x.dtype == torch.float32 and x.is_cuda and narrow - {"ieee", "none"}:
        return 2.0**-10
    return float(torch.finfo(x.dtype).eps)


def _told(error: BaseException) -> str:
    """Return one line of the error that came first."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
