"""The settings of a fine-tuning run: their defaults and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fastcure._defaults import BATCH_STATS, BatchStats
from fastcure._fields import OneOf, check_types, check_whole_numbers, shortened
from fastcure.data import ADDRESSES, DATASETS
from fastcure.engines import ENGINES, LossAt, engine_called
from fastcure.models import MODELS
from fastcure.models.loading import FORMS, parse_arguments
from fastcure.objectives import OBJECTIVES
from fastcure.schedules import Schedule, schedule
from fastcure.training.objective import check_objective, settings_of
from fastcure.training.optimizer import OPTIMIZERS
from fastcure.training.presets import PRESETS
from fastcure.training.run_folder import read_json
from fastcure.training.trackers import TRACKERS

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of each `amp`."""

MAX_H = 1e4
"""Largest h: far longer than the diagonal of the pixels' box, and far from where squares overflow in float32."""


def setting(default: Any, meaning: str, alone: int | None = None, *, repeat: bool = False) -> Any:
    """Return a dataclass field.

    Args:
        default: value.
        meaning: what the command line shows.
        alone: the value that the flag has there without one.
        repeat: the flag is given once for each element of a tuple.
    """
    return field(default=default, metadata={"help": meaning, "alone": alone, "repeat": repeat})


IMAGE_SIZE = "Of folder: and hf: images: the shorter side is scaled to N, and the middle of N x N cut out."
WORKERS = "Processes that decode images and read ahead (one a CPU, and 8 at most)."
MODEL_ARG = "NAME=VALUE, a keyword argument for what makes the network; may be given several times."
MEAN = "0.5,0.5,0.5: of each channel, in pixels in [0, 1], if the network does not normalise."


def check_model(model: str | None, model_arg: Sequence[str], numbers: Mapping[str, Sequence[float] | None]) -> None:
    """Check what is said of a network, as far as that is possible without making it.

    Args:
        model: its name.
        model_arg: its arguments.
        numbers: `mean` and `std`.

    Raises:
        ValueError: if an argument cannot be read, or a number is not of pixels in [0, 1].
    """
    parse_arguments(model_arg)
    for name, values in numbers.items():
        wrong = [value for value in values or () if not 0 <= value <= 1]
        if wrong:
            raise ValueError(f"{name} must be of pixels in [0, 1], got {wrong[0]:g}: of bytes, divide it by 255")
    if len({values is None for values in numbers.values()}) > 1:
        given = " and ".join(f"{name}={values}" for name, values in numbers.items())
        raise ValueError(f"mean and std must be given together, got {given}")


def check_radii(eps: Sequence[float], eps_l2: Sequence[float] = ()) -> None:
    """Check radii, of L-infinity and of L2."""
    if not eps or not all(0 < each <= 1 for each in eps):
        raise ValueError(f"eps must be radii in (0, 1], such as 8/255, got {list(eps)}")
    if not all(0 < each <= MAX_H for each in eps_l2):
        raise ValueError(f"eps_l2 must be L2 lengths in (0, {MAX_H:g}], such as 0.5, got {list(eps_l2)}")


