"""`fastcure analyze` and `fastcure report` on a small run, and the track that figure 3 is drawn from."""

import contextlib
import copy
import csv
import json
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_runs import contents, files_of_at_most, write_npz, write_run
from torch import Tensor, nn
from torch.nn import functional as F

from fastcure.cli import main
from fastcure.data import hold_out, load
from fastcure.evaluation.results import write_results
from fastcure.models import resnet8
from fastcure.report import measures, sections
from fastcure.report import report as reporting
from fastcure.report.page import Html, table
from fastcure.report.settings import NAMES

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
    data, x, y = hold_out(load(f"npz:{runs / 'grey.npz'}"), None, 0)
    assert (len(data.y_train), len(y)) == (43, 5)
    for row, when in ((rows[0], "before"), (rows[-1], "after")):  # all images that are held out are followed
        model, pixels = network(runs / "tracked", when), x.float() / 255
        assert float(row["clean"]) == float((model(pixels).argmax(1) == y).double().mean())
        assert float(row["pgd"]) * 5 == pytest.approx(round(float(row["pgd"]) * 5), abs=1e-9)
        assert float(row["along_z"]) == pytest.approx(float(plain_along_z(model, pixels, y).mean()), rel=1e-4)
        assert float(row["pgd"]) <= float(row["clean"])
    assert len({row["along_z"] for row in rows}) == 3
    assert not (runs / "plain" / "track.csv").exists()


def network(run: Path, when: str) -> nn.Module:
    model = resnet8(num_classes=3, in_channels=1)
    model.load_state_dict(load_file(run / f"{'original' if when == 'before' else 'model'}.safetensors"))
    return model.eval()


def plain_along_z(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """||H z|| (B,), by a central difference of gradients in float64, shorter than the way to the next kink."""
    model, x = copy.deepcopy(model).double(), x.double()

    def gradient(point: Tensor) -> Tensor:
        point = point.requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)[0]

    sign = gradient(x.clone()).sign().flatten(1)
    z = (sign / sign.norm(dim=1, keepdim=True)).view_as(x)
    return ((gradient(x + 1e-7 * z) - gradient(x - 1e-7 * z)) / 2e-7).flatten(1).norm(dim=1)


def check_picture(path: Path) -> None:
    """More than a white page, and drawn in more than one colour."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    share = (pixels < 250).any(1).mean()
    coloured = (pixels.max(1).astype(int) - pixels.min(1) > 60).mean()
    assert 0.01 < share < 0.95
    assert coloured > 0.001


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
    both = [str(runs / "tracked"), str(runs / "plain")]
    assert main(["report", *both, "--out", str(out), "--autoattack-images", "0"]) == 0
    for name in FIGURES:
        check_picture(out / f"{name}.png")
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
    for name, source in zip(FIGURES, page.sources, strict=True):  # nothing is fetched
        assert source.removeprefix("data:image/png;base64,") == b64encode((out / f"{name}.png").read_bytes()).decode()
    assert {path.name for path in out.iterdir()} == NAMES
    with (out / "figure4_accuracy.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["norm"] == "linf"]
    found = {(row["model"], float(row["eps"])): float(row["accuracy"]) for row in rows}
    metrics = json.loads((runs / "tracked" / "metrics.json").read_text())
    assert found["before CURE", 0.1] == metrics["before"]["pgd"]["0.1"]
    assert found["tracked", 0.1] == metrics["after"]["pgd"]["0.1"]
    assert found["tracked", 0.0] == metrics["after"]["clean"]
    assert main(["report", str(runs / "plain"), "--out", str(out)]) == 2  # holds something


def test_figure_1_takes_the_step_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_npz(Path("a.npz"))
    lengths = []

    def profiles(subjects: object, images: object, h: float, bar: object) -> None:
        lengths.append(h)
        raise KeyboardInterrupt

    monkeypatch.setattr(measures, "profiles", profiles)
    for h, unit in (("0.5", "l2"), ("0.5:2", "eps")):
        write_run(Path(unit), h=h, h_unit=unit)
        with contextlib.suppress(KeyboardInterrupt):
            main(["report", unit, "--limit", "4", "--out", f"report {unit}"])
    assert lengths == pytest.approx([0.5, 2 * 0.1 * 192**0.5])


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
    assert list(networks) == ["before fine-tuning", "after fine-tuning"]
    for network in networks.values():
        assert network["frobenius"]["mean"] > 0
        assert len(network["largest"]) == len(network["smallest"]) == 5
        assert network["largest"] == sorted(network["largest"])
    assert "largest eigenvalues" in capsys.readouterr().out


def test_the_seed_of_an_analysis_is_that_of_its_probes(runs: Path, tmp_path: Path) -> None:
    found = []
    for index, seed in enumerate(("3", "3", "4")):
        out = tmp_path / f"{index}.json"
        flags = ["--run", str(runs / "plain"), "--limit", "24", "--probes", "3", "--extremes", "1", "--out", str(out)]
        assert main(["analyze", *flags, "--seed", seed]) == 0
        found.append(json.loads(out.read_text())["networks"]["after fine-tuning"])
    assert found[0] == found[1]
    assert found[0]["frobenius"] != found[2]["frobenius"]
    assert found[0]["along_z"] == found[2]["along_z"]  # of the same images: nothing in it is random


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
    assert "<td>98.5% [95.7,&nbsp;99.5]</td>" in table(["a"], [["98.5% [95.7, 99.5]"]])


def test_a_figure_that_cannot_be_drawn_is_a_note() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font <at> all")

    files: dict[str, bytes] = {}
    drawn = sections.drawn(files, "norms", [{"a": 1}], fail, "a caption")
    assert "norms.png could not be drawn (RuntimeError: no font &lt;at&gt; all); its numbers are in norms.csv" in drawn
    assert list(files) == ["norms.csv"]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, whose report has a small file and a large one."""

    def measure(*arguments: object) -> list[object]:
        files = next(argument for argument in arguments if isinstance(argument, dict))
        files |= {"norms.csv": b"small", "table1.csv": bytes(200_000)}
        return []

    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "a.npz")
    write_run(tmp_path / "run")
    monkeypatch.setattr(reporting, "_measure", measure)
    return tmp_path


