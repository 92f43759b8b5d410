"""Draws docs/concepts.png from a finished run on the digits: `python benchmarks/plot_concepts.py RUN`.

The loss along the direction of the penalty with its tangent, and the penalty against h, before and after CURE.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import matplotlib as mpl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import fastcure
from fastcure._writing import write_whole

mpl.use("Agg")
import matplotlib.pyplot as plt

IMAGES, POINTS = 200, 41
COLOURS = {"before": "#555555", "after CURE": "#0072b2"}


def main() -> None:
    run = Path(sys.argv[1])
    h = float(json.loads((run / "config.json").read_text())["h"])
    data = fastcure.data.load("digits")
    x, y = data.x_test[:IMAGES].float() / 255, data.y_test[:IMAGES]
    steps = torch.linspace(0, 2 * h, POINTS)
    figure, (by_loss, by_penalty) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (label, colour), file in zip(COLOURS.items(), ("original", "model"), strict=True):
        model = fastcure.models.resnet8(int(data.y_train.max()) + 1, x.shape[1])
        model.load_state_dict(load_file(run / f"{file}.safetensors"))
        losses, slope = along_z(model.eval(), x, y, steps)
        style = "--" if label == "before" else "-"
        by_loss.plot(steps, losses, style, color=colour, label=label)
        by_loss.plot(steps, losses[0] + slope * steps, ":", color=colour, lw=1, label="its tangent at x")
        penalties = [penalty(model, x, y, float(step)) for step in steps[1:]]
        by_penalty.plot(steps[1:], penalties, style, color=colour, label=label)
    by_loss.set(xlabel="step along z, L2 length", ylabel="mean loss", ylim=(0, None))
    by_penalty.set(xlabel="h, L2 length", ylabel="mean penalty", yscale="log")
    for axis in (by_loss, by_penalty):
        axis.axvline(h, color="black", lw=1, ls=":")
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    path = Path(__file__).parent.parent / "docs" / "concepts.png"
    write_whole(path, picture.getvalue())
    print(f"written to {path}")


def along_z(model: nn.Module, x: Tensor, y: Tensor, steps: Tensor) -> tuple[Tensor, float]:
    """Return the mean loss at each step along z `(S,)`, and its slope at 0."""
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    z = g.sign() / g.sign().flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        losses = torch.stack([F.cross_entropy(model(x + step * z), y) for step in steps])
    return losses, float((g * z).flatten(1).sum(1).mean())


def penalty(model: nn.Module, x: Tensor, y: Tensor, h: float) -> float:
    with torch.no_grad():
        return float(fastcure.curvature(model, x, y, h).penalty.mean())


if __name__ == "__main__":
    main()
