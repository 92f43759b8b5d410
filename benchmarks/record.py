"""Results as CSV: a row a measurement, with what a reader needs to judge it."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastcure._writing import csv_bytes, write_whole

FOLDER = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")


def context(device: torch.device) -> dict[str, Any]:
    """Return device, versions and commit."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changed = (
        subprocess.run([*git, *arguments], capture_output=True, text=True, check=False).stdout.strip()
        # Rows are written as they come: a change to them alone is none of the code.
        for arguments in (
            ["describe", "--always"],
            ["status", "--porcelain", "-uno", ":/", ":(exclude,top)benchmarks/results"],
        )
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        # A copy of the tree, on a machine without its history, is told its commit.
        "commit": os.environ.get("BENCH_COMMIT") or f"{commit or 'unknown'}{'-dirty' * bool(changed)}",
    }


def cpu_name() -> str:
    """Return the CPU's model where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def write(name: str, rows: list[dict[str, Any]], device: torch.device, by: str | None = None) -> Path:
    """Write `results/NAME.csv`, replacing an older one.

    With `by`, the column of what took turns in one measurement, the older rows of other measurements stay: of those
    that differ in a column before it.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.csv"
    rows = [{**row, **context(device)} for row in rows]
    columns = list(rows[0])
    kept: list[dict[str, Any]] = []
    if by is not None and path.is_file():
        about = columns[: columns.index(by)]
        measured = {tuple(str(row[column]) for column in about) for row in rows}
        with path.open(newline="") as file:
            older = csv.DictReader(file)
            if list(older.fieldnames or []) == columns:
                kept = [row for row in older if tuple(row[column] for column in about) not in measured]
    write_whole(path, csv_bytes([*kept, *rows]))
    return path