REPORT = ["report", "run", "--limit", "4"]


@pytest.mark.parametrize("empty", [True, False])
def test_a_report_on_a_full_disk_leaves_nothing(quick: Path, empty: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """It can be written again, to the same folder, once there is space."""
    out = quick / "run" / "report"
    if empty:
        out.mkdir()
    with files_of_at_most(100_000):
        assert main(REPORT) == 2
    error = capsys.readouterr().err
    assert error == "fastcure: error: run/report/table1.csv cannot be written (File too large)\n"
    assert (contents(out) if empty else out.exists()) == ({} if empty else False)
    assert main(REPORT) == 0
    assert set(contents(out)) == {"norms.csv", "table1.csv", "settings.json", "index.html"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, FloatingPointError, MemoryError])
def test_a_report_that_is_stopped_leaves_nothing(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(reporting, "_measure", fail)
        assert main(REPORT) in (1, 2, 130)
    assert "--resume" not in capsys.readouterr().err
    assert not (quick / "run" / "report").exists()
    assert main(REPORT) == 0


def test_what_a_killed_report_has_left_is_no_hindrance(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quick / "run" / "report"
    out.mkdir()
    for name in ("norms.csv", "figure1_profile.png", ".table1.csv.partial"):
        (out / name).write_text("half of")
    assert main(REPORT) == 0
    assert main(REPORT) == 2
    error = capsys.readouterr().err
    assert "out must be a new or an empty folder, got run/report, which holds something: choose another" in error
    assert "--resume" not in error
    (out / "index.html").unlink()
    (out / "mine").write_text("kept")
    assert main(REPORT) == 2


def test_a_page_that_is_whole_comes_last(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = reporting.write_whole, []

    def remember(path: Path, content: bytes) -> None:
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(reporting, "write_whole", remember)
    assert main(REPORT) == 0
    assert written[-1] == "index.html"


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_a_measurement_on_a_full_disk_leaves_nothing(
    quick: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [command, "--run", "run", "--limit", "2", "--out", "out.json"]
    flags += ["--probes", "2", "--extremes", "1"] if command == "analyze" else ["--eps", "0.1", "--steps", "1"]
    with files_of_at_most(100):
        assert main(flags) == 2
    assert "fastcure: error: out.json cannot be written (File too large)\n" in capsys.readouterr().err
    assert not (quick / "out.json").exists()
    assert main(flags) == 0
    assert json.loads((quick / "out.json").read_text())["images"] == 2


def test_results_that_are_not_finite_are_null(tmp_path: Path) -> None:
    write_results(str(tmp_path / "a.json"), {"mean": float("inf"), "all": [float("nan"), 1.0]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"mean": None, "all": [None, 1.0]}
