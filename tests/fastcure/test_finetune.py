"""The bundled script, run as a user runs it, on data small enough for a test."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from pictures import BLUE, ORANGE, drawn
from safetensors.torch import load_file, save_file
from small_runs import FILES, history

import fastcure.training.finetune as module
from fastcure.cli import main
from fastcure.data import Dataset, hold_out
from fastcure.models import resnet8
from fastcure.training.finetune import collapse, table
from fastcure.training.run import Run
from fastcure.training.settings import make_settings


def finetune(npz: Path, out: Path, *flags: str) -> int:
    small = ["--pretrain-epochs", "2", "--epochs", "2", "--batch-size", "16", "--eps", "8/255,0.1", "--gamma", "0.1"]
    return main(["finetune", "--dataset", f"npz:{npz}", "--out", str(out), *small, *flags])


def read(out: Path, name: str) -> dict:
    return json.loads((out / name).read_text())


@pytest.fixture(scope="module")
def run(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    assert finetune(npz, out) == 0
    return out


def accuracy(weights: Path, npz: Path) -> float:
    """On the test images, by a plain forward pass."""
    model = resnet8(num_classes=2).eval()
    model.load_state_dict(load_file(weights))
    with np.load(npz) as arrays:
        x, y = (torch.from_numpy(arrays[f"{name}_test"]) for name in "xy")
    return float((model(x.permute(0, 3, 1, 2).float() / 255).argmax(1) == y).double().mean())


def test_the_folder_holds_what_is_promised(run: Path, npz: Path) -> None:
    assert sorted(p.name for p in run.iterdir()) == sorted(FILES)
    metrics = read(run, "metrics.json")
    assert list(metrics) == ["before", "after"]
    for name, side in zip(("original", "model"), metrics.values(), strict=True):
        assert side["clean"] == accuracy(run / f"{name}.safetensors", npz)
        assert list(side["pgd"]) == ["0.0313725", "0.1"]
        assert side["pgd"]["0.1"] <= side["pgd"]["0.0313725"] <= side["clean"]
    rows = history(run)
    assert [(row["phase"], row["epoch"]) for row in rows] == [
        ("pretrain", "1"), ("pretrain", "2"), ("finetune", "1"), ("finetune", "2")
    ]  # fmt: skip
    assert read(run, "config.json")["gamma"] == "0.1"
    assert read(run, "environment.json")["images"] == {"train": 43, "validation": 5, "test": 24}
    picture = (run / "curves.png").read_bytes()
    assert drawn(picture, BLUE) > 500
    assert drawn(picture, ORANGE) > 300


def test_a_run_is_followed_on_images_that_are_neither_trained_on_nor_tested_on(npz: Path, tmp_path: Path) -> None:
    """The labels of the test images are exchanged: what follows the run does not see them."""
    with np.load(npz) as arrays:
        wrong = {**arrays, "y_test": 1 - arrays["y_test"]}
    np.savez(tmp_path / "wrong.npz", **wrong)
    flags = ["--track", "3", "--validation", "20", "--pretrain-lr", "1e-2", "--lr", "1e-5", "--eps", "0.02"]
    assert finetune(tmp_path / "wrong.npz", tmp_path / "out", *flags) == 0
    assert read(tmp_path / "out", "metrics.json")["after"]["clean"] < 0.1
    assert float(history(tmp_path / "out")[-1]["clean"]) > 0.9
    with (tmp_path / "out" / "track.csv").open(newline="") as file:
        assert all(float(row["clean"]) > 0.6 for row in csv.DictReader(file))
    assert read(tmp_path / "out", "environment.json")["images"] == {"train": 28, "validation": 20, "test": 24}


def test_a_limit_of_sorted_data_has_every_class(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(npz) as arrays:
        order = {split: arrays[f"y_{split}"].argsort(kind="stable") for split in ("train", "test")}
        arranged = {f"{name}_{split}": arrays[f"{name}_{split}"][order[split]] for name in "xy" for split in order}
    np.savez(tmp_path / "sorted.npz", **arranged)
    seen = []

    def watched(data: Dataset, count: int | None, seed: int) -> tuple[Dataset, torch.Tensor, torch.Tensor]:
        rest, x, y = hold_out(data, count, seed)
        seen.extend([rest.y_train, y, rest.y_test])
        return rest, x, y

    monkeypatch.setattr(module, "hold_out", watched)
    flags = ["--limit", "20", "--track", "9"]
    assert finetune(tmp_path / "sorted.npz", tmp_path / "out", *flags) == 0
    printed = capsys.readouterr().out
    assert "18 training, 2 validation, 20 test images" in printed
    assert "--limit: stratified samples of 48 training and 24 test images" in printed
    assert "--track 9: there are 2 validation images" in printed
    for labels, split in zip(seen, ("train", "train", "test"), strict=True):
        y = arranged[f"y_{split}"]
        shares = len(labels) * np.bincount(y) / len(y)
        assert (abs(labels.bincount(minlength=2).numpy() - shares) < 2).all()
        assert labels.unique().numel() == 2


def test_weights_load_into_the_bare_model_and_say_nothing_of_the_machine(run: Path) -> None:
    states = [load_file(run / name) for name in ("original.safetensors", "model.safetensors")]
    for state in states:
        resnet8(num_classes=2).load_state_dict(state)
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])
    # Frozen: CURE moves no running statistic.
    assert torch.equal(states[0]["bn1.running_mean"], states[1]["bn1.running_mean"])
    assert str(run).encode() not in (run / "model.safetensors").read_bytes()


def test_a_seeded_run_repeats_bit_for_bit(run: Path, npz: Path, tmp_path: Path) -> None:
    assert finetune(npz, tmp_path / "again") == 0
    assert finetune(npz, tmp_path / "other", "--seed", "1") == 0
    for name in ("original.safetensors", "model.safetensors", "history.csv", "metrics.json"):
        assert (run / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (run / "model.safetensors").read_bytes() != (tmp_path / "other" / "model.safetensors").read_bytes()


def test_a_folder_that_holds_a_run_is_refused(run: Path, npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert finetune(npz, run) == 2
    assert "holds something: choose another" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_checkpoint_takes_the_place_of_normal_training(
    run: Path, npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    state = load_file(run / "original.safetensors")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if suffix == ".pth" else state, path)
    assert finetune(npz, tmp_path / "out", "--checkpoint", str(path)) == 0
    assert capsys.readouterr().out.count(f"checkpoint {path}: took 'state_dict'") == (suffix == ".pth")
    assert (tmp_path / "out" / "original.safetensors").read_bytes() == (run / "original.safetensors").read_bytes()
    assert read(tmp_path / "out", "metrics.json")["before"] == read(run, "metrics.json")["before"]
    assert {row["phase"] for row in history(tmp_path / "out")} == {"finetune"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-stats", "split"],
        ["--power", "1", "--gamma", "0:0.1x50%,0.1"],
        ["--engine", "reference"],
        ["--amp", "bf16"],
        ["--limit", "20", "--no-augment", "--pretrain-epochs", "0"],
    ],
)
def test_options_run(npz: Path, tmp_path: Path, flags: list[str]) -> None:
    assert finetune(npz, tmp_path / "out", *flags) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_h_in_steps_of_the_largest_eps(npz: Path, tmp_path: Path) -> None:
    flags = ["--eps", "0.05,0.1", "--h-unit", "eps", "--h", "0.5:1", "--batch-stats", "train", "--loss-at", "step"]
    assert finetune(npz, tmp_path / "run", *flags) == 0
    last = history(tmp_path / "run")[-1]
    now = 2 - 1 / 3  # epochs of two, before the last of three steps
    assert float(last["h"]) == pytest.approx((0.5 + 0.5 * now / 2) * 0.1 * 192**0.5)


def test_a_pair_of_official_svhn_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count)[:, None] % 10 + 1  # 10 is the digit 0
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images, "y": labels.astype(np.uint8)})
    flags = ["--dataset", "svhn", "--data-dir", str(tmp_path), "--preset", "svhn-paper", "--model", "resnet8"]
    assert main(["finetune", *flags, "--epochs", "1", "--pretrain-epochs", "1", "--out", str(tmp_path / "out")]) == 0
    config = read(tmp_path / "out", "config.json")
    assert (config["gamma"], config["h"], config["lr"]) == ("4x50%,8x25%,12x25%", "1.25", "1e-4:1e-6")


@pytest.mark.parametrize(
    ("before", "after", "labels", "words"),
    [
        (0.90, 0.25, [250] * 4, "clean accuracy fell from 90.0% to 25.0% (the most frequent class has 25.0%): lower"),
        (0.90, 0.70, [250] * 4, "clean accuracy fell from 90.0% to 70.0%"),
        (0.25, 0.25, [250] * 4, "before CURE, clean accuracy is 25.0%, no better than"),
        (0.80, 0.80, [900, 50, 50], "before CURE, clean accuracy is 80.0%, no better than the most frequent class"),
        (0.99, 0.93, [900, 50, 50], "clean accuracy fell from 99.0% to 93.0% (the most frequent class has 90.0%)"),
        (0.95, 0.83, [100] * 10, ""),  # the paper's, on CIFAR-10
        (0.96, 0.91, [100] * 10, ""),  # and on SVHN
        (0.90, 0.70, [5] * 4, ""),  # four of twenty images: by chance, perhaps
        (0.50, 0.60, [250] * 4, ""),
    ],
)
def test_a_collapse_is_told_from_a_price(before: float, after: float, labels: list[int], words: str) -> None:
    metrics = {name: {"clean": clean, "pgd": {}} for name, clean in (("before", before), ("after", after))}
    y = torch.arange(len(labels)).repeat_interleave(torch.tensor(labels))
    found = collapse(metrics, y)
    assert len(found) == bool(words)
    assert all(words in warning for warning in found)


def test_a_run_that_collapses_says_so(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"before CURE": 1.0, "after CURE": 0.5}
    monkeypatch.setattr(Run, "evaluate", lambda _, title: {"clean": found[title], "pgd": {"0.1": 0.0}})
    assert finetune(npz, tmp_path / "out") == 0
    assert capsys.readouterr().out.count("warning: clean accuracy fell from 100.0% to 50.0%") == 1
    (warning,) = read(tmp_path / "out", "environment.json")["warnings"]
    assert "lower --gamma" in warning


def test_explicit_settings_win_over_the_preset_and_that_over_the_defaults() -> None:
    assert make_settings({}).preset == "digits"
    assert make_settings({"dataset": "svhn"}).preset is None
    paper = make_settings({"preset": "svhn-paper", "gamma": "2"})
    assert (paper.dataset, paper.model, paper.epochs, paper.gamma) == ("svhn", "resnet18", 20, "2")
    schedule = make_settings({"preset": "svhn-paper"}).schedule("gamma")
    assert [schedule.at(epoch) for epoch in (0, 9, 10, 14, 15, 19)] == [4, 4, 8, 8, 12, 12]


@pytest.mark.parametrize("preset", ["fast", "strong"])
def test_presets_of_the_study_run_on_any_data(npz: Path, tmp_path: Path, preset: str) -> None:
    flags = ["--preset", preset, "--dataset", f"npz:{npz}", "--pretrain-epochs", "1", "--epochs", "1", "--eps", "0.1"]
    assert main(["finetune", *flags, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    used = read(tmp_path / "out", "config.json")
    assert (used["preset"], used["loss_at"], used["batch_stats"], used["h_unit"]) == (preset, "step", "train", "eps")
    assert used["fraction"] == 0.25
    assert float(history(tmp_path / "out")[-1]["h"]) == pytest.approx(0.1 * 192**0.5)


def test_the_columns_of_the_table_are_aligned_for_any_radius() -> None:
    metrics = {name: {"clean": 0.5, "pgd": {"0.0470588": 0.25, "0.1": 1.0}} for name in ("before", "after")}
    lines = table(metrics).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].startswith("PGD-10, eps 0.04706 ")
