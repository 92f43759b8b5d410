"""The robustness study on toy sizes: its steps compute what they say, and its rows can be had again."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from robustness import TINY, Study, check_row, recipe_of
from robustness_data import JPEG, Images, read_images
from robustness_grid import KIND, MAIN, cost, first, full, long, peak, smooth
from robustness_plot import draw
from robustness_recipe import Recipe
from robustness_run import Run
from robustness_summary import correlation, overview, ranked, summary
from robustness_table import COLUMNS, Row, Table

from fastcure import CURE, eps_to_h
from fastcure.data import Loader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> Images:
    return read_images("digits", "data", None, 64, 32, 32)


@pytest.mark.parametrize("label", KIND)
def test_the_budget_knows_what_a_step_costs(images: Images, label: str) -> None:
    recipe = dataclasses.replace(first(label, TINY), start="scratch")
    run = Run(recipe, TINY.setting, 0, None, images, CPU, None)
    assert run.cost(run.started()) == pytest.approx(cost(recipe), rel=0.02)


def test_a_step_of_a_run_is_that_of_the_objective(images: Images) -> None:
    """Two steps of CURE and Adam by hand, with the schedules of the recipe."""
    recipe = Recipe("", "cure", 1, "0.01:0.02", start="scratch", gamma="0.5:1", h="0.5", loss_at="step")
    run = Run(recipe, TINY.setting, 0, None, images, CPU, None)
    model = run.started()
    cure = CURE(model, h=0.5 * eps_to_h(0.1, images.numel), batch_stats="train", loss_at="step", engine="eager")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loader = Loader(*images.train, 32, augment=images.augment, generator=torch.Generator().manual_seed(0))
    model.train()
    for x, y, lr, gamma in [(*batch, 0.01 * (1 + i / 2), 0.5 * (1 + i / 2)) for i, batch in enumerate(loader)]:
        optimizer.param_groups[0]["lr"], cure.gamma = lr, gamma
        optimizer.zero_grad()
        cure(x.contiguous(memory_format=torch.channels_last), y).total.backward()
        optimizer.step()
    trained, _ = run.trained()
    for found, wanted in zip(trained.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_settings_that_mean_nothing_are_refused(images: Images) -> None:
    for objective, options, message in [
        ("magic", {}, "magic"),
        ("standard", {"batch_stats": "split"}, "batch_stats must be 'train' or 'frozen' for Standard"),
        ("cure", {"batch_stats": "split", "loss_at": "step"}, "loss_at='step' must have"),
        ("pgd", {}, "steps must be a whole number >= 1"),
    ]:
        with pytest.raises((ValueError, KeyError), match=message):
            Recipe("", objective, 1, "1", **options).make(torch.nn.Identity())


def test_a_run_is_done_once_and_again_gives_the_same_row(images: Images, tmp_path: Path) -> None:
    table = Table(tmp_path / "rows.csv")
    study = Study(TINY, images, table, CPU, tmp_path / "cache")
    recipe = first("FGSM-RS", TINY)
    study.run(recipe, 0, "search")
    written = table.path.read_bytes()
    study = Study(TINY, images, Table(table.path), CPU, tmp_path / "cache")
    study.run(recipe, 0, "search")
    assert len(study.table.rows) == 2  # standard training and this
    assert table.path.read_bytes() == written
    assert recipe_of(study.table.rows[1]) == recipe
    again = Study(TINY, images, study.table, CPU, None)
    assert check_row(again, 2) == []
    study.table.rows[1] |= {"hz_after": "0", "seconds": "0"}
    assert check_row(again, 2) == ["hz_after"]
    assert draw(study.table.rows, tmp_path / "picture.png").stat().st_size > 10_000


def row(label: str, stage: str, **values: object) -> Row:
    """A row with the values that a test cares for."""
    usual: dict[str, object] = dict.fromkeys(COLUMNS, "")
    usual |= {
        "dataset": "digits",
        "model": "resnet8",
        "eps": 0.1,
        "train": 100,
        "cost": 12.0,
        "gamma": "1",
        "lr": "1:2",
    }
    usual |= {
        "milliseconds_an_image": 3,
        "clean": 0.9,
        "pgd20x5": 0.5,
        "pgd20x5_subset": 0.5,
        "val_pgd10": 0.5,
        "h": "1",
    }
    usual |= {
        "seconds": 1,
        "compute": 3400,
        "epochs": 7,
        "followed": "0.5 0.6",
        "hz_before": 3,
        "hz_after": 1,
        "seed": 0,
    }
    return {name: str(value) for name, value in {**usual, "label": label, "stage": stage, **values}.items()}


def test_tables_are_of_the_settings_that_validation_chose() -> None:
    rows = [
        row("CURE", "search", val_pgd10=0.5, pgd20x5=0.9),
        row(
            "CURE",
            "search",
            val_pgd10=0.6,
            pgd20x5=0.4,
            autoattack=0.35,
            margin20x5_subset=0.36,
            checklist="ok",
            hz_after=2,
        ),
        row("CURE", "seed", seed=1, pgd20x5=0.6, hz_after=0.5),
        row("CURE", "budget", compute=8500, pgd20x5=0.7, seconds=33),
        row("CURE: constant gamma", "ablation", pgd20x5=0.33),
    ]
    text = summary(rows)
    assert "| CURE | 12.0 | 3.0 | 90.0 (90.0-90.0) | 50.0 (40.0-60.0) | 35.0 (50.0; 36.0) | ok |" in text
    assert "| CURE | 40.0 (1 s) | 70.0 (33 s) |" in text
    assert "| CURE: constant gamma | 12.0 | 7 | 90.0 | 33.0 |" in text
    assert "| CURE | 50 60 |" in text


def test_the_overview_has_means_over_seeds_and_leaves_comparisons_of_few_out() -> None:
    rows = [row(label, "search", pgd20x5=0.4) for label in MAIN[:5]]
    rows += [row("CURE frozen", "seed", seed=1, pgd20x5=0.6), row("CURE frozen", "budget", compute=8500, pgd20x5=0.7)]
    rows[1]["autoattack"] = "0.35"
    others = [row(label, "search", eps=0.5) for label in MAIN[:4]]
    lines = overview(rows + others).splitlines()[2:]
    assert lines == [
        "| digits, 25.5/255, 34 F | 40 | 50 | 40 | 40 | 40 |  |  |  |  |",
        "| digits, 25.5/255, 85 F |  | 70 |  |  |  |  |  |  |  |",
        "| digits, 25.5/255, AutoAttack |  | 35 |  |  |  |  |  |  |  |",
    ]


def test_rank_correlation() -> None:
    rows = [row("a", "search", hz_after=h, pgd20x5=p) for h, p in [(1, 0.9), (2, 0.5), (2, 0.5), (30, 0.1)]]
    assert "rank correlation with PGD-20 x 5 accuracy is -1.00" in correlation(rows)
    assert ranked([3.0, 1.0, 3.0, 0.0]) == [2.5, 1.0, 2.5, 0.0]


def test_validation_images_choose_and_nothing_else(images: Images, tmp_path: Path) -> None:
    study = Study(TINY, images, Table(tmp_path / "rows.csv"), CPU, tmp_path / "cache")
    for lr, validation, test, stage in [
        ("1", "0.3", "0.9", "search"),
        ("2", "0.4", "0.1", "search"),
        ("3", "1", "1", "seed"),
    ]:
        run = study.made(dataclasses.replace(first("PGD-7", TINY), lr=lr), 0)
        study.table.put({**run.key, "val_pgd10": validation, "pgd20x5": test, "stage": stage})
    assert study.best("PGD-7").lr == "2"
    with pytest.raises(ValueError, match="PGD-2 must be searched"):
        study.best("PGD-2")


def test_the_grid_asks_for_what_it_has_searched() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.searched: dict[str, Recipe] = {}
            self.runs: set[tuple[Recipe, int]] = set()

        def run(self, recipe: Recipe, seed: int, stage: str) -> None:
            self.runs.add((recipe, seed))
            if stage == "search":
                self.searched.setdefault(recipe.label, recipe)

        def best(self, label: str) -> Recipe:
            return self.searched[label]

        def best_of(self, recipes: Sequence[Recipe]) -> Recipe:
            return recipes[-1]

        def examine(self, recipe: Recipe, seed: int) -> None:
            assert (recipe, seed) in self.runs

    recorder = Recorder()
    for grid in (full, long, smooth):
        grid(recorder, dataclasses.replace(TINY, seeds=(1,)))
    assert recorder.searched.keys() == KIND.keys()
    assert all(peak(recipe.lr) > 0 for recipe, _ in recorder.runs)


def test_another_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns"):
        Table(path)


def test_jpegs_of_one_header(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {}
    for split, count in (("train", 5), ("test", 2)):
        files = []
        for level in rng.integers(20, 230, count):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (int(level), 0, 0)).save(file, "JPEG")
            files.append(file.getvalue())
        cut = files[0].index(b"\xff\xda")  # where the picture begins
        assert len({file[:cut] for file in files}) == 1
        arrays |= {"header": np.frombuffer(files[0][:cut], np.uint8), f"y_{split}": np.arange(count)}
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(file[cut:] for file in files), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *(len(file) - cut for file in files)])
    np.savez(tmp_path / "some.npz", **arrays)  # type: ignore[arg-type]
    got = read_images(JPEG, "data", tmp_path / "some.npz", 3, 1, 2)
    assert [got.train[0].shape, got.validation[1].tolist(), got.test[1].tolist()] == [(3, 3, 32, 32), [4], [0, 1]]
    assert int(got.train[0][:, 0].float().std(dim=(1, 2)).max()) == 0
    with pytest.raises(ValueError, match="needs its file"):
        read_images(JPEG, "data", None, 3, 1, 2)
