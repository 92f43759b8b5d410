"""The picture of the robustness study: robust accuracy against training compute, one curve a method."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from pathlib import Path

from robustness_summary import alike, chosen, setting_of, title
from robustness_table import Row

from fastcure._writing import write_whole

COLOURS = {
    "-": ["#D55E00", "#E69F00", "#CC79A7", "#882255", "#000000"],
    "--": ["#999999", "#56B4E9", "#0072B2", "#009E73", "#332288"],
}
MARKERS = {"-": "osD^v", "--": "xP*<>"}
"""By line: solid for methods with CURE, dashed for others."""
TICKS = (17, 34, 85, 255, 510)
"""The presets' budgets."""


def draw(rows: list[Row], path: Path) -> Path:
    """Draw a panel a setting: the mean over seeds, with a bar from the worst to the best.

    Methods and settings with one budget alone are left to the tables, unless there are no others.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(setting_of(row) for row in rows))
    found = {panel: curves([row for row in rows if setting_of(row) == panel]) for panel in panels}
    longer = {label for methods in found.values() for label, points in methods.items() if len(points) > 1}
    panels = [panel for panel in panels if any(len(points) > 1 for points in found[panel].values())] or panels
    labels = list(dict.fromkeys(label for panel in panels for label in found[panel]))
    labels = [label for label in labels if label in longer] or labels
    lines = {line: [label for label in labels if ("CURE" in label) == (line == "-")] for line in COLOURS}
    columns = min(3, max(1, len(panels)))
    height = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4.6 * columns, 0.9 + 3.8 * height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        for line, its in lines.items():
            for number, label in enumerate(its):
                if label in found[panel]:
                    form = {"ls": line, "color": COLOURS[line][number % 5], "marker": MARKERS[line][number % 5]}
                    axes.errorbar(*bars(found[panel][label]), label=label, lw=1.4, ms=5, capsize=3, **form)
        axes.set(xscale="log", title=title(panel), xlabel="training compute, forward passes an image")
        axes.set(ylabel="accuracy under PGD-20 x 5", ylim=(0, None))
        axes.set_xticks([tick for tick in TICKS if axes.get_xlim()[0] < tick < axes.get_xlim()[1]])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    shown = {
        text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, metadata={"Software": None})
    write_whole(path, picture.getvalue())
    return path


def bars(points: dict[float, list[float]]) -> tuple[list[float], list[float], list[list[float]]]:
    """Return F an image, mean accuracies, and the distances from there to the worst and to the best."""
    x = sorted(points)
    means = [sum(points[c]) / len(points[c]) for c in x]
    below = [mean - min(points[c]) for mean, c in zip(means, x, strict=True)]
    above = [max(points[c]) - mean for mean, c in zip(means, x, strict=True)]
    return x, means, [below, above]


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
