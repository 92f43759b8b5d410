"""Robustness for the compute it costs: CURE against adversarial training on a grid of runs, one row each.

    python benchmarks/robustness.py                                     Fashion-MNIST, sized for one CPU core
    python benchmarks/robustness.py --preset large                      the same at twice the radius, a smaller grid
    python benchmarks/robustness.py --preset collapse                   at four times: where one-step training collapses
    python benchmarks/robustness.py --preset smooth                     a network without kinks: exact or first order
    python benchmarks/robustness.py --preset cifar --cifar10-jpeg FILE  CIFAR-10 (JPEG), a smaller grid
    python benchmarks/robustness.py --preset gpu --dataset cifar10      ResNet-18, all images, the paper's budget
    python benchmarks/robustness.py --plot                              the picture and tables of the rows there are
    python benchmarks/robustness.py --check-row 3                       do the third row's run again: is it the same?

A run whose row is there is not done again: start it again after an interruption, or with a larger grid. On a CPU set
OMP_NUM_THREADS=1: networks so small gain little from more, and rows are then the same to the last digit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from record import FOLDER, context
from robustness_data import JPEG, Images, read_images
from robustness_grid import Sizes, few, full, long, smooth, standard
from robustness_plot import draw
from robustness_recipe import Recipe, Setting
from robustness_run import Run
from robustness_summary import summary
from robustness_table import KEY, MAY_DIFFER, Row, Table

from fastcure._writing import write_whole

TABLE = FOLDER / "robustness.csv"
PICTURE = Path(__file__).parent.parent / "docs" / "robustness.png"
"""Of that table; of another one it lies beside the table."""

GAMMAS = {
    "CURE frozen": (1.0, 0.3, 3.0),
    "CURE split": (1.0,),
    "CURE train": (1.0, 0.3, 3.0),
    "CURE at FGSM": (0.1, 0.3),
    "CURE at FGSM, train": (0.1, 0.3),
    "CURE/4 train": (1.0, 0.3),
    "CURE/4 at FGSM, train": (0.1, 0.3),
    "input gradient": (1.0, 0.1),
    "TRADES-2": (3.0, 6.0),
    "CURE first order": (1.0, 0.3),
}

CPU = Sizes(
    Setting("fashion-mnist", "resnet8", 12 / 255, 3000, 500, 500, 64, 100),
    budgets=(17.0, 34.0, 85.0),
    standard_epochs=10,
    rates=(3e-3, 1e-2, 3e-2),
    gammas=GAMMAS,
    steps=(0.5, 1.5),
    seeds=(1, 2),
)
CIFAR = dataclasses.replace(
    CPU,
    setting=dataclasses.replace(CPU.setting, dataset=JPEG, eps=8 / 255, train=10000),
    rates=(3e-3, 1e-2),
    steps=(),
    seeds=(1,),
)
LARGE = dataclasses.replace(CPU, setting=dataclasses.replace(CPU.setting, eps=0.1), seeds=(1,))
COLLAPSE = dataclasses.replace(
    LARGE,
    setting=dataclasses.replace(CPU.setting, eps=0.2),
    gammas=GAMMAS | {"CURE at FGSM, train": (0.3, 1.0, 0.1), "CURE/4 at FGSM, train": (0.3, 1.0, 0.1)},
)
SMOOTH = dataclasses.replace(CPU, setting=dataclasses.replace(CPU.setting, model="resnet8-gelu"), steps=(), seeds=(1,))
GPU = Sizes(
    Setting("cifar10", "resnet18", 8 / 255, 0, 1000, 10000, 128, 1000),
    budgets=(85.0, 255.0, 510.0),
    standard_epochs=30,
    rates=(1e-3, 1e-4, 3e-4),
    gammas=GAMMAS | {"CURE frozen": (4.0, 1.0, 12.0)},
    steps=(0.5, 0.72, 1.5),
    seeds=(1, 2),
)
TINY = Sizes(
    Setting("digits", "resnet8", 0.1, 64, 32, 32, 32, 8),
    budgets=(17.0, 17.0, 17.0),
    standard_epochs=1,
    rates=(3e-3,),
    gammas={label: gammas[:1] for label, gammas in GAMMAS.items()},
    steps=(),
    seeds=(),
)
PRESETS = {
    "cpu": (CPU, full),
    "large": (LARGE, long),
    "collapse": (COLLAPSE, long),
    "smooth": (SMOOTH, smooth),
    "cifar": (CIFAR, few),
    "gpu": (GPU, full),
    "tiny": (TINY, full),
}


class Study:
    """Does the runs that a grid asks for, and keeps their rows.

    Args:
        sizes: of the grid.
        images: of its setting.
        table: takes the rows.
        device: to compute on.
        cache: folder of trained weights; None for none.
    """

    def __init__(self, sizes: Sizes, images: Images, table: Table, device: torch.device, cache: Path | None) -> None:
        self.sizes, self.images, self.table, self.device, self.cache = sizes, images, table, device, cache
        self.began = time.monotonic()
        for seed in (0, *sizes.seeds):
            self.run(standard(sizes), seed, "start")

    def run(self, recipe: Recipe, seed: int, stage: str) -> None:
        """Do a run, unless its row is there."""
        run = self.made(recipe, seed)
        if self.table.find(run.key) is None:
            self._put(run, {**run.execute(), "stage": stage})

    def examine(self, recipe: Recipe, seed: int) -> None:
        """Put a run under AutoAttack and the checklist, unless that is done."""
        run = self.made(recipe, seed)
        row = self.table.find(run.key)
        if row is None or not row["autoattack"]:
            self._put(run, run.examine())

    def best(self, label: str) -> Recipe:
        """Return the searched recipe of a label that is best under PGD-10 on validation images."""
        wanted = {name: str(value) for name, value in dataclasses.asdict(self.sizes.setting).items()}
        wanted |= {"label": label, "stage": "search"}
        rows = [row for row in self.table.rows if all(row[name] == value for name, value in wanted.items())]
        if not rows:
            raise ValueError(f"{label} must be searched before it is chosen from")
        return recipe_of(max(rows, key=lambda row: float(row["val_pgd10"])))

    def best_of(self, recipes: Sequence[Recipe]) -> Recipe:
        """Return the best recipe under PGD-10 on validation images, the first of equals."""
        rows = [self.table.find(self.made(recipe, 0).key) for recipe in recipes]
        return recipe_of(max((row for row in rows if row), key=lambda row: float(row["val_pgd10"])))

    def made(self, recipe: Recipe, seed: int) -> Run:
        """Return a run, with the one that it starts from."""
        options = (self.images, self.device, self.cache)
        start = None
        if recipe.start == "standard":
            start = Run(standard(self.sizes), self.sizes.setting, seed, None, *options)
        return Run(recipe, self.sizes.setting, seed, start, *options)

    def _put(self, run: Run, found: dict[str, object]) -> None:
        row = {name: str(value) for name, value in found.items()}
        about = {name: str(value) for name, value in context(self.device).items()}
        shown = self.table.put({**run.key, **row, **about})
        minutes = (time.monotonic() - self.began) / 60
        print(f"{minutes:6.1f} min  {line(shown)}", flush=True)


def line(row: Row) -> str:
    """A row in brief."""
    settings = f"lr {row['lr'].split(',')[-1]} gamma {row['gamma'].split(',')[-1]} h {row['h'].split(',')[-1]}"
    text = (
        f"{row['stage']:<8} {row['label']:<24} seed {row['seed']} {settings}: {row['cost']} F x {row['epochs']} epochs"
    )
    text += f", clean {row['clean']}, PGD-20 x 5 {row['pgd20x5']}, validation {row['val_pgd10']}"
    if row["autoattack"]:
        text += f", AutoAttack {row['autoattack']} (PGD there {row['pgd20x5_subset']}), checklist {row['checklist']}"
    return f"{text}, {row['seconds']} s"


def recipe_of(row: Row) -> Recipe:
    """Return the recipe of a row."""
    kinds = {"int": int, "float": float, "str": str}
    fields = dataclasses.fields(Recipe)
    return Recipe(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields})


def check_row(study: Study, number: int) -> list[str]:
    """Do the run of a row again, from standard training on; return the columns that differ, of those that must not."""
    row = study.table.rows[number - 1]
    run = study.made(recipe_of(row), int(row["seed"]))
    if any(row[name] != run.key[name] for name in KEY):
        raise ValueError(f"row {number} must be of this preset's setting, got {row['dataset']}, {row['model']}, ...")
    found = {name: str(value) for name, value in run.execute().items()}
    return [name for name, value in found.items() if name not in MAY_DIFFER and row[name] != value]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--dataset", help="of fastcure.data.load, in place of the preset's")
    parser.add_argument("--eps", type=float, help="radius in [0, 1], in place of the preset's")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--cifar10-jpeg", type=Path, help=f"the file of {JPEG}")
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--cache", type=Path, default=Path("runs/robustness"), help="trained weights and tables")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plot", action="store_true", help="show what is there, and run nothing")
    parser.add_argument("--check-row", type=int, metavar="N", help="do the run of the Nth row again, and compare")
    given = parser.parse_args(arguments)
    sizes, grid = PRESETS[given.preset]
    changes = {name: value for name in ("dataset", "eps") if (value := getattr(given, name)) is not None}
    sizes = dataclasses.replace(sizes, setting=dataclasses.replace(sizes.setting, **changes))
    table, setting = Table(given.out), sizes.setting
    if not given.plot:
        counts = setting.train, setting.validation, setting.test
        images = read_images(setting.dataset, given.data_dir, given.cifar10_jpeg, *counts)
        device = torch.device(given.device)
        print(f"{setting.dataset}: {len(images.train[1]):,} training images, {setting.model}, {device}", flush=True)
        if given.check_row:
            differ = check_row(Study(sizes, images, table, device, None), given.check_row)
            print(f"row {given.check_row}: " + (f"differs in {', '.join(differ)}" if differ else "the same"))
            return int(bool(differ))
        grid(Study(sizes, images, table, device, given.cache), sizes)
    tables = given.cache / "tables.md"
    tables.parent.mkdir(parents=True, exist_ok=True)
    write_whole(tables, (summary(table.rows) + "\n").encode())
    picture = PICTURE if given.out == TABLE else given.out.with_suffix(".png")
    print(f"picture in {draw(table.rows, picture)}, tables in {tables}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
