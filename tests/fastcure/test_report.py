"""`fastcure analyze` and `fastcure report` on a small run, and the track that figure 3 is drawn from."""

import contextlib
import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fastcure.cli import main
from fastcure.report import measures
from fastcure.report.page import Html, table

FIGURES = ["figure1_profile", "figure2_surface", "figure3_evolution", "figure4_accuracy", "theorem1_bounds"]


def finetune(npz: Path, out: Path, *flags: str) -> None:
    small = ["--pretrain-epochs", "2", "--epochs", "2", "--batch-size", "16", "--eps", "0.1", "--gamma", "0.1"]
    assert main(["finetune", "--dataset", f"npz:{npz}", "--out", str(out), *small, *flags]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on three classes of 6 x 6 images, one tracked and one not, else the same."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    y = np.arange(72) % 3
    x = (rng.integers(0, 120, (72, 6, 6)) + 60 * y[:, None, None]).astype(np.uint8)
    np.savez(folder / "grey.npz", x_train=x[:48], y_train=y[:48], x_test=x[48:], y_test=y[48:])
    finetune(folder / "grey.npz", folder / "tracked", "--track")
    finetune(folder / "grey.npz", folder / "plain")
    return folder


def test_tracking_does_not_disturb_training(runs: Path) -> None:
    for name in ("original.safetensors", "model.safetensors", "history.csv", "metrics.json"):
        assert (runs / "tracked" / name).read_bytes() == (runs / "plain" / name).read_bytes()
    with (runs / "tracked" / "track.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert json.loads((runs / "tracked" / "config.json").read_text())["track"] == 1000
    assert all(float(row["frobenius"]) > 0 and 0 <= float(row["pgd"]) <= 1 for row in rows)
    assert not (runs / "plain" / "track.csv").exists()


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.sources: list[str] = []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._heading = tag == "h2"
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.headings.append(data)
            self._heading = False


def test_the_report_of_two_runs(runs: Path) -> None:
    out = runs / "report"
    assert main(["report", str(runs / "tracked"), str(runs / "plain"), "--out", str(out)]) == 0
    for name in FIGURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with (out / f"{name}.csv").open(newline="") as file:
            models = {row["model"] for row in csv.DictReader(file)}
        assert "tracked" in models
    page = Page((out / "index.html").read_text())
    assert page.headings == [
        "Table 1: accuracy",
        "Figure 1: curvature",
        "Figure 2: loss surfaces",
        "Figure 3: evolution",
        "Figure 4: accuracy against eps",
        "Theorem 1",
        "Gradient masking",
        "Settings",
    ]
    assert len(page.sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)  # nothing is fetched
    with (out / "figure4_accuracy.csv").open(newline="") as file:
        found = {(row["model"], float(row["eps"])): float(row["accuracy"]) for row in csv.DictReader(file)}
    metrics = json.loads((runs / "tracked" / "metrics.json").read_text())
    assert found["before CURE", 0.1] == metrics["before"]["pgd"]["0.1"]
    assert found["tracked", 0.1] == metrics["after"]["pgd"]["0.1"]
    assert found["tracked", 0.0] == metrics["after"]["clean"]
    assert main(["report", str(runs / "plain"), "--out", str(out)]) == 2  # holds something


def test_figure_1_takes_the_step_of_training(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    for flags in (["--h", "0.5", "--h-unit", "l2"], ["--h", "0.5:2", "--h-unit", "eps"]):
        finetune(runs / "grey.npz", tmp_path / flags[-1], *flags)

        def profiles(subjects: object, images: object, h: float, bar: object) -> None:
            lengths.append(h)
            raise KeyboardInterrupt

        monkeypatch.setattr(measures, "profiles", profiles)
        with contextlib.suppress(KeyboardInterrupt):
            main(["report", str(tmp_path / flags[-1]), "--out", str(tmp_path / f"report {flags[-1]}")])
    assert lengths == pytest.approx([0.5, 2 * 0.1 * 6])


def test_an_analysis(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--run",
        str(runs / "plain"),
        "--limit",
        "8",
        "--probes",
        "5",
        "--h",
        "0.5",
        "--out",
        str(tmp_path / "analysis.json"),
    ]
    assert main(["analyze", *flags]) == 0
    networks = json.loads((tmp_path / "analysis.json").read_text())["networks"]
    assert list(networks) == ["before CURE", "after CURE"]
    for network in networks.values():
        assert network["frobenius"]["mean"] > 0
        assert len(network["largest"]) == len(network["smallest"]) == 5
        assert network["largest"] == sorted(network["largest"])
    assert "largest eigenvalues" in capsys.readouterr().out


def test_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert "torch: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["report", "nowhere"], "nowhere is not a finished run of fastcure finetune"),
        (["analyze"], "give --run, or --model and --dataset"),
        (["analyze", "--run", "nowhere"], "nowhere must be the folder of a finetune run"),
        (["analyze", "--model", "resnet8", "--dataset", "digits", "--limit", "0"], "limit must be >= 1, got 0"),
    ],
)
def test_bad_input_is_one_clear_error(
    command: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_cells_are_escaped() -> None:
    text = table(["<a>"], [["<b>"], [Html("<i>c</i>")]])
    assert "&lt;a&gt;" in text
    assert "&lt;b&gt;" in text
    assert "<i>c</i>" in text
