"""`fastcure analyze`: how curved the loss of a network is around its images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcure.analysis import curvature_along_gradient, curvature_profile, frobenius_norm
from fastcure.data import load
from fastcure.evaluation.settings import run_defaults
from fastcure.outside import load_model
from fastcure.training.finetune import environment, limited, pick_device
from fastcure.training.settings import setting

Results = dict[str, Any]


@dataclass(frozen=True)
class AnalysisSettings:
    """What is analysed, and how."""

    run: str | None = setting(None, "Folder of a finetune run: its model, weights before and after, dataset and h.")
    model: str | None = setting(None, "As in `fastcure.models.build`, or package.module:function to call.")
    checkpoint: str | None = setting(None, "Weights, .safetensors or .pt; the run's after CURE.")
    mean: tuple[float, ...] | None = setting(None, "0.5,0.5,0.5: of each channel, if the model does not normalise.")
    std: tuple[float, ...] | None = setting(None, "Likewise.")
    dataset: str | None = setting(None, "As in `fastcure.data.load`.")
    data_dir: str = setting("data", "Folder of the dataset's files.")
    twin: str | None = setting(None, "Other weights of the same model, to compare; the run's before CURE.")
    h: float = setting(1.25, "L2 length of the finite step, in pixels in [0, 1].")
    limit: int = setting(100, "Use the first N test images only.")
    probes: int = setting(100, "Gaussian probes of the Frobenius norm.")
    extremes: int = setting(5, "Eigenvalues at each end of the spectrum.")
    device: str = setting("auto", "'auto' takes a GPU where there is one.")
    seed: int = setting(0, "Of the probes.")
    out: str | None = setting(None, "File for the results as JSON; must not exist.")

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        if self.model is None or self.dataset is None:
            raise ValueError("what to analyse is missing: give --run, or --model and --dataset")
        for name in ("limit", "probes", "extremes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.h > 0:
            raise ValueError(f"h must be > 0, got {self.h}")
        if self.out is not None and Path(self.out).exists():
            raise ValueError(f"out must be a new file, got {self.out}, which exists: choose another")


def make_analysis_settings(explicit: dict[str, Any]) -> AnalysisSettings:
    """Combine what the user set with what the run says, if there is one: what is explicit wins."""
    found = run_defaults(Path(explicit["run"])) if "run" in explicit else {}
    found.pop("eps", None)
    return AnalysisSettings(**{**found, **explicit})


def analyze(settings: AnalysisSettings, say: Callable[[str], object] = print) -> Results:
    """Measure what `settings` describe; write it to `settings.out`, if given.

    Returns:
        `networks`: for each of them means over the images, with their standard errors, of `frobenius` ||H||_F, of
        `along_z` ||H z|| and of `finite_along_z` with a step of length h, and the mean `smallest` and `largest`
        eigenvalues; and `settings`, `images`, `environment`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: if a setting, the data or the model is not as it must be.
        FloatingPointError: if a curvature is not finite.
    """
    assert settings.model is not None
    assert settings.dataset is not None
    device = pick_device(settings.device)
    data = limited(load(settings.dataset, settings.data_dir), settings.limit)
    x, y = (data.x_test.float() / 255).to(device), data.y_test.to(device)
    make = partial(load_model, settings.model, classes=data.classes, channels=x.shape[1])
    weights: dict[str, str | None] = {"after CURE" if settings.run else settings.model: settings.checkpoint}
    if settings.twin is not None:
        weights = {"before CURE" if settings.run else "twin": settings.twin, **weights}
    say(f"{data.name}: {len(x):,} test images, on {device}")
    networks = {}
    for name, checkpoint in weights.items():
        model = make(checkpoint, settings.mean, settings.std).to(device)
        generator = torch.Generator().manual_seed(settings.seed)
        k = min(settings.extremes, x[0].numel() // 2)
        eigenvalues = curvature_profile(model, x, y, k=k).mean.tolist()
        columns: dict[str, Tensor] = {
            "frobenius": frobenius_norm(model, x, y, probes=settings.probes, generator=generator).value,
            "along_z": curvature_along_gradient(model, x, y).value,
            "finite_along_z": curvature_along_gradient(model, x, y, method="finite", h=settings.h).value,
        }
        networks[name] = {
            title: {"mean": float(values.mean()), "standard_error": float(values.std() / len(values) ** 0.5)}
            for title, values in columns.items()
        } | {"smallest": eigenvalues[:k], "largest": eigenvalues[k:]}
        say(name)
        titles = ("||H||_F", "||H z||", f"||H z||, finite step {settings.h:g}")
        for title, values in zip(titles, columns.values(), strict=True):
            say(f"  {title:<28} {values.mean():10.4g} +- {values.std() / len(values) ** 0.5:.2g}")
        say(f"  {'smallest eigenvalues':<28} " + "  ".join(f"{value:.3g}" for value in eigenvalues[:k]))
        say(f"  {'largest eigenvalues':<28} " + "  ".join(f"{value:.3g}" for value in eigenvalues[k:]))
    about = {"settings": asdict(settings), "images": len(x), "environment": environment(device)}
    results: Results = {**about, "networks": networks}
    if settings.out is not None:
        with open(settings.out, "x") as file:
            file.write(json.dumps(results, indent=2) + "\n")
        say(f"results in {settings.out}")
    return results
