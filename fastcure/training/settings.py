"""The settings of a fine-tuning run: their defaults, the presets, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastcure._batch import Options
from fastcure._defaults import BATCH_STATS, BatchStats
from fastcure._fields import check_types, check_whole_numbers, shortened
from fastcure._validation import check_fraction
from fastcure.engines import ENGINES, LossAt, engine_called
from fastcure.models import MODELS
from fastcure.training.run_folder import read_json
from fastcure.training.schedule import Schedule, parse_schedule
from fastcure.units import eps_to_h

MAX_H = 1e4
"""Largest h: far longer than the diagonal of the pixels' box, and far from where squares overflow in float32."""


def setting(default: Any, meaning: str) -> Any:
    """Return a dataclass field whose meaning the command line shows."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Settings:
    """All that determines a run. Numbers that may change during it are schedules, see `parse_schedule`.

    The defaults are CURE with what docs/study.md found to serve it.
    """

    dataset: str = setting("digits", "digits, fashion-mnist, svhn, cifar10, npz:PATH or hf:OWNER/NAME.")
    data_dir: str = setting("data", "Folder of the dataset's files.")
    model: str = setting("resnet8", f"{', '.join(MODELS)}.")
    checkpoint: str | None = setting(
        None, "Weights to start from, .safetensors or .pt; without them the model is first trained normally."
    )
    preset: str | None = setting(None, "Where the other defaults come from.")
    pretrain_epochs: int = setting(20, "Epochs of normal training.")
    pretrain_lr: str = setting("1e-3:1e-5", "Learning rate of normal training.")
    epochs: int = setting(20, "Epochs of fine-tuning with CURE.")
    batch_size: int = setting(128, "Images a step.")
    microbatch: int | None = setting(
        None, "Images of a step of CURE at a time, in each process: less memory; found by itself when memory runs out."
    )
    lr: str = setting("0:1e-2x10%,1e-2:1e-4", "Learning rate (Adam); large networks want less, 1e-4 in the paper.")
    gamma: str = setting("0:1x50%,1", "Weight of the penalty.")
    h: str = setting("1", "Length of the finite step.")
    h_unit: str = setting(
        "eps", "Of h: 'eps', FGSM steps of the largest --eps; or 'l2', its L2 length, pixels in [0, 1]."
    )
    power: int = setting(2, "2: squared norm; 1: norm.")
    batch_stats: BatchStats = setting(BATCH_STATS, "'frozen', 'split' or 'train', as in `fastcure.curvature`.")
    loss_at: LossAt = setting("x", "'x', or 'step' for the loss at x + h z, as in `fastcure.curvature`.")
    fraction: float = setting(1.0, "Share of each batch, in (0, 1], that has a penalty; the loss is of all of it.")
    engine: str = setting(
        "auto", f"{', '.join(ENGINES)}; 'auto' is 'eager' here, so that a resumed run is the same run."
    )
    non_finite: str = setting(
        "stop", "'stop' or 'skip' (and count): what becomes of a step whose loss, penalty or gradient is not finite."
    )
    augment: bool = setting(True, "The dataset's usual augmentation, in normal training and in fine-tuning.")
    eps: tuple[float, ...] = setting(
        (2 / 255, 4 / 255, 8 / 255, 12 / 255),
        "Radii of the L-infinity PGD-10 evaluation, in pixels in [0, 1]; the run is followed at the last one.",
    )
    validation: int | None = setting(
        None, "Training images held out to follow the run on (128, or a tenth of them if that is less)."
    )
    track: int = setting(0, "Follow curvature and PGD-10 at eps 8/255 on so many of the images held out (track.csv).")
    device: str = setting("auto", "'auto' takes a GPU where there is one.")
    amp: str = setting("none", "'none' or 'bf16': the dtype of autocast.")
    seed: int = setting(0, "Of the weights, the batches' order, the augmentation and the attacks' starts.")
    limit: int | None = setting(None, "Use N training and N test images only, stratified by class.")
    out: str = setting("runs/finetune", "Folder of the run's results; must not exist, or be empty.")

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        check_types(self)
        choices = {
            "model": tuple(MODELS),
            "power": (1, 2),
            "batch_stats": ("frozen", "split", "train"),
            "loss_at": ("x", "step"),
            "h_unit": ("l2", "eps"),
            "engine": tuple(ENGINES),
            "non_finite": ("stop", "skip"),
            "amp": ("none", "bf16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        least = {"pretrain_epochs": 0, "epochs": 1, "batch_size": 1, "microbatch": 1, "limit": 1, "seed": 0, "track": 0}
        check_whole_numbers(self, {**least, "validation": 1})
        options = Options(power=self.power, batch_stats=self.batch_stats, loss_at=self.loss_at)
        options.check_microbatch(self.microbatch)
        check_fraction(self.fraction)
        engine_called(self.engine, training_norms=self.batch_stats == "train")
        if not self.eps or not all(0 < eps <= 1 for eps in self.eps):
            raise ValueError(f"eps must be radii in (0, 1], such as 8/255, got {list(self.eps)}")
        lengths = [value for segment in self.schedule("h").segments for value in segment[:2]]
        if min(lengths) <= 0:
            raise ValueError(f"h must be > 0, got {self.h}")
        if max(lengths) > MAX_H:
            raise ValueError(f"h must be <= {MAX_H:g}, got {self.h}")
        for name in ("lr", "gamma", "pretrain_lr"):
            self.schedule(name)

    def schedule(self, name: str) -> Schedule:
        """Return the schedule of `lr`, `gamma`, `h` or `pretrain_lr` over its epochs."""
        return parse_schedule(name, getattr(self, name), self.pretrain_epochs if "pretrain" in name else self.epochs)


def step_lengths(h: str, h_unit: str, epochs: int, eps: Sequence[float], values: int) -> Schedule:
    """Return the schedule of the finite step as an L2 length, for images of so many values and these radii."""
    schedule = parse_schedule("h", h, epochs)
    return schedule if h_unit == "l2" else schedule.times(eps_to_h(max(eps), values))


PRESETS: dict[str, dict[str, Any]] = {
    # Seconds on a laptop. PGD-10 at eps = 0.1 of the enlarged 16 x 16 image leaves an undefended network nothing.
    "digits": {
        "dataset": "digits",
        "model": "resnet8",
        "pretrain_epochs": 8,
        "pretrain_lr": "3e-3:1e-5",
        "epochs": 15,
        "batch_size": 32,
        "lr": "0:5e-3x5%,5e-3:1e-5",
        "gamma": "0:0.4x30%,0.4",
        "h": "1.25",
        "h_unit": "l2",
        "batch_stats": "train",
        "augment": False,
        "track": 100,
        "eps": (0.025, 0.05, 0.075, 0.1),
    },
    # More robust than PGD-7 adversarial training at equal arithmetic, on Fashion-MNIST up to eps 0.1 (two budgets of
    # docs/study.md). Not the paper's: the loss is at the FGSM point, and a quarter has a penalty.
    **{
        name: {
            "model": "resnet8",
            "pretrain_epochs": 10,
            "pretrain_lr": "0:3e-3x10%,3e-3:3e-5",
            "epochs": epochs,
            "batch_size": 64,
            "lr": "0:1e-2x10%,1e-2:1e-4",
            "gamma": "0:0.3x50%,0.3",
            "h": "1",
            "h_unit": "eps",
            "batch_stats": "train",
            "loss_at": "step",
            "fraction": 0.25,
        }
        for name, epochs in (("fast", 5), ("strong", 13))
    },
    # The paper's supplement; it fine-tunes a network that was trained normally.
    "svhn-paper": {
        "dataset": "svhn",
        "model": "resnet18",
        "pretrain_epochs": 30,
        "epochs": 20,
        "batch_size": 128,
        "lr": "1e-4:1e-6",
        "gamma": "4x50%,8x25%,12x25%",
        "h": "1.25",
        "h_unit": "l2",
    },
}


def make_settings(explicit: dict[str, Any], *, resume: bool = False) -> Settings:
    """Combine what the user set with the preset they chose: what is explicit wins, then the preset, then defaults.

    Without a preset, digits takes the preset of its name. With `resume` the settings of the run in `out`, if there is
    one, take the place of presets and defaults.

    Raises:
        ValueError: for an unknown preset, or a value that does not fit.
    """
    path = Path(explicit.get("out", Settings.out)) / "config.json"
    if resume and path.is_file():
        return replace(read_settings(path), **explicit)
    name = explicit.get("preset")
    if name is None and explicit.get("dataset", "digits") == "digits":
        name = "digits"
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return Settings(**{**PRESETS.get(name or "", {}), **explicit, "preset": name})


def read_settings(path: Path, *, resume: bool = True) -> Settings:
    """Read the `config.json` of a run, which is not trusted: every value is checked, and the model is a bundled one.

    Args:
        path: of the file.
        resume: to go on with the run, nothing may be unknown. Otherwise settings that this version does not have are
            left out.

    Raises:
        ValueError: if the file does not hold the settings of a run.
    """
    content = read_json(path)
    lacking = [name for name in ("dataset", "data_dir", "model", "eps") if name not in content]
    known = {each.name for each in fields(Settings)}
    unknown = sorted(content.keys() - known) if resume else []
    if lacking or unknown:
        what = f"lacks {lacking[0]}" if lacking else f"has {shortened(unknown[0])}, which no run has"
        raise ValueError(f"{path} does not hold the settings of a run: it {what}")
    try:
        # Runs from before `h_unit` had L2 lengths.
        found = Settings(**{name: value for name, value in {"h_unit": "l2", **content}.items() if name in known})
    except ValueError as error:
        raise ValueError(f"{path} does not hold the settings of a run: {error}") from error
    return replace(found, eps=tuple(found.eps))
