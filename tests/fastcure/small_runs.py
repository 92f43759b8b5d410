"""A run of `fastcure finetune` that is small enough to be repeated many times."""

from pathlib import Path

import numpy as np

from fastcure.cli import main

COMPARED = ("model.safetensors", "original.safetensors", "history.csv", "metrics.json")
FILES = ["config.json", "curves.png", "environment.json", *COMPARED]
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


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def check_equal(out: Path, whole: Path) -> None:
    """The run in `out` ended like that in `whole`, and left nothing else behind."""
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    for name in COMPARED:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