@dataclass(frozen=True)
class Settings:
    """All that determines a run. Numbers that may change during it are schedules, see `fastcure.schedule`.

    The defaults are CURE with what docs/study.md found to serve it. Types and choices are those of the annotations, for
    the checks here and for the command line.
    """

    dataset: Annotated[str, OneOf(DATASETS, ADDRESSES)] = setting("digits", "Images and labels.")
    data_dir: str = setting("data", "Folder of the dataset's files.")
    image_size: int | None = setting(None, IMAGE_SIZE)
    val_fraction: float | None = setting(
        None,
        "Share of the training images held out, in place of --validation; and tested on, of a folder that has none.",
    )
    workers: int | None = setting(None, WORKERS)
    model: Annotated[str, OneOf(MODELS, FORMS)] = setting(
        "resnet8", "A bundled network, one of timm's, or what a function of yours returns."
    )
    model_arg: tuple[str, ...] = setting((), MODEL_ARG, repeat=True)
    mean: tuple[float, ...] | None = setting(None, MEAN)
    std: tuple[float, ...] | None = setting(None, "Likewise.")
    checkpoint: str | None = setting(
        None, "Weights to start from, .safetensors or .pt; without them standard training comes first."
    )
    preset: Annotated[str, OneOf(PRESETS)] | None = setting(None, "Where the other defaults come from.")
    objective: Annotated[str, OneOf(OBJECTIVES)] = setting("cure", "What fine-tuning minimises.")
    pretrain_epochs: int = setting(20, "Epochs of standard training.")
    pretrain_lr: str = setting("1e-3:1e-5", "Learning rate of standard training.")
    epochs: int = setting(20, "Epochs of fine-tuning.")
    batch_size: int = setting(128, "Images a step.")
    microbatch: int | None = setting(
        None, "Images of a step of CURE at a time, in each process: less memory; found by itself when memory runs out."
    )
    lr: str = setting("0:1e-2x10%,1e-2:1e-4", "Learning rate; large networks want less, 1e-4 in CURE's paper.")
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = setting("adam", "Of both phases.")
    momentum: float = setting(0.9, "Nesterov momentum of sgd.")
    weight_decay: float = setting(0.0, "Of all parameters: decoupled in adamw, else added to the gradient.")
    label_smoothing: float = setting(0.0, "Of the loss, in both phases; in [0, 1).")
    clip: float | None = setting(None, "Largest L2 norm of a step's gradient, which is scaled down to it.")
    ema: float | None = setting(
        None, "Decay of an exponential moving average of the fine-tuned weights, such as 0.999, measured beside them."
    )
    gamma: str = setting("0:1x50%,1", "Weight of the penalty.")
    h: str = setting("1", "Length of CURE's finite step.")
    h_unit: Literal["eps", "l2"] = setting(
        "eps", "Of h: 'eps', FGSM steps of the largest --eps; or 'l2', its L2 length, pixels in [0, 1]."
    )
    power: Literal[1, 2] = setting(2, "2: squared norm; 1: norm.")
    batch_stats: BatchStats = setting(BATCH_STATS, "Mode of batch norms; 'split' is for CURE alone.")
    loss_at: LossAt = setting("x", "'x', or 'step' for the loss at x + h z, as in `fastcure.curvature`.")
    fraction: float = setting(1.0, "Share of each batch, in (0, 1], that has a penalty; the loss is of all of it.")
    engine: Annotated[str, OneOf(ENGINES)] = setting(
        "auto", "'auto' is 'eager', so that a resumed run is the same run."
    )
    train_eps: str | None = setting(None, "Radius of the attack in adversarial training and TRADES; the largest --eps.")
    steps: int = setting(7, "Of that attack, by pgd and trades.")
    non_finite: Literal["stop", "skip"] = setting(
        "stop", "'skip' leaves out (and counts) a step whose loss, penalty or gradient is not finite."
    )
    augment: bool = setting(True, "The dataset's usual augmentation, in both phases.")
    eps: tuple[float, ...] = setting(
        (2 / 255, 4 / 255, 8 / 255, 12 / 255),
        "Radii of the L-infinity PGD-10 evaluation, in pixels in [0, 1]; the run is followed at the last one.",
    )
    validation: int | None = setting(
        None, "Training images held out to follow the run on (128, or a tenth of them if that is less)."
    )
    track: int = setting(
        0, "Follow curvature and PGD-10, also at eps 8/255, on so many images held out (track.csv).", alone=1000
    )
    device: str = setting("auto", "'auto' takes a GPU where there is one.")
    amp: Literal["none", "bf16", "fp16"] = setting("none", "The dtype of autocast; fp16 scales the loss.")
    seed: int = setting(0, "Of the weights, the batches' order, the augmentation and the attacks' starts.")
    limit: int | None = setting(None, "Use N training and N test images only, stratified by class.")
    log_to: tuple[Annotated[str, OneOf(TRACKERS)], ...] = setting(
        (), "Trackers that get the numbers of each epoch, joined by commas; TensorBoard's files go to OUT/tensorboard."
    )
    out: str = setting("runs/finetune", "Folder of the run's results; must not exist, or be empty.")

    def __post_init__(self) -> None:
        """Check every value; a ValueError names the first that does not fit, and what would."""
        check_types(self)
        least = {"pretrain_epochs": 0, "epochs": 1, "batch_size": 1, "microbatch": 1, "limit": 1, "seed": 0, "track": 0}
        check_whole_numbers(self, {**least, "validation": 1, "steps": 1, "image_size": 1, "workers": 0})
        check_model(self.model, self.model_arg, {"mean": self.mean, "std": self.std})
        if self.model in MODELS and self.mean is not None and self.checkpoint is not None:
            raise ValueError(f"{self.model} has its mean and std in the checkpoint: leave out those given")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), such as 0.1, got {self.val_fraction}")
        if self.val_fraction is not None and self.validation is not None:
            raise ValueError(
                f"validation must be left out with val_fraction, got {self.validation} and {self.val_fraction}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be > 0, got {self.clip}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must be in (0, 1), such as 0.999, got {self.ema}")
        check_objective(self)
        if "engine" in settings_of(self.objective):
            engine_called(self.engine, training_norms=self.batch_stats == "train")
        check_radii(self.eps)
        for name, high in (("h", MAX_H), ("train_eps", 1.0)):
            numbers = [value for segment in self.schedule(name).segments for value in (segment.start, segment.stop)]
            if name == "h" and min(numbers) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
            if max(numbers) > high:
                raise ValueError(f"{name} must be <= {high:g}, got {getattr(self, name)}")
        for name in ("lr", "gamma", "pretrain_lr"):
            self.schedule(name)

    def schedule(self, name: str) -> Schedule:
        """Return the schedule of `lr`, `gamma`, `h`, `train_eps` or `pretrain_lr` over its epochs."""
        text = getattr(self, name)
        if name == "train_eps" and text is None:
            text = repr(float(max(self.eps)))
        return schedule(text, self.pretrain_epochs if "pretrain" in name else self.epochs, name)


