"""Results as CSV: a row a measurement, with what a reader needs to judge it."""

from __future__ import annotations

import csv
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def context(device: torch.device) -> dict[str, Any]:
    """Return device, versions and commit."""
    git = ["git", "-C", str(FOLDER.parent)]
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
        "commit": f"{commit or 'unknown'}{'-dirty' * bool(changed)}",
    }


def cpu_name() -> str:
    """Return the CPU's model where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names) or '?'} cores"


def write(name: str, rows: list[dict[str, Any]], device: torch.device) -> Path:
    """Write `results/NAME.csv`, replacing an older one."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.csv"
    rows = [{**row, **context(device)} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
