"""The report's figures: of one width and one size of text, so that the page shows all of them at one scale.

Colours that colour-blind readers tell apart; line styles and markers for grey print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import cycle
from typing import IO, Any

import numpy as np

from fastcure._figure_text import as_written, label
from fastcure.analysis import LossSurface
from fastcure.report.measures import Row
from fastcure.training.track import PAPER_EPS

# Okabe and Ito; six colours and seven styles, so that 42 networks differ in one of them.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("--o", "-s", "-.^", ":D", "--v", "-P", "-.X")
BLUE, ORANGE, GREEN, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#56B4E9", "#555555"

WIDTH, DPI, TEXT = 8.6, 150, 10
LINE = 92
"""Characters of a legend's line."""
ROUND = (1, 2, 5, 10)
"""Multiples at which ticks are set."""


def draw_profiles(rows: list[Row], file: IO[bytes]) -> None:
    """Figure 1: eigenvalues of the input Hessian, in order; exact ones, and those that a finite step sees."""
    figure, panels = _figure(2, 2, 3.6, sharey=True)
    largest = max((abs(row["eigenvalue"]) for row in rows), default=0.0) or 1.0
    for axes, method in zip(panels, ("finite", "exact"), strict=True):
        for (name, points), colour, style in zip(_by_model(rows).items(), cycle(COLOURS), cycle(STYLES)):
            values = [row["eigenvalue"] for row in points if row["method"] == method]
            axes.plot(range(1, len(values) + 1), values, style[:-1], color=colour, label=name, lw=1.8)
        steps = {row["h"] for row in rows if row["method"] == method and row["h"] is not None}
        title = f"finite step of L2 length {', '.join(f'{h:.3g}' for h in steps)}" if steps else "exact"
        axes.set(xlabel="rank of the eigenvalue", title=title)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(7, integer=True))
        axes.set_yscale("symlog", linthresh=largest * 1e-3)
        axes.set_yticks(symmetric_ticks(largest))
        axes.yaxis.set_minor_locator(_ticker().NullLocator())
    panels[0].set_ylabel("eigenvalue, mean over images")
    _finish(figure, panels, file)


def symmetric_ticks(largest: float) -> list[float]:
    """Return 0 and powers of ten on both sides that stay clear of it, where a thousandth of `largest` is linear."""
    top = math.floor(math.log10(largest))
    decades = [10.0**power for power in range(top - 1, top + 1)]
    return [*(-decade for decade in reversed(decades)), 0.0, *decades]


