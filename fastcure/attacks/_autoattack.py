"""AutoAttack, the field's standard ensemble, through its authors' package (Croce and Hein, ICML 2020)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastcure._diagnostics.first_pass import look_before_attack
from fastcure._extras import extra
from fastcure._functional import FunctionalLoss, evaluation_mode, unwrap
from fastcure._inference_mode import outside_inference_mode
from fastcure._validation import check_batch, check_classes, check_labels, check_pixels, check_positive
from fastcure.attacks._arguments import Norm, check_counts, check_numbers, hard_labels, has_no_class


@outside_inference_mode
def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    *,
    attacks: tuple[str, ...] | None = None,
    batch_size: int = 256,
    eot: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run AutoAttack's standard ensemble: APGD-CE, targeted APGD-DLR, targeted FAB and Square, one after the other.

    Each attacks the samples that those before it left. The DLR loss compares with the third and fourth largest
    logits, so with 3 classes its untargeted form takes the place of the targeted one, and with 2 classes there is
    none: APGD-CE, FAB and Square run. With fewer than 10 classes all wrong ones are targets.

    A model that is random on purpose wants `eot=20`. The ensemble is then the authors' for such models: APGD-CE and
    untargeted APGD-DLR, each gradient the mean of `eot` passes.

    Args:
        model: the network, normalisation inside.
        x: `(B, C, H, W)` images in [0, 1]; the attack computes in float32.
        y: class indices `(B,)` or probabilities `(B, C)`.
        eps: radius in pixels (linf) or as an L2 length (l2).
        norm: "linf" or "l2".
        attacks: names of the package's attacks in place of the ensemble.
        batch_size: images at a time.
        eot: passes whose mean is a gradient of APGD, see `pgd`.
        generator: source of the seed, on any device; torch's default if None.

    Returns:
        `(B, C, H, W)` in the dtype of `x`: the image itself where no attack succeeded.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
        FloatingPointError: if an output was not a number.

    Warns:
        UserWarning: as `pgd` does.

    Examples:
        >>> import torch, fastcure
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
        >>> adversarial = fastcure.attacks.autoattack(model, x, y, eps=8 / 255, attacks=("apgd-ce",))
        >>> adversarial.shape
        torch.Size([5, 1, 4, 4])
    """
    package = extra("pyautoattack", "by autoattack")
    check_batch(x, y, None)
    check_labels(y, len(x))
    check_pixels(x, option=False)
    check_positive("eps", eps)
    check_counts(batch_size=batch_size, eot=eot)
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}")
    if x.dim() != 4:
        raise ValueError(f"x must be images (B, C, H, W), got shape {tuple(x.shape)}")
    if norm == "l2" and min(x.shape[2:]) < 5:
        size = " x ".join(map(str, x.shape[2:]))
        raise ValueError(f"AutoAttack's L2 norm needs images of at least 5 x 5 pixels, got {size}")
    if not len(x):
        return x.clone()
    model = unwrap(model)
    logits_of = _Logits(model, x.dtype)
    look_before_attack(logits_of.functional, x, random=eot > 1)
    with evaluation_mode(model):
        with torch.no_grad():
            logits = torch.cat([logits_of(part.float()) for part in x.detach().split(batch_size)])
        check_numbers(has_no_class(logits))
        check_classes(y, logits)
        classes = logits.shape[1]
        if classes < 2:
            raise ValueError(f"the model must have 2 outputs or more, got {classes}")
        if attacks is None:
            dlr = () if classes == 2 else ("apgd-dlr",) if classes == 3 or eot > 1 else ("apgd-t",)
            attacks = ("apgd-ce", *dlr, *(() if eot > 1 else ("fab-t", "square")))
        source = generator.device if generator is not None else None
        seed = int(torch.randint(2**31, (), generator=generator, device=source))
        with _undisturbed(x.device):
            run = package.AutoAttack(
                logits_of,
                attacks=list(attacks),
                device=x.device,
                eps=float(eps),
                norm={"linf": "Linf", "l2": "L2"}[norm],
                seed=seed,
                version="custom",
            )
            run.apgd.n_restarts = run.fab.n_restarts = 1  # as the package's standard version has it
            run.apgd.eot_iter = run.apgd_targeted.eot_iter = eot
            run.apgd_targeted.n_target_classes = run.fab.n_target_classes = min(9, classes - 1)
            images = x.detach().float().contiguous()  # the package views gradients, which have their layout
            x_adv, _ = run.run_standard_evaluation(images, hard_labels(y), batch_size=batch_size)
    return torch.where(x_adv == x.float(), x.detach(), x_adv.to(x.dtype))


class _Logits(nn.Module):
    """`x -> logits` in float32, without side effects, of a model that may compute in another dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.functional, self.dtype = FunctionalLoss(model, trainable=False), dtype

    def forward(self, x: Tensor) -> Tensor:
        logits, _ = self.functional(x.to(self.dtype), torch.zeros(len(x), dtype=torch.int64, device=x.device))
        return logits.float().clone()  # the package writes into them


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Give back torch's random state, which the package seeds, and the trace function, which it unsets."""
    trace: Any = sys.gettrace()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        sys.settrace(trace)
