"""Draws `results/step-DEVICE.csv` as bars, a panel a workload: `python benchmarks/plot_steps.py [cpu|cuda]`."""

from __future__ import annotations

import csv
import io
import sys
from itertools import groupby
from pathlib import Path

import matplotlib as mpl
from record import FOLDER

from fastcure._writing import write_whole

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "#0072b2", "#999999"
"""Told apart in grey as well."""


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    with (FOLDER / f"step-{kind}.csv").open() as file:
        rows = list(csv.DictReader(file))
    panels = [(key, list(group)) for key, group in groupby(rows, lambda r: (r["model"], r["batch"], r["dtype"]))]
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.5, 0.5 + 3.0 * len(panels)), squeeze=False, sharex=True)
    for axis, ((model, batch, dtype), group) in zip(axes[:, 0], panels, strict=True):
        names = [row["step"] for row in group][::-1]
        ratios = [float(row["ratio_to_standard"]) for row in group][::-1]
        axis.barh(names, ratios, color=[OURS if "(ours)" in name else THEIRS for name in names])
        for place, ratio in enumerate(ratios):
            axis.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=8)
        axis.set_title(f"{model}, batch {batch}, {dtype}", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("time of a training step, standard step = 1")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['threads']} threads", fontsize=9)
    figure.tight_layout()
    path = Path(__file__).parent.parent / "docs" / f"step-{kind}.png"
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    write_whole(path, picture.getvalue())
    print(f"written to {path}")


if __name__ == "__main__":
    main()
