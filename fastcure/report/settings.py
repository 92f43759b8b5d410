"""The settings of a report: its networks, of finished runs or any other, and what is measured of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from fastcure.data.folder import TEST_FRACTION
from fastcure.evaluation.settings import AUTOATTACK_IMAGES, EPS_L2, Measurement, check_step
from fastcure.models import MODELS
from fastcure.training.settings import Settings, check_radii, read_settings, setting

FIGURES = ("figure1_profile", "figure2_surface", "figure3_evolution", "figure4_accuracy", "theorem1_bounds")
NAMES = {
    *(f"{name}.{kind}" for name in FIGURES for kind in ("csv", "png")),
    *("table1.csv", "norms.csv", "checklist.csv", "settings.json", "index.html"),
}
"""Files of a report."""

FILES_OF_A_RUN = ("config.json", "metrics.json", "original.safetensors", "model.safetensors")


@dataclass(frozen=True)
class ReportSettings(Measurement):
    """What is reported, and where."""

    runs: tuple[str, ...] = setting((), "Folders of finished runs.")
    limit: int | None = setting(2000, "Use N test images only, stratified by class.")
    eps: tuple[float, ...] = setting(
        (2 / 255, 4 / 255, 8 / 255, 12 / 255), "L-infinity radii, in pixels in [0, 1]; those of the first run."
    )
    eps_l2: tuple[float, ...] = setting((0.25, 0.5, 1.0), EPS_L2)
    h: float | None = setting(None, "L2 length of figure 1's finite step; that of the first run at its end, or 1.25.")
    autoattack_images: int = setting(100, AUTOATTACK_IMAGES)
    out: str | None = setting(None, "Folder of the report, new or empty (report, in the folder of the first run).")

    least: ClassVar[dict[str, int]] = {**Measurement.least, "autoattack_images": 0}
    wanted: ClassVar[str] = "folders of finished runs, or --model and --dataset"

    @classmethod
    def of(cls, explicit: dict[str, Any]) -> Self:
        """Combine what the user set with what the first run says, if there is one: what is explicit wins.

        Raises:
            FileNotFoundError: if a run is not whole.
            ValueError: if its settings cannot be read, a value does not fit, or the runs do not belong together.
        """
        runs = explicit.get("runs", ())
        configs = read_runs(runs)
        if runs and "checkpoint" in explicit:
            raise ValueError("checkpoint is of a network that is no run's: leave it out, or the folders of runs")
        found = super().of({**explicit, "run": runs[0]} if runs else explicit)
        if not runs or found.val_fraction is None or "val_fraction" in explicit:
            return found
        # A smaller share is part of a larger one: no run has trained on an image of the smallest.
        return replace(found, val_fraction=min(config.val_fraction or TEST_FRACTION for config in configs))

    @property
    def folder(self) -> Path:
        """Where the report is written."""
        return Path(self.out or (Path(self.runs[0]) / "report" if self.runs else "report"))

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        super().__post_init__()
        check_radii(self.eps, self.eps_l2)
        if self.h is not None:
            check_step(self.h)

    def _check_out(self) -> None:
        """Check that a report can be written: what a killed one has left in the folder is no hindrance."""
        folder = self.folder
        held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        left = NAMES | {f".{name}.partial" for name in NAMES}
        if (os.path.lexists(folder) and not folder.is_dir()) or held - left or "index.html" in held:
            raise ValueError(
                f"out must be a new or an empty folder, got {folder}, which holds something: choose another"
            )
        place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        with tempfile.TemporaryFile(dir=place):  # says now, not after the measurement, that nothing may be
            pass


def read_runs(runs: Sequence[str]) -> list[Settings]:
    """Return the settings of each finished run.

    Raises:
        FileNotFoundError: if a run is not whole.
        ValueError: if its settings cannot be read, or the runs do not belong together.
    """
    configs = [_config(Path(run)) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        # A bundled network has its mean and std in its weights.
        numbers = () if config.model in MODELS else ("mean", "std")
        for key in ("dataset", "image_size", "model", "model_arg", *numbers):
            ours, theirs = getattr(configs[0], key), getattr(config, key)
            if ours != theirs:
                raise ValueError(f"runs must agree in {key}, got {ours} in {runs[0]} and {theirs} in {run}")
    return configs


def _config(run: Path) -> Settings:
    """Read the settings of a finished run."""
    for name in FILES_OF_A_RUN:
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is not a finished run of fastcure finetune: {run / name} does not exist")
    return read_settings(run / "config.json", resume=False)


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the names of the runs' folders, or all of their paths where two have one name."""
    names = [Path(run).resolve().name for run in runs]
    return names if len(set(names)) == len(names) else list(runs)
