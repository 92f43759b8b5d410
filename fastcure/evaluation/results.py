"""The results of a measurement: with all that they depend on, and as a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastcure._environment import environment
from fastcure._writing import json_bytes, write_whole
from fastcure.data import Dataset
from fastcure.evaluation.settings import Measurement
from fastcure.training.ranks import Ranks


def conclude(
    settings: Measurement,
    data: Dataset,
    whole: Dataset,
    ranks: Ranks,
    results: dict[str, Any],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Return the results after what they are of; write them to `settings.out`, if given.

    Args:
        settings: of the measurement.
        data: what was measured.
        whole: the dataset of which that is a part.
        ranks: the processes.
        results: of the measurement alone.
        say: takes the line that names the file.

    Raises:
        OSError: as `write_results` does.
    """
    about = {"settings": asdict(settings), "images": len(data.x_test), "test_set": len(whole.x_test)}
    results = {**about, "environment": environment(ranks.device), **results}
    if settings.out is not None and ranks.is_main_process:
        write_results(settings.out, results)
        say(f"results in {settings.out}")
    return results


def write_results(out: str, results: dict[str, Any]) -> None:
    """Write the results of a measurement as JSON, as a whole or not at all.

    Raises:
        OSError: if that is impossible, or the file has come to exist since the settings were checked.
    """
    if os.path.lexists(out):
        raise FileExistsError(f"{out} has come to exist during the measurement, and is left as it is: see above")
    write_whole(out, json_bytes(results))
