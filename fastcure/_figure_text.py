"""Text of figures as it was written: names of files and folders are no formulas."""

from __future__ import annotations

from typing import Any


def as_written(figure: Any) -> None:
    """Draw titles, axis labels and legends letter by letter; numbers at ticks keep their exponents.

    Otherwise matplotlib takes what stands between two `$` for mathematics, and fails where it is none.
    """
    texts = list(figure.texts)  # the title of the figure among them
    for legend in figure.legends:
        texts += legend.get_texts()
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
        if hasattr(axes, "zaxis"):
            texts.append(axes.zaxis.label)
        if axes.get_legend() is not None:
            texts += axes.get_legend().get_texts()
    for text in texts:
        text.set_parse_math(False)
        text.set_usetex(False)


def label(name: str) -> str:
    """Return a label that a legend shows: it leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name