def make_settings(explicit: dict[str, Any], *, resume: bool = False, config: str | None = None) -> Settings:
    """Combine what the user set with the preset they chose: what is explicit wins, then the preset, then defaults.

    Without a preset, digits takes the preset of its name. With `resume` the settings of the run in `out`, if there is
    one, take the place of presets and defaults.

    Args:
        explicit: settings by name.
        resume: as in `finetune`.
        config: path of a JSON file with settings, which come after what is explicit and before the preset.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown preset, or a value that does not fit.
    """
    file = {} if config is None else read_config(Path(config), explicit)
    path = Path({**file, **explicit}.get("out", Settings.out)) / "config.json"
    if resume and path.is_file():
        explicit = {**file, **explicit}
        began = read_settings(path)
        if "model" not in explicit:
            refuse_code(began.model, path)
        return replace(began, **{**without_code(explicit, vars(began), path), **explicit})
    chosen = {**file, **explicit}
    name = chosen.get("preset")
    if name is None and chosen.get("dataset", "digits") == "digits":
        name = "digits"
    if name is not None and name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {shortened(name)}")
    settings = Settings(**{**PRESETS.get(name or "", {}), **chosen, "preset": name})
    known = settings_of(settings.objective)
    for name in explicit.keys() - known:
        others = [other for other in OBJECTIVES if name in settings_of(other)]
        if others:
            raise ValueError(
                f"{name} is no setting of the objective {settings.objective}, but of {', '.join(others)}: leave it "
                "out, or choose another --objective"
            )
    if "momentum" in explicit and settings.optimizer != "sgd":
        raise ValueError(f"momentum is no setting of {settings.optimizer}: leave it out, or give --optimizer sgd")
    return settings


def read_config(path: Path, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Read a file of settings, all of them or some: the `config.json` of a run is one. No code runs at its word.

    Args:
        path: of the file.
        explicit: what the user gave beside it.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it cannot be read, has a name that is no setting, or names a network that is not bundled, and
            the user does not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config {path} not found; give a JSON file of settings, such as a run's config.json")
    content = read_json(path)
    if unknown := sorted(content.keys() - {each.name for each in fields(Settings)}):
        raise ValueError(f"{path} has {shortened(unknown[0])}, which is no setting: remove it")
    if "model" in content and "model" not in explicit:
        refuse_code(content["model"], path)
    content |= without_code(explicit, {"model": Settings.model, **content}, path)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}


def read_settings(path: Path, *, resume: bool = True) -> Settings:
    """Read the `config.json` of a run, which is not trusted: every value is checked, and no code runs at its word.

    Args:
        path: of the file.
        resume: to go on with the run, nothing may be unknown. Otherwise settings that this version does not have are
            left out, and the objective may be one of the user's, by its name alone.

    Raises:
        ValueError: if the file does not hold the settings of a run.
    """
    content = read_json(path)
    objective = content.get("objective", Settings.objective)
    if not resume and isinstance(objective, str) and objective not in OBJECTIVES:
        content["objective"] = "standard"  # for the checks of the other settings
    lacking = [name for name in ("dataset", "data_dir", "model", "eps") if name not in content]
    known = {each.name for each in fields(Settings)}
    unknown = sorted(content.keys() - known) if resume else []
    if lacking or unknown:
        what = f"lacks {lacking[0]}" if lacking else f"has {shortened(unknown[0])}, which no run has"
        raise ValueError(f"{path} does not hold the settings of a run: it {what}")
    try:
        found = Settings(**{name: value for name, value in content.items() if name in known})
    except ValueError as error:
        raise ValueError(f"{path} does not hold the settings of a run: {error}") from error
    lists: dict[str, Any] = {name: tuple(value) for name, value in vars(found).items() if isinstance(value, list)}
    found = replace(found, **lists)
    vars(found)["objective"] = objective
    return found


def refuse_code(model: object, path: Path) -> None:
    """Check that the model which the file of a run names is a bundled one: a file is not to run code.

    Raises:
        ValueError: for a function.
    """
    if isinstance(model, str) and model not in MODELS:
        raise ValueError(
            f"{path} names the model {shortened(model)}, and only {', '.join(MODELS)} are made at a file's word: give "
            "it again as --model"
        )


def without_code(explicit: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a file says of a network, of which a function of the user's gets no argument unless it is repeated.

    Args:
        explicit: what the user gave.
        config: the settings in the file.
        path: of the file.

    Raises:
        ValueError: if the user names a function and the file has arguments for it.
    """
    model = explicit.get("model", config.get("model"))
    arguments = tuple(config.get("model_arg") or ())
    if model not in MODELS and arguments and "model_arg" not in explicit:
        given = " ".join(f"--model-arg {shortened(text)}" for text in arguments[:8])
        raise ValueError(
            f"{path} has arguments for the network, and code is not called with what a file says: give {given} again, "
            f"or what you want in place of them"
        )
    return {"model_arg": arguments}
