"""Names go into figures as they are, and a figure that cannot be drawn costs nothing but itself."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from pictures import BLUE, ORANGE, drawn
from small_runs import finetune, write_npz

import fastcure.training.finetune as module
from fastcure.cli import main
from fastcure.report import figures
from fastcure.training.curves import draw_curves

HOSTILE = ["d$^$", "$\\frac{1}{$", "a_b^{c} \\alpha_{ 50 % & #1 ~"]
HISTORY = [
    {"phase": "pretrain", "clean": 0.5, "pgd": 0.1, "penalty": 0.0, "loss": 1.0},
    {"phase": "finetune", "clean": 0.6, "pgd": 0.2, "penalty": 0.1, "loss": 0.9},
]
METRICS: Any = {name: {"clean": 0.7, "pgd": {"0.1": 0.2}} for name in ("before", "after")}


def accuracy(model: str, eps: float) -> dict[str, Any]:
    return {"model": model, "norm": "linf", "eps": eps, "accuracy": 0.5, "low": 0.4, "high": 0.6}


def title_of_curves(name: str) -> bytes:
    file = io.BytesIO()
    draw_curves(HISTORY, METRICS, file, name, 128, 450, "CURE")
    return file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_curves_of_any_name_are_drawn(name: str) -> None:
    png = title_of_curves(name)
    assert drawn(png, BLUE) > 300
    assert drawn(png, ORANGE) > 300
    assert drawn(png) > drawn(title_of_curves("")) + 50  # the title


def test_a_name_is_drawn_letter_by_letter() -> None:
    """Read as mathematics, `$x$` would lose its dollars, and be as wide as `x` alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fastcure._figure_text import as_written

    widths = {}
    for name in ("$x$", "x", "SxS"):
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], label=name)
        axes.set(title=name, xlabel=name)
        figure.suptitle(name)
        legend = axes.legend()
        as_written(figure)
        texts = [axes.title, axes.xaxis.label, *figure.texts, *legend.get_texts()]
        widths[name] = [text.get_window_extent(figure.canvas.get_renderer()).width for text in texts]
    assert len(widths["x"]) == 4
    for one, three, dollars in zip(widths["x"], widths["SxS"], widths["$x$"], strict=True):
        assert dollars > (one + three) / 2


def test_ticks_keep_their_exponents() -> None:
    from matplotlib.figure import Figure

    from fastcure._figure_text import as_written

    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1e-3, 1e3])
    axes.set_yscale("log")
    as_written(figure)
    figure.canvas.draw()
    assert all(text.get_parse_math() for text in axes.yaxis.get_ticklabels())


@pytest.mark.parametrize("name", HOSTILE)
def test_the_figures_of_a_report_show_any_name(tmp_path: Path, name: str) -> None:
    rows = [accuracy(model, e) for model in (name, "before CURE") for e in (0, 0.1)]
    figures.draw_accuracies(rows, tmp_path / "a.png")
    bounds = [{"model": name, "deepfool": 1.0, "pgd": 1.1, "lower": 0.9, "upper": 1.2}] * 2
    figures.draw_bounds(bounds, tmp_path / "b.png")
    for figure in ("a.png", "b.png"):
        assert drawn((tmp_path / figure).read_bytes(), BLUE) > 100


def test_a_legend_shows_a_name_that_begins_with_an_underscore(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        figures, "as_written", lambda figure: shown.extend(t.get_text() for t in figure.legends[0].get_texts())
    )
    figures.draw_accuracies([accuracy("_run", e) for e in (0, 0.1)], io.BytesIO())
    assert [name.strip() for name in shown] == ["_run"]


@pytest.mark.picture
def test_a_run_on_a_path_with_a_dollar_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d$^$").mkdir()
    npz = write_npz(Path("d$^$") / "e$_.npz")
    assert finetune(npz, Path("o$^$")) == 0
    assert drawn((tmp_path / "o$^$" / "curves.png").read_bytes(), BLUE) > 300


def test_a_picture_that_cannot_be_drawn_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font at all")

    monkeypatch.setattr(module, "draw_curves", fail)
    out = tmp_path / "out"
    assert finetune(write_npz(tmp_path / "bright.npz"), out) == 0
    words = "curves.png could not be drawn (RuntimeError: no font at all)"
    assert capsys.readouterr().out.count(f"warning: {words}") == 1
    assert words in json.loads((out / "environment.json").read_text())["warnings"]
    assert not (out / "curves.png").exists()
    assert not (out / "checkpoint.safetensors").exists()  # the run is over
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert "is finished" in capsys.readouterr().out
