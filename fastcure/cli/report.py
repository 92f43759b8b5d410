"""`fastcure report`: a page with the paper's figures and tables for finished runs, or for any other network."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastcure.cli._flags import add_flags
from fastcure.cli._measurement import imported, measure_with

HELP = "write a page with the paper's figures and tables for finished runs, or for any other network"
DESCRIPTION = (
    "Measure the networks of finished finetune runs (RUN ...), or any other network (--model, --checkpoint, --dataset; "
    "--surrogate for weights to compare with), and write one self-contained page with the figures and tables of the "
    "paper's supplement, and each as PNG and CSV beside it."
)
EPILOG = ""
SETTINGS = "fastcure.report.settings:ReportSettings"

_measure = measure_with(SETTINGS, "fastcure.report.report:report", "matplotlib", "safetensors", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, and the folders of runs."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="Folder of a run.")
    add_flags(parser, imported(SETTINGS), without=("run", "runs"))


def run(arguments: dict[str, Any]) -> None:
    """Run the command."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("report is for one process: leave torchrun out (finetune, evaluate and analyze take it)")
    _measure({**arguments, "runs": tuple(arguments.get("runs", ()))})
