"""The robustness study on toy sizes: its steps compute what they say, and its rows can be had again."""

import copy
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import methods
import numpy as np
import pytest
import torch
from methods import Moment, Recipe, gradients
from PIL import Image
from robustness import TINY, Study, check_row, recipe_of
from robustness_data import JPEG, Images, read_images
from robustness_grid import COST, KIND, MAIN, first, full, long, peak, smooth
from robustness_plot import draw
from robustness_run import Run
from robustness_summary import correlation, overview, ranked, summary
from robustness_table import COLUMNS, Row, Table

from fastcure import CURE, reference
from fastcure._functional import ModelWithLoss, cross_entropy
from fastcure.models import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> Images:
    return read_images("digits", "data", None, 64, 32, 32)


@pytest.fixture
def batch() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model, x = build("resnet8", channels=1), torch.rand(8, 1, 12, 12)
    model(x)  # running statistics that are not the initial ones
    return model, x, torch.arange(8)


def moment(**changes: float) -> Moment:
    return Moment(0, 0.1, 0.7, 1.2, torch.Generator().manual_seed(0))._replace(**changes)  # type: ignore[arg-type]


def found(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("batch_stats", ["frozen", "split", "train"])
def test_the_step_is_that_of_the_library(batch: tuple, batch_stats: str) -> None:
    model, x, y = batch
    other = copy.deepcopy(model)
    CURE(other, 1.2, 0.7, batch_stats=batch_stats)(x, y).total.backward()  # type: ignore[arg-type]
    gradients(model, x, y, Recipe("", "cure", 1, "1", batch_stats=batch_stats), moment())
    assert torch.equal(found(model), found(other))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_a_loss_at_fgsm_is_that_of_the_library(batch: tuple) -> None:
    model, x, y = batch
    other = copy.deepcopy(model)
    CURE(other, 1.2, 0.7, batch_stats="train", loss_at="step")(x, y).total.backward()
    gradients(model, x, y, Recipe("", "cure", 1, "1", mix=1.0), moment())
    assert torch.equal(found(model), found(other))


def test_in_training_mode_it_is_that_of_the_reference_and_updates_buffers_once(batch: tuple) -> None:
    model, x, y = batch
    other, once = copy.deepcopy(model), copy.deepcopy(model)
    once(x)
    _, loss, penalty = reference.curvature(ModelWithLoss(other, cross_entropy), x, y, 1.2)
    (loss + 0.7 * penalty).mean().backward()
    gradients(model, x, y, Recipe("", "cure", 1, "1"), moment())
    torch.testing.assert_close(found(model), found(other), rtol=1e-3, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), once.buffers(), strict=True))


def test_the_loss_at_the_second_point_is_the_loss_there(batch: tuple) -> None:
    model, x, y = batch
    other = copy.deepcopy(model).eval()
    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(other(point), y).sum(), point)
    cross_entropy(other(x + 1.2 * reference.unit_sign(g)), y).mean().backward()
    gradients(model, x, y, Recipe("", "cure", 1, "1", batch_stats="frozen", mix=1.0), moment(gamma=0.0))
    torch.testing.assert_close(found(model), found(other), rtol=1e-4, atol=1e-6)


def test_a_penalty_on_a_share_is_that_of_the_library(batch: tuple) -> None:
    model, x, y = batch
    other = copy.deepcopy(model)
    CURE(other, 1.2, 0.7, batch_stats="train", loss_at="step", fraction=0.25)(x, y).total.backward()
    gradients(model, x, y, Recipe("", "cure", 1, "1", mix=1.0, fraction=0.25), moment())
    assert torch.equal(found(model), found(other))


def test_a_penalty_at_every_fourth_step_is_unbiased(batch: tuple) -> None:
    model, x, y = batch
    recipe = Recipe("", "cure", 1, "1", batch_stats="frozen")
    gradients(model, x, y, recipe, moment())
    whole, every = found(model), []
    for step in range(4):
        gradients(model, x, y, dataclasses.replace(recipe, every=4), moment(step=step))
        every.append(found(model))
    torch.testing.assert_close(sum(every) / 4, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("label", KIND)
def test_the_budget_knows_what_a_step_costs(images: Images, label: str) -> None:
    run = Run(dataclasses.replace(first(label, TINY), start="scratch"), TINY.setting, 0, None, images, CPU, None)
    assert run.cost(run.started()) == pytest.approx(COST[label], rel=0.02)


def test_trades_is_its_definition(batch: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = batch
    model.double()
    x = x.double()
    adv = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
    monkeypatch.setattr(methods, "attacked", lambda *_: adv)
    other = copy.deepcopy(model).eval()
    p, q = other(x).softmax(1), other(adv).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    (-other(x).log_softmax(1)[range(8), y].mean() + 0.7 * divergence).backward()
    said = gradients(model, x, y, Recipe("", "trades", 1, "1", batch_stats="frozen", steps=2), moment())
    assert said == pytest.approx(float(divergence.detach()), rel=1e-9)
    torch.testing.assert_close(found(model), found(other), rtol=1e-7, atol=1e-10)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'magic'"):
        Recipe("", "magic", 1, "1")
    with pytest.raises(ValueError, match="a penalty at some steps needs batch_stats='frozen', got 'train'"):
        Recipe("", "cure", 1, "1", every=2)
    with pytest.raises(ValueError, match=r"a penalty on some samples is that of fastcure.CURE, which knows no Recipe"):
        Recipe("", "cure", 1, "1", fraction=0.5, mix=0.5)
    with pytest.raises(ValueError, match="batch_stats='split' needs mix=0"):
        Recipe("", "cure", 1, "1", batch_stats="split", mix=0.5)


def test_a_run_is_done_once_and_again_gives_the_same_row(images: Images, tmp_path: Path) -> None:
    table = Table(tmp_path / "rows.csv")
    study = Study(TINY, images, table, CPU, tmp_path / "cache")
    recipe = first("FGSM-RS", TINY)
    study.run(recipe, 0, "search")
    written = table.path.read_bytes()
    study = Study(TINY, images, Table(table.path), CPU, tmp_path / "cache")
    study.run(recipe, 0, "search")
    assert len(study.table.rows) == 2  # the normal network and this
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
    assert recorder.searched.keys() == COST.keys()
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
