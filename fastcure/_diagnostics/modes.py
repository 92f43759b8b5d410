"""What the modes of a model's modules leave undone in silence: said once per model, by a warning.

The passes of the penalty run in evaluation mode. So dropout and its like do nothing there; and `batch_stats="train"`
or "split" is "frozen" on a model that nobody has put in training mode.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastcure._diagnostics.warning import TORCH, warn
from fastcure._torch_compat import BatchNormBase, DropoutBase

STRENGTHS = ("p", "drop_prob", "drop_path", "drop_rate", "prob", "dropout", "dropout_p", "rate")
"""What modules of other libraries call the share that they drop."""
DROPOUTS = frozenset([F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout])
MODULES = os.path.join(TORCH, "nn", "modules") + os.sep

_idle_norms: WeakSet[nn.Module] = WeakSet()
_left_out: WeakSet[nn.Module] = WeakSet()


def warn_of_idle_norms(model: nn.Module, batch_stats: str) -> None:
    """Warn if `batch_stats` asks for batch norms in training mode, and of those that there are none is.

    Some of them may be frozen on purpose; but who freezes all means `batch_stats="frozen"`. Where gradients are off,
    as in validation, nothing is trained and nothing is said.
    """
    if batch_stats == "frozen" or model in _idle_norms or not torch.is_grad_enabled():
        return
    idle = 0
    for module in model.modules():
        if isinstance(module, BatchNormBase) and module.running_mean is not None:
            if module.training:
                return
            idle += 1
    if idle:
        _idle_norms.add(model)
        warn(
            f"batch_stats={batch_stats!r} leaves batch norms as their flags say, and all {idle} of this model are in "
            "evaluation mode, which is batch_stats='frozen': call model.train() before each epoch, or ask for 'frozen'"
        )


@contextlib.contextmanager
def regularisation_left_out(
    model: nn.Module, loss_fn: object, engine: str, batch_stats: str, instead: str = "split"
) -> Iterator[None]:
    """Around the passes of the penalty, whose loss comes from them: warn of the regularisation that these leave out.

    The warning names the `batch_stats` to choose `instead`.

    Modules are named if they are in training mode and drop something, and functional calls of dropout if the model is
    in training mode: those of the first batch that it sees in that mode, unless a compiler runs it.
    """
    if batch_stats == "split" or not model.training or model in _left_out or not torch.is_grad_enabled():
        yield
        return
    _left_out.add(model)
    roots = [root for root in (model, loss_fn) if isinstance(root, nn.Module)]
    modules = (named for root in roots for named in root.named_modules())
    found = [f"{name} ({type(m).__name__}, {share:g})" for name, m in modules if m.training and (share := dropped(m))]
    if engine == "compile":
        yield
    else:
        with _Calls() as calls:
            yield
        found += dict.fromkeys(calls.found)  # there are several passes
    if found:
        some = ", ".join(found[:4]) + f" and {len(found) - 4} more" * (len(found) > 4)
        warn(
            f"loss and penalty are computed in evaluation mode, which leaves out {some}: the model is trained without "
            f"it; batch_stats={instead!r} has it in the loss. Where that is meant, set it to 0 or to evaluation mode"
        )


def dropped(module: nn.Module) -> float:
    """Return the share that a module drops in training mode, 0 for a module of another kind.

    Dropout, stochastic depth and their like are known by their class: torch's own, and of other libraries those that
    have such a name (`DropPath`, `StochasticDepth`, `PatchDropout`, `DropBlock2d`) and a number in one of `STRENGTHS`.
    """
    if isinstance(module, DropoutBase):
        return module.p
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout
    if isinstance(module, nn.RNNBase):
        return module.dropout if module.num_layers > 1 else 0.0
    if isinstance(module, nn.RReLU):
        return module.upper - module.lower
    if not re.search("drop|stochastic|shake", type(module).__name__, re.IGNORECASE):
        return 0.0
    values = (vars(module).get(name) for name in STRENGTHS)
    return next((float(value) for value in values if isinstance(value, (int, float)) and 0 < value <= 1), 0.0)


class _Calls(TorchFunctionMode):
    """Notes functional dropout that is switched off, and where it is called; that of torch's modules is known."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        off = func in DROPOUTS and not kwargs.get("training", True) and kwargs.get("p", 0.5) > 0
        if off and (place := _place()):
            self.found.append(f"F.{func.__name__} at {place} ({kwargs.get('p', 0.5):g})")
        return func(*args, **kwargs)


def _place() -> str | None:
    """Return file and line of the code outside of torch that called a function; None if it was a module of torch's."""
    frame = sys._getframe(2)
    while frame.f_back and (file := frame.f_code.co_filename).startswith(TORCH):
        if file.startswith(MODULES):
            return None
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
