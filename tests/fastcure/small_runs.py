"""A run of `fastcure finetune` that is small enough to be repeated many times."""

import csv
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcure.training.run as run_module
from fastcure._augmentation import Transform
from fastcure.cli import main
from fastcure.data import Batch
from fastcure.models import resnet8
from fastcure.training.ranks import Ranks, Share
from fastcure.training.run import Run
from fastcure.training.run_folder import RunFolder
from fastcure.training.settings import make_settings

COMPARED = ("model.safetensors", "original.safetensors", "history.csv", "metrics.json")
FILES = ["config.json", "curves.png", "environment.json", "state.safetensors", *COMPARED]
SMALL = "--pretrain-epochs 1 --epochs 2 --batch-size 20 --eps 0.1 --lr 1e-3:1e-5 --gamma 0.1 --device cpu".split()


def write_npz(path: Path, seed: int = 0) -> Path:
    """Two classes of 8 x 8 images, dark and bright: 48 to train on, in batches of 20, 20 and 8, and 24 to test."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 72)
    x = (rng.integers(0, 128, (72, 8, 8, 3)) + 127 * y[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])
    return path


def finetune(npz: Path, out: Path, *flags: str) -> int:
    return main(["finetune", "--dataset", f"npz:{npz}", "--out", str(out), *SMALL, *flags])


def write_run(path: Path, **settings: object) -> Path:
    """The folder of a finished run on `a.npz`, of which no step was taken."""
    folder = RunFolder(path)
    small = {"dataset": "npz:a.npz", "eps": (0.1,), "device": "cpu"}
    folder.write_json("config.json", vars(make_settings({**small, **settings})))
    folder.write_json("metrics.json", {})
    model = resnet8(num_classes=2)
    folder.write_weights("original.safetensors", model)
    folder.write_weights("model.safetensors", model)
    return path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more to a file, as a full disk does, for every user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def check_equal(out: Path, whole: Path) -> None:
    """The run in `out` ended like that in `whole`, and left nothing else behind."""
    averaged = ["ema.safetensors"] if (whole / "ema.safetensors").exists() else []
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, *averaged])
    for name in (*COMPARED, *averaged):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def history(out: Path) -> list[dict[str, str]]:
    with (out / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def share_of(ranks: Ranks, x: Tensor, y: Tensor) -> Share:
    """What a process has of a batch: every `size`-th image, or one that does not count."""
    mine = slice(ranks.rank, None, ranks.size) if len(x) > ranks.rank else slice(1)
    return ranks.counted(Batch(x[mine], y[mine], torch.arange(len(x))[mine], Transform()), len(x))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


class Killed(BaseException):
    """Nothing in the library catches it."""


def kill_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Save after every step, and die in the one after `steps` of them, before it is saved."""
    pause, taken = Run._pause, []

    def killing(run: Run) -> None:
        taken.append(1)
        if len(taken) > steps:
            raise Killed
        pause(run)

    patch.setattr(run_module, "SAVE_EVERY", -1.0)
    patch.setattr(Run, "_pause", killing)
