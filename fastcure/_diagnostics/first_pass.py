"""What attacks and measures look for in a model's first pass: outputs that are probabilities, and randomness.

Both make a network look other than it is: cross-entropy and margins of probabilities have no gradient left where the
model is sure, and the noise of a random model hides its gradient and passes for curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastcure._diagnostics.first_batch import difference_of_passes, random_states, warn_of_range
from fastcure._diagnostics.warning import warn
from fastcure._functional import FunctionalLoss, LossFn

_attacked: WeakSet[nn.Module] = WeakSet()
_probabilities: WeakSet[nn.Module] = WeakSet()
_ranges: WeakSet[nn.Module] = WeakSet()


def look_before_attack(functional: FunctionalLoss, x: Tensor, *, logits: bool = True, random: bool = False) -> None:
    """Have the first pass of `functional` examined, once per model, so that the host waits for a GPU once.

    Args:
        functional: of the attack; its first call is examined.
        x: images of the attack.
        logits: whether the loss wants logits.
        random: whether the attack expects a random model.

    Warns:
        UserWarning: within that call, if the model returns probabilities, or is random in evaluation mode.
    """
    if functional.model in _attacked or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return

    def judge(output: Tensor, difference: float) -> None:
        if logits:
            warn_of_probabilities(functional.model, output)
        if random:
            return  # nor is it examined for good
        _attacked.add(functional.model)
        if difference > 1e-3:
            warn(
                f"the model is random in evaluation mode: logits differ by {difference:.1%} between two passes, so the "
                "attack follows noise, and the model looks more robust than it is; give F.dropout and the like "
                "training=self.training, or, if it is meant to be random, attack the mean of 20 passes: eot=20"
            )

    _examine(functional, x, judge)


def look_before_measure(functional: FunctionalLoss, x: Tensor, *, logits: bool = True, pixels: bool = True) -> None:
    """Have the first pass of `functional` examined, in every measurement.

    Args:
        functional: of the measure; its first call is examined.
        x: images of the measure.
        logits: whether the loss wants logits.
        pixels: whether to look at the range of x.

    Warns:
        UserWarning: once per model, of pixels outside of [0, 1], and within that call of probabilities.

    Raises:
        ValueError: within that call, if the model is random in evaluation mode.
    """
    if pixels and functional.model not in _ranges and warn_of_range(x):
        _ranges.add(functional.model)

    def judge(output: Tensor, difference: float) -> None:
        if logits:
            warn_of_probabilities(functional.model, output)
        if difference > max(1e-5, torch.finfo(output.dtype).eps):
            raise ValueError(
                f"the model is random in evaluation mode: logits differ by {difference:.1e} of their size between two "
                "passes, which a measure would take for curvature or a boundary; give F.dropout and the like "
                "training=self.training, or use nn.Dropout"
            )

    _examine(functional, x, judge)


def warn_of_probabilities(model: nn.Module, logits: Tensor) -> None:
    """Warn, once per model, of outputs `(B, C)` that are no logits but probabilities. It waits for a GPU."""
    if model in _probabilities or not looks_like_probabilities(logits):
        return
    _probabilities.add(model)
    warn(
        "the model must return logits, got what look like probabilities (none below 0, each row sums to 1): where it "
        "is sure they have no gradient left, so that attacks fail and distances and bounds are wrong; leave out the "
        "last softmax"
    )


def looks_like_probabilities(logits: Tensor) -> bool:
    """Whether all are >= 0 and each row of `(B, C)` sums to 1."""
    if logits.dim() != 2 or logits.shape[1] < 2 or not len(logits):
        return False
    values = logits.detach()
    slack = max(1e-4, 4 * torch.finfo(values.dtype).eps)
    near = (values.double().sum(1) - 1).abs() <= slack  # False for NaN
    return bool((near & (values >= 0).all(1)).all())


def takes_logits(loss_fn: LossFn) -> bool:
    """Whether `loss_fn` is one of ours or torch's cross-entropy, which want logits."""
    return isinstance(loss_fn, nn.CrossEntropyLoss) or getattr(loss_fn, "__module__", "").startswith("fastcure.")


def _examine(functional: FunctionalLoss, x: Tensor, judge: Callable[[Tensor, float], None]) -> None:
    """Have `judge` called with the logits of the first pass, and by how much those of other passes differ."""
    states: list[Tensor] = []

    def before(*_: Any) -> None:
        states[:] = random_states(x)

    def after(_: nn.Module, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        for handle in handles:
            handle.remove()
        drawn = not all(map(torch.equal, states, random_states(x)))
        judge(output[0].detach(), difference_of_passes(functional, *inputs) if drawn else 0.0)

    module = functional.module
    handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after))
