"""`fastcure analyze`: how curved the loss of a network is around its images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcure._environment import pick_device
from fastcure._inference_mode import outside_inference_mode
from fastcure.analysis import curvature_along_gradient, curvature_profile, frobenius_norm
from fastcure.data import limited, sampled
from fastcure.evaluation.network import load_images, load_network
from fastcure.evaluation.results import conclude
from fastcure.evaluation.settings import AnalysisSettings
from fastcure.training.ranks import Ranks, join, own_device

Results = dict[str, Any]


@outside_inference_mode
def analyze(settings: AnalysisSettings, say: Callable[[str], object] = print) -> Results:
    """Measure what `settings` describe; write it to `settings.out`, if given.

    Under torchrun the processes share the images, with the same result, and the first of them writes and prints.

    Returns:
        `networks`: for each of them means over the images, with their standard errors, of `frobenius` ||H||_F, of
        `along_z` ||H z|| and of `finite_along_z` with a step of length h, and the mean `smallest` and `largest`
        eigenvalues; and `settings`, `images` (how many) of `test_set` (how many), `environment`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: if a setting, the data or the model is not as it must be.
        FloatingPointError: if a curvature is not finite.
        MemoryError: if memory runs out.
    """
    with join(pick_device(own_device(settings.device))) as ranks:
        return _analyze(settings, ranks.voice(say), ranks)


def _analyze(settings: AnalysisSettings, say: Callable[[str], object], ranks: Ranks) -> Results:
    assert settings.model is not None
    whole = load_images(settings)
    data = limited(whole, settings.limit, settings.seed)
    x, y = data.x_test.float() / 255, data.y_test
    weights: dict[str, str | None] = {"after fine-tuning" if settings.run else settings.model: settings.checkpoint}
    if settings.surrogate is not None:
        weights = {"before fine-tuning" if settings.run else "surrogate": settings.surrogate, **weights}
    say(f"{data.name}: {sampled(data, whole)}, on {ranks}")
    titles = {
        "frobenius": "||H||_F",
        "along_z": "||H z||",
        "finite_along_z": f"||H z||, finite step {settings.h:g}",
        "smallest": "smallest eigenvalues",
        "largest": "largest eigenvalues",
    }
    networks = {}
    for name, checkpoint in weights.items():
        model = load_network(settings, data, checkpoint, ranks.device, say)
        work = partial(_curvatures, model, settings)
        rows = ranks.map(work, x, y, settings.seed, settings.batch_size)
        mean, error = rows.mean(0).tolist(), (rows.std(0) / len(rows) ** 0.5).tolist()
        k = (len(mean) - 3) // 2
        columns = zip(titles, mean[:3], error[:3], strict=False)
        networks[name] = {
            **{title: {"mean": mean, "standard_error": error} for title, mean, error in columns},
            "smallest": mean[3 : 3 + k],
            "largest": mean[3 + k :],
        }
        say(name)
        for title, values in networks[name].items():
            if isinstance(values, dict):
                shown = "{mean:10.4g} +- {standard_error:.2g}".format(**values)
            else:
                shown = "  ".join(f"{value:.3g}" for value in values)
            say(f"  {titles[title]:<28} {shown}")
    return conclude(settings, data, whole, ranks, {"networks": networks}, say)


def _curvatures(
    model: nn.Module, settings: AnalysisSettings, x: Tensor, y: Tensor, generator: torch.Generator
) -> Tensor:
    """||H||_F, ||H z||, its finite form, and the extreme eigenvalues of each image: `(B, 3 + 2k)`."""
    k = min(settings.extremes, x[0].numel() // 2)
    along = partial(curvature_along_gradient, model, x, y)
    columns = [
        frobenius_norm(model, x, y, probes=settings.probes, generator=generator).value,
        along().value,
        along(method="finite", h=settings.h).value,
    ]
    return torch.cat([torch.stack(columns, 1), curvature_profile(model, x, y, k=k).eigenvalues], 1)
