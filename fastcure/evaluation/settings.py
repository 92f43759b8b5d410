"""The settings of a measurement: their defaults, what a run says of them, and their checks."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from fastcure._fields import OneOf, check_types, check_whole_numbers
from fastcure.attacks import ATTACKS, L2_ATTACKS
from fastcure.data import ADDRESSES, DATASETS
from fastcure.data.folder import TEST_FRACTION
from fastcure.models import MODELS
from fastcure.models.loading import FORMS
from fastcure.training.run_folder import read_json
from fastcure.training.settings import (
    IMAGE_SIZE,
    MAX_H,
    MEAN,
    MODEL_ARG,
    check_model,
    check_radii,
    read_settings,
    refuse_code,
    setting,
    without_code,
)

EPS_L2 = "L2 radii, in pixels in [0, 1], for the attacks that have this norm."
AUTOATTACK_IMAGES = "Images that the checklist runs AutoAttack on, where it is installed; 0 leaves it out."


@dataclass(frozen=True)
class Measurement:
    """Which network is measured on which images: what `evaluate`, `analyze` and `report` have in common."""

    run: str | None = setting(None, "Folder of a finetune run: its model, weights, dataset and radii are the defaults.")
    model: Annotated[str, OneOf(MODELS, FORMS)] | None = setting(None, "The network.")
    model_arg: tuple[str, ...] = setting((), MODEL_ARG, repeat=True)
    checkpoint: str | None = setting(None, "Weights, .safetensors or .pt; the run's after fine-tuning.")
    surrogate: str | None = setting(
        None, "Other weights of the model, to transfer attacks from or to compare with; the run's before fine-tuning."
    )
    mean: tuple[float, ...] | None = setting(None, MEAN)
    std: tuple[float, ...] | None = setting(None, "Likewise.")
    dataset: Annotated[str, OneOf(DATASETS, ADDRESSES)] | None = setting(None, "Images and labels.")
    data_dir: str = setting("data", "Folder of the dataset's files.")
    image_size: int | None = setting(None, IMAGE_SIZE)
    val_fraction: float | None = setting(
        None, "Share of a folder without test images that is measured on: the run's, or else all of it."
    )
    workers: int | None = setting(None, "Threads that decode images (one a CPU, and 8 at most).")
    limit: int | None = setting(None, "Use N test images only, stratified by class.")
    batch_size: int = setting(256, "Images at a time; under torchrun, processes share whole batches.")
    device: str = setting("auto", "'auto' takes a GPU where there is one.")
    seed: int = setting(0, "Of all that is random.")
    out: str | None = setting(None, "File for the results as JSON; must not exist.")

    least: ClassVar[dict[str, int]] = {"limit": 1, "batch_size": 1, "seed": 0, "image_size": 1, "workers": 0}
    """The least value of each whole number."""

    wanted: ClassVar[str] = "--run, or --model and --dataset"
    """What names a network and its images."""

    @classmethod
    def of(cls, explicit: dict[str, Any]) -> Self:
        """Combine what the user set with what the run says, if there is one: what is explicit wins.

        Raises:
            FileNotFoundError: if the run's folder is not there, or lacks its settings.
            ValueError: if these cannot be read, or a value does not fit.
        """
        known = {field.name for field in fields(cls)}
        found = {name: value for name, value in run_defaults(explicit).items() if name in known}
        return cls(**{**found, **explicit})

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        check_types(self)
        if self.model is None or self.dataset is None:
            raise ValueError(f"what to measure is missing: give {self.wanted}")
        check_whole_numbers(self, self.least)
        check_model(self.model, self.model_arg, {"mean": self.mean, "std": self.std})
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), such as 0.1, got {self.val_fraction}")
        if self.model in MODELS and self.checkpoint is None:
            raise ValueError(f"{self.model} has random weights without --checkpoint")
        self._check_out()

    def _check_out(self) -> None:
        if self.out is None:
            return
        path = Path(self.out)
        with suppress(FileNotFoundError):
            path.lstat()  # an OSError if there can be no such file
            raise ValueError(f"out must be a new file, got {path}, which exists: choose another")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"out must be in a folder that exists, got {path}")
        with tempfile.TemporaryFile(dir=path.parent):  # says now, not after the measurement, that nothing may be
            pass


@dataclass(frozen=True)
class EvaluationSettings(Measurement):
    """What is evaluated, and how."""

    eps: tuple[float, ...] = setting((2 / 255, 4 / 255, 8 / 255, 12 / 255), "L-infinity radii, in pixels in [0, 1].")
    eps_l2: tuple[float, ...] = setting((), EPS_L2)
    steps: int = setting(10, "Of PGD.")
    restarts: int = setting(1, "Random starts of PGD; the best of each image counts.")
    attacks: tuple[Annotated[str, OneOf(ATTACKS)], ...] = setting(
        ("fgsm", "pgd"), "Attacks, joined by commas; spsa uses no gradients, autoattack is the field's standard (slow)."
    )
    eot: int = setting(1, "Passes whose mean is a gradient of an attack: 20 of a network that is random on purpose.")
    checklist: bool = setting(False, "Also look for gradient masking, at the last radius, with the surrogate.")
    autoattack_images: int = setting(100, AUTOATTACK_IMAGES)

    least: ClassVar[dict[str, int]] = {
        **Measurement.least,
        **{"steps": 1, "restarts": 1, "eot": 1, "autoattack_images": 0},
    }

    @classmethod
    def of(cls, explicit: dict[str, Any]) -> Self:
        """Combine what the user set with what the run says, and check that all of the former has an effect.

        Raises:
            FileNotFoundError, ValueError: as in `Measurement.of`; or if nothing that is measured has a setting.
        """
        found = super().of(explicit)
        for names, used, fix in (
            (("surrogate", "autoattack_images"), found.checklist, "--checklist"),
            (("restarts",), "pgd" in found.attacks, "--attacks pgd"),
            (("steps",), found.checklist or "pgd" in found.attacks, "--attacks pgd"),
        ):
            for name in names:
                if name in explicit and not used:
                    raise ValueError(f"{name} has no effect here, got {explicit[name]}: leave it out, or add {fix}")
        return found

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        super().__post_init__()
        check_radii(self.eps, self.eps_l2)
        if self.eps_l2 and not set(self.attacks) & set(L2_ATTACKS):
            raise ValueError(
                f"eps_l2 needs an attack that has the L2 norm, {' or '.join(L2_ATTACKS)}, got {','.join(self.attacks)}"
            )


@dataclass(frozen=True)
class AnalysisSettings(Measurement):
    """What is analysed, and how."""

    limit: int | None = setting(100, "Use N test images only, stratified by class.")
    batch_size: int = setting(25, "Images at a time; under torchrun, processes share whole batches.")
    h: float = setting(1.25, "L2 length of the finite step, in pixels in [0, 1].")
    probes: int = setting(100, "Gaussian probes of the Frobenius norm.")
    extremes: int = setting(5, "Eigenvalues at each end of the spectrum.")

    least: ClassVar[dict[str, int]] = {**Measurement.least, "probes": 2, "extremes": 1}

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        super().__post_init__()
        check_step(self.h)


def check_step(h: float) -> None:
    """Check the L2 length of a finite step."""
    if h <= 0:
        raise ValueError(f"h must be > 0, got {h}")
    if h > MAX_H:
        raise ValueError(f"h must be <= {MAX_H:g}, got {h}")


class Known(NamedTuple):
    """What a run says of the data that it was trained on."""

    classes: tuple[str, ...] = ()
    channels: int | None = None
    num_classes: int = 0


def known_of(run: str | None) -> Known:
    """Return what `environment.json` of a finished run says of its data; nothing, where there is none.

    Raises:
        ValueError: if it cannot be read, or a value does not fit.
    """
    path = Path(run or "") / "environment.json"
    if run is None or not path.is_file():
        return Known()
    content = read_json(path)
    classes, channels, number = (content.get(name) for name in ("classes", "channels", "num_classes"))
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not ((classes is None or named) and channels in (None, 1, 3, 4) and type(number) in (int, type(None))):
        raise ValueError(f"{path} must hold classes, channels and num_classes of a run's data: restore it")
    return Known(tuple(classes or ()), channels, number or 0)


def run_defaults(explicit: dict[str, Any]) -> dict[str, Any]:
    """Return what the finetune run, if one was set, says of its model, weights, data and radii."""
    if "run" not in explicit:
        return {}
    run = Path(explicit["run"])
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"run {run} must be the folder of a finetune run, but {path} does not exist")
    if "model" not in explicit:
        refuse_code(read_json(path).get("model"), path)
    config = read_settings(path, resume=False)
    found = {name: getattr(config, name) for name in ("model", "dataset", "data_dir", "eps", "image_size")}
    found |= without_code(explicit, vars(config), path)
    if config.model not in MODELS:  # a bundled one has them in its weights
        found |= {"mean": config.mean, "std": config.std}
    if _may_be_the_same(explicit.get("dataset", config.dataset), config.dataset):
        found["val_fraction"] = config.val_fraction or TEST_FRACTION
    if explicit.get("dataset", config.dataset).partition(":")[0] not in ("folder", "hf"):
        found["image_size"] = None
    original = str(run / "original.safetensors") if (run / "original.safetensors").is_file() else None
    return {**found, "checkpoint": str(run / "model.safetensors"), "surrogate": original}


def _may_be_the_same(dataset: str, other: str) -> bool:
    """Tell whether two names may be of the same data; of a folder that is not at the `other` path, by its own name."""
    (kind, _, path), (other_kind, _, other_path) = dataset.partition(":"), other.partition(":")
    if dataset == other or not kind == other_kind == "folder":
        return dataset == other
    here, there = Path(path).resolve(), Path(other_path).resolve()
    return here == there if there.exists() else here.name == there.name
