"""`fastcure report`: a page with the paper's figures and tables for finished runs."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastcure._extras import need

HELP = "write a page with the paper's figures and tables for finished runs"
DESCRIPTION = (
    "Measure the networks of finished finetune runs, and write one self-contained page with the figures and tables of "
    "the paper's supplement, and each as PNG and CSV beside it."
)
EPILOG = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run.")
    parser.add_argument("--out", help="Folder of the report, new or empty (RUN/report of the first).")
    parser.add_argument("--data-dir", help="Folder of the dataset's files, if they have moved.")
    parser.add_argument("--device", help="'auto' takes a GPU where there is one. (auto)")
    parser.add_argument("--seed", type=int, help="Of the attacks' starts and the probes. (0)")
    parser.add_argument("--limit", type=int, help="Use N test images only, stratified by class. (2000)")


def run(arguments: dict[str, Any]) -> None:
    """Run the command."""
    need("matplotlib", "safetensors", "tqdm", purpose="by report")
    from fastcure.report.report import report

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("report is for one process: leave torchrun out (finetune, evaluate and analyze take it)")
    report(arguments.pop("runs"), **arguments)