def draw_surfaces(planes: list[tuple[str, LossSurface]], file: IO[bytes]) -> None:
    """Figure 2: minus the loss, in 3-D above and as contours below, on one scale; two networks a row at most."""
    columns = min(len(planes), 2)
    lines = -(-len(planes) // columns)
    figure, _ = _figure(0, 0, 6.6 * lines)
    values = [np.asarray(surface.values[0].double().cpu()) for _, surface in planes]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    levels = _ticker().MaxNLocator(24).tick_values(low, high)
    grid = figure.add_gridspec(2 * lines, columns, height_ratios=(1.25, 1) * lines)
    flat = []
    for place, ((name, surface), z) in enumerate(zip(planes, values, strict=True)):
        line, column = divmod(place, columns)
        a, b = (np.asarray(axis.double().cpu()) for axis in (surface.a, surface.b))
        first, second = np.meshgrid(a, b, indexing="ij")
        above = figure.add_subplot(grid[2 * line, column], projection="3d", computed_zorder=False)
        above.plot_surface(first, second, z, cmap="cividis", vmin=low, vmax=high, rstride=1, cstride=1, lw=0)
        above.scatter([0], [0], [z[len(a) // 2, len(b) // 2]], color=ORANGE, s=45, depthshade=False, zorder=5)
        above.set(title=label(name), xlabel="normal", ylabel="random", zlim=(low, high))
        above.set_zlabel("minus the loss")
        for axis in (above.xaxis, above.yaxis, above.zaxis):
            axis.set_major_locator(_ticker().MaxNLocator(4, steps=ROUND))
        below = figure.add_subplot(grid[2 * line + 1, column])
        filled = below.contourf(first, second, z, levels, cmap="cividis")
        below.contour(first, second, z, levels, colors="white", linewidths=0.4, linestyles="solid")
        below.plot(0, 0, "o", color=ORANGE, ms=8, mec="white", label="the image" if place == 0 else None)
        below.set(xlabel="along the normal, L2")
        if column == 0:
            below.set_ylabel("along a random direction, L2")
        flat.append(below)
    bar = figure.colorbar(filled, ax=flat, label="minus the loss")
    bar.locator = _ticker().MaxNLocator(6, steps=ROUND)
    bar.update_ticks()
    _finish(figure, flat, file, bare=True)


def draw_evolution(rows: list[Row], file: IO[bytes]) -> None:
    """Figure 3: curvature and robustness from epoch to epoch, at the run's radius and at the paper's."""
    radii = sorted({float(row["eps"]) for row in rows})
    own = ", ".join(f"{eps:.4g}" for eps in radii)
    titles = {
        "frobenius": "mean Frobenius norm of H",
        "along_z": "mean length of H z",
        "pgd": f"accuracy, PGD-10 at the run's eps {own}",
        "pgd_paper": "accuracy, PGD-10 at the paper's eps 8/255",
    }
    if radii == [PAPER_EPS]:
        titles = {"frobenius": titles["frobenius"], "along_z": titles["along_z"], "pgd": titles["pgd_paper"]}
    figure, panels = _figure(len(titles), 2, 6.2)
    for axes, (key, title) in zip(panels, titles.items(), strict=False):
        for (name, points), colour, style in zip(_by_model(rows).items(), cycle(COLOURS[1:]), cycle(STYLES[1:])):
            epochs = [float(row["epoch"]) for row in points]
            axes.plot(epochs, [float(row[key]) for row in points], style, color=colour, label=name, ms=4)
        axes.axvline(0, color=GREY, ls=":", lw=1.4, label=str(rows[0]["begins"]))
        axes.set(xlabel="epoch of fine-tuning", title=title)
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(7, integer=True))
        if key.startswith("pgd"):
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_ylim(bottom=0)
    _finish(figure, panels, file)


def draw_accuracies(rows: list[Row], file: IO[bytes]) -> None:
    """Figure 4: accuracy against eps, with its intervals, in each norm."""
    norms = {norm: [row for row in rows if row["norm"] == norm] for norm in ("linf", "l2")}
    clean = [row for row in norms["linf"] if row["eps"] == 0]
    norms = {norm: points if norm == "linf" else clean + points for norm, points in norms.items() if points}
    figure, panels = _figure(len(norms), 2, 3.6, sharey=True)
    for axes, (norm, points) in zip(panels, norms.items(), strict=True):
        for (name, own), colour, style in zip(_by_model(points).items(), cycle(COLOURS), cycle(STYLES)):
            radii = [row["eps"] for row in own]
            axes.plot(radii, [row["accuracy"] for row in own], style, color=colour, label=name, ms=5)
            axes.fill_between(radii, [r["low"] for r in own], [r["high"] for r in own], color=colour, alpha=0.15, lw=0)
        words = {"linf": "L-infinity", "l2": "L2"}[norm]
        axes.set(xlabel=f"eps of PGD-10, {words}, pixels in [0, 1]", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(6))
    panels[0].set_ylabel("accuracy")
    _finish(figure, panels, file)


def draw_bounds(rows: list[Row], file: IO[bytes]) -> None:
    """Theorem 1's bounds for each image, in order of the perturbation found; a band where they are apart."""
    models = _by_model(rows)
    figure, panels = _figure(len(models), 2, 3.6 * -(-len(models) // 2), sharey=True)
    for place, (axes, (name, points)) in enumerate(zip(panels, models.items(), strict=False)):
        found = [min(row["deepfool"], row["pgd"]) for row in points]
        order = np.argsort(found)
        ranks = range(1, len(order) + 1)
        lower, upper = (np.asarray([row[key] for row in points])[order] for key in ("lower", "upper"))
        upper = np.where(np.isfinite(upper), upper, np.nan)
        if bounds_are_apart(points):
            axes.fill_between(ranks, lower, upper, color=SKY, alpha=0.5, lw=0, label="theorem 1: between the bounds")
            axes.plot(ranks, lower, "-", color=BLUE, lw=1.2, label="theorem 1: lower bound")
        else:
            axes.plot(ranks, lower, "-", color=BLUE, lw=1.2, label="theorem 1: both bounds, which meet")
        for key, style, colour, words in (("deepfool", "o", ORANGE, "DeepFool"), ("pgd", "x", GREEN, "PGD-20, L2")):
            values = np.asarray([row[key] for row in points])[order]
            values = np.where(np.isfinite(values), values, np.nan)
            axes.plot(ranks, values, style, color=colour, ms=4, label=words)
        axes.set(xlabel="image, in order", title=name, yscale="log")
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(7, integer=True))
        if place % 2 == 0:
            axes.set_ylabel("L2 length to the boundary")
    _finish(figure, panels, file)


def bounds_are_apart(points: Iterable[Row]) -> bool:
    """Whether theorem 1's bounds of some image differ by 2 % or more."""
    return any(math.isfinite(row["upper"]) and row["upper"] > 1.02 * row["lower"] for row in points)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _figure(panels: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure, and its panels, so many in each row; those left over are not shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    if not panels:
        return figure, []
    grid = figure.subplots(-(-panels // columns), columns, squeeze=False, **options).ravel()
    for axes in grid[panels:]:
        axes.set_visible(False)
    return figure, grid[:panels]


def _finish(figure: Any, panels: Iterable[Any], file: IO[bytes], *, bare: bool = False) -> None:
    """Give all text one size, put one legend above all panels, and write the figure."""
    entries: dict[str, Any] = {}
    for axes in panels:
        entries |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        if not bare:
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes:
        axes.tick_params(labelsize=TEXT)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *([axes.zaxis.label] if _is_3d(axes) else [])):
            text.set_fontsize(TEXT)
    columns = max(1, min(len(entries), LINE // (max(map(len, entries), default=0) + 6)))
    figure.legend(entries.values(), entries, loc="outside upper left", ncols=columns, frameon=False, fontsize=TEXT)
    as_written(figure)
    figure.savefig(file, dpi=DPI)


def _is_3d(axes: Any) -> bool:
    return hasattr(axes, "zaxis")


def _by_model(rows: list[Row]) -> dict[str, list[Row]]:
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(label(row["model"]), []).append(row)
    return models
