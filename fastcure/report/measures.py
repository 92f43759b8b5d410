"""What the report measures of each network, as rows of numbers: one table a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcure.analysis import (
    LossSurface,
    accuracy_curve,
    curvature_along_gradient,
    curvature_profile,
    frobenius_norm,
    loss_surface,
    robustness_bounds,
)
from fastcure.attacks import deepfool, pgd
from fastcure.attacks._arguments import Norm
from fastcure.data import stratified
from fastcure.evaluation.accuracy import accuracy, correct
from fastcure.evaluation.checklist import Item, masking_checklist
from fastcure.evaluation.interval import wilson

Row = dict[str, Any]
Bar = Callable[[str, Iterable[Any]], Iterable[Any]]
"""Shows how far an iteration called so is."""

PROFILE_IMAGES, NORM_IMAGES, BOUND_IMAGES, CHECKED_IMAGES, PROBES = 24, 64, 64, 200, 100
FULL_SPECTRUM = 1024
"""Largest number of input values for which all eigenvalues are computed; above, the extremes."""


class Subject(NamedTuple):
    """A network of the report."""

    name: str
    model: nn.Module


class Images(NamedTuple):
    """Test images in [0, 1], on the device, and their labels."""

    x: Tensor
    y: Tensor

    def sample(self, count: int) -> Images:
        """Return a sample of `count`, stratified by class: always the same."""
        chosen = stratified(self.y, count, seed=0).to(self.y.device)
        return Images(self.x[chosen], self.y[chosen])


def accuracies(
    subjects: list[Subject], images: Images, radii: dict[Norm, list[float]], seed: int, bar: Bar
) -> list[Row]:
    """Accuracy under PGD-10 at each radius of each norm, 0 for clean accuracy, and its interval (table 1, figure 4)."""
    rows = []
    for name, model in subjects:
        for norm, lengths in radii.items():
            if not lengths:
                continue
            progress = partial(bar, f"PGD-10 ({norm}) on {name}")
            curve = accuracy_curve(model, *images, lengths, norm=norm, seed=seed, progress=progress)
            for eps, value in zip(lengths, curve.accuracy.tolist(), strict=True):
                low, high = wilson(value, len(images.x))
                row = {"model": name, "norm": norm, "eps": eps, "accuracy": value, "low": low, "high": high}
                rows.append({**row, "images": len(images.x)})
    return rows


def profiles(subjects: list[Subject], images: Images, h: float, bar: Bar) -> list[Row]:
    """Eigenvalues of the loss's input Hessian in ascending order, averaged over images (figure 1).

    Exact ones, and those of finite differences of length `h`, which see the kinks.
    """
    images = images.sample(PROFILE_IMAGES)
    k = None if images.x[0].numel() <= FULL_SPECTRUM else 10
    rows = []
    for name, model in subjects:
        for method, length in (("exact", None), ("finite", h)):
            progress = partial(bar, f"{method} eigenvalues of {name}")
            options: dict[str, Any] = {"method": method, "h": length, "k": k, "progress": progress}
            mean = curvature_profile(model, *images, **options).mean.tolist()
            about = {"model": name, "method": method, "h": length}
            rows += [{**about, "rank": i + 1, "eigenvalue": v} for i, v in enumerate(mean)]
    return rows


def norms(subjects: list[Subject], images: Images, seed: int, bar: Bar) -> list[Row]:
    """||H||_F by Gaussian probes and ||H z||, averaged over images, with standard errors over the images."""
    images = images.sample(NORM_IMAGES)
    rows = []
    for name, model in subjects:
        generator = torch.Generator().manual_seed(seed)
        progress = partial(bar, f"Frobenius norms of {name}")
        frobenius = frobenius_norm(model, *images, probes=PROBES, generator=generator, progress=progress).value
        along = curvature_along_gradient(model, *images).value
        row: Row = {"model": name}
        for title, values in (("frobenius", frobenius), ("along_z", along)):
            row |= {title: float(values.mean()), f"{title}_standard_error": float(values.std() / len(values) ** 0.5)}
        rows.append(row)
    return rows


def bounds(subjects: list[Subject], images: Images, bar: Bar) -> list[Row]:
    """Theorem 1's bounds for the margin beside the L2 perturbations that DeepFool and PGD find, image by image."""
    rows = []
    for name, model in subjects:
        right = correct(model, *images)
        x, y = Images(images.x[right], images.y[right]).sample(BOUND_IMAGES)
        if not len(x):
            continue
        theorem = robustness_bounds(model, x, y, kind="margin", progress=partial(bar, f"bounds of {name}"))
        columns = {
            "lower": theorem.lower,
            "upper": theorem.upper,
            "deepfool": deepfool(model, x, y, bounds=None).distance,
            "pgd": _least_radius(model, x, y, partial(bar, f"least L2 radius of {name}")),
        }
        rows += [
            {"model": name, "image": i, **{title: float(values[i]) for title, values in columns.items()}}
            for i in range(len(x))
        ]
    return rows


def _least_radius(model: nn.Module, x: Tensor, y: Tensor, progress: Callable[[Iterable[int]], Iterable[int]]) -> Tensor:
    """Bisect the L2 radius at which PGD-20 first succeeds `(B,)`; infinite where 8 is too little."""
    low, high = torch.zeros(len(x), device=x.device), torch.full((len(x),), 8.0, device=x.device)
    found = torch.full_like(high, torch.inf)
    for _ in progress(range(10)):
        eps = (low + high) / 2 if bool(found.isfinite().any()) else high
        adv = pgd(model, x, y, eps=eps, steps=20, norm="l2", random_start=False)
        wrong = ~correct(model, adv, y)
        length = (adv - x).flatten(1).norm(dim=1)
        found = torch.where(wrong, torch.minimum(found, length), found)
        high, low = torch.where(wrong, length, high), torch.where(wrong, low, eps)
    return found


def surfaces(subjects: list[Subject], images: Images, seed: int) -> list[tuple[str, LossSurface]]:
    """Minus the loss on the plane of the boundary's normal and a random direction, at one image (figure 2).

    The image is the first that every network classifies rightly.
    """
    right = torch.ones_like(images.y, dtype=torch.bool)
    for _, model in subjects:
        right &= correct(model, *images)
    if not right.any():
        return []
    i = int(right.nonzero()[0])
    x, y = images.x[i : i + 1], images.y[i : i + 1]
    planes = []
    for name, model in subjects:
        generator = torch.Generator().manual_seed(seed)
        planes.append((name, loss_surface(model, x, y, generator=generator)))
    return planes


def checklists(
    subjects: list[Subject],
    surrogate: nn.Module | None,
    images: Images,
    eps: float,
    autoattack_images: int,
    seed: int,
    bar: Bar,
) -> list[tuple[str, list[Item]]]:
    """The gradient-masking checklist of each network; `surrogate` is one from standard training."""
    images = images.sample(CHECKED_IMAGES)
    found = []
    for name, model in subjects:
        if float(accuracy(model, *images)) == 0:
            continue
        generator = torch.Generator().manual_seed(seed)
        progress: Any = partial(bar, f"checklist of {name}")
        options: dict[str, Any] = {"surrogate": surrogate, "generator": generator, "progress": progress}
        found.append((name, masking_checklist(model, *images, eps, autoattack_images=autoattack_images, **options)))
    return found
