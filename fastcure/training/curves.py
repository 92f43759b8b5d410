"""The picture of a run: accuracy and penalty by epoch, and accuracy against eps before and after."""

from __future__ import annotations

import math
from typing import IO, Any

from fastcure._figure_text import as_written

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles tell them apart in grey print.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def draw_curves(
    history: list[dict[str, Any]],
    metrics: dict[str, dict[str, Any]],
    file: IO[bytes],
    data: str,
    followed: int,
    tested: int,
    title: str,
) -> None:
    """Draw `history` (of history.csv, on `followed` images of `data`) and `metrics` (on `tested` images) as a PNG.

    The objective of fine-tuning is called `title`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    by_epoch, by_penalty, by_eps = figure.subplots(1, 3)
    figure.suptitle(f"{title} on {data}", fontsize=12)

    epochs = range(1, len(history) + 1)
    robust_eps = list(metrics["after"]["pgd"])[-1]
    by_epoch.plot(epochs, [row["clean"] for row in history], color=BLUE, label="clean")
    label = f"PGD-10, eps {float(robust_eps):.4g}"
    by_epoch.plot(epochs, [row["pgd"] for row in history], color=ORANGE, ls="--", label=label)
    by_epoch.set(xlabel="epoch", ylabel=f"accuracy ({followed} validation images)", ylim=(-0.02, 1.02))

    fine_tuned = [(epoch, row) for epoch, row in zip(epochs, history, strict=True) if row["phase"] == "finetune"]
    steps = [epoch for epoch, _ in fine_tuned]
    penalties = [row["penalty"] for _, row in fine_tuned]
    if any(penalties):
        by_penalty.plot(steps, penalties, color=ORANGE, ls="--", label="penalty")
    by_penalty.plot(steps, [row["loss"] for _, row in fine_tuned], color=BLUE, label="loss")
    by_penalty.set(xlabel="epoch", ylabel="mean of the epoch", yscale="log")
    by_penalty.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    decades = _decades([row[name] for _, row in fine_tuned for name in ("loss", "penalty")])
    by_penalty.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    by_penalty.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    by_penalty.yaxis.set_minor_formatter(NullFormatter())
    first = steps[0]
    if first > 1:
        by_epoch.axvline(first - 0.5, color=GREY, lw=1.4, ls=":", label=f"{title} starts")
    by_epoch.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    for name, style, colour, words in (
        ("before", "--o", GREY, "before"),
        ("after", "-s", BLUE, f"after {title}"),
        ("ema", "-^", ORANGE, "averaged"),
    ):
        if name not in metrics:
            continue
        points = {0.0: metrics[name]["clean"], **{float(e): v for e, v in metrics[name]["pgd"].items()}}
        by_eps.plot(list(points), list(points.values()), style, color=colour, label=words)
    by_eps.set(
        xlabel="eps of PGD-10, pixels in [0, 1]", ylabel=f"accuracy ({tested:,} test images)", ylim=(-0.02, 1.02)
    )
    for axes in (by_epoch, by_penalty, by_eps):
        # Above the axes, where it covers no curve, whatever their course; long names under one another.
        columns = 2 if max(map(len, axes.get_legend_handles_labels()[1])) < 20 else 1
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    as_written(figure)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def _decades(values: list[float]) -> float:
    """Return how many powers of ten the positive ones among `values` span."""
    logarithms = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    return max(logarithms) - min(logarithms) if logarithms else 0.0
