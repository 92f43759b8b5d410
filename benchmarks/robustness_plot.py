"""The picture of the robustness study: robust accuracy against training compute, one curve a method."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from robustness_summary import chosen
from robustness_table import Row

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000"]
MARKERS = "osD^vPX*"
"""Okabe and Ito's colours, and a marker each for grey print."""


def draw(rows: list[Row], path: Path) -> Path:
    """Draw a panel a dataset: the mean over seeds, with a bar from the worst to the best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["dataset"], row["model"], row["eps"]) for row in rows))
    figure = Figure(figsize=(7.5 * max(len(panels), 1), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False):
        shown = curves([row for row in rows if (row["dataset"], row["model"], row["eps"]) == panel])
        for number, (label, points) in enumerate(shown.items()):
            x = sorted(points)
            middle = [sum(points[c]) / len(points[c]) for c in x]
            below = [m - min(points[c]) for m, c in zip(middle, x, strict=True)]
            above = [max(points[c]) - m for m, c in zip(middle, x, strict=True)]
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            style = "-" if number < len(COLOURS) else "--"
            axes.errorbar(x, middle, [below, above], label=label, color=colour, marker=marker, ls=style, capsize=3)
        dataset, model, eps = panel
        title = f"{dataset}, {model}, fine-tuned from a normally trained network"
        axes.set(xscale="log", title=title, xlabel="training compute, forward passes of one image")
        axes.set(ylabel=f"accuracy under PGD-20 x 5, eps {255 * float(eps):.3g}/255")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def curves(rows: list[Row]) -> dict[str, dict[float, list[float]]]:
    """Return label -> compute -> accuracies over seeds, of the searched settings that validation images chose."""
    found: dict[str, dict[float, list[float]]] = {}
    for label, best in chosen(rows).items():
        points = defaultdict(list)
        for row in rows:
            if row is best or (row["label"] == label and row["stage"] in ("seed", "budget")):
                points[float(row["compute"])].append(float(row["pgd20x5"]))
        found[label] = dict(points)
    return found
