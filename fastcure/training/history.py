"""What is told of an epoch: its row of the history, and its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastcure.training.tally import EpochResult


def epoch_row(phase: str, epoch: int, scheduled: Mapping[str, float], result: EpochResult) -> dict[str, Any]:
    """Return the row of history of an epoch, but for what is measured after it.

    Args:
        phase: of the run.
        epoch: of the phase, counted from 1.
        scheduled: learning rate and other numbers of its last step.
        result: of its steps.
    """
    means = {"loss": result.loss, "penalty": result.penalty, "train_accuracy": result.accuracy}
    return {"phase": phase, "epoch": epoch, **scheduled, **means, "skipped": result.skipped}


def epoch_line(title: str, row: Mapping[str, Any], eps: float, steps: int, left: str) -> str:
    """Return the line that is printed of an epoch.

    Args:
        title: its beginning.
        row: of the history.
        eps: radius of PGD-10.
        steps: of the epoch.
        left: the time that the rest of the run takes.
    """
    parts = [
        f"{title:>15}",
        f"loss {row['loss']:.3f}",
        f"penalty {row['penalty']:.2e}" if row["phase"] == "finetune" else "",
        f"train {row['train_accuracy']:6.1%}",
        f"clean {row['clean']:6.1%}",
        f"pgd({eps:.3g}) {row['pgd']:6.1%}",
        f"skipped {row['skipped']} of {steps} steps" if row["skipped"] else "",
        left,
    ]
    return "  ".join(part for part in parts if part)
