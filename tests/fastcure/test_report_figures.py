"""The report's figures as a reader has them: one scale and size of text, nothing printed over anything else."""

import csv
import io
import itertools
import math
from collections.abc import Callable
from html import unescape
from typing import Any

import matplotlib
import pytest
import torch

from fastcure.analysis import LossSurface
from fastcure.report import figures, sections
from fastcure.report.measures import Row

MODELS = ["before CURE", "after CURE", "a run of a name that is rather long"]
BEGINS = "Epoch 0: CURE begins, after 4 epochs of standard training"


def profiles() -> list[Row]:
    return [
        {"model": model, "method": method, "h": h, "rank": i + 1, "eigenvalue": (i - 20) ** 3 / 800 / (k + 1)}
        for k, model in enumerate(MODELS)
        for method, h in (("exact", None), ("finite", 1.25))
        for i in range(41)
    ]


def surfaces() -> list[tuple[str, LossSurface]]:
    axis = torch.linspace(-2, 2, 9)
    z = -(axis[:, None] + 0.3 * axis).exp()[None]
    return [(model, LossSurface(z * (k + 1), axis, axis, torch.zeros(1, 2, 1))) for k, model in enumerate(MODELS)]


def tracks(eps: float) -> list[Row]:
    names = ("frobenius", "along_z", "clean", "pgd", "pgd_paper")
    about = {"images": "128", "eps": str(eps), "begins": BEGINS}
    return [
        {"model": model, "epoch": str(epoch), **{name: str(0.5 + epoch / 90) for name in names}, **about}
        for model in MODELS[1:]
        for epoch in range(41)
    ]


def accuracies() -> list[Row]:
    return [
        {"model": m, "norm": n, "eps": e, "accuracy": 0.9 - e, "low": 0.8 - e, "high": 0.95 - e, "images": 450}
        for m in MODELS
        for n in ("linf", "l2")
        for e in ((0.0, 0.05, 12 / 255, 0.1) if n == "linf" else (0.25, 0.5))
    ]


def bounds(upper: float) -> list[Row]:
    return [
        {"model": m, "image": i, "lower": 0.01 * 1.3**i, "upper": upper * 0.01 * 1.3**i, "deepfool": 1.0, "pgd": 1.1}
        for m in MODELS
        for i in range(20)
    ]


FIGURES: dict[str, tuple[Callable[..., None], Any]] = {
    "profiles": (figures.draw_profiles, profiles()),
    "surfaces": (figures.draw_surfaces, surfaces()),
    "evolution": (figures.draw_evolution, tracks(0.1)),
    "evolution at 8/255": (figures.draw_evolution, tracks(8 / 255)),
    "accuracies": (figures.draw_accuracies, accuracies()),
    "bounds that meet": (figures.draw_bounds, bounds(1.0)),
    "bounds apart": (figures.draw_bounds, bounds(2.0)),
}


@pytest.fixture(params=FIGURES, scope="module")
def figure(request: pytest.FixtureRequest) -> Any:
    """The figure as matplotlib has it, drawn once."""
    draw, subject = FIGURES[request.param]
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "as_written", found.append)
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        draw(subject, io.BytesIO())
    found[0].canvas.draw()
    return found[0]


def shown(axes: Any) -> list[Any]:
    """The axes that a reader sees."""
    return [each for each in axes if each.get_visible()]


def test_one_width_and_one_size_of_text(figure: Any) -> None:
    assert figure.get_figwidth() == figures.WIDTH
    texts = [text for axes in shown(figure.axes) for text in axes.findobj(matplotlib.text.Text)]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    assert {text.get_fontsize() for text in texts if text.get_text()} == {figures.TEXT}


def test_no_tick_or_legend_is_printed_over_another(figure: Any) -> None:
    renderer = figure.canvas.get_renderer()
    flat = [axes for axes in shown(figure.axes) if not hasattr(axes, "zaxis")]
    for axes in flat:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [text for text in axis.get_ticklabels() if text.get_text() and text.get_visible()]
            boxes = [text.get_window_extent(renderer) for text in labels]
            for one, other in itertools.combinations(boxes, 2):
                assert not one.overlaps(other), [text.get_text() for text in labels]
    (legend,) = figure.legends
    box = legend.get_window_extent(renderer)
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    for axes in shown(figure.axes):
        assert not box.overlaps(axes.get_window_extent(renderer))


def legend_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    draw, subject = FIGURES[name]
    texts: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(figures, "as_written", lambda f: texts.extend(t.get_text() for t in f.legends[0].get_texts()))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
        draw(subject, io.BytesIO())
    return texts


def test_a_band_is_in_the_legend_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "theorem 1: both bounds, which meet" in legend_of("bounds that meet", monkeypatch)
    assert "theorem 1: between the bounds" in legend_of("bounds apart", monkeypatch)
    assert not figures.bounds_are_apart(bounds(1.01))
    assert figures.bounds_are_apart(bounds(1.03))
    assert not figures.bounds_are_apart(bounds(math.inf))


def test_figure_3_names_where_cure_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BEGINS in legend_of("evolution", monkeypatch)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    caption = unescape(sections.evolution_section(tracks(0.1), {}).body)
    for words in (BEGINS, "128 images held out", "PGD-10 at the run's eps 0.1, and at the paper's, 8/255."):
        assert words in caption


@pytest.mark.parametrize("largest", [0.011, 1.0, 7.3, 2e4])
def test_ticks_on_both_sides_of_zero(largest: float) -> None:
    ticks = figures.symmetric_ticks(largest)
    assert ticks == sorted(ticks)
    assert ticks == [-tick for tick in reversed(ticks)]
    assert largest / 10 < ticks[-1] <= largest
    assert min(tick for tick in ticks if tick > 0) > 5e-3 * largest  # clear of 0, up to a thousandth of it linear


def test_no_column_mixes_two_radii() -> None:
    files: dict[str, bytes] = {}
    body = sections.accuracy_section(accuracies(), 0.1, [], files).body
    rows = list(csv.DictReader(io.StringIO(files["table1.csv"].decode())))
    assert list(rows[0]) == ["network", "images", "clean", "PGD-10, eps 0.1", "PGD-10, eps 12/255"]
    assert rows[0]["PGD-10, eps 0.1"].startswith("80.0% [")
    assert rows[0]["PGD-10, eps 12/255"].startswith("85.3% [")
    paper = [row for row in rows if row["network"].startswith("paper")]
    assert {row["PGD-10, eps 0.1"] for row in paper} == {"-"}
    assert [row["PGD-10, eps 12/255"] for row in paper] == ["0.9 %", "28.4 %", "33 %"]
    assert "450" in body
    sections.accuracy_section(accuracies(), 12 / 255, [], files)
    assert files["table1.csv"].decode().splitlines()[0].count("PGD-10") == 1
