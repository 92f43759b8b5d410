"""The report's figures. Colours that colour-blind readers tell apart; line styles and markers for grey print."""

from __future__ import annotations

from itertools import cycle
from typing import IO, Any

import numpy as np

from fastcure._figure_text import as_written, label
from fastcure.analysis import LossSurface
from fastcure.report.measures import Row

# Okabe and Ito.
COLOURS = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
STYLES = ("--o", "-s", "-.^", ":D", "--v", "-P")


def draw_profiles(rows: list[Row], file: IO[bytes]) -> None:
    """Figure 1: eigenvalues of the input Hessian, in order; exact ones, and those that a finite step sees."""
    figure, panels = _figure(2, sharey=True)
    methods = {"finite": "finite step, h of the penalty", "exact": "exact"}
    for axes, (method, title) in zip(panels, methods.items(), strict=True):
        for (name, points), colour, style in zip(_by_model(rows).items(), cycle(COLOURS), cycle(STYLES)):
            values = [row["eigenvalue"] for row in points if row["method"] == method]
            axes.plot(range(1, len(values) + 1), values, style[:-1], color=colour, label=name, lw=1.8)
        axes.set(xlabel="rank", ylabel="eigenvalue, mean over images", title=title)
        axes.set_yscale("symlog", linthresh=_threshold([row["eigenvalue"] for row in rows]))
    _finish(figure, panels, file)


def draw_surfaces(planes: list[tuple[str, LossSurface]], file: IO[bytes]) -> None:
    """Figure 2: minus the loss, in 3-D above and as contours below, on one scale."""
    figure, _ = _figure(0, size=(4.6 * len(planes), 7.4))
    values = [np.asarray(surface.values[0].double().cpu()) for _, surface in planes]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    levels = np.linspace(low, high, 24)
    grid = figure.add_gridspec(2, len(planes), height_ratios=(1.25, 1))
    for column, ((name, surface), z) in enumerate(zip(planes, values, strict=True)):
        a, b = (np.asarray(axis.double().cpu()) for axis in (surface.a, surface.b))
        first, second = np.meshgrid(a, b, indexing="ij")
        above = figure.add_subplot(grid[0, column], projection="3d", computed_zorder=False)
        above.plot_surface(first, second, z, cmap="cividis", vmin=low, vmax=high, rstride=1, cstride=1, lw=0)
        centre = z[len(a) // 2, len(b) // 2]
        above.scatter([0], [0], [centre], color="#D55E00", s=45, depthshade=False, zorder=5)
        above.set(title=name, xlabel="normal", ylabel="random", zlim=(low, high))
        above.set_zlabel("-loss")
        below = figure.add_subplot(grid[1, column])
        filled = below.contourf(first, second, z, levels, cmap="cividis")
        below.contour(first, second, z, levels, colors="white", linewidths=0.4)
        below.plot(0, 0, "o", color="#D55E00", ms=8, mec="white", label="image")
        below.set(xlabel="along the boundary's normal, L2", ylabel="along a random direction, L2")
        below.legend(frameon=True, loc="upper right")
        figure.colorbar(filled, ax=below, label="-loss", format="%.1f")
    as_written(figure)
    figure.savefig(file, dpi=130)


def draw_evolution(rows: list[Row], file: IO[bytes]) -> None:
    """Figure 3: curvature and robustness from epoch to epoch."""
    figure, panels = _figure(3)
    titles = {"frobenius": "||H||_F", "along_z": "||H z||", "pgd": "accuracy, PGD-10 at eps 8/255"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for (name, points), colour, style in zip(_by_model(rows).items(), cycle(COLOURS[1:]), cycle(STYLES[1:])):
            epochs = [float(row["epoch"]) for row in points]
            axes.plot(epochs, [float(row[key]) for row in points], style, color=colour, label=name, ms=4)
        axes.set(xlabel="epoch of fine-tuning", ylabel=title)
        if key == "pgd":
            axes.set_ylim(-0.02, 1.02)
    _finish(figure, panels, file)


def draw_accuracies(rows: list[Row], file: IO[bytes]) -> None:
    """Figure 4: accuracy against eps."""
    figure, (axes,) = _figure(1)
    for (name, points), colour, style in zip(_by_model(rows).items(), cycle(COLOURS), cycle(STYLES)):
        radii = [row["eps"] for row in points]
        axes.plot(radii, [row["accuracy"] for row in points], style, color=colour, label=name, ms=5)
    axes.set(xlabel="eps of PGD-10, L-infinity, pixels in [0, 1]", ylabel="accuracy", ylim=(-0.02, 1.02))
    _finish(figure, axes, file)


def draw_bounds(rows: list[Row], file: IO[bytes]) -> None:
    """Theorem 1's bounds for each image, in order of the perturbation found."""
    models = _by_model(rows)
    figure, panels = _figure(len(models), sharey=True)
    for axes, (name, points) in zip(panels, models.items(), strict=True):
        found = [min(row["deepfool"], row["pgd"]) for row in points]
        order = np.argsort(found)
        ranks = range(1, len(order) + 1)
        lower, upper = (np.asarray([row[key] for row in points])[order] for key in ("lower", "upper"))
        upper = np.where(np.isfinite(upper), upper, np.nan)
        axes.fill_between(ranks, lower, upper, color="#56B4E9", alpha=0.4, lw=0, label="bounds of theorem 1")
        axes.plot(ranks, lower, "-", color="#0072B2", lw=1)
        for key, style, words in (("deepfool", "o", "DeepFool"), ("pgd", "x", "PGD-20")):
            values = np.asarray([row[key] for row in points])[order]
            axes.plot(ranks, np.where(np.isfinite(values), values, np.nan), style, color="#D55E00", ms=4, label=words)
        axes.set(xlabel="image, in order", ylabel="L2 perturbation to the boundary", title=name, yscale="log")
    _finish(figure, panels, file)


def _figure(panels: int, size: tuple[float, float] | None = None, **options: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (max(5.4, 4.3 * panels), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0] if panels else []


def _finish(figure: Any, axes: Any, file: IO[bytes]) -> None:
    for each in np.atleast_1d(axes):
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False)
    as_written(figure)
    figure.savefig(file, dpi=150)


def _by_model(rows: list[Row]) -> dict[str, list[Row]]:
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(label(row["model"]), []).append(row)
    return models


def _threshold(values: list[float]) -> float:
    """Return where a symmetric logarithmic scale becomes linear: a thousandth of the largest value."""
    return max(max(map(abs, values), default=1.0) * 1e-3, 1e-12)
