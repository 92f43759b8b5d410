"""Trackers of experiments (TensorBoard, Weights & Biases, MLflow), through the adapters of accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcure._extras import extra, need

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Each is called like its package."""

PURPOSE = "by --log-to"


def check_trackers(names: Sequence[str]) -> None:
    """Check, before hours of work, that trackers are installed.

    Raises:
        ModuleNotFoundError: naming the first missing package and its command.
    """
    if names:
        need("accelerate", *names, purpose=PURPOSE)


class Trackers:
    """Sends numbers to each of the trackers called `names`; to none, if there are none.

    Args:
        names: of `TRACKERS`.
        folder: of the run; those that write files do it there, in a folder of their name.
        settings: of the run.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._trackers: list[Any] = []
        for name in names:
            kind = extra("accelerate.tracking", PURPOSE).LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(name, str(folder)) if kind.requires_logging_directory else kind("fastcure")
            if hasattr(tracker, "start"):  # in newer versions, made apart from it
                tracker.start()
            plain = {
                key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
            }
            tracker.store_init_configuration(plain)
            self._trackers.append(tracker)

    def log(self, part: str, row: Mapping[str, Any], step: int) -> None:
        """Send the numbers of a row, each as `part/name`."""
        numbers = {f"{part}/{name}": float(value) for name, value in row.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def close(self) -> None:
        """Send what is left."""
        for tracker in self._trackers:
            tracker.finish()
