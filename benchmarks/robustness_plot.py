"""The picture of the robustness study: robust accuracy against training compute, one curve a method."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

from robustness_summary import alike, chosen, setting_of, title
from robustness_table import Row

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000"]
MARKERS = "osD^vPX*<>hd"
"""Okabe and Ito's colours, and markers for grey print; methods with CURE have solid lines."""


def draw(rows: list[Row], path: Path) -> Path:
    """Draw a panel a setting: the mean over seeds, with a bar from the worst to the best.

    Settings with one budget alone are left to the tables, unless there are no others.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(setting_of(row) for row in rows))
    panels = list(dict.fromkeys(setting_of(row) for row in rows if row["stage"] == "budget")) or panels
    labels = list(chosen([row for row in rows if setting_of(row) in panels]))
    columns = min(2, max(1, len(panels)))
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(5.5 * columns, 1.2 + 4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        its = [row for row in rows if setting_of(row) == panel]
        for label, points in curves(its).items():
            x = sorted(points)
            middle = [sum(points[c]) / len(points[c]) for c in x]
            below = [m - min(points[c]) for m, c in zip(middle, x, strict=True)]
            above = [max(points[c]) - m for m, c in zip(middle, x, strict=True)]
            number, style = labels.index(label), "-" if "CURE" in label else "--"
            form = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "ms": 5}
            axes.errorbar(x, middle, [below, above], label=label, ls=style, lw=1.4, capsize=3, **form)
        axes.set(xscale="log", title=title(panel), xlabel="training compute, forward passes an image")
        axes.set(ylabel="accuracy under PGD-20 x 5")
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("{x:.0f}")
        axes.tick_params(which="both", labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    shown = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def curves(rows: list[Row]) -> dict[str, dict[float, list[float]]]:
    """Return label -> F an image -> accuracies over seeds, of the searched settings that validation images chose."""
    found: dict[str, dict[float, list[float]]] = {}
    for label, best in chosen(rows).items():
        points = defaultdict(list)
        for row in rows:
            if row is best or (row["stage"] in ("seed", "budget") and alike(row, best)):
                points[float(row["compute"]) / int(row["train"])].append(float(row["pgd20x5"]))
        found[label] = dict(points)
    return found
