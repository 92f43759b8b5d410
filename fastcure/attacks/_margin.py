"""The margin by which a network errs: a loss that does not saturate (Carlini and Wagner, S&P 2017)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcure._validation import check_classes, check_labels
from fastcure.attacks._arguments import hard_labels


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the largest wrong logit minus the right one: > 0 where a sample is misclassified.

    Unlike cross-entropy it keeps its gradient where a network is very sure; pass it as the `loss_fn` of an attack.

    Args:
        logits: `(B, C)`, C >= 2.
        y: class indices `(B,)`, or probabilities `(B, C)` whose largest is meant.

    Returns:
        `(B,)`, in the units of the logits.

    Raises:
        ValueError: if there is one class only, y is not one label a sample, or (on the CPU) a label is out of range.

    Examples:
        >>> import torch, fastcure
        >>> logits = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
        >>> fastcure.attacks.margin_loss(logits, torch.tensor([0, 0]))
        tensor([-2.,  2.])
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape (B, C) with C >= 2, got {tuple(logits.shape)}")
    check_labels(y, len(logits))
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        check_classes(y, logits)
    right = hard_labels(y)[:, None]
    wrong = logits.scatter(1, right, -torch.inf).amax(1)
    return wrong - logits.gather(1, right)[:, 0]
