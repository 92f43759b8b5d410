"""When work is replayed without being asked for: as it repeats, after a comparison with eager work, and else never.

What cannot be captured, or what a replay gets wrong, runs eagerly for good, and a line of the log says why.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcure._cuda_graphs import Capture, Captures
from fastcure._diagnostics.first_batch import random_states
from fastcure._torch_compat import TorchDispatchMode, has_hooks, somebody_listens, tree_leaves

logger = logging.getLogger("fastcure")

EAGER_RUNS = 2
"""Of a kind of work, before it is captured."""
COMPARED_EVERY = 1000
KINDS = 32
"""Kinds of work that are counted for a model."""


@dataclass
class _Trial:
    """What is known of a model."""

    seen: dict[Hashable, int] = field(default_factory=dict)
    """How often each kind of work came."""
    given_up: bool = False
    said: bool = False


class Trials:
    """What became of the attempts to replay the work of each model.

    Args:
        captures: where they are kept.
        what: the work, in the plural.
    """

    def __init__(self, captures: Captures[Any], what: str) -> None:
        self.captures, self.what = captures, what
        self._trials: WeakKeyDictionary[nn.Module, _Trial] = WeakKeyDictionary()

    def may_replay(self, model: nn.Module, x: Tensor) -> bool:
        """Tell whether a replay would be right, and pass nobody by who sees what runs, hooks of modules apart."""
        if self._trials.setdefault(model, _Trial()).given_up or somebody_listens():
            return False
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)

    def comes_again(self, model: nn.Module, key: Hashable, *roots: object) -> bool:
        """Count a piece of work, and tell whether to capture its kind now: never one with hooks, which are in its key.

        Args:
            model: whose work it is.
            key: of its kind.
            roots: modules that it runs.
        """
        seen = self._trials[model].seen
        count = seen.pop(key, 0)
        while len(seen) >= KINDS:
            del seen[next(iter(seen))]
        seen[key] = count + 1
        modules = (module for root in roots if isinstance(root, nn.Module) for module in root.modules())
        return count >= EAGER_RUNS and not any(map(has_hooks, modules))

    def attempt(
        self, model: nn.Module, make: Callable[[], Capture | str], compare: Callable[[Capture], str]
    ) -> Capture | None:
        """Return what `make` captures, if `compare` finds no difference; both return the reason against it."""
        try:
            captured = make()
            reason = captured if isinstance(captured, str) else compare(captured)
        except Exception as error:
            reason = _told(error)
        trial = self._trials[model]
        if not reason:
            assert not isinstance(captured, str)
            if not trial.said:
                trial.said = True
                name = type(model).__name__
                logger.warning("fastcure: %s of %s are replayed as CUDA graphs from now on", self.what, name)
            return captured
        trial.given_up = True
        self.captures.forget(model)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        logger.warning(
            "fastcure: %s of %s run eagerly, since they cannot be replayed as a CUDA graph (%s)",
            *(self.what, type(model).__name__, reason),
        )
        return None


def obstacle(x: Tensor, work: Callable[[], object], key: Callable[[], Hashable]) -> str:
    """Run `work` on `x`; return what in it a capture would not repeat, or nothing.

    Args:
        x: what it works on.
        work: runs it eagerly.
        key: reads the key of its kind.
    """
    kind, python, before = key(), random.getstate(), random_states(x)
    with _Inspection(x.device) as inspection:
        work()
    if inspection.found:
        return inspection.found
    after = random_states(x)
    if python != random.getstate() or not all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        return "it draws random numbers"
    return "" if key() == kind else "its forward changes attributes of the model"


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


def differs(ours: list[Tensor], theirs: list[Tensor], x: Tensor, norm: float | None = None) -> str:
    """Return by how much of their norm `ours` differ from `theirs`, if that is more than rounding.

    Args:
        ours, theirs: tensors of the same shapes; theirs with a value that is not finite tell nothing.
        x: what they were computed from.
        norm: that of `theirs`, if it is not theirs that count.
    """
    error = norm_of(s.double() - t.double() for s, t in zip(ours, theirs, strict=True))
    norm = norm_of(theirs) if norm is None else norm
    if not norm < torch.inf or error <= 4 * resolution(x) ** 0.5 * norm:
        return ""
    return f"{error / norm if norm else error:.2g}"


def norm_of(tensors: Iterable[Tensor]) -> float:
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
