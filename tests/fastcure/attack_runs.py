"""Every attack, and all that use attacks, on a small linear network."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastcure.analysis import accuracy_curve, loss_surface
from fastcure.attacks import autoattack, deepfool, fgsm, margin_loss, pgd, spsa
from fastcure.evaluation.accuracy import accuracy, correct
from fastcure.evaluation.checklist import masking_checklist

Run = Callable[..., object]


def found_by_deepfool(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> Tensor:
    return deepfool(model, x, y, **options).x_adv  # type: ignore[arg-type]


ATTACKS: dict[str, Run] = {
    "fgsm": fgsm,
    "pgd": partial(pgd, steps=2),
    "pgd-l2": partial(pgd, eps=0.5, steps=2, norm="l2"),
    "restarts": partial(pgd, steps=2, restarts=2),
    "margin": partial(pgd, steps=2, loss_fn=margin_loss),
    "spsa": partial(spsa, steps=2, samples=4),
    "deepfool": found_by_deepfool,
    "autoattack": partial(autoattack, attacks=("apgd-ce",)),
}
USERS: dict[str, Run] = {
    "curve": partial(accuracy_curve, eps=[0.0, 0.1], steps=2),
    "curve of one radius": partial(accuracy_curve, eps=[0.1], steps=2),
    "checklist": partial(masking_checklist, eps=0.1, steps=2, samples=2),
    "surface": partial(loss_surface, points=3),
}
ACCURACIES: dict[str, Run] = {"accuracy": accuracy, "correct": correct}


def each(*groups: dict[str, Run]) -> pytest.MarkDecorator:
    runs = {name: run for group in groups for name, run in group.items()}
    return pytest.mark.parametrize("run", runs.values(), ids=runs)


def case(dtype: torch.dtype = torch.float32, *last: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network, three classes, and twelve images, all classified rightly."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), *last)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(3, 36, generator=generator))
        model[1].bias.copy_(-model[1].weight.sum(1) / 2)  # the boundaries meet in the middle of the box
    x = torch.rand(12, 1, 6, 6, generator=generator)
    y = model(x).argmax(1)
    return model.to(dtype), x.to(dtype), y
