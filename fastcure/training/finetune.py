"""`fastcure finetune`: normal training or a checkpoint, then CURE, and accuracies before and after."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastcure import CURE, __version__
from fastcure.accuracy import accuracy
from fastcure.attacks import pgd
from fastcure.data import Dataset, Loader, default_augmentation, load
from fastcure.models import build
from fastcure.training.curves import draw_curves
from fastcure.training.epoch import train_epoch
from fastcure.training.run_folder import RunFolder, load_weights
from fastcure.training.settings import Settings

FOLLOWED = 128
"""Test images on which clean and PGD accuracy are followed from epoch to epoch; no decision depends on them."""

Metrics = dict[str, Any]
Row = dict[str, Any]


def finetune(settings: Settings, say: Callable[[str], object] = print) -> dict[str, Metrics]:
    """Run what `settings` describe, and leave the results in `settings.out` (see `RunFolder`).

    Args:
        settings: of the run.
        say: takes each line of the report.

    Returns:
        `{"before": ..., "after": ...}`, each `{"clean": accuracy, "pgd": {eps: accuracy}}`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: before anything is written, if a setting, the data or the
            checkpoint is not as it must be.
        FloatingPointError: if training diverges.
    """
    folder = RunFolder(settings.out)
    device = pick_device(settings.device)
    data = limited(load(settings.dataset, settings.data_dir), settings.limit)
    torch.manual_seed(settings.seed)
    model = make_model(settings, data)
    if settings.checkpoint is not None:
        load_weights(model, settings.checkpoint)
    model.to(device)
    folder.write_json("config.json", asdict(settings))
    say(
        f"{data.name}: {len(data.x_train):,} training and {len(data.x_test):,} test images of "
        f"{' x '.join(map(str, data.x_train.shape[1:]))}, {settings.model} on {device}, seed {settings.seed}"
    )

    run = _Run(settings, data, model, device, folder)
    if settings.checkpoint is None:
        run.train("pretrain", settings.pretrain_epochs)
    folder.write_weights("original.safetensors", model)
    before = run.evaluate("before CURE")
    run.train("cure", settings.epochs)
    folder.write_weights("model.safetensors", model)
    after = run.evaluate("after CURE")

    metrics = {"before": before, "after": after}
    folder.write_json("metrics.json", metrics)
    folder.write_json("environment.json", {**environment(device), "seconds": run.seconds})
    draw_curves(run.history, metrics, folder.path / "curves.png", data.name)
    say(table(metrics))
    say(f"results in {folder.path} (curves.png is the picture)")
    return metrics


class _Run:
    """The state that the phases of a run share."""

    def __init__(
        self, settings: Settings, data: Dataset, model: nn.Module, device: torch.device, folder: RunFolder
    ) -> None:
        self.settings, self.data, self.model, self.device, self.folder = settings, data, model, device, folder
        self.x_test, self.y_test = data.x_test.to(device), data.y_test.to(device)
        self.history: list[Row] = []
        self.seconds: dict[str, float] = {}
        generator = torch.Generator().manual_seed(settings.seed)
        self.loader = Loader(
            data.x_train,
            data.y_train,
            settings.batch_size,
            device=device,
            augment=default_augmentation(data.name) if settings.augment else None,
            generator=generator,
        )

    def train(self, phase: str, epochs: int) -> None:
        """Train for `epochs` epochs, a bar of progress and a row of history each."""
        began = time.perf_counter()
        settings, cured = self.settings, phase == "cure"
        cure = CURE(self.model, power=settings.power, engine=settings.engine, batch_stats=settings.batch_stats)
        optimizer = torch.optim.Adam(self.model.parameters())
        lr = settings.schedule("lr" if cured else "pretrain_lr")
        gamma, h = (settings.schedule("gamma"), settings.schedule("h")) if cured else (None, None)
        for epoch in range(epochs):
            bar = tqdm(
                self.loader,
                f"{phase} {epoch + 1}/{epochs}",
                leave=False,
                unit="step",
                dynamic_ncols=True,
                disable=None,
            )
            result = train_epoch(
                cure,
                bar,
                optimizer,
                lr,
                epoch,
                len(self.loader),
                gamma=gamma,
                h=h,
                autocast=torch.bfloat16 if settings.amp == "bf16" else None,
            )
            clean, robust = self._follow()
            end = epoch + 1
            self.history.append(
                {
                    "phase": phase,
                    "epoch": end,
                    "lr": lr.at(end),
                    "gamma": gamma.at(end) if gamma else 0.0,
                    "h": h.at(end) if h else 0.0,
                    "loss": result.loss,
                    "penalty": result.penalty,
                    "train_accuracy": result.accuracy,
                    "clean": clean,
                    "pgd": robust,
                }
            )
            self.folder.write_csv("history.csv", self.history)
            tqdm.write(
                f"{phase:>8} {end:3d}/{epochs}  loss {result.loss:.3f}  "
                + (f"penalty {result.penalty:.2e}  " if cured else "")
                + f"train {result.accuracy:6.1%}  clean {clean:6.1%}  pgd({settings.eps[-1]:.3g}) {robust:6.1%}"
            )
        self.seconds[phase] = round(time.perf_counter() - began, 1)

    def evaluate(self, title: str) -> Metrics:
        """Clean accuracy, and accuracy under PGD-10 at each eps, on the whole test set."""
        robust = {}
        for eps in tqdm(
            self.settings.eps, f"PGD-10 {title}", leave=False, unit="eps", dynamic_ncols=True, disable=None
        ):
            robust[f"{eps:.6g}"] = accuracy(self.model, self.x_test, self.y_test, self._attack(eps))
        return {"clean": accuracy(self.model, self.x_test, self.y_test), "pgd": robust}

    def _follow(self) -> tuple[float, float]:
        x, y = self.x_test[:FOLLOWED], self.y_test[:FOLLOWED]
        return accuracy(self.model, x, y), accuracy(self.model, x, y, self._attack(self.settings.eps[-1]))

    def _attack(self, eps: float) -> Callable[..., torch.Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        return partial(pgd, eps=eps, steps=10, generator=generator)


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is a GPU where there is one.

    Raises:
        ValueError: for a name that is none, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be auto, cpu, cuda, cuda:0, ... and present, got {name!r}: {reason}") from error
    return device


def limited(data: Dataset, limit: int | None) -> Dataset:
    """Return the first `limit` images of each split, or all."""
    if limit is None:
        return data
    return data._replace(
        x_train=data.x_train[:limit],
        y_train=data.y_train[:limit],
        x_test=data.x_test[:limit],
        y_test=data.y_test[:limit],
    )


def make_model(settings: Settings, data: Dataset) -> nn.Module:
    """Build the network for the data's channels and classes, with their mean and deviation as its normalisation."""
    channels = data.x_train.shape[1]
    pixels = data.x_train[:10_000].transpose(0, 1).reshape(channels, -1).double() / 255
    std = pixels.std(1).clamp_min(1e-2)  # a constant channel has none
    return build(settings.model, data.classes, channels, pixels.mean(1).tolist(), std.tolist())


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and device, for a reader of the results."""
    return {
        "fastcure": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
    }


def table(metrics: dict[str, Metrics]) -> str:
    """Format accuracies before and after as lines of text."""
    before, after = metrics["before"], metrics["after"]
    rows = [("clean", before["clean"], after["clean"])]
    rows += [(f"PGD-10, eps {eps}", before["pgd"][eps], after["pgd"][eps]) for eps in before["pgd"]]
    lines = [f"{'accuracy':<20} {'before':>8} {'after CURE':>11}"]
    return "\n".join(lines + [f"{name:<20} {old:8.1%} {new:11.1%}" for name, old, new in rows])
